"""What the `streets` scenes contain and where: the ground plan of a street, its fronts, furniture and traffic."""

import random
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from jaxuda.data import streets_draw as draw
from jaxuda.data import streets_models as models
from jaxuda.data.streets_draw import CLASS, SUPER, Canvas, Sun, View
from jaxuda.data.streets_look import Paint, look

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
        people=(2, 7),
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
        people=(3, 10),
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
    """One side of the street, distances from the camera in metres, always positive; sign: -1 left, 1 right."""

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
        """What stands at x is out of the picture nearer than this."""
        return abs(x) / self.limit * 0.95


def paint_scene(domain: str, rng: random.Random, size: tuple[int, int]) -> Canvas:
    """Paints a scene of a domain, far to near, in this size (width, height)."""
    stats = STATISTICS[domain]
    paint = Paint(domain, rng)
    width, height = (SUPER * s for s in size)
    view = View(
        focal=rng.uniform(*stats.focal) * width, u0=width * rng.uniform(0.42, 0.58),
        v0=height * rng.uniform(*stats.horizon), height=rng.uniform(*stats.camera_height),
    )  # fmt: skip
    canvas = Canvas(size, view, _sun(domain, rng))
    street = _plan(stats, rng, 0.62 * width / view.focal)
    _sky(canvas, paint)
    _ground(canvas, street, paint, rng)
    for side in (street.left, street.right):
        _fronts(canvas, street, side, paint, rng)
    roadway = _Roadway(canvas, street, paint, rng)
    roadway.drive()
    roadway.park()
    roadway.ride()
    things = _pavement_things(canvas, street, paint, rng) + roadway.things
    for _, draw_thing in sorted(things, key=lambda thing: -thing[0]):
        draw_thing()
    return canvas


def _sun(domain: str, rng: random.Random) -> Sun:
    style = look(domain)
    shadow = rng.uniform(*style.shadow)
    x, y, z = rng.choice((-1, 1)) * rng.uniform(0.4, 1.0), rng.uniform(0.8, 1.4), rng.uniform(-0.6, 0.3)
    norm = (x * x + y * y + z * z) ** 0.5
    return Sun((x / norm, y / norm, z / norm), rng.uniform(*style.direct), shadow if shadow > 0.1 else 0.0)


def _plan(stats: Statistics, rng: random.Random, limit: float) -> Street:
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


def _sky(canvas: Canvas, paint: Paint) -> None:
    """Sky, and a skyline where the street ends."""
    rows = int(canvas.view.v0) + 2
    share = (np.linspace(0, 1, rows) ** 1.5)[:, None]
    canvas.pixels[:rows, :, :3] = ((1 - share) * paint("sky") + share * paint("skyline")).astype(np.uint16)[
        :, None
    ]
    rng, end = paint.rng, 0.6 * FAR * SUPER * canvas.size[0] / canvas.view.focal
    x = -end
    while x < end:
        width = rng.uniform(12, 30)
        if rng.random() < 0.5:
            draw.front(
                canvas,
                CLASS["building"],
                paint("building"),
                x0=x,
                x1=x + width,
                y0=0,
                y1=rng.uniform(7, 20),
                z=FAR + 15,
            )
        else:
            u, v = canvas.pixel(x + width / 2, 2, FAR + 10)
            zoom = canvas.view.focal / FAR
            draw.blob(
                canvas,
                rng,
                paint("leaves"),
                canvas.upright(CLASS["vegetation"], FAR + 10),
                u=u,
                v=v,
                rx=width * 0.6 * zoom,
                ry=rng.uniform(3, 8) * zoom,
                clumps=3,
            )
        x += width * 0.9


