"""What the streets of the two domains contain, and the ground plan of one street."""

import random
from typing import NamedTuple

FAR = 110.0  # metres to the end of the street

Range = tuple[float, float]


class Statistics(NamedTuple):
    """What the streets of a domain contain. Lengths in metres; chances are per scene unless noted."""

    focal: Range  # in picture widths
    horizon: Range  # in picture heights
    camera_height: Range
    lanes: tuple[int, ...]
    lane_width: Range
    sidewalk: Range
    frontage: tuple[float, float, float, float]  # weights of building, wall, fence, trees
    facade_height: Range
    facade_length: Range
    pitch: Range
    window_height: Range
    framed: float
    crossing: float  # chance of a side street
    verge: float  # chance of a strip of grass per side
    tree_gap: Range
    conifers: float
    parked: float  # share of parking bays taken
    cars: tuple[int, int]  # driving
    people: tuple[int, int]
    cyclists: tuple[int, int]
    motorcycles: tuple[int, int]
    stands: float  # chance of parked bicycles or motorcycles
    truck: float
    bus: float
    train: float
    lights: float
    lamps: Range  # distance between lamp posts
    signs: tuple[int, int]


STATISTICS = {
    "game": Statistics(
        focal=(0.6, 0.76),
        horizon=(0.42, 0.5),
        camera_height=(1.5, 2.4),
        lanes=(2, 3, 4),
        lane_width=(3.3, 3.8),
        sidewalk=(2.6, 4.6),
        frontage=(0.62, 0.13, 0.12, 0.13),
        facade_height=(7, 22),
        facade_length=(10, 26),
        pitch=(2.6, 3.6),
        window_height=(1.3, 1.9),
        framed=0.3,
        crossing=0.45,
        verge=0.35,
        tree_gap=(9, 22),
        conifers=0.3,
        parked=0.4,
        cars=(2, 5),
        people=(1, 5),
        cyclists=(0, 2),
        motorcycles=(0, 2),
        stands=0.3,
        truck=0.45,
        bus=0.42,
        train=0.36,
        lights=0.75,
        lamps=(14, 24),
        signs=(1, 4),
    ),
    "camera": Statistics(
        focal=(0.68, 0.9),
        horizon=(0.4, 0.48),
        camera_height=(1.2, 1.7),
        lanes=(2, 2, 3),
        lane_width=(2.9, 3.4),
        sidewalk=(1.8, 3.4),
        frontage=(0.66, 0.12, 0.1, 0.12),
        facade_height=(6, 16),
        facade_length=(7, 18),
        pitch=(2.0, 2.8),
        window_height=(1.5, 2.1),
        framed=0.75,
        crossing=0.5,
        verge=0.25,
        tree_gap=(7, 18),
        conifers=0.08,
        parked=0.6,
        cars=(1, 4),
        people=(2, 7),
        cyclists=(0, 2),
        motorcycles=(0, 2),
        stands=0.35,
        truck=0.5,
        bus=0.42,
        train=0.36,
        lights=0.75,
        lamps=(18, 30),
        signs=(1, 5),
    ),
}


class Side(NamedTuple):
    """One side of the street; metres from the camera, always positive. sign: -1 left, 1 right."""

    sign: int
    road: float  # end of the lanes
    curb: float  # end of the parking strip
    walk: float  # start of the pavement behind a verge
    edge: float  # line of the fronts


class Street(NamedTuple):
    """Ground plan of a scene."""

    stats: Statistics
    lanes: int
    lane_width: float
    left: Side
    right: Side
    crossing: Range | None  # z of the side street
    tracks: bool
    limit: float  # half the picture at distance 1

    def near(self, x: float) -> float:
        """What stands at x and nearer than this is outside the picture."""
        return abs(x) / self.limit * 0.95


def plan_street(stats: Statistics, rng: random.Random, limit: float) -> Street:
    """Draws the ground plan of a street: lanes, curbs, walks and what borders them; `limit` as in `Street`."""
    lanes, lane_width = rng.choice(stats.lanes), rng.uniform(*stats.lane_width)
    shift = rng.uniform(-0.4, 0.4)
    sides = []
    for sign in (-1, 1):
        road = lane_width / 2 + sign * shift + (lane_width * (lanes - 1) if sign < 0 else 0)
        curb = road + (2.2 if rng.random() < 0.75 else 0.3)
        walk = curb + (rng.uniform(0.9, 1.8) if rng.random() < stats.verge else 0)
        sides.append(Side(sign, road, curb, walk, walk + rng.uniform(*stats.sidewalk)))
    crossing = None
    if rng.random() < stats.crossing:
        start = rng.uniform(14, 34)
        crossing = (start, start + rng.uniform(7, 10))
    return Street(stats, lanes, lane_width, *sides, crossing, rng.random() < stats.train, limit)
