"""Entropy of predictions (Vu et al., ADVENT, CVPR 2019)."""

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from jaxuda.losses.reduction import masked_mean


def entropy_map(probs: jax.Array) -> jax.Array:
    """Weighted self-information -p log2(p + 1e-30) / log2(C) of probabilities (..., C), in the same shape."""
    return -probs * jnp.log2(probs + 1e-30) / jnp.log2(jnp.asarray(probs.shape[-1], probs.dtype))


def entropy_loss(probs: jax.Array, *, axis_name: str | None = None) -> jax.Array:
    """Mean over pixels of the normalised entropy, in 0..1 (equation 3).

    Args:
      probs: (..., C) float probabilities, for instance (N, H, W, C).
      axis_name: device axis over which the mean is taken.

    Returns:
      Scalar.
    """
    return masked_mean(jnp.sum(entropy_map(probs), axis=-1), axis_name=axis_name)


def adaptive_entropy(probs: jax.Array, opening: float | jax.Array, *, axis_name: str | None = None) -> jax.Array:
    """Entropy above a margin, so that well aligned entries get no gradient (Huang et al., CrCDA, ECCV 2020).

    With e = `entropy_map(probs)` and R = opening * mean of e over positions and classes, a constant in the gradient,
    the loss is the mean over positions of the sum over classes of max(e - R, 0).

    Args:
      probs: (..., C) float probabilities.
      opening: size of the margin, from 1 (entries below the mean entropy do not count) to 0 (`entropy_loss`).
      axis_name: device axis over which both means are taken.

    Returns:
      Scalar.
    """
    values = entropy_map(probs)
    margin = opening * masked_mean(stop_gradient(values), axis_name=axis_name)
    return masked_mean(jnp.sum(jax.nn.relu(values - margin), axis=-1), axis_name=axis_name)
