"""Confusion matrices and intersection over union, as the Cityscapes scripts define them."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def confusion_matrix(labels: jax.Array, predictions: jax.Array, num_classes: int) -> jax.Array:
    """Counts (C, C) int32: row = label, column = prediction.

    Args:
      labels: integers of any shape; values outside 0..C-1 (usually 255) are ignored.
      predictions: integers 0..C-1 of the same shape.
      num_classes: C.
    """
    labels, predictions = labels.astype(jnp.int32).ravel(), predictions.astype(jnp.int32).ravel()
    valid = (labels >= 0) & (labels < num_classes)
    # Ignored pixels are counted in one extra bin, which is dropped.
    cell = jnp.where(valid, labels * num_classes + predictions, num_classes**2)
    return jnp.bincount(cell, length=num_classes**2 + 1)[:-1].reshape(num_classes, num_classes)


def iou(confusion: np.ndarray) -> np.ndarray:
    """Intersection over union per class (C,), 0..1; NaN where a class is neither labelled nor predicted."""
    confusion = np.asarray(confusion, np.float64)
    hits = np.diag(confusion)
    union = confusion.sum(0) + confusion.sum(1) - hits
    return np.divide(hits, union, out=np.full_like(hits, np.nan), where=union > 0)


def mean_iou(confusion: np.ndarray) -> float:
    """Mean over the classes that occur, 0..1."""
    return _mean(iou(confusion))


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def pixel_accuracy(confusion: np.ndarray) -> float:
    """Share of the labelled pixels that are predicted correctly, 0..1."""
    total = np.sum(confusion)
    return float(np.trace(confusion) / total) if total else float("nan")


def iou_table(columns: dict[str, np.ndarray], classes: Sequence[str], starred: Sequence[str] = ()) -> str:
    """A text table: one row per class, one column per model, IoU in percent.

    Args:
      columns: heading -> confusion matrix (C, C).
      classes: C names.
      starred: those of them whose mean is mIoU*, see `LabelSpace`.
    """
    width = max(len("pixel accuracy"), *map(len, classes))
    heads = {name: max(9, len(name)) for name in columns}

    def row(title: str, cells: Sequence[float]) -> str:
        texts = [f"{100 * cell:.1f}" if np.isfinite(cell) else "-" for cell in cells]
        return f"{title:<{width}}" + "".join(
            f"  {text:>{head}}" for text, head in zip(texts, heads.values(), strict=True)
        )

    rule = "-" * (width + sum(head + 2 for head in heads.values()))
    per_class = np.stack([iou(confusion) for confusion in columns.values()], 1)
    lines = [" " * width + "".join(f"  {name:>{head}}" for name, head in heads.items()), rule]
    lines += [row(name, cells) for name, cells in zip(classes, per_class, strict=True)]
    lines += [rule, row(f"mIoU ({len(classes)})", [mean_iou(confusion) for confusion in columns.values()])]
    if starred:
        rows = [classes.index(name) for name in starred]
        lines += [row(f"mIoU* ({len(rows)})", [_mean(values[rows]) for values in per_class.T])]
    lines += [row("pixel accuracy", [pixel_accuracy(confusion) for confusion in columns.values()])]
    return "\n".join(lines)
