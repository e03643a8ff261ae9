"""Entropy of predictions (Vu et al., ADVENT, CVPR 2019)."""

import jax
import jax.numpy as jnp

from jaxuda.losses.reduction import masked_mean


def entropy_map(probs: jax.Array) -> jax.Array:
    """Weighted self-information -p log2(p + 1e-30) / log2(C) of probabilities (..., C), in that shape."""
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