def _ground(canvas: Canvas, street: Street, paint: Paint, rng: random.Random) -> None:
    road, walk, grass = (canvas.ground(CLASS[name]) for name in ("road", "sidewalk", "terrain"))
    asphalt, pavement, curb, line = paint("road"), paint("sidewalk"), paint("curb"), paint("marking")
    near = 1.0

    def strip(x0: float, x1: float, colour, surface: int, z0: float = near, z1: float = 400.0) -> None:
        canvas.fill(draw.quad_y(x0, x1, z0, z1), colour, surface)

    strip(-300, 300, paint("terrain") if rng.random() < 0.6 else pavement, grass)
    for side in (street.left, street.right):
        s = side.sign
        strip(s * side.walk, s * (side.edge + 0.3), pavement, walk)
        strip(s * side.curb, s * side.walk, paint("terrain"), grass)
        strip(s * side.curb, s * (side.curb + 0.22), curb, walk)
    strip(-street.left.curb, street.right.curb, asphalt, road)
    for _ in range(rng.randint(1, 5)):  # repaired patches
        x, z = rng.uniform(-street.left.road, street.right.road), rng.uniform(4, 40)
        strip(x, x + rng.uniform(0.5, 2), paint("patch"), road, z, z + rng.uniform(1, 6))
    for side in (street.left, street.right):
        strip(
            side.sign * (side.curb - 0.25), side.sign * side.curb, draw.shaded(asphalt, 0.8), road
        )  # gutter
        if side.curb - side.road > 1:
            strip(side.sign * (side.road - 0.07), side.sign * (side.road + 0.07), line, road)
    for k in range(1, street.lanes):
        x = -street.left.road + k * street.lane_width
        zs = np.arange(near + rng.uniform(0, 6), 90, 7.5)
        canvas.fill_many(draw.grid_x(0, zs, np.zeros(1), 3.5, 0) + _across(x, 0.16), line, road)
    if street.tracks:
        centre = -street.left.road + street.lane_width / 2
        for x in (centre - 0.72, centre + 0.72):
            strip(x - 0.07, x + 0.07, paint("rail"), road)
    if street.crossing:
        z0, z1 = street.crossing
        strip(-300, 300, pavement, walk, z0 - 2.5, z1 + 2.5)
        strip(-street.left.curb, street.right.curb, asphalt, road, z0 - 2.6, z1 + 2.6)
        strip(-300, 300, asphalt, road, z0, z1)
        xs = np.arange(-street.left.curb + 0.4, street.right.curb - 0.5, 1.0)
        canvas.fill_many(np.array([draw.quad_y(x, x + 0.5, z0 - 3.4, z0 - 0.6) for x in xs]), line, road)
        strip(-0.5 * street.lane_width, street.right.road, line, road, z0 - 4.6, z0 - 4.2)


def _across(x: float, width: float) -> np.ndarray:
    """Corners (4, 3) to add to the degenerate rectangles of `grid_x` at x = 0 to lay them flat."""
    return np.array([(x, 0, 0), (x + width, 0, 0), (x + width, 0, 0), (x, 0, 0)])


def _fronts(canvas: Canvas, street: Street, side: Side, paint: Paint, rng: random.Random) -> None:
    """Buildings, walls, fences and trees along one side, far to near."""
    stats, x = street.stats, side.sign * side.edge
    near = street.near(x)
    spans, z = [], max(near - rng.uniform(0, 15), 0.5)
    while z < FAR:
        length = rng.uniform(*stats.facade_length)
        end = z + length
        if street.crossing and z < street.crossing[1] + 2 and end > street.crossing[0] - 2.5:
            if street.crossing[0] - 2.5 - z > 4:
                spans.append((z, street.crossing[0] - 2.5))
            z = street.crossing[1] + 2.5
            continue
        spans.append((z, end))
        z = end
    for z0, z1 in reversed(spans):
        if z1 <= near + 0.5:
            continue
        kind = rng.choices(("building", "wall", "fence", "trees"), stats.frontage)[0]
        if kind == "building":
            draw.building(canvas, _facade(stats, paint, rng), x=x, z0=z0, z1=z1, near=near)
            _shadow_of_front(canvas, x, z0, z1, stats.facade_height[0])
            continue
        back = x + side.sign * rng.uniform(4, 9)
        if kind != "trees" and rng.random() < 0.6:
            draw.building(
                canvas, _facade(stats, paint, rng), x=back, z0=z0, z1=z1, near=street.near(back), base=2.5
            )
        else:
            for z in np.linspace(z1, z0, max(int((z1 - z0) / 4), 2)).tolist():
                if z > street.near(back):
                    _tree(canvas, paint, rng, stats, x + side.sign * rng.uniform(2, 5), z, rng.uniform(5, 9))
        z0 = max(z0, near)
        if kind == "wall":
            draw.wall(canvas, paint("wall"), paint("joint"), x=x, z0=z0, z1=z1, height=rng.uniform(1.9, 3.2))
        elif kind == "fence":
            draw.fence(canvas, paint("fence"), paint("mesh"), x=x, z0=z0, z1=z1, height=rng.uniform(1.3, 2.3))
        else:
            draw.panel(
                canvas,
                CLASS["vegetation"],
                paint("leaves"),
                x=x,
                z0=z0,
                z1=z1,
                y0=0,
                y1=rng.uniform(0.8, 1.8),
            )


