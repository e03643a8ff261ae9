"""What stands beside the road: posts, traffic lights, signs and trees, upright at the depth of their foot."""

import random

import cv2
import numpy as np

from jaxuda.data.datasets.scenes.canvas import CLASS, SUPER, THIN, Canvas, Colour, polygon, quad_y, shaded
from jaxuda.data.datasets.scenes.look import Paint


def _thin_box(
    canvas: Canvas,
    u: float,
    v0: float,
    v1: float,
    width: float,
    colour: Colour,
    surface: int,
    least: int = THIN,
) -> tuple[int, int]:
    """Upright box centred on u, at least `least` final pixels wide; returns its first and last column."""
    wide = max(int(width + 0.5), least * SUPER)
    left = int(u - wide / 2)
    cv2.rectangle(canvas.pixels, (left, int(v0)), (left + wide - 1, int(v1)), (*colour, surface), -1)
    return left, left + wide - 1


def post(canvas: Canvas, colour: Colour, *, x: float, z: float, height: float, width: float, arm: float = 0.0) -> None:
    """A pole, optionally with a lamp arm that reaches `arm` metres to the right (negative: left)."""
    zoom = canvas.view.focal / z
    surface = canvas.upright(CLASS["pole"], z)
    u, foot = canvas.pixel(x, 0, z)
    top = foot - height * zoom
    left, right = _thin_box(canvas, u, top, foot, width * zoom, colour, surface)
    third = max((right - left) // 3, 1)
    cv2.rectangle(canvas.pixels, (left, int(top)), (left + third, int(foot)), (*shaded(colour, 1.3), surface), -1)
    if arm:
        # at least THIN pixels in both directions, like the post itself
        thick = max(int(0.12 * zoom), THIN * SUPER)
        end = int(u + arm * zoom)
        cv2.rectangle(
            canvas.pixels,
            (min(int(u), end), int(top)),
            (max(int(u), end), int(top) + thick - 1),
            (*colour, surface),
            -1,
        )
        lamp = max(int(0.6 * zoom), THIN * SUPER)
        cv2.rectangle(
            canvas.pixels,
            (end - lamp // 2, int(top)),
            (end + lamp // 2, int(top) + int(thick * 1.3)),
            (*shaded(colour, 0.8), surface),
            -1,
        )
    canvas.cast_by_sun(quad_y(x - width / 2, x + width / 2, z - 0.1, z + 0.1), height)


def traffic_light(canvas: Canvas, case: Colour, lit: int, *, x: float, y: float, z: float) -> None:
    """A case with three lamps whose lower end hangs at height y; lit: 0 red, 1 amber, 2 green."""
    zoom = canvas.view.focal / z
    surface = canvas.upright(CLASS["light"], z)
    u, low = canvas.pixel(x, y, z)
    width = max(0.42 * zoom, 4 * SUPER)
    height = max(1.1 * zoom, 2.4 * width)
    _thin_box(canvas, u, low - height, low, width, case, surface)
    for k, colour in enumerate(((250, 40, 30), (250, 180, 30), (40, 230, 110))):
        lamp = colour if k == lit else shaded(colour, 0.3)
        cv2.circle(
            canvas.pixels,
            (int(u), int(low - height * (5 - 2 * k) / 6)),
            max(int(width * 0.32), 2),
            (*lamp, surface),
            -1,
        )


_SIGNS = {
    "disc": polygon(12, 0, 0, 1, 1),
    "octagon": polygon(8, 0, 0, 1, 1),
    "square": polygon(4, 0, 0, 1.25, 1.25),
    "triangle": [(-1.15, -0.85), (0.0, 1.1), (1.15, -0.85)],
    "board": [(-2.0, -0.9), (-2.0, 0.9), (2.0, 0.9), (2.0, -0.9)],
}
SIGN_SHAPES = tuple(_SIGNS)


def sign(
    canvas: Canvas, shape: str, rim: Colour, field: Colour, *, x: float, y: float, z: float, radius: float
) -> None:
    """A traffic sign centred at height y."""
    surface = canvas.upright(CLASS["sign"], z)
    centre = canvas.pixel(x, y, z)
    size = max(radius * canvas.view.focal / z, 1.2 * THIN * SUPER)
    outline = np.array(_SIGNS[shape]) * (size, -size)
    cv2.fillConvexPoly(canvas.pixels, (outline + centre).astype(np.int32), (*rim, surface))
    cv2.fillConvexPoly(canvas.pixels, (outline * 0.66 + centre).astype(np.int32), (*field, surface))


_ROUND = np.array(polygon(18, 0, 0, 1, 1))
_DISC = np.array([(x, 0, z) for x, z in polygon(8, 0, 0, 1, 1)])


def blob(
    canvas: Canvas,
    rng: random.Random,
    colour: Colour,
    surface: int,
    *,
    u: float,
    v: float,
    rx: float,
    ry: float,
    clumps: int,
) -> None:
    """Leaves (drawn pixels): an irregular outline, then lighter clumps above and darker ones below."""
    wobble = np.array([0.82 + 0.3 * rng.random() for _ in _ROUND])
    outline = (_ROUND * wobble[:, None] * (rx, ry) + (u, v)).astype(np.int32)
    cv2.fillPoly(canvas.pixels, [outline], (*shaded(colour, 0.85), surface))
    for _ in range(clumps):
        dx, dy = rng.uniform(-0.55, 0.55), rng.uniform(-0.6, 0.55)
        size = rng.uniform(0.25, 0.42)
        cv2.ellipse(
            canvas.pixels,
            (int(u + dx * rx), int(v + dy * ry)),
            (int(size * rx) + 1, int(size * ry) + 1),
            0,
            0,
            360,
            (*shaded(colour, 0.98 - 0.3 * dy), surface),
            -1,
        )


def tree(
    canvas: Canvas, paint: Paint, rng: random.Random, *, x: float, z: float, height: float, conifers: float
) -> None:
    """A tree; `height` in metres, `conifers` the chance of a conifer. Its trunk is vegetation, as in Cityscapes."""
    spread = height * rng.uniform(0.22, 0.34)
    leaves, trunk = paint("leaves"), paint("trunk")
    zoom = canvas.view.focal / z
    surface = canvas.upright(CLASS["vegetation"], z)
    u, foot = canvas.pixel(x, 0, z)
    _thin_box(canvas, u, foot - height * 0.6 * zoom, foot, 0.28 * zoom, trunk, surface, least=2)
    if rng.random() < conifers:
        for k in range(4):
            low, wide = 0.15 + 0.19 * k, spread * (1 - 0.2 * k)
            tip = min(low + 0.4, 1.0)
            corners = [
                (u - wide * zoom, foot - low * height * zoom),
                (u, foot - tip * height * zoom),
                (u + wide * zoom, foot - low * height * zoom),
            ]
            cv2.fillConvexPoly(
                canvas.pixels, np.array(corners).astype(np.int32), (*shaded(leaves, 0.75 + 0.1 * k), surface)
            )
    else:
        crown = 0.36 * height
        middle = foot - (height - crown) * zoom
        # far trees are a few pixels: details would not be seen
        clumps = min(max(int(crown * zoom / 4), 2), 8)
        blob(canvas, rng, leaves, surface, u=u, v=middle, rx=spread * zoom, ry=crown * zoom, clumps=clumps)
    if canvas.sun.shadow > 0:
        sx, sy, sz = canvas.sun.direction
        reach = height * 0.6 / sy  # the shadow of the middle of the crown
        disc = _DISC * spread + (x - sx * reach, 0, max(z - sz * reach, spread + 1))
        canvas.cast(disc, canvas.sun.shadow * 0.8)
