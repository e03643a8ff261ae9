"""Cycle association of pixels between two images, and the smoothness that goes with it.

Kang et al., Pixel-Level Cycle Association: A New Perspective for Domain Adaptive Semantic Segmentation, NeurIPS
2020. A source pixel i goes to its most similar target pixel j*, and j* goes back to its most similar source pixel i*.
Where the cycle ends in the class in which it started, the loss makes both steps more likely.

The matrix of similarities of all L source pixels with all L target pixels is never stored: it is computed in blocks of
columns, reduced, and computed again, tile by tile, in the gradient. Memory grows with L * block. A block holds whole
columns; the values of rows are accumulated over the blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxuda.errors import UserError
from jaxuda.losses.reduction import masked_mean
from jaxuda.losses.segmentation import IGNORE

PyTree = Any
METRICS = ("cosine", "kl")
BLOCK = 256
_HIGHEST = lax.Precision.HIGHEST


class Cycle(NamedTuple):
    """The cycle of each source position; positions are numbered row by row, 0..L_s-1 and 0..L_t-1.

    target: (N, L_s) int32, j*(i), in 0..L_t-1.
    source: (N, L_s) int32, i*(j*(i)), in 0..L_s-1.
    log_likelihood: (N, L_s) float, log a(i, j*) + log b(j*, i*); at least -log L_t - log L_s.
    """

    target: jax.Array
    source: jax.Array
    log_likelihood: jax.Array


def cycle_association(
    source: jax.Array,
    target: jax.Array,
    labels: jax.Array,
    metric: str = "cosine",
    aggregation: float = 0.5,
    axis_name: str | None = None,
    block: int = BLOCK,
) -> jax.Array:
    """Mean of -log(a(i, j*) b(j*, i*)) over all positive source positions of the batch (equations 3 to 6).

    A position is positive if it is labelled and its cycle ends in its own class. Image n of the source is associated
    with image n of the target, after aggregation of the target (`aggregate`). See `cycle` for a and b. The published
    loss is clamped at 100, which it cannot reach, since a and b are the largest entries of softmax rows.

    Args:
      source: (N, h, w, A) float features, or probabilities with "kl"; (P, A) for a single pair.
      target: (N, h', w', A) or (P', A).
      labels: (N, h, w) or (P,) integers of the source, 255 = ignore; on the grid of `source`.
      metric: "cosine", or "kl" between class distributions.
      aggregation: share of the aggregated map in the target, 0..1.
      axis_name: device axis over which the mean is taken.
      block: number of columns of similarities that are held at a time.

    Returns:
      Scalar; 0 if no position is positive.

    Raises:
      UserError: the shapes do not fit together, or the metric is unknown.
    """
    if labels.shape != source.shape[:-1]:
        raise UserError(
            f"labels {labels.shape} are not on the grid of the source map {source.shape}: resize them first "
            "(jaxuda.models.layers.resize_labels)"
        )
    found = cycle(source, target, metric, aggregation, block)
    labels = labels.reshape(found.source.shape).astype(jnp.int32)
    return masked_mean(-found.log_likelihood, positive(found, labels), axis_name)


def positive(found: Cycle, labels: jax.Array) -> jax.Array:
    """(N, L_s) bool: which cycles end in the class in which they start; `labels` (N, L_s) int32, 255 = ignore."""
    return (labels != IGNORE) & (jnp.take_along_axis(labels, found.source, axis=1) == labels)


def cycle(
    source: jax.Array, target: jax.Array, metric: str = "cosine", aggregation: float = 0.5, block: int = BLOCK
) -> Cycle:
    """Follows every source position to the target and back.

    a(i, .) is the softmax over target positions of row i of the similarities, contrast-normalised: the row's mean is
    subtracted, and the row is divided by its standard deviation; both are constants in the gradient. b(j, .) is the
    same from target position j over source positions; with "kl", which is not symmetric, it uses -KL(q_j || p_i). Of
    equal similarities the first is taken.

    Args and errors as for `cycle_association`.
    """
    if metric not in METRICS:
        raise UserError(f"unknown similarity {metric!r}; choose one of: {', '.join(METRICS)}")
    if source.ndim != target.ndim or source.ndim not in (2, 4) or source.shape[-1] != target.shape[-1]:
        raise UserError(
            f"source map {source.shape} and target map {target.shape} cannot be associated: both must be (N, h, w, A) "
            "or (P, A), with the same number of channels"
        )
    if source.ndim == 4 and len(source) != len(target):
        raise UserError(f"source map {source.shape} and target map {target.shape} must have the same number of images")
    source, target = _pairs(source), aggregate(_pairs(target), metric, aggregation, block)

    def one_pair(source: jax.Array, target: jax.Array) -> Cycle:
        there, back = _best(_sides(source, metric), _sides(target, metric), metric, block)
        return Cycle(there.index, back.index[there.index], -there.surprise - back.surprise[there.index])

    return jax.vmap(one_pair)(source, target)


def aggregate(maps: jax.Array, metric: str = "cosine", share: float = 0.5, block: int = BLOCK) -> jax.Array:
    """Spatial aggregation (1 - share) x + share W x of each image with itself (equation 7).

    Row j of W is the softmax over all positions of the similarities of position j, contrast-normalised with "cosine",
    unchanged with "kl".

    Args:
      maps: (N, h, w, A) or (N, L, A) float.
      metric: "cosine" or "kl".
      share: 0..1; 0 returns the maps themselves.
      block: number of columns of similarities that are held at a time.

    Returns:
      Like `maps`.
    """
    if not share:
        return maps
    one_image = lambda x: _aggregate(_sides(x, metric), metric, share, block)  # noqa: E731
    return jax.vmap(one_image)(maps.reshape(len(maps), -1, maps.shape[-1])).reshape(maps.shape)


def smoothness(logits: jax.Array, threshold: float = 10.0, axis_name: str | None = None) -> jax.Array:
    """Label-smoothing regulariser: with l = -mean_c log p_c, the mean of (l / threshold - 1) l (section 3.4).

    The bracket is constant in the gradient; a threshold of 0 drops it.

    Args:
      logits: (..., C) float.
      threshold: the loss raises l below it and lowers l above it.
      axis_name: device axis over which the mean is taken.

    Returns:
      Scalar.
    """
    level = -jnp.mean(jax.nn.log_softmax(logits), axis=-1)
    weight = lax.stop_gradient(level) / threshold - 1 if threshold else 1.0
    return masked_mean(weight * level, axis_name=axis_name)


def _pairs(maps: jax.Array) -> jax.Array:
    """(N, h, w, A) or (P, A) as (N, L, A), at least float32."""
    maps = maps.astype(jnp.promote_types(maps.dtype, jnp.float32))
    return maps.reshape(len(maps) if maps.ndim == 4 else 1, -1, maps.shape[-1])


# Similarities -----------------------------------------------------------------------------------------------


class _Sides(NamedTuple):
    """What similarities need of one image. map: (L, A). other: 1 / length of each row (L,), or log(map) for "kl"."""

    map: jax.Array
    other: jax.Array


def _sides(maps: jax.Array, metric: str) -> _Sides:
    if metric == "kl":
        return _Sides(maps, jnp.log(maps + 1e-10))
    squares, tiny = jnp.sum(jnp.square(maps), axis=-1), jnp.asarray(1e-24, maps.dtype)
    # Rows of zeros have similarity 0 with all and get no gradient. Scaling the products, not the maps, saves a copy.
    return _Sides(maps, jnp.where(squares > tiny, lax.rsqrt(jnp.maximum(squares, tiny)), 0))


def _similarities(rows: _Sides, columns: _Sides, metric: str) -> tuple[jax.Array, jax.Array]:
    """Similarities (P, Q) twice: for the softmax of each row, and for the softmax of each column.

    -KL(p || q) is reduced to sum p log q: the rest does not depend on the index that the softmax runs over.
    """
    if metric == "kl":
        return _product(rows.map, columns.other), _product(rows.other, columns.map)
    cosine = _product(rows.map, columns.map) * rows.other[:, None] * columns.other
    return cosine, cosine


def _product(rows: jax.Array, columns: jax.Array) -> jax.Array:
    return lax.dot_general(rows, columns, (((1,), (1,)), ((), ())), precision=_HIGHEST)


class _Choice(NamedTuple):
    """The best partner of each position. index: (L,) int32. surprise: (L,) -log of its softmax probability."""

    index: jax.Array
    surprise: jax.Array


class _Softmax(NamedTuple):
    """What is needed to compute entries of a softmax again: exp((s - best) * sharpness - surprise); each is (L,)."""

    best: jax.Array
    sharpness: jax.Array
    surprise: jax.Array

    def __call__(self, similarities: jax.Array, axis: int) -> jax.Array:
        """Probabilities (P, Q) of similarities (P, Q); they sum to 1 over `axis`."""
        best, sharpness, surprise = (jnp.expand_dims(field, axis) for field in self)
        return jnp.exp((similarities - best) * sharpness - surprise)


def _sharpness(squares: jax.Array, count: int, best: jax.Array) -> jax.Array:
    """1 / (unbiased standard deviation + 1e-10) from the sum of `count` centred squares; 0 (all entries are equally
    likely) where the deviation is only a rounding error."""
    deviation = jnp.sqrt(squares / max(count - 1, 1))
    noise = 8 * jnp.finfo(best.dtype).eps * (1 + jnp.abs(best))
    return jnp.where(deviation > noise, 1 / (deviation + 1e-10), 0)


def _first(similarities: jax.Array, best: jax.Array, axis: int) -> jax.Array:
    """Index of the first entry equal to `best`; two plain reductions are faster than an argmax."""
    index = lax.broadcasted_iota(jnp.int32, similarities.shape, axis)
    size = similarities.shape[axis]
    return jnp.min(jnp.where(similarities == jnp.expand_dims(best, axis), index, size - 1), axis)


def _column_softmax(similarities: jax.Array, normalised: bool) -> _Softmax:
    """The softmax of each column; `similarities` must hold all rows."""
    best = jnp.max(similarities, axis=0)
    sharpness = jnp.ones_like(best)
    if normalised:
        centred = similarities - jnp.mean(similarities, axis=0)
        sharpness = _sharpness(jnp.sum(jnp.square(centred), axis=0), len(similarities), best)
    return _Softmax(best, sharpness, jnp.log(jnp.sum(jnp.exp((similarities - best) * sharpness), axis=0)))


# Blocks -----------------------------------------------------------------------------------------------------


def _over_blocks(length: int, block: int, body: Callable[[PyTree, Any, int], PyTree], carry: PyTree) -> PyTree:
    """`carry = body(carry, start, size)` for consecutive blocks of 0..length-1; the last one may be smaller."""
    full = length // block
    if full:
        carry = lax.fori_loop(0, full, lambda k, carry: body(carry, k * block, block), carry)
    return body(carry, full * block, length % block) if length % block else carry


def _cut(tree: PyTree, start: Any, size: int) -> PyTree:
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, size), tree)


def _put(tree: PyTree, part: PyTree, start: Any) -> PyTree:
    return jax.tree.map(lambda x, y: lax.dynamic_update_slice_in_dim(x, y, start, 0), tree, part)


def _add(tree: PyTree, part: PyTree, start: Any) -> PyTree:
    size = len(jax.tree.leaves(part)[0])
    return _put(tree, jax.tree.map(jnp.add, _cut(tree, start, size), part), start)


# Best partners ----------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _best(rows: _Sides, columns: _Sides, metric: str, block: int) -> tuple[_Choice, _Choice]:
    """The best column of each row, and the best row of each column."""
    return _best_forward(rows, columns, metric, block)[0]


def _best_forward(rows: _Sides, columns: _Sides, metric: str, block: int) -> tuple:
    height, width, dtype = len(rows.map), len(columns.map), rows.map.dtype
    ints, floats = functools.partial(jnp.zeros, dtype=jnp.int32), functools.partial(jnp.zeros, dtype=dtype)

    def both(carry: tuple, start: Any, size: int) -> tuple:
        """Finishes the columns of a block; carries best, index, mean and centred squares of the rows."""
        (best, index, mean, squares), down_index, down = carry
        across, upright = _similarities(rows, _cut(columns, start, size), metric)
        found = _column_softmax(upright, normalised=True)
        down_index, down = _put((down_index, down), (_first(upright, found.best, 0), found), start)

        block_best, block_mean = jnp.max(across, axis=1), jnp.mean(across, axis=1)
        # Earlier columns win ties, so only a larger one counts.
        index = jnp.where(block_best > best, start + _first(across, block_best, 1), index)
        # Means and centred squares of two parts are pooled without cancellation (Chan et al., 1979).
        step, share = block_mean - mean, size / jnp.asarray(start + size, dtype)
        squares += jnp.sum(jnp.square(across - block_mean[:, None]), axis=1) + jnp.square(step) * share * start
        return (jnp.maximum(best, block_best), index, mean + step * share, squares), down_index, down

    start = (jnp.full((height,), -jnp.inf, dtype), ints(height), floats(height), floats(height))
    carry = start, ints(width), _Softmax(*(floats(width) for _ in _Softmax._fields))
    (best, index, _, squares), down_index, down = _over_blocks(width, block, both, carry)
    sharpness = _sharpness(squares, width, best)

    def total(carry: jax.Array, start: Any, size: int) -> jax.Array:
        across, _ = _similarities(rows, _cut(columns, start, size), metric)
        return carry + jnp.sum(jnp.exp((across - best[:, None]) * sharpness[:, None]), axis=1)

    across = _Softmax(best, sharpness, jnp.log(_over_blocks(width, block, total, floats(height))))
    choices = _Choice(index, across.surprise), _Choice(down_index, down.surprise)
    return choices, (rows, columns, choices, (across, down))


def _best_backward(metric: str, block: int, saved: tuple, gradients: tuple[_Choice, _Choice]) -> tuple:
    """d surprise / d s = sharpness * (probability - 1[best]); one tile of similarities at a time."""
    rows, columns, (there, back), (row_softmax, column_softmax) = saved
    # Gradient, softmax and choice of each position, to be cut together.
    per_row = gradients[0].surprise * row_softmax.sharpness, row_softmax, there.index
    per_column = gradients[1].surprise * column_softmax.sharpness, column_softmax, back.index

    def tile(carry: tuple, top: Any, height: int, left: Any, width: int) -> tuple:
        d_rows, d_columns = carry
        parts = _cut(rows, top, height), _cut(columns, left, width)
        (across, down), pull = jax.vjp(functools.partial(_similarities, metric=metric), *parts)
        weight, softmax, index = _cut(per_row, top, height)
        down_weight, down_softmax, down_index = _cut(per_column, left, width)
        hit = index[:, None] == left + jnp.arange(width)
        down_hit = down_index == top + jnp.arange(height)[:, None]
        d_across = weight[:, None] * (softmax(across, axis=1) - hit)
        d_down = down_weight * (down_softmax(down, axis=0) - down_hit)
        d_part_rows, d_part_columns = pull((d_across, d_down))
        return _add(d_rows, d_part_rows, top), _add(d_columns, d_part_columns, left)

    def strip(carry: tuple, left: Any, width: int) -> tuple:
        inner = functools.partial(tile, left=left, width=width)
        return _over_blocks(len(rows.map), block, inner, carry)

    return _over_blocks(len(columns.map), block, strip, jax.tree.map(jnp.zeros_like, (rows, columns)))


_best.defvjp(_best_forward, _best_backward)


# Aggregation ------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _aggregate(sides: _Sides, metric: str, share: float, block: int) -> jax.Array:
    """(1 - share) x + share W x of the map x (L, A) in `sides`."""
    return _aggregate_forward(sides, metric, share, block)[0]


def _aggregate_forward(sides: _Sides, metric: str, share: float, block: int) -> tuple:
    x = sides.map

    def body(carry: tuple, start: Any, size: int) -> tuple:
        part = _cut(sides, start, size)
        _, similarities = _similarities(sides, part, metric)
        softmax = _column_softmax(similarities, normalised=metric == "cosine")
        mixed = lax.dot_general(softmax(similarities, 0), x, (((0,), (0,)), ((), ())), precision=_HIGHEST)
        return _put(carry, ((1 - share) * part.map + share * mixed, softmax), start)

    floats = [jnp.zeros((len(x),), x.dtype) for _ in _Softmax._fields]
    mixed, softmax = _over_blocks(len(x), block, body, (jnp.zeros_like(x), _Softmax(*floats)))
    return mixed, (sides, mixed, softmax)


def _aggregate_backward(metric: str, share: float, block: int, saved: tuple, gradient: jax.Array) -> tuple:
    """Goes over the tiles on and above the diagonal: each serves the softmax of its rows and that of its columns.

    With g the gradient of the result, s_jk the similarity of k in row j, and W_jk its softmax in that row: dW_jk =
    share g_j . x_k and ds_jk = sharpness_j W_jk (dW_jk - sum_k W_jk dW_jk), the sum being share g_j . (W x)_j.
    """
    sides, mixed, softmax = saved
    x = sides.map
    offset = jnp.sum(gradient * (mixed - (1 - share) * x), axis=-1)
    everything = sides, gradient, softmax, offset

    def tile(carry: _Sides, top: Any, height: int, left: Any, width: int, weight: float) -> _Sides:
        rows, row_gradient, row_softmax, row_offset = _cut(everything, top, height)
        columns, column_gradient, column_softmax, column_offset = _cut(everything, left, width)
        (across, down), pull = jax.vjp(functools.partial(_similarities, metric=metric), rows, columns)
        row_weights, column_weights = weight * row_softmax(across, axis=1), weight * column_softmax(down, axis=0)
        d_across = share * _product(row_gradient, columns.map) - row_offset[:, None]
        d_across *= row_weights * row_softmax.sharpness[:, None]
        d_down = share * _product(rows.map, column_gradient) - column_offset
        d_down *= column_weights * column_softmax.sharpness
        d_rows, d_columns = pull((d_across, d_down))
        # The gradient through x_k as a value in the sum W x.
        row_values = share * jnp.matmul(column_weights, column_gradient, precision=_HIGHEST)
        column_values = share * jnp.matmul(row_weights.T, row_gradient, precision=_HIGHEST)
        carry = _add(carry, d_rows._replace(map=d_rows.map + row_values), top)
        return _add(carry, d_columns._replace(map=d_columns.map + column_values), left)

    def strip(carry: _Sides, left: Any, width: int) -> _Sides:
        if len(x) > block:
            above = lambda k, carry: tile(carry, k * block, block, left, width, 1.0)  # noqa: E731
            carry = lax.fori_loop(0, left // block, above, carry)
        # A tile on the diagonal counts each pair twice, once for its row and once for its column.
        return tile(carry, left, width, left, width, 0.5)

    start = _Sides((1 - share) * gradient, jnp.zeros_like(sides.other))
    return (_over_blocks(len(x), block, strip, start),)


_aggregate.defvjp(_aggregate_forward, _aggregate_backward)
