"""Local contextual relations: descriptors of label regions, their labelling, and the file in which a sweep saves them.

Huang et al., Contextual-Relation Consistent Domain Adaptation for Semantic Segmentation, ECCV 2020. A region is a
square of `size` x `size` feature cells, on a label map shrunk to four times the feature grid. The functions of arrays
here take NumPy arrays in the sweep and JAX arrays inside the training step: one formula for both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxuda.artifacts.arrays import REMEDY, read_arrays, write_arrays
from jaxuda.errors import UserError
from jaxuda.losses.segmentation import IGNORE
from jaxuda.models.layers import resize_labels

Array = np.ndarray | jax.Array

FILE = "context_relations.npz"
CELLS = 4  # label cells per feature cell, in each direction
QUARTERS, DIRECTIONS = 4, 4  # the layout histogram: 2 x 2 quarters, edges across 0, 45, 90 and 135 degrees
LAYOUT_WEIGHT = 0.5


class Relations(NamedTuple):
    """The relations of one region size.

    prototypes: (M, C + 16) float32 descriptors, the most frequent relation first.
    radii: (M,) float32; a descriptor farther than this from its nearest prototype belongs to no relation.
    """

    prototypes: Array
    radii: Array


def region_grid(grid: tuple[int, int], size: int) -> tuple[int, int]:
    """Rows and columns of regions of `size` feature cells on a feature grid (h, w); the incomplete rest is dropped.

    Raises:
      UserError: no region fits, or `size` is less than 1.
    """
    if size < 1:
        raise UserError(f"region_sizes holds {size}: a region has at least one feature cell")
    if min(grid) < size:
        raise UserError(
            f"label maps of {grid[1]}x{grid[0]} feature cells are smaller than a region of {size}x{size}: "
            "take smaller region_sizes, or larger images (source.resize)"
        )
    return grid[0] // size, grid[1] // size


def cut_regions(labels: Array, grid: tuple[int, int], size: int) -> Array:
    """Label maps cut into regions.

    Args:
      labels: (..., H, W) integers, 255 = ignore, at the size of the network's input.
      grid: (h, w) of the features.
      size: r, feature cells per side of a region.

    Returns:
      (..., R, Q, 4r, 4r) of the same dtype, with R, Q = `region_grid(grid, size)`.
    """
    rows, columns = region_grid(grid, size)
    side = CELLS * size
    cells = resize_labels(labels, (CELLS * grid[0], CELLS * grid[1]))[..., : rows * side, : columns * side]
    return cells.reshape(*cells.shape[:-2], rows, side, columns, side).swapaxes(-3, -2)


def describe(regions: Array, num_classes: int) -> Array:
    """Descriptors of regions: which classes a region has, and where and in which direction they meet.

    The first C entries are the class histogram over labelled cells. The other 16 are the layout: every class's
    indicator map is differentiated by central differences (at the rim the cell itself replaces a missing neighbour;
    an ignored neighbour gives no difference); each difference in x and y is -1, 0 or 1. Its length, 1 or sqrt 2, is
    added to the bin of its direction modulo 180 degrees and its quarter of the region, summed over classes. Both
    parts have unit length, or are zero (the layout of a single class), and the layout is weighted by 0.5.

    Args:
      regions: (..., s, s) integers in 0..C-1, 255 = ignore; s even.
      num_classes: C.

    Returns:
      (..., C + 16) float32.
    """
    xp = regions.__array_namespace__()
    lead, side = regions.shape[:-2], regions.shape[-1]
    member = (regions[..., None] == xp.arange(num_classes)).astype(xp.int8)  # (..., s, s, C)
    known = xp.any(member, axis=-1, keepdims=True).astype(xp.int8)
    rim, seen = (xp.pad(x, [(0, 0)] * len(lead) + [(1, 1), (1, 1), (0, 0)], mode="edge") for x in (member, known))
    dx = (rim[..., 1:-1, 2:, :] - rim[..., 1:-1, :-2, :]) * seen[..., 1:-1, 2:, :] * seen[..., 1:-1, :-2, :]
    dy = (rim[..., 2:, 1:-1, :] - rim[..., :-2, 1:-1, :]) * seen[..., 2:, 1:-1, :] * seen[..., :-2, 1:-1, :]
    found = (dx != 0) & (dy == 0), dx * dy == 1, (dx == 0) & (dy != 0), dx * dy == -1
    edges = xp.stack([xp.sum(edge, axis=-1) for edge in found], axis=-1)  # (..., s, s, 4) counts
    quarters = xp.sum(edges.reshape(*lead, 2, side // 2, 2, side // 2, DIRECTIONS), axis=(-4, -2))
    lengths = np.array([1, np.sqrt(2), 1, np.sqrt(2)], np.float32)
    layout = (quarters.astype(xp.float32) * lengths).reshape(*lead, QUARTERS * DIRECTIONS)
    histogram = xp.sum(member, axis=(-3, -2), dtype=xp.int32).astype(xp.float32)
    half = np.float32(LAYOUT_WEIGHT)
    return xp.concatenate([_unit(histogram, xp), half * _unit(layout, xp)], axis=-1)


def _unit(rows: Array, xp: Any) -> Array:
    """Rows (..., D) scaled to unit length; a row of zeros stays zero."""
    length = xp.sqrt(xp.sum(rows * rows, axis=-1, keepdims=True))
    return rows / xp.where(length > 0, length, xp.ones_like(length))


def mostly_labelled(regions: Array) -> Array:
    """(..., s, s) label regions -> (...) bool: whether at most half of the cells are ignored."""
    xp = regions.__array_namespace__()
    return 2 * xp.sum(regions == IGNORE, axis=(-2, -1)) <= regions.shape[-1] ** 2


def label_regions(regions: Array, relations: Relations, num_classes: int) -> Array:
    """The relation of each region: that of the nearest prototype (by Euclidean distance).

    Args:
      regions: (..., s, s) integers, 255 = ignore.
      relations: M of them.
      num_classes: C.

    Returns:
      (...) int32 in 0..M-1, or 255 where the nearest prototype is farther than its radius, or more than half of the
      region is ignored.
    """
    xp = regions.__array_namespace__()
    difference = describe(regions, num_classes)[..., None, :] - xp.asarray(relations.prototypes)
    distance = xp.sqrt(xp.sum(difference * difference, axis=-1))
    nearest = xp.argmin(distance, axis=-1)
    inside = xp.min(distance, axis=-1) <= xp.asarray(relations.radii)[nearest]
    return xp.where(inside & mostly_labelled(regions), nearest, IGNORE).astype(xp.int32)


def class_relations(num_classes: int) -> Relations:
    """Relations without a search: prototype c is a region of class c alone, and no region is too far from all."""
    prototypes = np.eye(num_classes, num_classes + QUARTERS * DIRECTIONS, dtype=np.float32)
    return Relations(prototypes, np.full(num_classes, 2.0, np.float32))  # no two descriptors are 2 apart


def write_relations(folder: Path, found: Mapping[int, Relations], classes: Sequence[str]) -> None:
    """Writes `FILE` in `folder`: the relations by region size, and the class names."""
    arrays = {f"{name}{size}": array for size, kind in found.items() for name, array in kind._asdict().items()}
    write_arrays(folder / FILE, arrays, classes)


def read_relations(
    folder: Path, sizes: Sequence[int], num_classes: int, classes: Sequence[str] | None = None
) -> dict[int, Relations]:
    """Reads what `write_relations` wrote.

    Args:
      folder: the folder of `FILE`.
      sizes: the region sizes to read.
      num_classes: C of the network that will use them.
      classes: its class names in order; None if only their number is known.

    Raises:
      UserError: the file is missing or corrupt, belongs to another label space, or lacks a region size.
    """
    path = folder / FILE
    arrays = read_arrays(path, "context relations", (), num_classes, classes)
    missing = [size for size in sizes if not {f"{name}{size}" for name in Relations._fields} <= arrays.keys()]
    if missing:
        raise UserError(
            f"{path} has no relations of region size {missing[0]}: give the stage that finds them and the one that "
            f"learns from them the same region_sizes, then {REMEDY}"
        )
    return {size: Relations(*(arrays[f"{name}{size}"] for name in Relations._fields)) for size in sizes}
