"""Supervised segmentation losses."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxuda.losses.reduction import global_sum, masked_mean

IGNORE = 255


def cross_entropy(
    logits: jax.Array, labels: jax.Array, *, weights: Sequence[float] = (), axis_name: str | None = None
) -> jax.Array:
    """Mean over labelled pixels of -log softmax(logits)[label], weighted by class.

    Args:
      logits: (..., C) float, for instance (N, H, W, C).
      labels: (...) integers in 0..C-1, or 255 = ignore.
      weights: C class weights; empty: all are the same. Only their ratios matter.
      axis_name: device axis over which the mean is taken.

    Returns:
      Scalar; 0 if no pixel is labelled.
    """
    labels = labels.astype(jnp.int32)
    losses, chosen = _pixel_losses(logits, labels)
    if not len(weights):
        return masked_mean(losses, labels != IGNORE, axis_name)
    weight = jnp.sum(jnp.where(chosen, jnp.asarray(weights, losses.dtype), 0), axis=-1)  # 0 where ignored
    total = global_sum(weight, axis_name)
    return global_sum(weight * losses, axis_name) / jnp.where(total > 0, total, 1)


def weighted_cross_entropy(
    logits: jax.Array, labels: jax.Array, weights: jax.Array | None = None, axis_name: str | None = None
) -> jax.Array:
    """Mean over ALL pixels of weight * -log softmax(logits)[label], where ignored pixels contribute 0.

    This is the loss of self-training with a teacher (Tranheden et al., DACS, WACV 2021; Hoyer et al., DAFormer,
    CVPR 2022). `cross_entropy` divides by the number of labelled pixels instead.

    Args:
      logits: (..., C) float, for instance (N, H, W, C).
      labels: (...) integers in 0..C-1, or 255 = ignore.
      weights: (...) float, one per pixel; None: all are 1.
      axis_name: device axis over which the mean is taken.

    Returns:
      Scalar; 0 if no pixel is labelled.
    """
    losses, _ = _pixel_losses(logits, labels.astype(jnp.int32))
    if weights is not None:
        losses = losses * weights.astype(losses.dtype)
    return masked_mean(jnp.where(labels != IGNORE, losses, 0), axis_name=axis_name)


def _pixel_losses(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """-log softmax(logits)[label] (...), of no meaning where ignored, and whether a label is each class, (..., C)."""
    logits = _at_least_float32(logits)
    # A comparison instead of a gather: its gradient is elementwise, not a scatter.
    chosen = labels[..., None] == jnp.arange(logits.shape[-1])
    picked = jnp.sum(jnp.where(chosen, logits, 0), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - picked, chosen


def lovasz_softmax(probs: jax.Array, labels: jax.Array, *, axis_name: str | None = None) -> jax.Array:
    """Lovasz-softmax over the whole batch (Berman et al., CVPR 2018, equations 8, 9 and 11).

    For each class present in the labels, the errors |1[label = c] - p_c| of all labelled pixels are sorted in
    decreasing order and weighted with the steps of the Jaccard loss; the result is the mean over present
    classes. With `axis_name` the errors of all devices are sorted together, so that N devices give the same value
    as one.

    Args:
      probs: (..., C) probabilities, for instance (N, H, W, C).
      labels: (...) integers in 0..C-1, or 255 = ignore.
      axis_name: device axis over which pixels are gathered.

    Returns:
      Scalar; 0 if no pixel is labelled.
    """
    classes = probs.shape[-1]
    labels = labels.astype(jnp.int32).reshape(-1)
    probs = _at_least_float32(probs).reshape(-1, classes).T  # (C, P)
    valid = labels != IGNORE
    hits = labels == jnp.arange(classes)[:, None]
    # The sign is known, so no absolute value with its kink is needed; unlabelled pixels are sorted last.
    errors = jnp.where(valid, jnp.where(hits, 1 - probs, probs), -1)

    # The weights are constants in the gradient. In the order of the pixels they make the loss a plain dot
    # product: no derivative of a sort is needed, and each of several devices needs only the weights of its own
    # pixels.
    fixed, owners = lax.stop_gradient(errors), hits
    if axis_name is not None:
        fixed = lax.all_gather(fixed, axis_name, axis=1, tiled=True)
        owners = lax.all_gather(hits, axis_name, axis=1, tiled=True)
    weights = lax.map(lambda row: _jaccard_steps(*row), (fixed, owners))
    present = jnp.any(owners, axis=1)
    if axis_name is not None:
        weights = lax.dynamic_slice_in_dim(weights, lax.axis_index(axis_name) * labels.size, labels.size, axis=1)
    total = global_sum(jnp.where(present[:, None], errors * weights, 0), axis_name)
    return total / jnp.maximum(jnp.sum(present), 1)


def _jaccard_steps(errors: jax.Array, hits: jax.Array) -> jax.Array:
    """Weight of each pixel for one class: how much its error, at its rank, adds to the Jaccard loss.

    Args:
      errors: (P,), at least 0, or negative where the pixel does not count.
      hits: (P,) bool, pixels of the class.

    Returns:
      (P,) weights, 0 where the pixel does not count.
    """
    falling, order = lax.sort_key_val(-errors, jnp.arange(errors.size, dtype=jnp.int32))
    hits = hits[order]
    others = ~hits & (falling <= 0)
    foreground = jnp.sum(hits)
    missed = jnp.cumsum(hits)
    union = foreground + jnp.cumsum(others)
    jaccard = (1 - (foreground - missed) / jnp.maximum(union, 1)).astype(errors.dtype)
    steps = jnp.diff(jaccard, prepend=jnp.zeros((1,), errors.dtype))
    return jnp.zeros_like(errors).at[order].set(steps, unique_indices=True)


def _at_least_float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
