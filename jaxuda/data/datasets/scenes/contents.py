"""What stands and moves in a street: trees, posts, signs and people on the pavements, vehicles and riders."""

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from jaxuda.data.datasets.scenes import furniture, models
from jaxuda.data.datasets.scenes.canvas import CLASS, Canvas
from jaxuda.data.datasets.scenes.look import Paint
from jaxuda.data.datasets.scenes.plan import Side, Street

Thing = tuple[float, Callable[[], None]]  # nearest z, and what paints it


def pavement_things(canvas: Canvas, street: Street, paint: Paint, rng: random.Random) -> list[Thing]:
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
                add(
                    z,
                    furniture.tree,
                    canvas,
                    paint,
                    rng,
                    x=line,
                    z=z,
                    height=rng.uniform(4.5, 8),
                    conifers=stats.conifers,
                )
            z += rng.uniform(*stats.tree_gap)
        z = first + rng.uniform(2, 12)
        while z < 40:
            if clear(z):
                add(
                    z,
                    furniture.post,
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
                add(z + k, _cycle, canvas, paint, rng, machine, False, side.sign * (side.curb + 0.9), z + k, 1)
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
    furniture.post(
        canvas,
        paint("pole"),
        x=x,
        z=z,
        height=6.0 if over else height + 0.1,
        width=0.18,
        arm=-side.sign * 3.2 if over else 0.0,
    )
    if over:
        furniture.traffic_light(canvas, case, lit, x=x - side.sign * 3.2, y=4.9, z=z - 0.05)
    furniture.traffic_light(canvas, case, lit, x=x, y=height - 1.0, z=z - 0.05)


def _sign(canvas: Canvas, paint: Paint, rng: random.Random, x: float, z: float) -> None:
    height = rng.uniform(2.2, 3.0)
    furniture.post(canvas, paint("pole"), x=x, z=z, height=height, width=0.1)
    for k in range(rng.randint(1, 2)):
        furniture.sign(
            canvas,
            rng.choice(furniture.SIGN_SHAPES),
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


class Roadway:
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
