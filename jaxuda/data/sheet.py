"""Contact sheets: many small pictures as one, in rows and columns, with a heading above each column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import cv2
import numpy as np

HEADING = 22  # pixels, above the columns


def contact_sheet(rows: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
    """One row of the sheet for each mapping, one column for each name.

    Args:
      rows: column -> (H, W, 3) uint8 RGB; all have the columns of the first one.

    Returns:
      (H, W, 3) uint8 RGB. All cells are as wide as the widest (nearest pixels), and white below shorter ones.
    """
    width = max(cell.shape[1] for row in rows for cell in row.values())
    strips = [np.concatenate([_heading(name, width) for name in rows[0]], 1)]
    for row in rows:
        cells = [_as_wide(row[name], width) for name in rows[0]]
        height = max(len(cell) for cell in cells)
        padding = [((0, height - len(cell)), (0, 0), (0, 0)) for cell in cells]
        fitted = [np.pad(cell, pad, constant_values=255) for cell, pad in zip(cells, padding, strict=True)]
        strips.append(np.concatenate(fitted, 1))
    return np.concatenate(strips)


def _as_wide(cell: np.ndarray, width: int) -> np.ndarray:
    height = max(1, round(cell.shape[0] * width / cell.shape[1]))
    return cv2.resize(cell, (width, height), interpolation=cv2.INTER_NEAREST)


def _heading(name: str, width: int) -> np.ndarray:
    strip = np.full((HEADING, width, 3), 255, np.uint8)
    where = {"fontFace": cv2.FONT_HERSHEY_SIMPLEX, "fontScale": 0.42, "lineType": cv2.LINE_AA}
    return cv2.putText(strip, name.replace("_", " "), (4, HEADING - 7), color=(20, 20, 20), thickness=1, **where)
