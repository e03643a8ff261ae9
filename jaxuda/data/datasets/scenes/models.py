"""What moves: vehicles as closed shapes of planar faces, people and riders as flat figures."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from jaxuda.data.datasets.scenes.canvas import Canvas, polygon, quad_y

# ---- vehicles: closed shapes of planar faces, origin below the middle of the rear edge, length along +z

PAINT, GLASS, DARK, TAIL, LAMP, METAL, SECOND = range(7)


class Mesh(NamedTuple):
    """Convex planar faces: points (P, 3); for each face its bounds, first point, outward normal and material."""

    points: np.ndarray
    bounds: tuple[tuple[int, int], ...]
    first: np.ndarray
    normals: np.ndarray
    materials: np.ndarray


def _mesh(faces: list[tuple[int, list[tuple[float, float, float]]]]) -> Mesh:
    arrays = [np.array(points, np.float64) for _, points in faces]
    ends = np.cumsum([len(a) for a in arrays])
    starts = ends - [len(a) for a in arrays]
    points = np.concatenate(arrays)
    centre = (points.min(0) + points.max(0)) / 2
    normals = np.array([np.cross(a[1] - a[0], a[2] - a[0]) for a in arrays])
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    outward = np.sign((normals * (np.array([a.mean(0) for a in arrays]) - centre)).sum(1, keepdims=True))
    return Mesh(
        points,
        tuple(zip(starts.tolist(), ends.tolist(), strict=True)),
        starts,
        normals * outward,
        np.array([m for m, _ in faces]),
    )


def _sides(material: int, zy: list[tuple[float, float]], x: float, top_x: float | None = None, split: float = 0.0):
    """The same polygon on both sides; points higher than `split` lie at top_x."""

    def at(sign):
        return [(sign * (x if top_x is None or y <= split else top_x), y, z) for z, y in zy]

    return [(material, at(-1)), (material, at(1))]


def _end(material: int, x0: float, x1: float, y0: float, y1: float, z: float):
    return [(material, [(x0, y0, z), (x0, y1, z), (x1, y1, z), (x1, y0, z)])]


def _ends(material: int, x0: float, x1: float, y0: float, y1: float, z: float):
    """A pair, mirrored left and right."""
    return _end(material, x0, x1, y0, y1, z) + _end(material, -x1, -x0, y0, y1, z)


def _slope(material: int, half0: float, y0: float, z0: float, half1: float, y1: float, z1: float):
    return [(material, [(-half0, y0, z0), (-half1, y1, z1), (half1, y1, z1), (half0, y0, z0)])]


def _wheels(x: float, positions: Sequence[float], radius: float):
    faces = []
    for z in positions:
        faces += _sides(DARK, polygon(10, z, radius, radius, radius), x)
        faces += _sides(METAL, polygon(8, z, radius, radius * 0.5, radius * 0.5), x + 0.01)
    return faces


def _box(material: int, half: float, y0: float, y1: float, z0: float, z1: float):
    return (
        _sides(material, [(z0, y0), (z0, y1), (z1, y1), (z1, y0)], half)
        + _end(material, -half, half, y0, y1, z0)
        + _end(material, -half, half, y0, y1, z1)
        + _slope(material, half, y1, z0, half, y1, z1)
    )


def _car_faces(length: float, belt: float, roof: float, hood: float, tail: float):
    """belt, roof: heights; hood: where the windscreen starts; tail: how far the rear window leans."""
    low = belt - 0.15
    faces = _box(DARK, 0.78, 0.08, 0.35, 0.1, length - 0.1)
    faces += _sides(PAINT, [(0, 0.24), (0, belt), (hood, belt), (length, low), (length, 0.24)], 0.88)
    faces += _end(PAINT, -0.88, 0.88, 0.24, belt, 0) + _end(PAINT, -0.88, 0.88, 0.24, low, length)
    faces += _slope(PAINT, 0.88, belt, hood, 0.88, low, length)
    top0, top1 = 0.1 + tail, hood - 0.75
    faces += _sides(PAINT, [(0.1, belt), (top0, roof), (top1, roof), (hood, belt)], 0.87, 0.7, belt)
    middle = (top0 + top1) / 2
    for z0, z1, lean0, lean1 in ((top0, middle - 0.06, 0.7, 0.0), (middle + 0.06, top1, 0.0, 0.7)):
        faces += _sides(
            GLASS,
            [
                (z0 - lean0 * tail + 0.1, belt + 0.06),
                (z0 + 0.05, roof - 0.09),
                (z1 - 0.02, roof - 0.09),
                (z1 + lean1 * 0.75, belt + 0.06),
            ],
            0.86,
            0.72,
            belt + 0.1,
        )
    faces += _slope(PAINT, 0.87, belt, 0.1, 0.7, roof, top0)
    faces += _slope(GLASS, 0.76, belt + 0.05, 0.12, 0.64, roof - 0.07, top0 - 0.06)
    faces += _slope(PAINT, 0.87, belt, hood, 0.7, roof, top1)
    faces += _slope(GLASS, 0.8, belt + 0.02, hood - 0.02, 0.66, roof - 0.06, top1 + 0.06)
    faces += _slope(PAINT, 0.7, roof, top0, 0.7, roof, top1)
    faces += _end(DARK, -0.86, 0.86, 0.24, 0.38, -0.01) + _ends(TAIL, 0.56, 0.86, belt - 0.28, belt - 0.06, -0.01)
    faces += _end(METAL, -0.27, 0.27, 0.45, 0.58, -0.02)
    faces += _end(DARK, -0.45, 0.45, 0.34, low - 0.12, length + 0.01)
    faces += _ends(LAMP, 0.5, 0.84, low - 0.24, low - 0.06, length + 0.01)
    return faces + _wheels(0.89, (0.75, length - 0.8), 0.34)


def _bus_faces():
    faces = _box(DARK, 1.15, 0.15, 0.5, 0.1, 11.4) + _box(PAINT, 1.25, 0.4, 3.1, 0, 11.5)
    faces += _sides(SECOND, [(0, 0.75), (0, 1.25), (11.5, 1.25), (11.5, 0.75)], 1.26)
    for z in np.arange(0.5, 10.6, 1.55):
        faces += _sides(GLASS, [(z, 1.45), (z, 2.6), (z + 1.35, 2.6), (z + 1.35, 1.45)], 1.26)
    faces += _end(GLASS, -1.0, 1.0, 1.7, 2.6, -0.01) + _ends(TAIL, 0.95, 1.2, 0.8, 1.3, -0.01)
    faces += _end(SECOND, -0.9, 0.9, 0.7, 1.4, -0.01) + _end(DARK, -0.8, 0.8, 2.68, 2.98, -0.01)
    faces += _end(GLASS, -1.12, 1.12, 1.1, 2.55, 11.51) + _end(DARK, -0.9, 0.9, 2.62, 3.0, 11.51)
    faces += _end(LAMP, -0.7, 0.7, 2.7, 2.92, 11.52) + _ends(LAMP, 0.75, 1.1, 0.55, 0.85, 11.51)
    return faces + _wheels(1.27, (2.6, 8.9), 0.48)


def _tram_faces():
    """A tram of two cars: label train."""
    faces = _box(DARK, 1.1, 0.1, 0.5, 0.2, 19.8)
    for z0 in (0.0, 10.3):
        faces += _box(PAINT, 1.28, 0.35, 3.45, z0, z0 + 9.7)
        faces += _sides(SECOND, [(z0, 0.35), (z0, 1.2), (z0 + 9.7, 1.2), (z0 + 9.7, 0.35)], 1.29)
        faces += _sides(SECOND, [(z0, 3.05), (z0, 3.45), (z0 + 9.7, 3.45), (z0 + 9.7, 3.05)], 1.29)
        for z in np.arange(z0 + 0.5, z0 + 9.0, 2.2):
            faces += _sides(GLASS, [(z, 1.4), (z, 2.85), (z + 1.8, 2.85), (z + 1.8, 1.4)], 1.29)
    for z, out in ((0.0, -0.01), (20.0, 0.01)):
        faces += _end(SECOND, -1.28, 1.28, 0.35, 1.25, z + out) + _end(GLASS, -0.95, 0.95, 1.5, 2.75, z + out)
        faces += _end(DARK, -0.75, 0.75, 2.9, 3.3, z + out) + _end(METAL, -0.4, 0.4, 0.4, 0.6, z + 2 * out)
        faces += _ends(TAIL if z == 0 else LAMP, 0.7, 1.05, 0.8, 1.08, z + 2 * out)
    return faces + _slope(METAL, 0.9, 3.75, 4.0, 0.9, 3.75, 8.0)


def _cargo_faces():
    faces = _box(DARK, 1.0, 0.35, 0.95, 0.1, 6.3) + _box(SECOND, 1.25, 0.9, 3.5, 0, 6.2)
    faces += _end(DARK, -0.03, 0.03, 0.95, 3.4, -0.01) + _end(METAL, -1.25, 1.25, 0.8, 0.98, -0.02)
    faces += _ends(TAIL, 0.85, 1.15, 0.55, 0.75, -0.02)
    faces += _sides(PAINT, [(0.8, 1.7), (0.8, 2.5), (5.4, 2.5), (5.4, 1.7)], 1.26)
    return faces + _ends(DARK, 0.65, 1.15, 0.0, 0.8, 0.3) + _wheels(1.2, (0.9, 2.0), 0.48)


def _cab_faces():
    faces = _box(DARK, 1.0, 0.35, 0.6, 6.2, 8.2) + _box(PAINT, 1.2, 0.5, 2.75, 6.4, 8.3)
    faces += _sides(GLASS, [(7.0, 1.65), (7.0, 2.4), (7.9, 2.4), (8.15, 1.65)], 1.21)
    faces += _end(GLASS, -1.08, 1.08, 1.55, 2.5, 8.31) + _end(DARK, -0.8, 0.8, 0.8, 1.35, 8.31)
    faces += _ends(LAMP, 0.75, 1.1, 0.6, 0.9, 8.32) + _end(DARK, -1.2, 1.2, 0.35, 0.55, 8.31)
    return faces + _wheels(1.22, (7.4,), 0.48)


VEHICLES: dict[str, tuple[Mesh, ...]] = {
    "hatchback": (_mesh(_car_faces(4.0, 0.9, 1.48, 2.95, 0.45)),),
    "saloon": (_mesh(_car_faces(4.6, 0.88, 1.42, 3.3, 0.95)),),
    "van": (_mesh(_car_faces(4.7, 1.05, 1.95, 3.8, 0.15)),),
    "bus": (_mesh(_bus_faces()),),
    "tram": (_mesh(_tram_faces()),),
    "truck": (_mesh(_cab_faces()), _mesh(_cargo_faces())),
}
EXTENT = {
    name: (
        float(max(m.points[:, 0].max() for m in parts)),
        float(max(m.points[:, 1].max() for m in parts)),
        float(max(m.points[:, 2].max() for m in parts)),
    )
    for name, parts in VEHICLES.items()
}


_AROUND = np.array([(-0.15, 0, -0.2), (-0.15, 0, 0.2), (0.15, 0, 0.2), (0.15, 0, -0.2)])


@functools.cache
def _turned(name: str, heading: str) -> tuple[Mesh, ...]:
    """Parts of a vehicle heading 'away', 'towards', 'left' or 'right', far parts first; nearest z is 0."""
    length = EXTENT[name][2]
    half = EXTENT[name][0]
    rotation, shift = {
        "away": (((1, 0, 0), (0, 1, 0), (0, 0, 1)), (0, 0, 0)),
        "towards": (((-1, 0, 0), (0, 1, 0), (0, 0, -1)), (0, 0, length)),
        "right": (((0, 0, 1), (0, 1, 0), (-1, 0, 0)), (-length / 2, 0, half)),
        "left": (((0, 0, -1), (0, 1, 0), (1, 0, 0)), (length / 2, 0, half)),
    }[heading]
    matrix = np.array(rotation, np.float64).T
    parts = [p._replace(points=p.points @ matrix + shift, normals=p.normals @ matrix) for p in VEHICLES[name]]
    return tuple(sorted(parts, key=lambda p: -p.points[:, 2].mean()))


def vehicle(
    canvas: Canvas,
    name: str,
    label: int,
    colours: np.ndarray,
    *,
    x: float,
    z: float,
    heading: str,
    scale: float = 1.0,
) -> None:
    """Paints a vehicle whose nearest end stands at z (metres). colours: (7, 3), one per material."""
    half, height, length = (scale * e for e in EXTENT[name])
    across = heading in ("left", "right")
    foot = quad_y(
        x - (length / 2 if across else half),
        x + (length / 2 if across else half),
        z,
        z + (2 * half if across else length),
    )
    canvas.cast_by_sun(foot, height * 0.9)
    canvas.cast(foot + _AROUND, 0.55)
    camera = np.array([0.0, canvas.view.height, 0.0])
    for part in _turned(name, heading):
        world = part.points * scale + (x, 0, z)
        offsets = (part.normals * (world[part.first] - camera)).sum(1)
        light = 1 - canvas.sun.direct * (1 - np.maximum(part.normals @ canvas.sun.direction, 0.0))
        shades = (colours[part.materials] * light[:, None]).tolist()
        corners = canvas.project(world)
        for face in np.flatnonzero(offsets < -1e-3).tolist():
            surface = canvas.surface(label, part.normals[face].tolist(), float(offsets[face]))
            start, end = part.bounds[face]
            cv2.fillConvexPoly(canvas.pixels, corners[start:end], (*shades[face], surface))


# ---- figures: flat templates in metres, upright at the depth of their foot point

SKIN, TOP, TROUSERS, HAIR, FRAME, TYRE, SPOKES, HELMET = range(8)


class Figure(NamedTuple):
    """Flat polygons: points (P, 2), and for each polygon (start, end, material, belongs to the machine)."""

    points: np.ndarray
    parts: tuple[tuple[int, int, int, bool], ...]


def _figure(parts: list[tuple[int, bool, list[tuple[float, float]]]]) -> Figure:
    points, spans, start = [], [], 0
    for material, machine, corners in parts:
        points += corners
        spans.append((start, start + len(corners), material, machine))
        start += len(corners)
    return Figure(np.array(points, np.float64), tuple(spans))


def _bar(x0: float, y0: float, x1: float, y1: float, width: float) -> list[tuple[float, float]]:
    dx, dy = x1 - x0, y1 - y0
    norm = (dx * dx + dy * dy) ** 0.5
    ox, oy = -dy / norm * width / 2, dx / norm * width / 2
    return [(x0 + ox, y0 + oy), (x1 + ox, y1 + oy), (x1 - ox, y1 - oy), (x0 - ox, y0 - oy)]


def _walker(stride: float, arm: float) -> Figure:
    return _figure(
        [
            (SKIN, False, _bar(-0.16, 1.38, -0.2 - arm, 0.85, 0.11)),
            (TROUSERS, False, _bar(0.05, 0.9, stride, 0.05, 0.17)),
            (TROUSERS, False, _bar(-0.05, 0.9, -stride, 0.05, 0.17)),
            (TYRE, False, _bar(stride - 0.06, 0.04, stride + 0.14, 0.04, 0.09)),
            (TYRE, False, _bar(-stride - 0.06, 0.04, -stride + 0.14, 0.04, 0.09)),
            (TOP, False, [(-0.23, 1.45), (0.23, 1.45), (0.19, 0.82), (-0.19, 0.82)]),
            (TOP, False, _bar(0.17, 1.4, 0.22 + arm, 0.95, 0.12)),
            (SKIN, False, polygon(10, 0, 1.6, 0.13, 0.16)),
            (HAIR, False, [(-0.14, 1.62), (-0.1, 1.76), (0.1, 1.76), (0.14, 1.66)]),
        ]
    )


def _wheel_pair(reach: float, radius: float, rim: float) -> list[tuple[int, bool, list[tuple[float, float]]]]:
    parts = []
    for x in (-reach, reach):
        parts += [
            (TYRE, True, polygon(14, x, radius, radius, radius)),
            (SPOKES, True, polygon(12, x, radius, radius - rim, radius - rim)),
        ]
    return parts


def _cyclist(machine: str, ridden: bool) -> Figure:
    if machine == "bicycle":
        parts = _wheel_pair(0.52, 0.35, 0.08)
        bars = (
            (-0.52, 0.35, -0.15, 0.85),
            (-0.52, 0.35, 0.0, 0.32),
            (0.0, 0.32, -0.17, 0.92),
            (0.0, 0.32, 0.4, 0.85),
            (-0.15, 0.82, 0.4, 0.85),
            (0.52, 0.35, 0.38, 1.02),
            (0.3, 1.03, 0.46, 1.0),
            (-0.28, 0.95, -0.05, 0.93),
        )
        parts += [(FRAME, True, _bar(*bar, 0.08)) for bar in bars]
        rider = (
            (TROUSERS, _bar(-0.15, 0.98, 0.12, 0.62, 0.16)),
            (TROUSERS, _bar(0.12, 0.64, 0.02, 0.22, 0.13)),
            (TOP, [(-0.28, 0.95), (-0.02, 0.93), (0.26, 1.42), (0.02, 1.52)]),
            (TOP, _bar(0.15, 1.4, 0.4, 1.05, 0.11)),
            (SKIN, polygon(10, 0.22, 1.62, 0.13, 0.15)),
            (HELMET, [(0.06, 1.64), (0.1, 1.78), (0.3, 1.8), (0.38, 1.66)]),
        )
    else:
        parts = _wheel_pair(0.68, 0.32, 0.14)
        parts += [
            (TYRE, True, [(-0.45, 0.25), (-0.4, 0.55), (0.4, 0.6), (0.45, 0.25)]),
            (FRAME, True, [(-0.95, 0.85), (-0.5, 0.62), (0.1, 0.62), (0.45, 0.9), (0.1, 1.0), (-0.3, 0.82)]),
            (FRAME, True, _bar(0.68, 0.32, 0.4, 1.05, 0.14)),
            (FRAME, True, [(0.45, 0.6), (0.95, 0.55), (0.9, 0.68)]),
            (SPOKES, True, [(0.4, 0.85), (0.62, 0.95), (0.5, 1.3), (0.38, 1.1)]),
            (SPOKES, True, _bar(-0.85, 0.3, -0.1, 0.28, 0.1)),
            (TYRE, True, _bar(-0.75, 0.87, 0.0, 0.83, 0.12)),
        ]
        rider = (
            (TROUSERS, _bar(-0.3, 0.95, 0.12, 0.78, 0.2)),
            (TROUSERS, _bar(0.12, 0.8, -0.02, 0.34, 0.16)),
            (TOP, [(-0.45, 0.9), (-0.1, 0.88), (0.16, 1.42), (-0.16, 1.52)]),
            (TOP, _bar(0.0, 1.38, 0.42, 1.05, 0.14)),
            (HELMET, polygon(10, 0.06, 1.64, 0.18, 0.18)),
            (HAIR, _bar(0.08, 1.64, 0.24, 1.62, 0.1)),
        )
    return _figure(parts + ([(material, False, polygon) for material, polygon in rider] if ridden else []))


WALKERS = (_walker(0.08, 0.02), _walker(0.2, 0.08), _walker(0.3, 0.14))
CYCLES = {
    (machine, ridden): _cyclist(machine, ridden) for machine in ("bicycle", "motorcycle") for ridden in (False, True)
}


def figure(
    canvas: Canvas,
    template: Figure,
    colours: np.ndarray,
    *,
    label: int,
    machine: int | None = None,
    x: float,
    z: float,
    scale: float = 1.0,
    stretch: float = 1.0,
) -> None:
    """Paints a flat figure at (x, z) metres; stretch narrows (a three-quarter view) or, negative, mirrors it.

    colours: (8, 3), one per material. Parts of the machine get the label `machine`, all others `label`.
    """
    width = 0.5 * abs(stretch) if machine is None else abs(stretch)
    foot = quad_y(x - width * 0.6, x + width * 0.6, z - 0.25, z + 0.25)
    canvas.cast_by_sun(foot, 1.6)
    canvas.cast(foot, 0.4)
    zoom = canvas.view.focal / z
    u, v = canvas.pixel(x, 0, z)
    corners = (template.points * (zoom * scale * stretch, -zoom * scale) + (u, v)).astype(np.int32)
    surface = canvas.upright(label, z)
    below = canvas.upright(machine, z) if machine is not None else surface
    shades = colours.tolist()
    for start, end, material, mechanical in template.parts:
        cv2.fillConvexPoly(canvas.pixels, corners[start:end], (*shades[material], below if mechanical else surface))
