"""A perspective canvas that keeps the colour, label and exact inverse depth of everything painted on it.

World coordinates are metres: x to the right, y up from the ground, z forward; the camera is at (0, height, 0)
and looks along z. The inverse depth of a plane n.P = c is affine in image coordinates, so that a polygon needs
three numbers for it, and the inverse depth of a whole picture needs one pass at the end.
"""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from jaxuda.data.datasets.cityscapes import COLOURS

CLASS = {name: index for index, name in enumerate(COLOURS)}

SUPER = 2  # pictures are drawn at this multiple and averaged down; labels take every second pixel
THIN = 3  # least width of poles, lights and signs, in pixels of the final picture
NEAR = 0.4  # metres; nothing is drawn closer

Colour = tuple[float, float, float]

_FLIP = np.array((1.0, -1.0))  # image rows count downwards


class View(NamedTuple):
    """The camera: focal length and vanishing point in drawn (supersampled) pixels, height in metres."""

    focal: float
    u0: float
    v0: float
    height: float


class Sun(NamedTuple):
    """Unit vector to the sun, share of direct light, darkness of cast shadows (0: overcast)."""

    direction: tuple[float, float, float]
    direct: float
    shadow: float


class Canvas:
    """A picture painted far to near: colour and surface per pixel, one plane and label per surface."""

    def __init__(self, size: tuple[int, int], view: View, sun: Sun):
        self.size, self.view, self.sun = size, view, sun
        self._eye, self._centre = np.array((0.0, view.height)), np.array((view.u0, view.v0))
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
        scale = self.view.focal / np.maximum(points[..., 2:], NEAR)
        return ((points[..., :2] * _FLIP + self._eye) * scale + self._centre).astype(np.int32)

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
        """Darkens a convex polygon of world points (N, 3) lying on the ground."""
        cv2.fillConvexPoly(self.shade, self.project(ground_points) // SUPER, 255 * (1 - strength))

    def cast_by_sun(self, footprint: np.ndarray, height: float) -> None:
        """Shadow of an object of this height (metres) on this footprint (N, 3)."""
        if self.sun.shadow > 0:
            sx, sy, sz = self.sun.direction
            shift = np.array([-sx / sy * height, 0, -sz / sy * height])
            both = self.project(np.concatenate([footprint, footprint + shift])) // SUPER
            cv2.fillConvexPoly(self.shade, cv2.convexHull(both), 255 * (1 - self.sun.shadow))


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
    """A colour under `factor` times the light."""
    return colour[0] * factor, colour[1] * factor, colour[2] * factor


def polygon(n: int, cx: float, cy: float, rx: float, ry: float) -> list[tuple[float, float]]:
    """Regular polygon of n corners inside an ellipse."""
    angles = np.arange(n) * (2 * np.pi / n) + np.pi / n
    return [(cx + rx * np.cos(a), cy + ry * np.sin(a)) for a in angles]


def light_on(canvas: Canvas, normal: tuple[float, float, float]) -> float:
    """Share of the full light, 0..1, on a face with this unit normal."""
    towards = sum(n * s for n, s in zip(normal, canvas.sun.direction, strict=True))
    return 1 - canvas.sun.direct * (1 - max(towards, 0.0))


def panel(
    canvas: Canvas, label: int, colour: Colour, *, x: float, z0: float, z1: float, y0: float, y1: float
) -> tuple[int, float]:
    """Paints an upright rectangle along the street; returns its surface number and the light on it."""
    side = 1 if x > 0 else -1
    light = light_on(canvas, (-side, 0, 0))
    surface = canvas.surface(label, (1, 0, 0), x)
    canvas.fill(quad_x(x, y0, y1, z0, z1), shaded(colour, light), surface)
    return surface, light


def front(canvas: Canvas, label: int, colour: Colour, *, x0: float, x1: float, y0: float, y1: float, z: float) -> int:
    """Paints an upright rectangle that faces the camera; returns its surface number."""
    surface = canvas.upright(label, z)
    canvas.fill(quad_z(x0, x1, y0, y1, z), shaded(colour, light_on(canvas, (0, 0, -1))), surface)
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
