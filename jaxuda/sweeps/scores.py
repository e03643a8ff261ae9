"""What every sweep does first: class scores of a batch of images, and their resize to each image's own size."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxuda import data
from jaxuda.data.transforms import Transform, fitted_size
from jaxuda.models.layers import interpolation_matrix, normalise

PyTree = Any
BUCKET = 32  # images of mixed sizes share compiled code when they round up to the same multiple of this


def make_scores(model: nn.Module, method: ModuleType, config: Any) -> Callable[[PyTree, jax.Array], jax.Array]:
    """`scores(variables, images)`: images (N, H, W, 3) uint8 -> scores (N, h, w, C), upsampled before the argmax.

    Scores are logits, or probabilities if the method has its own `predict`.
    """

    def scores(variables: PyTree, images: jax.Array) -> jax.Array:
        images = normalise(images, config.preprocess)
        if hasattr(method, "predict"):
            return method.predict(variables, images, model=model, config=config)
        return model.apply(variables, images, train=False).main

    return scores


def probabilities(scores: jax.Array, method: ModuleType) -> jax.Array:
    """Class probabilities from scores of `make_scores`, at any resolution."""
    return scores if hasattr(method, "predict") else jax.nn.softmax(scores)


def score_grid(
    scores: Callable, variables: PyTree, config: Any, size: tuple[int, int] | None = None
) -> tuple[int, int]:
    """(h, w) of the scores of images of a size (width, height), without computing the scores.

    `size` is `config.evaluation.size` unless another one is given.
    """
    width, height = size or config.evaluation.size
    images = jax.ShapeDtypeStruct((config.evaluation.batch, height, width, 3), jnp.uint8)
    return jax.eval_shape(scores, variables, images).shape[1:3]


def sweep(
    records: Sequence, config: Any, size: tuple[int, int] | None = None, batch: int = 0
) -> Iterator[dict[str, Any]]:
    """One pass in order; see `data.sweep_batches`.

    Images are resized to `size`, in batches of `batch`; both are those of `config.evaluation` unless given. With
    `config.evaluation.keep_aspect` they keep their aspect within that size, at the top left; the rest is black.
    `config.evaluation.interpolation` ("bicubic") may name another resize, see `TransformSpec`.
    """
    return data.sweep_batches(records, input_transform(config, size), batch or config.evaluation.batch)


def input_transform(config: Any, size: tuple[int, int] | None = None) -> Transform:
    """The transform from an image to the network's input in `sweep`; `size` defaults to `config.evaluation.size`."""
    kind = "fit" if kept_aspect(config) else "resize"
    interpolation = config.evaluation.get("interpolation", "bicubic")
    return data.build_transform({kind: tuple(size or config.evaluation.size), "interpolation": interpolation})


def shown_pixels(batch: dict[str, Any], config: Any, grid: tuple[int, int] | None = None) -> np.ndarray:
    """`image_masks` for a batch of `sweep`; reads `evaluation.size` and `evaluation.keep_aspect` from `config`."""
    return image_masks(batch, tuple(config.evaluation.size), kept_aspect(config) is not None, grid)


def image_masks(
    batch: dict[str, Any], size: tuple[int, int], fit: bool, grid: tuple[int, int] | None = None
) -> np.ndarray:
    """Where the network's input shows an image: False in the border of a kept aspect, and in a repeated image.

    Args:
      batch: as `data.sweep_batches` yields it.
      size: (width, height) of the input.
      fit: whether images keep their aspect within that size, at the top left; otherwise they fill it.
      grid: (h, w) of the result; default: that of the input.

    Returns:
      (N, h, w) bool.
    """
    width, height = size
    rows, columns = grid or (height, width)
    shown = np.zeros((len(batch["image"]), rows, columns), bool)
    for mask, (own_height, own_width) in zip(shown, batch["size"], strict=False):
        across, down = fitted_size((own_width, own_height), size) if fit else size
        # A cell belongs to the image if its centre does; even the thinnest image has one.
        mask[: max(1, round(rows * down / height)), : max(1, round(columns * across / width))] = True
    return shown


def kept_aspect(config: Any) -> float | None:
    """Width / height of the network's input where images keep their own aspect in it, else None."""
    width, height = config.evaluation.size
    return width / height if config.evaluation.get("keep_aspect", False) else None


def padded_sizes(sizes: list[tuple[int, int]], batch: int) -> list[tuple[int, int]]:
    """`sizes` with the last one repeated for the images that only fill up the last batch."""
    return sizes + sizes[-1:] * (batch - len(sizes))


def resize_matrices(
    grid: tuple[int, int], sizes: Sequence[tuple[int, int]], config: Any, size: tuple[int, int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Bilinear resizes from one grid to several sizes, as matrices of one shape: sizes are data, not shapes.

    Args:
      grid: (h, w) of the scores.
      sizes: (height, width) of each image of a batch of N.
      config: `align_corners` is read, as in `resize_bilinear`. With `evaluation.keep_aspect` the grid shows the image
        at the top left of a canvas: scores are resized to the canvas, and only the image is kept. With
        `evaluation.through_input` scores are resized to the network's input, and from there to the image, which is what
        mmsegmentation and its descendants do; without it, at once.
      size: (width, height) of the network's input; default: `evaluation.size`.

    Returns:
      float32 (N, H, h) and (N, W, w); H and W are the largest sizes, rounded up to a multiple of `BUCKET`. Rows
      beyond an image's own size are zero.
    """
    stacks, aspect = [], kept_aspect(config)
    width, height = size or config.evaluation.size
    between = ((height,), (width,)) if config.evaluation.get("through_input", False) else ((), ())
    for axis in (0, 1):
        longest = -(-max(size[axis] for size in sizes) // BUCKET) * BUCKET
        stack = np.zeros((len(sizes), longest, grid[axis]), np.float32)
        for row, own in zip(stack, sizes, strict=True):
            whole = canvas(own, aspect)[axis] if aspect else own[axis]
            row[: own[axis]] = _chain((grid[axis], *between[axis], whole), config.align_corners)[: own[axis]]
        stacks.append(stack)
    return stacks[0], stacks[1]


@functools.lru_cache(maxsize=64)
def _chain(lengths: tuple[int, ...], align_corners: bool) -> np.ndarray:
    """The matrix that resizes from the first length to the second, from there to the third, and so on."""
    steps = [interpolation_matrix(source, target, align_corners) for source, target in itertools.pairwise(lengths)]
    return functools.reduce(lambda matrix, step: step @ matrix, steps)


def canvas(size: tuple[int, int], aspect: float) -> tuple[int, int]:
    """The smallest (height, width) of this width / height that an image of `size` (height, width) fits in."""
    height, width = size
    return max(height, round(width / aspect)), max(width, round(height * aspect))


def resize(scores: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Scores (N, h, w, C) at (N, H, W, C), with the matrices of `resize_matrices`."""
    highest = jax.lax.Precision.HIGHEST
    wide = jnp.einsum("nWw,nhwc->nhWc", columns, scores, precision=highest)
    return jnp.einsum("nHh,nhWc->nHWc", rows, wide, precision=highest)
