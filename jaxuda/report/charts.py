"""Charts as SVG elements: lines, bars, heat maps, points. chart.css has their style, with numbered colours."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any, NamedTuple

import cv2
import numpy as np

from jaxuda.report.markup import Markup, join, tag

COLOURS = 6  # number of colours in chart.css; further series repeat them with dashes
WIDTH, HEIGHT = 640, 280
NARROW = 340  # the width of a chart on a phone
LEFT, RIGHT, TOP, BOTTOM = 52, 18, 24, 40
_LINE = 16  # height of a line of a title
FEW = 12  # a curve with at most this many points also shows them as dots
_LETTER, _TITLE_LETTER = 6.2, 7.5  # rough widths of letters, in the units of the drawing


class Series(NamedTuple):
    """A curve or one bar per group. name: for the legend. colour: its number. values: (x, y) points, or one y each."""

    name: str
    colour: int
    values: Sequence[Any]


class Mark(NamedTuple):
    """The start of a stage on the x axis of a line chart."""

    x: float
    name: str


def style() -> Markup:
    """The style element of the charts."""
    return tag("style", Markup(resources.files(__package__).joinpath("chart.css").read_text()))


def standalone(chart: Markup) -> bytes:
    """A chart as the content of an SVG file."""
    head, rest = chart.split(">", 1)
    paper = tag("rect", class_="paper", width="100%", height="100%")
    return f'{head} xmlns="http://www.w3.org/2000/svg">{style()}{paper}{rest}'.encode()


def fitted(draw: Callable[[int], Markup]) -> Markup:
    """A chart at two widths; page.css shows the one that fits, since a chart that shrinks has text nobody can read."""
    drawn = [tag("div", draw(width), class_=name) for name, width in (("wide", WIDTH), ("narrow", NARROW))]
    return tag("div", drawn, class_="fitted")


def stacked(line_charts: Sequence[Markup]) -> Markup:
    """Line charts below each other, as one chart."""
    placed = (
        Markup(chart.replace("<svg ", f'<svg y="{index * HEIGHT}" width="{WIDTH}" height="{HEIGHT}" ', 1))
        for index, chart in enumerate(line_charts)
    )
    return tag("svg", placed, viewBox=f"0 0 {WIDTH} {HEIGHT * len(line_charts)}", class_="chart")


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from `low` to `high`."""
    span = high - low
    if not span > 0:
        return [low]
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((f * power for f in (1, 2, 2.5, 5, 10)), key=lambda s: abs(span / s - count))
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def legend(series: Sequence[Series]) -> Markup:
    """The names of series next to their colours."""
    items = (
        tag(
            "li",
            tag(
                "svg",
                tag("line", class_=look(s.colour), x1=1, x2=25, y1=6, y2=6),
                viewBox="0 0 26 12",
                width=26,
                height=12,
                aria_hidden="true",
            ),
            f" {s.name}",
        )
        for s in series
    )
    return tag("ul", items, class_="legend")


def look(colour: int) -> str:
    """The CSS classes of a curve with a colour number; numbers from `COLOURS` on are dashed."""
    return f"line c{colour % COLOURS}" + (" dashed" if colour >= COLOURS else "")


def line_chart(
    series: Sequence[Series], title: str, x_label: str, marks: Sequence[Mark] = (), width: int = WIDTH
) -> Markup:
    """Curves over steps, with a vertical line and a name where each stage begins.

    Args:
      series: `values` are (x, y) points.
      title: of the chart; screen readers get it with the first and last values.
      x_label: below the x axis.
      marks: in order.
      width: of the drawing; its height is always `HEIGHT`.
    """
    points = [point for s in series for point in s.values]
    lines = textwrap.wrap(title, int((width - LEFT) / _TITLE_LETTER))
    right = max([x for x, _ in points] + [mark.x for mark in marks] + [1])
    frame = _Frame(width, TOP + _LINE * (len(lines) - 1), right, *_limits([y for _, y in points]))
    body = [_axes(frame, lines, x_label)]
    for mark, following in itertools.pairwise([*marks, Mark(frame.right, "")]):
        x = frame.across(mark.x)
        body.append(tag("line", class_="mark", x1=_n(x), x2=_n(x), y1=frame.top, y2=HEIGHT - BOTTOM))
        if len(mark.name) * _LETTER < frame.across(following.x) - x:
            body.append(tag("text", mark.name, class_="name", x=_n(x + 3), y=frame.top + 10))
    for s in series:
        places = [(_n(frame.across(x)), _n(frame.down(y))) for x, y in s.values]
        body.append(tag("polyline", class_=look(s.colour), points=" ".join(map(",".join, places))))
        if len(places) <= FEW:
            body += [tag("circle", class_=f"dot c{s.colour % COLOURS}", cx=x, cy=y, r=3) for x, y in places]
    spoken = "; ".join(f"{s.name}: {_ends(s.values)}" for s in series if s.values)
    return _svg(body, f"{title}. {spoken}", width, HEIGHT)


