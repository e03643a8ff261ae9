"""Overlapping windows: networks that compute an image in parts."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Boxes(NamedTuple):
    """Equal parts of an image that cover it; sizes are (height, width).

    offsets: (row, column) of each.
    part: the size of each.
    size: that of the image.
    """

    offsets: tuple[tuple[int, int], ...]
    part: tuple[int, int]
    size: tuple[int, int]

    def shrunk(self, factor: int) -> Boxes:
        """The same on a map that is `factor` times smaller."""
        small = lambda pair: (pair[0] // factor, pair[1] // factor)  # noqa: E731
        return Boxes(tuple(map(small, self.offsets)), small(self.part), small(self.size))


def windows(size: tuple[int, int], part: tuple[int, int]) -> Boxes:
    """The parts of an image that overlap by half, the last ones shifted inwards to its border.

    Args:
      size, part: (height, width) of the image and of each part, which must not be larger.
    """
    starts = []
    for side, length in zip(size, part, strict=True):
        step = max(length // 2, 1)
        starts.append([min(place * step, side - length) for place in range(-(-(side - length) // step) + 1)])
    return Boxes(tuple((row, column) for row in starts[0] for column in starts[1]), tuple(part), tuple(size))


def cut_out(images: jax.Array, boxes: Boxes) -> jax.Array:
    """(N, H, W, A) -> (parts * N, h, w, A), one part of all images after another."""
    height, width = boxes.part
    return jnp.concatenate([images[:, y : y + height, x : x + width] for y, x in boxes.offsets])


def averaged(parts: jax.Array, boxes: Boxes) -> jax.Array:
    """The inverse of `cut_out`: (parts * N, h, w, A) -> (N, H, W, A), the mean where parts overlap."""
    (height, width), (rows, columns) = boxes.part, boxes.size
    count, total = np.zeros((rows, columns, 1)), 0.0
    parts = parts.reshape(len(boxes.offsets), -1, *parts.shape[1:])
    for part, (y, x) in zip(parts, boxes.offsets, strict=True):
        around = ((0, 0), (y, rows - y - height), (x, columns - x - width), (0, 0))
        total += jnp.pad(part, around)
        count[y : y + height, x : x + width] += 1
    return total / jnp.asarray(count, parts.dtype)