def _shadow_of_front(canvas: Canvas, x: float, z0: float, z1: float, height: float) -> None:
    """Fronts shade the pavement where the sun stands behind them."""
    if x * canvas.sun.direction[0] > 0:
        canvas.cast_by_sun(draw.quad_y(x - 0.1, x + 0.1, max(z0, 1.0), z1), height * 0.5)


def _facade(stats: Statistics, paint: Paint, rng: random.Random) -> draw.Facade:
    pitch = rng.uniform(*stats.pitch)
    return draw.Facade(
        colour=paint("building"), window=paint("window"), frame=paint("frame"), shop=paint("shop"),
        roof=paint("roof"), height=rng.uniform(*stats.facade_height), storey=rng.uniform(3.0, 3.8), pitch=pitch,
        window_width=pitch * rng.uniform(0.4, 0.62), window_height=rng.uniform(*stats.window_height),
        framed=rng.random() < stats.framed,
    )  # fmt: skip


def _tree(
    canvas: Canvas, paint: Paint, rng: random.Random, stats: Statistics, x: float, z: float, height: float
) -> None:
    draw.tree(
        canvas,
        rng,
        paint("leaves"),
        paint("trunk"),
        x=x,
        z=z,
        height=height,
        spread=height * rng.uniform(0.22, 0.34),
        conifer=rng.random() < stats.conifers,
    )


Thing = tuple[float, Callable[[], None]]  # nearest z, and what paints it