class _Frame(NamedTuple):
    """The axes of a line chart, `width` wide and below `top`: x from 0 to `right`, y from `low` to `high`."""

    width: int
    top: int
    right: float
    low: float
    high: float

    def across(self, x: float) -> float:
        return LEFT + (self.width - LEFT - RIGHT) * x / self.right

    def down(self, y: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - self.top - BOTTOM) * (y - self.low) / (self.high - self.low)


def _ends(points: Sequence[tuple[float, float]]) -> str:
    first, last = points[0], points[-1]
    return f"{first[1]:.3g}" if len(points) == 1 else f"from {first[1]:.3g} to {last[1]:.3g}"


def _axes(frame: _Frame, title: Sequence[str], x_label: str) -> Markup:
    pieces = [tag("text", line, class_="title", x=LEFT, y=14 + _LINE * index) for index, line in enumerate(title)]
    end = frame.width - RIGHT
    for y in ticks(frame.low, frame.high):
        height = _n(frame.down(y))
        pieces.append(tag("line", class_="grid", x1=LEFT, x2=end, y1=height, y2=height))
        pieces.append(tag("text", f"{y:g}", class_="tick end", x=LEFT - 6, y=_n(frame.down(y) + 4)))
    for x in ticks(0, frame.right, 8 * frame.width // WIDTH):
        pieces.append(tag("text", f"{x:g}", class_="tick middle", x=_n(frame.across(x)), y=HEIGHT - BOTTOM + 16))
    pieces.append(tag("text", x_label, class_="tick middle", x=_n((LEFT + end) / 2), y=HEIGHT - 6))
    return join(pieces)


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """From 0, or below the lowest value, to above the highest."""
    low, high = min([0.0, *values]), max([0.0, *values])
    return low, (high + 0.05 * (high - low)) if high > low else low + 1


def bar_chart(
    groups: Sequence[str], series: Sequence[Series], title: str, highest: float, width: int = WIDTH
) -> Markup:
    """Horizontal bars, one group of them per class.

    Args:
      groups: the names of the groups; long ones are shortened.
      series: `values` are one number per group, NaN where there is none.
      title: of the chart, also for screen readers.
      highest: the end of the axis.
      width: of the drawing.
    """
    thick, gap = 9, 8
    names = [_shortened(name, int(0.4 * width / _LETTER)) for name in groups]
    left = 16 + _LETTER * max(map(len, names))
    height = TOP + len(groups) * (len(series) * thick + gap) + 24

    def across(x: float) -> float:
        return left + (width - left - 40) * x / highest

    body = [tag("text", title, class_="title", x=4, y=14)]
    for x in ticks(0, highest):
        body.append(tag("line", class_="grid", x1=_n(across(x)), x2=_n(across(x)), y1=TOP, y2=height - 22))
        body.append(tag("text", f"{x:g}", class_="tick middle", x=_n(across(x)), y=height - 8))
    for index, group in enumerate(names):
        top = TOP + 4 + index * (len(series) * thick + gap)
        body.append(tag("text", group, class_="tick end", x=_n(left - 6), y=_n(top + len(series) * thick / 2 + 4)))
        for place, s in enumerate(series):
            value = s.values[index]
            if math.isfinite(value):
                box = {"x": _n(left), "y": top + place * thick, "height": thick - 1}
                body.append(tag("rect", class_=f"bar c{s.colour % COLOURS}", width=_n(across(value) - left), **box))
    return _svg(body, f"{title}; the numbers are in the table of results", width, height)


def _shortened(name: str, letters: int) -> str:
    """Without its middle, since long names of classes often begin alike ("construction--flat--...")."""
    start = letters // 3
    return name if len(name) <= letters else f"{name[:start]}…{name[len(name) - (letters - start - 1) :]}"


def heat_map(rows: Sequence[str], columns: Sequence[str], values: np.ndarray, title: str, limits: tuple) -> Markup:
    """A matrix as coloured squares with their numbers.

    Args:
      rows, columns: names.
      values: (rows, columns), NaN where there is none.
      title: above.
      limits: the values of the darkest and the brightest colour.
    """
    size, left, top = 26, 16 + _LETTER * max(map(len, rows)), 44 + _LETTER * max(map(len, columns))
    low, high = limits
    shades = np.clip(np.nan_to_num((values - low) / (high - low)) * 255, 0, 255).astype(np.uint8)
    colours = colour_map(shades)
    body = [tag("text", title, class_="title", x=6, y=18)]
    for place, name in enumerate(columns):
        x, y = _n(left + (place + 0.65) * size), _n(top - 6)
        body.append(tag("text", name, class_="tick", x=x, y=y, transform=f"rotate(-90 {x} {y})"))
    for i, name in enumerate(rows):
        body.append(tag("text", name, class_="tick end", x=_n(left - 6), y=_n(top + (i + 0.65) * size)))
        for j in range(len(columns)):
            if not np.isfinite(values[i, j]):
                continue
            place = {"x": _n(left + j * size), "y": _n(top + i * size)}
            body.append(tag("rect", **place, width=size - 1, height=size - 1, fill=_rgb(colours[i, j])))
            where = {"x": _n(left + (j + 0.48) * size), "y": _n(top + (i + 0.64) * size)}
            text, black_or_white = f"{values[i, j]:.2f}".replace("0.", "."), f"fill:{ink(colours[i, j])}"
            body.append(tag("text", text, class_="cell", style=black_or_white, **where))
    width = max(left + len(columns) * size + 12, 12 + 7.5 * len(title))
    return _svg(body, title, width, top + len(rows) * size + 12)


def ink(colour: Sequence[int]) -> str:
    """Black or white, whichever is easier to read on an RGB colour; the contrast is at least 4.5 (WCAG 2)."""
    red, green, blue = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in np.divide(colour, 255))
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return "#000" if (luminance + 0.05) ** 2 > 1.05 * 0.05 else "#fff"


