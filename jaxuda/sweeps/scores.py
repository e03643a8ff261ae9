"""What every sweep does first: class scores of a batch of images, and their resize to each image's own size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxuda import data
from jaxuda.models.deeplab import DeepLabV2
from jaxuda.models.layers import interpolation_matrix, normalise

PyTree = Any
BUCKET = 32  # images of mixed sizes share compiled code when they round up to the same multiple of this


def make_scores(model: DeepLabV2, method: ModuleType, config: Any) -> Callable[[PyTree, jax.Array], jax.Array]:
    """`scores(variables, images)`: (N, H, W, 3) uint8 to what is upsampled before the argmax, (N, h, w, C).

    That is logits, or the probabilities of a method that has its own `predict`.
    """

    def scores(variables: PyTree, images: jax.Array) -> jax.Array:
        images = normalise(images, config.preprocess)
        if hasattr(method, "predict"):
            return method.predict(variables, images, model=model, config=config)
        return model.apply(variables, images, train=False).main

    return scores


def probabilities(scores: jax.Array, method: ModuleType) -> jax.Array:
    """Class probabilities of what `make_scores` gave, at any resolution."""
    return scores if hasattr(method, "predict") else jax.nn.softmax(scores)


def score_grid(scores: Callable, variables: PyTree, config: Any) -> tuple[int, int]:
    """(h, w) of the scores of images of `config.evaluation.size`, found without computing them."""
    width, height = config.evaluation.size
    images = jax.ShapeDtypeStruct((config.evaluation.batch, height, width, 3), jnp.uint8)
    return jax.eval_shape(scores, variables, images).shape[1:3]


def sweep(records: Sequence, config: Any) -> Iterator[dict[str, Any]]:
    """One pass in order, images resized to `config.evaluation.size`; see `data.sweep_batches`."""
    transform = data.build_transform({"resize": tuple(config.evaluation.size)})
    return data.sweep_batches(records, transform, config.evaluation.batch)


def padded_sizes(sizes: list[tuple[int, int]], batch: int) -> list[tuple[int, int]]:
    """`sizes` with the last one repeated for the images that only fill up the last batch."""
    return sizes + sizes[-1:] * (batch - len(sizes))


def resize_matrices(
    grid: tuple[int, int], sizes: Sequence[tuple[int, int]], align_corners: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Bilinear resizes from one grid to several sizes, as matrices of one shape, so that sizes are data.

    Args:
      grid: (h, w) of the scores.
      sizes: (height, width) of each image of a batch of N.
      align_corners: as in `resize_bilinear`.

    Returns:
      float32 (N, H, h) and (N, W, w), H and W being the largest size rounded up to a multiple of `BUCKET`; rows
      beyond an image's own size are zero.
    """
    stacks = []
    for axis in (0, 1):
        longest = -(-max(size[axis] for size in sizes) // BUCKET) * BUCKET
        stack = np.zeros((len(sizes), longest, grid[axis]), np.float32)
        for row, size in zip(stack, sizes, strict=True):
            row[: size[axis]] = interpolation_matrix(grid[axis], size[axis], align_corners)
        stacks.append(stack)
    return stacks[0], stacks[1]


def resize(scores: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Scores (N, h, w, C) at (N, H, W, C), with the matrices of `resize_matrices`."""
    highest = jax.lax.Precision.HIGHEST
    wide = jnp.einsum("nWw,nhwc->nhWc", columns, scores, precision=highest)
    return jnp.einsum("nHh,nhWc->nHWc", rows, wide, precision=highest)
