"""The picture sheet of context relations: for each its share, its classes, and some of its regions."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from jaxuda.data.labels import IGNORE, LabelSpace, colourise

EXAMPLES, TILE, GAP, TEXT = 10, 48, 4, 260  # regions per relation; pixels
SINGLE_SHARE = 0.95
_SINGLE_BAR, _MIXED_BAR, _PAPER, _INK = (70, 120, 200), (220, 130, 40), (255, 255, 255), (20, 20, 20)


def class_shares(regions: np.ndarray, num_classes: int) -> np.ndarray:
    """Share of each class among the labelled cells of regions (n, s, s): (C,) float."""
    counts = np.bincount(regions.reshape(-1), minlength=IGNORE + 1)[:num_classes]
    return counts / max(counts.sum(), 1)


def is_single(regions: np.ndarray, num_classes: int) -> bool:
    """Whether nearly all cells of a relation's regions (n, s, s) are of one class."""
    return bool(class_shares(regions, num_classes).max() >= SINGLE_SHARE)


def draw_sheet(regions: np.ndarray, members: Sequence[np.ndarray], shares: np.ndarray, space: LabelSpace) -> np.ndarray:
    """One row per relation in two columns, in the given order; a blue bar means a single class, an orange one mixed.

    Args:
      regions: (n, s, s) uint8, the sample.
      members: the rows of each relation.
      shares: (M,) share of the source's regions.
      space: names and colours of the classes.

    Returns:
      (H, W, 3) uint8 RGB.
    """
    width = TEXT + EXAMPLES * (TILE + GAP) + GAP
    rows = [_row(index, regions[rows], shares[index], space, width) for index, rows in enumerate(members)]
    half = -(-len(rows) // 2)
    blank = np.full((TILE + GAP, width, 3), _PAPER, np.uint8)
    columns = [np.concatenate(part) for part in (rows[:half], rows[half:] + [blank] * (2 * half - len(rows)))]
    return np.concatenate(columns, axis=1)


def _row(index: int, regions: np.ndarray, share: float, space: LabelSpace, width: int) -> np.ndarray:
    row = np.full((TILE + GAP, width, 3), _PAPER, np.uint8)
    single = is_single(regions, space.num_classes)
    row[:TILE, :8] = _SINGLE_BAR if single else _MIXED_BAR
    held = class_shares(regions, space.num_classes)
    most = [c for c in np.argsort(-held, kind="stable")[:3] if held[c] >= 1 - SINGLE_SHARE]
    lines = (
        f"{index}  {100 * share:.2f}%  {'single class' if single else 'mixed'}",
        ", ".join(f"{space.classes[c]} {100 * held[c]:.0f}" for c in most),
    )
    for place, line in enumerate(lines):
        cv2.putText(row, line, (14, 18 + 20 * place), cv2.FONT_HERSHEY_SIMPLEX, 0.42, _INK, 1, cv2.LINE_AA)
    # Spread over the members, which are sorted by class and random key.
    chosen = np.linspace(0, len(regions) - 1, min(EXAMPLES, len(regions))).astype(int)
    for place, region in enumerate(regions[chosen]):
        left = TEXT + place * (TILE + GAP)
        tile = cv2.resize(colourise(region, space), (TILE, TILE), interpolation=cv2.INTER_NEAREST)
        row[:TILE, left : left + TILE] = tile
    return row