class Cloud(NamedTuple):
    """Points of one class: (n, 2) in `first` and `second`, for example the two domains. colour: RGB."""

    name: str
    colour: tuple[int, int, int]
    first: np.ndarray
    second: np.ndarray


def clouds(rows: Sequence[tuple[str, Sequence[Cloud]]], headings: tuple[str, str, str]) -> Markup:
    """For each row the first points, the second points, and lines from the first class means to the second.

    Args:
      rows: title and clouds; the panels of a row have the same axes.
      headings: those of the three panels.
    """
    side, gap, top = 280, 14, 40
    body, width = [], 3 * (side + gap) + gap
    for index, (title, found) in enumerate(rows):
        down = index * (side + top + gap)
        place = _placement(np.concatenate([part for cloud in found for part in (cloud.first, cloud.second)]), side)
        body.append(tag("text", title, class_="title", x=gap, y=_n(down + 18)))
        for column, heading in enumerate(headings):
            left = gap + column * (side + gap)
            body.append(tag("text", heading, class_="tick", x=left, y=_n(down + 34)))
            frame = {"x": left, "y": _n(down + top), "width": side, "height": side}
            body.append(tag("rect", class_="frame-line", **frame))
            offset = np.array([left, down + top])
            named: list[np.ndarray] = []
            for cloud in found:
                points = [place(part) + offset for part in (cloud.first, cloud.second)]
                body.append(_dots(points[column], cloud) if column < 2 else _way(*points, cloud, named))
    bottom = len(rows) * (side + top + gap) + 8
    columns, line = 6, 18
    for index, cloud in enumerate(rows[0][1]):
        x, y = gap + (index % columns) * (width - gap) / columns, bottom + 10 + line * (index // columns)
        body.append(tag("circle", class_="point", cx=_n(x + 5), cy=_n(y - 4), r=5, fill=_rgb(cloud.colour)))
        body.append(tag("text", cloud.name, x=_n(x + 16), y=_n(y)))
    height = bottom + 10 + line * -(-len(rows[0][1]) // columns)
    return _svg(body, "; ".join(title for title, _ in rows), width, height)


def _placement(points: np.ndarray, side: float) -> Callable[[np.ndarray], np.ndarray]:
    """Maps points into a square, with the same scale on both axes."""
    middle = (points.max(0) + points.min(0)) / 2
    scale = (side - 16) / max(np.ptp(points, axis=0).max(), 1e-12)
    return lambda part: (part - middle) * scale * (1, -1) + side / 2


def _dots(points: np.ndarray, cloud: Cloud) -> Markup:
    fill = _rgb(cloud.colour)
    return join(tag("circle", class_="point", cx=_n(x), cy=_n(y), r=2.5, fill=fill) for x, y in points)


def _way(first: np.ndarray, second: np.ndarray, cloud: Cloud, named: list[np.ndarray]) -> Markup | None:
    """A line between means. Its name is written, and its end added to `named`, if that covers no name there."""
    if not (len(first) and len(second)):
        return None
    (x1, y1), (x2, y2) = first.mean(0), second.mean(0)
    colour = _rgb(cloud.colour)
    end = np.array([x2, y2])
    free = all((abs(end - other) > (50, 11)).any() for other in named)
    if free:
        named.append(end)
    return join(
        tag("line", class_="way", x1=_n(x1), y1=_n(y1), x2=_n(x2), y2=_n(y2), stroke=colour),
        tag("circle", class_="ring", cx=_n(x1), cy=_n(y1), r=4, stroke=colour),
        tag("circle", class_="point", cx=_n(x2), cy=_n(y2), r=4, fill=colour),
        tag("text", cloud.name, class_="tick", x=_n(x2 + 6), y=_n(y2 + 3)) if free else None,
    )


def _rgb(colour: Sequence[int]) -> str:
    return "rgb({},{},{})".format(*colour)


def colour_map(shades: np.ndarray) -> np.ndarray:
    """(H, W) uint8, dark to bright, as (H, W, 3) uint8 RGB; the order is also visible to colour-blind people."""
    return cv2.applyColorMap(shades, cv2.COLORMAP_CIVIDIS)[..., ::-1]


def _svg(body: Sequence[Markup], spoken: str, width: float, height: float) -> Markup:
    return tag("svg", body, viewBox=f"0 0 {_n(width)} {_n(height)}", role="img", aria_label=spoken, class_="chart")


def _n(value: float) -> str:
    """A coordinate with few digits."""
    return f"{value:.1f}".removesuffix(".0")