def _pavement_things(canvas: Canvas, street: Street, paint: Paint, rng: random.Random) -> list[Thing]:
    """Trees, posts, lights, signs, people and stands on both pavements."""
    stats, things = street.stats, []

    def add(z: float, function: Callable, /, *args: Any, **kwargs: Any) -> None:
        things.append((z, partial(function, *args, **kwargs)))

    def clear(z: float) -> bool:
        return not street.crossing or not street.crossing[0] - 1.5 < z < street.crossing[1] + 1

    for side in (street.left, street.right):
        line = side.sign * (side.curb + 0.55)
        first = street.near(line)
        lined = rng.random() < 0.6
        z = first + rng.uniform(1, 10)
        while lined and z < 70:
            if clear(z):
                add(z, _tree, canvas, paint, rng, stats, line, z, rng.uniform(4.5, 8))
            z += rng.uniform(*stats.tree_gap)
        z = first + rng.uniform(2, 12)
        while z < 40:
            if clear(z):
                add(
                    z,
                    draw.post,
                    canvas,
                    paint("pole"),
                    x=line,
                    z=z,
                    height=rng.uniform(5.5, 8),
                    width=0.2,
                    arm=-side.sign * rng.uniform(1.2, 2.2),
                )
            z += rng.uniform(*stats.lamps)
        for _ in range(rng.randint(*stats.people)):
            z = rng.uniform(max(first, 6), 34)
            add(z, _person, canvas, paint, rng, side.sign * rng.uniform(side.curb + 0.4, side.edge - 0.4), z)
        for _ in range(rng.randint(*stats.signs) // 2 + (side.sign > 0)):
            z = rng.uniform(max(first, 9), 30)
            add(z, _sign, canvas, paint, rng, line + side.sign * 0.1, z)
        if rng.random() < stats.stands:
            z = rng.uniform(max(first, 7), 20)
            machine = rng.choice(("bicycle", "motorcycle"))
            for k in range(rng.randint(1, 3)):
                add(
                    z + k, _cycle, canvas, paint, rng, machine, False, side.sign * (side.curb + 0.9), z + k, 1
                )
    if rng.random() < stats.lights:
        z = street.crossing[0] - 1.2 if street.crossing else rng.uniform(9, 20)
        lit = rng.randrange(3)
        for side in (street.left, street.right):
            add(z, _light_post, canvas, paint, rng, side, z, lit)
    return things


def _light_post(canvas: Canvas, paint: Paint, rng: random.Random, side: Side, z: float, lit: int) -> None:
    x, height = side.sign * (side.curb + 0.4), rng.uniform(3.2, 3.8)
    case = paint("case")
    over = rng.random() < 0.4
    draw.post(
        canvas,
        paint("pole"),
        x=x,
        z=z,
        height=6.0 if over else height + 0.1,
        width=0.18,
        arm=-side.sign * 3.2 if over else 0.0,
    )
    if over:
        draw.traffic_light(canvas, case, lit, x=x - side.sign * 3.2, y=4.9, z=z - 0.05)
    draw.traffic_light(canvas, case, lit, x=x, y=height - 1.0, z=z - 0.05)


def _sign(canvas: Canvas, paint: Paint, rng: random.Random, x: float, z: float) -> None:
    height = rng.uniform(2.2, 3.0)
    draw.post(canvas, paint("pole"), x=x, z=z, height=height, width=0.1)
    for k in range(rng.randint(1, 2)):
        draw.sign(
            canvas,
            rng.choice(draw.SIGN_SHAPES),
            paint("sign"),
            paint(rng.choice(("field", "sign"))),
            x=x,
            y=height + 0.1 - 0.95 * k,
            z=z - 0.02,
            radius=rng.uniform(0.36, 0.5),
        )


def _person(canvas: Canvas, paint: Paint, rng: random.Random, x: float, z: float) -> None:
    models.figure(
        canvas,
        rng.choice(models.WALKERS),
        _dress(paint, "clothes"),
        label=CLASS["person"],
        x=x,
        z=z,
        scale=rng.uniform(0.88, 1.12),
        stretch=rng.choice((-1, 1)) * rng.uniform(0.9, 1.25),
    )


def _cycle(
    canvas: Canvas,
    paint: Paint,
    rng: random.Random,
    machine: str,
    ridden: bool,
    x: float,
    z: float,
    heading: int,
) -> None:
    label = CLASS["rider"] if ridden else CLASS[machine]
    models.figure(
        canvas,
        models.CYCLES[machine, ridden],
        _dress(paint, "cycle" if machine == "bicycle" else "engine"),
        label=label,
        machine=CLASS[machine],
        x=x,
        z=z,
        scale=1.05,
        stretch=heading * rng.uniform(0.5, 1.05),
    )


def _dress(paint: Paint, frame: str) -> np.ndarray:
    return np.array(
        [paint(name) for name in ("skin", "clothes", "trousers", "hair", frame, "tyre", "spokes", "helmet")]
    )


class _Roadway:
    """Collects what stands on the road and keeps vehicles apart."""

    def __init__(self, canvas: Canvas, street: Street, paint: Paint, rng: random.Random):
        self.canvas, self.street, self.paint, self.rng = canvas, street, paint, rng
        self.things: list[Thing] = []
        self.taken: list[tuple[float, float, float]] = []  # x, z0, z1 of the vehicles

    def place(self, kind: str, x: float, z: float, heading: str) -> bool:
        """Adds a vehicle whose nearest end stands at z, unless another one is in its way."""
        scale = self.rng.uniform(0.95, 1.06)
        half, _, length = models.EXTENT[kind]
        reach = (half * 2 if heading in ("left", "right") else length) + 1.5
        if any(abs(x - other) < 2.4 and z < z1 and z + reach > z0 for other, z0, z1 in self.taken):
            return False
        self.taken.append((x, z, z + reach))
        label = CLASS[_LABELS[kind]]
        self.things.append((z, lambda: models.vehicle(
            self.canvas, kind, label, _coat(self.paint, kind), x=x, z=z, heading=heading, scale=scale
        )))  # fmt: skip
        return True

    def drive(self) -> None:
        """Trams, trucks, buses and cars in the lanes or across the side street."""
        street, stats, rng = self.street, self.street.stats, self.rng
        lane = [-street.left.road + (k + 0.5) * street.lane_width for k in range(street.lanes)]
        heading = ["towards" if k < street.lanes // 2 else "away" for k in range(street.lanes)]
        across = street.crossing is not None and rng.random() < 0.3
        if street.tracks and across:
            self.place("tram", rng.uniform(-6, 6), street.crossing[0] + 3, rng.choice(("left", "right")))
        elif street.tracks:
            self.place("tram", lane[0], rng.uniform(7, 20), heading[0])
        for kind, chance in (("truck", stats.truck), ("bus", stats.bus)):
            if rng.random() >= chance:
                continue
            if street.crossing and rng.random() < 0.3:
                z = street.crossing[0] + rng.uniform(1, 3)
                self.place(kind, rng.uniform(-7, 7), z, rng.choice(("left", "right")))
                continue
            for _ in range(3):
                k = rng.randrange(street.lanes)
                nearest = 13 if k == street.lanes - 1 else 8  # the camera's own lane
                if self.place(kind, lane[k], nearest + rng.uniform(0, 16), heading[k]):
                    break
        for _ in range(rng.randint(*stats.cars)):
            k = rng.randrange(street.lanes)
            z = rng.uniform(11 if k == street.lanes - 1 else 8, 50)
            self.place(rng.choice(_CARS), lane[k] + rng.uniform(-0.3, 0.3), z, heading[k])

    def park(self) -> None:
        """Cars at the curb, clear of the side street."""
        rng, crossing = self.rng, self.street.crossing
        for side in (self.street.left, self.street.right):
            x = side.sign * (side.curb - 1.15)
            z = max(self.street.near(x) * 0.7, 3.0) + rng.uniform(0, 4)
            while side.curb - side.road > 1 and z < 55:
                clear = not crossing or not crossing[0] - 8 < z < crossing[1] + 1
                if clear and rng.random() < self.street.stats.parked:
                    self.place(rng.choice(_CARS), x, z, "towards" if side.sign < 0 else "away")
                z += rng.uniform(5.4, 6.6)

    def ride(self) -> None:
        """Riders between the vehicles, and people on the crossing."""
        street, rng = self.street, self.rng
        for machine, count in (("bicycle", street.stats.cyclists), ("motorcycle", street.stats.motorcycles)):
            for _ in range(rng.randint(*count)):
                x, z = rng.uniform(-street.left.road, street.right.road), rng.uniform(7, 20)
                beside = [(z0, z1) for other, z0, z1 in self.taken if abs(x - other) < 1.5]
                if any(z0 - 0.5 < z < z1 for z0, z1 in beside):
                    z = max(6.0, min(z0 for z0, _ in beside) - 1)
                self.things.append((z, partial(
                    _cycle, self.canvas, self.paint, rng, machine, True, x, z, rng.choice((-1, 1))
                )))  # fmt: skip
        for _ in range(rng.randint(0, 3) if street.crossing else 0):
            x = rng.uniform(-street.left.curb, street.right.curb)
            z = street.crossing[0] - rng.uniform(1, 3)
            self.things.append((z, partial(_person, self.canvas, self.paint, rng, x, z)))


_CARS = ("hatchback", "saloon", "van")
_LABELS = {"hatchback": "car", "saloon": "car", "van": "car", "bus": "bus", "tram": "train", "truck": "truck"}


def _coat(paint: Paint, kind: str) -> np.ndarray:
    """Colours of a vehicle by material: paint, glass, dark, tail, lamp, metal, second."""
    main, second = {"bus": ("bus", "stripe"), "tram": ("stripe", "train"), "truck": ("truck", "cargo")}.get(
        kind, ("car", "car")
    )
    return np.array([paint(name) for name in (main, "glass", "tyre", "tail", "lamp", "hub", second)])
