"""Contrast of pixels with the distributions of class features, and the running statistics that describe them.

Li et al., Semantic Distribution-aware Contrastive Adaptation for Semantic Segmentation, arXiv 2105.05013.
Everything is a product of (pixels x classes) with (pixels x channels) matrices: nothing of size pixels x
classes x channels exists at any time.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxuda.losses.reduction import masked_mean
from jaxuda.losses.segmentation import IGNORE

_HIGHEST = lax.Precision.HIGHEST


class ClassStatistics(NamedTuple):
    """Distribution of features per class, over all pixels seen so far.

    mean: (C, A) float.
    var: (C, A) float, biased; only the diagonal of the covariance is kept.
    count: (C,) float, number of pixels. Not an integer: long trainings would overflow 32 bits, while as a weight
      of past against new pixels a rounded count does no harm.
    """

    mean: jax.Array
    var: jax.Array
    count: jax.Array


def empty_statistics(num_classes: int, channels: int, dtype: str = "float32") -> ClassStatistics:
    """Statistics before the first pixel: all zero."""
    zeros = jnp.zeros((num_classes, channels), dtype)
    return ClassStatistics(zeros, zeros, jnp.zeros((num_classes,), dtype))


def update_statistics(
    stats: ClassStatistics, features: jax.Array, labels: jax.Array, axis_name: str | None = None
) -> ClassStatistics:
    """Statistics of everything seen before and of one more batch.

    With n pixels of a class in the batch, their mean m and biased variance v, and w = n / (n + count):
    var <- (1 - w) var + w v + w (1 - w) (mean - m)^2, mean <- (1 - w) mean + w m, count <- count + n. The result
    is the pooled mean and variance. Classes without pixels stay as they are. Carries no gradient.

    Args:
      stats: (C, A) statistics.
      features: (N, h, w, A) or (P, A) float.
      labels: (N, h, w) or (P,) integers in 0..C-1, or 255 = ignore.
      axis_name: device axis; the batch is then the joined one of all devices.

    Returns:
      Statistics of the same shapes and dtypes.
    """
    features = lax.stop_gradient(features).reshape(-1, features.shape[-1])
    features = features.astype(jnp.promote_types(features.dtype, jnp.float32))
    members = _members(labels, stats.mean.shape[0])
    weights = members.astype(features.dtype)

    def total(values: jax.Array) -> jax.Array:
        sums = jnp.matmul(weights.T, values, precision=_HIGHEST)
        return sums if axis_name is None else lax.psum(sums, axis_name)

    count = jnp.sum(members, axis=0, dtype=jnp.int32)
    count = (count if axis_name is None else lax.psum(count, axis_name)).astype(features.dtype)
    divisor = jnp.maximum(count, 1)[:, None]
    mean = total(features) / divisor
    # The centre comes from all devices before anything is squared: sums of squares would cancel in float32.
    centred = features - jnp.matmul(weights, mean, precision=_HIGHEST)
    var = total(jnp.square(centred)) / divisor

    new = (count / jnp.maximum(count + stats.count, 1))[:, None]
    spread = new * (1 - new) * jnp.square(stats.mean - mean)
    moved = ClassStatistics(
        stats.mean * (1 - new) + mean * new, stats.var * (1 - new) + var * new + spread, stats.count + count
    )
    return jax.tree.map(lambda after, before: after.astype(before.dtype), moved, stats)


def distribution_contrast(
    features: jax.Array, labels: jax.Array, stats: ClassStatistics, tau: float, axis_name: str | None = None
) -> jax.Array:
    """Contrastive loss against infinitely many draws from every class's distribution, in closed form.

    With features, means and variances scaled to unit length (hats), for pixel i and class c
    l_ic = (f^_i . mean^_c + 1/(2 tau) sum_a f^_ia^2 var^_ca) / tau; the loss is the mean over labelled pixels of
    -log softmax(l_i)[y_i] + 1/(2 tau^2) sum_a f^_ia^2 var^_{y_i,a}  (the paper's pixel loss with the covariances
    diagonal). At the paper's tau of 100 its value stays within 2 / tau of log C.

    Args:
      features: (N, h, w, A) or (P, A) float.
      labels: (N, h, w) or (P,) integers in 0..C-1, or 255 = ignore.
      stats: (C, A) statistics, constants here; a class never seen is all zero and counts as a negative with l = 0.
      tau: temperature, above 0.
      axis_name: device axis over which the mean is taken.

    Returns:
      Scalar; 0 if no pixel is labelled.
    """
    features = features.reshape(-1, features.shape[-1])
    features = _unit(features.astype(jnp.promote_types(features.dtype, jnp.float32)))
    mean, var = (_unit(lax.stop_gradient(rows)).astype(features.dtype) for rows in (stats.mean, stats.var))
    likeness = jnp.matmul(features, mean.T, precision=_HIGHEST)
    spread = jnp.matmul(jnp.square(features), var.T, precision=_HIGHEST) / (2 * tau)
    logits = (likeness + spread) / tau  # (P, C)

    own = jnp.where(_members(labels, mean.shape[0]), spread / tau - logits, 0)
    loss = jax.nn.logsumexp(logits, axis=-1) + jnp.sum(own, axis=-1)
    return masked_mean(loss, labels.reshape(-1) != IGNORE, axis_name)


def _members(labels: jax.Array, num_classes: int) -> jax.Array:
    """(P, C) bool: whether a pixel belongs to a class; ignored pixels belong to none."""
    return labels.reshape(-1, 1).astype(jnp.int32) == jnp.arange(num_classes)


def _unit(rows: jax.Array) -> jax.Array:
    """Rows scaled to unit length; a row of zeros stays zero and gets no gradient."""
    squares = jnp.sum(jnp.square(rows), axis=-1, keepdims=True)
    tiny = jnp.asarray(1e-24, rows.dtype)
    return rows * jnp.where(squares > tiny, lax.rsqrt(jnp.maximum(squares, tiny)), 0)
