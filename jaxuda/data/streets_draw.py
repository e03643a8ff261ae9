"""Drawing tools for the `streets` scenes: a perspective canvas, street furniture and plants.

World coordinates are metres: x to the right, y up from the ground, z forward, with the camera at (0, height, 0) looking
along z. A plane n.P = c of that world has an inverse depth that is affine in the image coordinates, so that every polygon
carries three numbers and the inverse depth of a picture is exact and costs one pass at the end.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from jaxuda.data.labels import label_space

CLASS = {name: index for index, name in enumerate(label_space("cityscapes19").classes)}

SUPER = 2  # pictures are drawn at this multiple and averaged down; labels take every second pixel
THIN = 3  # least width of poles, lights and signs, in pixels of the final picture
NEAR = 0.4  # metres; nothing is drawn closer

Colour = tuple[float, float, float]


class View(NamedTuple):
    """The camera: focal length, vanishing point (both in drawn, that is supersampled, pixels) and height in metres."""

    focal: float
    u0: float
    v0: float
    height: float


class Sun(NamedTuple):
    """Direction towards the sun (unit vector), share of direct light, darkness of cast shadows (0: overcast)."""

    direction: tuple[float, float, float]
    direct: float
    shadow: float


class Canvas:
    """A picture being painted far to near: colour and surface number per pixel, one plane and label per surface."""

    def __init__(self, size: tuple[int, int], view: View, sun: Sun):
        self.size, self.view, self.sun = size, view, sun
        # four channels (R, G, B, surface): one OpenCV call paints colour, label and depth together
        self.pixels = np.zeros((size[1] * SUPER, size[0] * SUPER, 4), np.uint16)
        self.shade = np.full((size[1], size[0]), 255, np.uint8)  # light that reaches the ground
        self.labels = [CLASS["sky"]]
        self.planes = [(0.0, 0.0, 0.0)]  # inverse depth (1/m) = a u + b v + c

    def surface(self, label: int, normal: Sequence[float], offset: float) -> int:
        """Registers the plane normal . P = offset (P relative to the camera); returns its surface number."""
        focal, u0, v0, _ = self.view
        nx, ny, nz = normal
        self.labels.append(label)
        self.planes.append(
            (nx / (focal * offset), -ny / (focal * offset), (nz - nx * u0 / focal + ny * v0 / focal) / offset)
        )
        return len(self.labels) - 1

    def ground(self, label: int) -> int:
        return self.surface(label, (0, 1, 0), -self.view.height)

    def upright(self, label: int, z: float) -> int:
        return self.surface(label, (0, 0, 1), z)

    def project(self, points: np.ndarray) -> np.ndarray:
        """World points (..., 3) to drawn pixels (..., 2) int32."""
        focal, u0, v0, height = self.view
        scale = focal / np.maximum(points[..., 2], NEAR)
        out = np.empty(points.shape[:-1] + (2,), np.float64)
        out[..., 0] = points[..., 0] * scale + u0
        out[..., 1] = (height - points[..., 1]) * scale + v0
        # OpenCV keeps 16 fractional bits: stay far inside 32 bits
        np.maximum(out, -16000, out=out)
        return np.minimum(out, 16000, out=out).astype(np.int32)

    def pixel(self, x: float, y: float, z: float) -> tuple[float, float]:
        scale = self.view.focal / max(z, NEAR)
        return self.view.u0 + x * scale, self.view.v0 + (self.view.height - y) * scale

    def fill(self, points: np.ndarray, colour: Colour, surface: int) -> None:
        """Paints one convex polygon of world points (N, 3)."""
        cv2.fillConvexPoly(self.pixels, self.project(points), (*colour, surface))

    def fill_many(self, polygons: np.ndarray, colour: Colour, surface: int) -> None:
        """Paints polygons of world points (M, N, 3) that do not overlap each other."""
        if len(polygons):
            cv2.fillPoly(self.pixels, list(self.project(polygons)), (*colour, surface))

    def cast(self, ground_points: np.ndarray, strength: float) -> None:
        """Darkens the ground below the convex hull of world points (N, 3) lying on it."""
        hull = cv2.convexHull(self.project(ground_points) // SUPER)
        cv2.fillConvexPoly(self.shade, hull, 255 * (1 - strength))

    def cast_by_sun(self, footprint: np.ndarray, height: float) -> None:
        """Shadow of a thing of this height (metres) on this footprint (N, 3)."""
        if self.sun.shadow > 0:
            sx, sy, sz = self.sun.direction
            shift = np.array([-sx / sy * height, 0, -sz / sy * height])
            self.cast(np.concatenate([footprint, footprint + shift]), self.sun.shadow)


def quad_x(x: float, y0: float, y1: float, z0: float, z1: float) -> np.ndarray:
    """Upright rectangle along the street, (4, 3)."""
    return np.array([(x, y0, z0), (x, y1, z0), (x, y1, z1), (x, y0, z1)])


def quad_y(x0: float, x1: float, z0: float, z1: float, y: float = 0.0) -> np.ndarray:
    """Level rectangle, (4, 3)."""
    return np.array([(x0, y, z0), (x0, y, z1), (x1, y, z1), (x1, y, z0)])


def quad_z(x0: float, x1: float, y0: float, y1: float, z: float) -> np.ndarray:
    """Upright rectangle across the street, (4, 3)."""
    return np.array([(x0, y0, z), (x0, y1, z), (x1, y1, z), (x1, y0, z)])


def shaded(colour: Colour, factor: float) -> Colour:
    return colour[0] * factor, colour[1] * factor, colour[2] * factor


def polygon(n: int, cx: float, cy: float, rx: float, ry: float) -> list[tuple[float, float]]:
    """Regular polygon of n corners inside an ellipse."""
    angles = np.arange(n) * (2 * np.pi / n) + np.pi / n
    return [(cx + rx * np.cos(a), cy + ry * np.sin(a)) for a in angles]


# ---- things on posts


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
    """Upright box centred on u, at least `least` final pixels wide; returns its left and right drawn columns."""
    wide = max(int(width + 0.5), least * SUPER)
    left = int(u - wide / 2)
    cv2.rectangle(canvas.pixels, (left, int(v0)), (left + wide - 1, int(v1)), (*colour, surface), -1)
    return left, left + wide - 1


def post(
    canvas: Canvas, colour: Colour, *, x: float, z: float, height: float, width: float, arm: float = 0.0
) -> None:
    """A pole, optionally with a lamp arm that reaches `arm` metres to the right (negative: left)."""
    zoom = canvas.view.focal / z
    surface = canvas.upright(CLASS["pole"], z)
    u, foot = canvas.pixel(x, 0, z)
    top = foot - height * zoom
    left, right = _thin_box(canvas, u, top, foot, width * zoom, colour, surface)
    third = max((right - left) // 3, 1)
    cv2.rectangle(
        canvas.pixels, (left, int(top)), (left + third, int(foot)), (*shaded(colour, 1.3), surface), -1
    )
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


# ---- plants

_ROUND = np.array(polygon(18, 0, 0, 1, 1))


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
    """A mass of leaves (drawn pixels): an irregular outline, then lighter clumps above and darker ones below."""
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
    canvas: Canvas,
    rng: random.Random,
    leaves: Colour,
    trunk: Colour,
    *,
    x: float,
    z: float,
    height: float,
    spread: float,
    conifer: bool,
) -> None:
    """A tree of this height with a crown of this radius (metres); trunk and crown are both vegetation, as in Cityscapes."""
    zoom = canvas.view.focal / z
    surface = canvas.upright(CLASS["vegetation"], z)
    u, foot = canvas.pixel(x, 0, z)
    _thin_box(canvas, u, foot - height * 0.6 * zoom, foot, 0.28 * zoom, trunk, surface, least=2)
    if conifer:
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
        blob(
            canvas,
            rng,
            leaves,
            surface,
            u=u,
            v=foot - (height - crown) * zoom,
            rx=spread * zoom,
            ry=crown * zoom,
            clumps=8,
        )
    angles = np.arange(8) * (np.pi / 4)
    disc = np.stack([x + spread * np.cos(angles), 0 * angles, z + spread * np.sin(angles)], 1)
    if canvas.sun.shadow > 0:
        sx, sy, sz = canvas.sun.direction
        canvas.cast(
            np.maximum(disc - np.array([sx, 0, sz]) / sy * height * 0.6, [-99, 0, 1]), canvas.sun.shadow * 0.8
        )


# ---- what lines the street


def _light(canvas: Canvas, normal: tuple[float, float, float]) -> float:
    towards = sum(n * s for n, s in zip(normal, canvas.sun.direction, strict=True))
    return 1 - canvas.sun.direct * (1 - max(towards, 0.0))


def panel(
    canvas: Canvas, label: int, colour: Colour, *, x: float, z0: float, z1: float, y0: float, y1: float
) -> tuple[int, float]:
    """Paints an upright rectangle along the street; returns its surface number and the light that falls on it."""
    side = 1 if x > 0 else -1
    light = _light(canvas, (-side, 0, 0))
    surface = canvas.surface(label, (1, 0, 0), x)
    canvas.fill(quad_x(x, y0, y1, z0, z1), shaded(colour, light), surface)
    return surface, light


def front(
    canvas: Canvas, label: int, colour: Colour, *, x0: float, x1: float, y0: float, y1: float, z: float
) -> int:
    """Paints an upright rectangle that faces the camera; returns its surface number."""
    surface = canvas.upright(label, z)
    canvas.fill(quad_z(x0, x1, y0, y1, z), shaded(colour, _light(canvas, (0, 0, -1))), surface)
    return surface


def grid_x(x: float, zs: np.ndarray, ys: np.ndarray, width: float, height: float) -> np.ndarray:
    """Rectangles along the street with their lower near corners at all (z, y): (len(zs) len(ys), 4, 3)."""
    corners = np.empty((len(zs), len(ys), 4, 3))
    corners[..., 0] = x
    corners[..., 1] = ys[:, None] + (0, height, height, 0)
    corners[..., 2] = zs[:, None, None] + (0, 0, width, width)
    return corners.reshape(-1, 4, 3)


def grid_z(z: float, xs: np.ndarray, ys: np.ndarray, width: float, height: float) -> np.ndarray:
    """The same across the street, with lower left corners at all (x, y)."""
    return grid_x(0, xs, ys, width, height)[..., [2, 1, 0]] + (0, 0, z)


class Facade(NamedTuple):
    """Colours and measures (metres) of a building."""

    colour: Colour
    window: Colour
    frame: Colour
    shop: Colour
    roof: Colour
    height: float
    storey: float
    pitch: float  # from window to window
    window_width: float
    window_height: float
    framed: bool


def building(
    canvas: Canvas, style: Facade, *, x: float, z0: float, z1: float, near: float, base: float = 0.0
) -> None:
    """Paints a building with its front along the street at x and its gable at z0.

    near: what lies nearer than this z on a front at x is out of the picture. base: height of what hides its foot.
    """
    label, side = CLASS["building"], 1 if x > 0 else -1
    if z0 > near:
        deep = x + side * 14
        surface = front(
            canvas, label, style.colour, x0=min(x, deep), x1=max(x, deep), y0=0, y1=style.height, z=z0
        )
        if z0 < 70:
            xs = np.arange(x + side * 1.2, x + side * 12, side * style.pitch * 1.3)
            ys = np.arange(style.storey + 0.9, style.height - 1.2, style.storey)
            if len(ys):
                canvas.fill_many(
                    grid_z(z0, xs, ys, style.window_width, style.window_height), style.window, surface
                )
    z0 = max(z0, near)
    surface, light = panel(canvas, label, style.colour, x=x, z0=z0, z1=z1, y0=0, y1=style.height)
    canvas.fill(quad_x(x, style.height - 0.5, style.height, z0, z1), shaded(style.roof, light), surface)
    if z0 > 70:
        return
    canvas.fill(quad_x(x, base, style.storey - 0.4, z0, z1), shaded(style.shop, light), surface)
    zs = np.arange(z1 - style.pitch, z0 - style.pitch, -style.pitch)
    ys = np.arange(style.storey + 0.8, style.height - style.window_height - 0.5, style.storey)
    if len(zs) and len(ys):
        if style.framed and z0 < 40:
            canvas.fill_many(
                grid_x(x, zs - 0.18, ys - 0.18, style.window_width + 0.36, style.window_height + 0.36),
                shaded(style.frame, light),
                surface,
            )
        canvas.fill_many(grid_x(x, zs, ys, style.window_width, style.window_height), style.window, surface)
    if len(zs):
        canvas.fill_many(
            grid_x(x, zs, np.array([0.3]), style.pitch * 0.7, style.storey - 1.1), style.window, surface
        )


def wall(
    canvas: Canvas, colour: Colour, joint: Colour, *, x: float, z0: float, z1: float, height: float
) -> None:
    """A wall along the street with courses and a coping."""
    surface, light = panel(canvas, CLASS["wall"], colour, x=x, z0=z0, z1=z1, y0=0, y1=height)
    ys = np.arange(0.4, height - 0.3, 0.5)
    canvas.fill_many(grid_x(x, np.array([z0]), ys, z1 - z0, 0.07), shaded(joint, light), surface)
    zs = np.arange(z0 + 1, z1, 2.0)
    canvas.fill_many(grid_x(x, zs, np.array([0.0]), 0.1, height), shaded(joint, light), surface)
    canvas.fill(quad_x(x, height - 0.2, height, z0, z1), shaded(colour, light * 1.2), surface)


def fence(
    canvas: Canvas, colour: Colour, mesh: Colour, *, x: float, z0: float, z1: float, height: float
) -> None:
    """A fence along the street: posts and rails before a mesh; what shows through is fence as well, as in Cityscapes."""
    surface, light = panel(canvas, CLASS["fence"], mesh, x=x, z0=z0, z1=z1, y0=0, y1=height)
    bar = shaded(colour, light)
    canvas.fill_many(grid_x(x, np.arange(z0, min(z1, 40), 0.8), np.array([0.0]), 0.3, height), bar, surface)
    canvas.fill_many(
        grid_x(x, np.array([z0]), np.array([0.25 * height, height - 0.16]), z1 - z0, 0.16), bar, surface
    )
