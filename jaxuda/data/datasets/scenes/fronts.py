"""What lines a street: buildings, walls, fences and hedges."""

import random
from typing import NamedTuple

import numpy as np

from jaxuda.data.datasets.scenes import furniture
from jaxuda.data.datasets.scenes.canvas import (
    CLASS,
    Canvas,
    Colour,
    front,
    grid_x,
    grid_z,
    panel,
    quad_x,
    quad_y,
    shaded,
)
from jaxuda.data.datasets.scenes.look import Paint
from jaxuda.data.datasets.scenes.plan import FAR, Side, Statistics, Street


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


def building(canvas: Canvas, style: Facade, *, x: float, z0: float, z1: float, near: float, base: float = 0.0) -> None:
    """Paints a building with its front along the street at x and its gable at z0.

    The part of a front at x that is nearer than z = near is outside the picture; its lowest `base` metres are hidden.
    """
    label, side = CLASS["building"], 1 if x > 0 else -1
    if z0 > near:
        deep = x + side * 14
        surface = front(canvas, label, style.colour, x0=min(x, deep), x1=max(x, deep), y0=0, y1=style.height, z=z0)
        if z0 < 70:
            xs = np.arange(x + side * 1.2, x + side * 12, side * style.pitch * 1.3)
            ys = np.arange(style.storey + 0.9, style.height - 1.2, style.storey)
            if len(ys):
                canvas.fill_many(grid_z(z0, xs, ys, style.window_width, style.window_height), style.window, surface)
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
        canvas.fill_many(grid_x(x, zs, np.array([0.3]), style.pitch * 0.7, style.storey - 1.1), style.window, surface)


def wall(canvas: Canvas, colour: Colour, joint: Colour, *, x: float, z0: float, z1: float, height: float) -> None:
    """A wall along the street with courses and a coping."""
    surface, light = panel(canvas, CLASS["wall"], colour, x=x, z0=z0, z1=z1, y0=0, y1=height)
    ys = np.arange(0.4, height - 0.3, 0.5)
    canvas.fill_many(grid_x(x, np.array([z0]), ys, z1 - z0, 0.07), shaded(joint, light), surface)
    zs = np.arange(z0 + 1, z1, 2.0)
    canvas.fill_many(grid_x(x, zs, np.array([0.0]), 0.1, height), shaded(joint, light), surface)
    canvas.fill(quad_x(x, height - 0.2, height, z0, z1), shaded(colour, light * 1.2), surface)


def fence(canvas: Canvas, colour: Colour, mesh: Colour, *, x: float, z0: float, z1: float, height: float) -> None:
    """A fence along the street: bars and a mesh; what is seen through it is labelled fence too, as in Cityscapes."""
    surface, light = panel(canvas, CLASS["fence"], mesh, x=x, z0=z0, z1=z1, y0=0, y1=height)
    bar = shaded(colour, light)
    canvas.fill_many(grid_x(x, np.arange(z0, min(z1, 40), 0.8), np.array([0.0]), 0.3, height), bar, surface)
    canvas.fill_many(grid_x(x, np.array([z0]), np.array([0.25 * height, height - 0.16]), z1 - z0, 0.16), bar, surface)


def paint_fronts(canvas: Canvas, street: Street, side: Side, paint: Paint, rng: random.Random) -> None:
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
            building(canvas, _facade(stats, paint, rng), x=x, z0=z0, z1=z1, near=near)
            _shadow_of_front(canvas, x, z0, z1, stats.facade_height[0])
            continue
        back = x + side.sign * rng.uniform(4, 9)
        if kind != "trees" and rng.random() < 0.6:
            building(canvas, _facade(stats, paint, rng), x=back, z0=z0, z1=z1, near=street.near(back), base=2.5)
        else:
            for z in np.linspace(z1, z0, max(int((z1 - z0) / 4), 2)).tolist():
                if z > street.near(back):
                    furniture.tree(
                        canvas,
                        paint,
                        rng,
                        x=x + side.sign * rng.uniform(2, 5),
                        z=z,
                        height=rng.uniform(5, 9),
                        conifers=stats.conifers,
                    )
        z0 = max(z0, near)
        if kind == "wall":
            wall(canvas, paint("wall"), paint("joint"), x=x, z0=z0, z1=z1, height=rng.uniform(1.9, 3.2))
        elif kind == "fence":
            fence(canvas, paint("fence"), paint("mesh"), x=x, z0=z0, z1=z1, height=rng.uniform(1.3, 2.3))
        else:
            panel(
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
        canvas.cast_by_sun(quad_y(x - 0.1, x + 0.1, max(z0, 1.0), z1), height * 0.5)


def _facade(stats: Statistics, paint: Paint, rng: random.Random) -> Facade:
    pitch = rng.uniform(*stats.pitch)
    return Facade(
        colour=paint("building"), window=paint("window"), frame=paint("frame"), shop=paint("shop"),
        roof=paint("roof"), height=rng.uniform(*stats.facade_height), storey=rng.uniform(3.0, 3.8),
        pitch=pitch, window_width=pitch * rng.uniform(0.4, 0.62),
        window_height=rng.uniform(*stats.window_height), framed=rng.random() < stats.framed,
    )  # fmt: skip
