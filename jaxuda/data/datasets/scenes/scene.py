"""Paints one scene from far to near: sky, ground, fronts, then everything that stands in between."""

import random

import cv2
import numpy as np

from jaxuda.data.datasets.scenes import contents, furniture
from jaxuda.data.datasets.scenes.canvas import CLASS, SUPER, Canvas, Sun, View, front, grid_x, quad_y, shaded
from jaxuda.data.datasets.scenes.fronts import paint_fronts
from jaxuda.data.datasets.scenes.look import Paint, look
from jaxuda.data.datasets.scenes.plan import FAR, STATISTICS, Street, plan_street


def paint_scene(domain: str, rng: random.Random, size: tuple[int, int]) -> Canvas:
    """Paints a scene of a domain from far to near, at this size (width, height)."""
    stats = STATISTICS[domain]
    paint = Paint(domain, rng)
    width, height = (SUPER * s for s in size)
    view = View(
        focal=rng.uniform(*stats.focal) * width, u0=width * rng.uniform(0.42, 0.58),
        v0=height * rng.uniform(*stats.horizon), height=rng.uniform(*stats.camera_height),
    )  # fmt: skip
    canvas = Canvas(size, view, _sun(domain, rng))
    street = plan_street(stats, rng, 0.62 * width / view.focal)
    _sky(canvas, paint)
    _ground(canvas, street, paint, rng)
    for side in (street.left, street.right):
        paint_fronts(canvas, street, side, paint, rng)
    roadway = contents.Roadway(canvas, street, paint, rng)
    roadway.drive()
    roadway.park()
    roadway.ride()
    things = contents.pavement_things(canvas, street, paint, rng) + roadway.things
    for _, draw_thing in sorted(things, key=lambda thing: -thing[0]):
        draw_thing()
    return canvas


def _sun(domain: str, rng: random.Random) -> Sun:
    style = look(domain)
    shadow = rng.uniform(*style.shadow)
    x, y, z = rng.choice((-1, 1)) * rng.uniform(0.4, 1.0), rng.uniform(0.8, 1.4), rng.uniform(-0.6, 0.3)
    norm = (x * x + y * y + z * z) ** 0.5
    return Sun((x / norm, y / norm, z / norm), rng.uniform(*style.direct), shadow if shadow > 0.1 else 0.0)


def _sky(canvas: Canvas, paint: Paint) -> None:
    """Sky, and a skyline where the street ends."""
    rows = int(canvas.view.v0) + 2
    share = (np.linspace(0, 1, rows) ** 1.5)[:, None]
    column = np.zeros((rows, 1, 4), np.uint16)  # surface 0 is the sky
    column[:, 0, :3] = (1 - share) * paint("sky") + share * paint("skyline")
    canvas.pixels[:rows] = cv2.repeat(column, 1, canvas.pixels.shape[1])
    rng, end = paint.rng, 0.6 * FAR * SUPER * canvas.size[0] / canvas.view.focal
    x = -end
    while x < end:
        width = rng.uniform(12, 30)
        if rng.random() < 0.5:
            front(
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
            furniture.blob(
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
        canvas.fill(quad_y(x0, x1, z0, z1), colour, surface)

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
        strip(side.sign * (side.curb - 0.25), side.sign * side.curb, shaded(asphalt, 0.8), road)  # gutter
        if side.curb - side.road > 1:
            strip(side.sign * (side.road - 0.07), side.sign * (side.road + 0.07), line, road)
    for k in range(1, street.lanes):
        x = -street.left.road + k * street.lane_width
        zs = np.arange(near + rng.uniform(0, 6), 90, 7.5)
        canvas.fill_many(grid_x(0, zs, np.zeros(1), 3.5, 0) + _across(x, 0.16), line, road)
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
        canvas.fill_many(np.array([quad_y(x, x + 0.5, z0 - 3.4, z0 - 0.6) for x in xs]), line, road)
        strip(-0.5 * street.lane_width, street.right.road, line, road, z0 - 4.6, z0 - 4.2)


def _across(x: float, width: float) -> np.ndarray:
    """Corners (4, 3) to add to the degenerate rectangles of `grid_x` at x = 0 to lay them flat."""
    return np.array([(x, 0, 0), (x + width, 0, 0), (x + width, 0, 0), (x, 0, 0)])
