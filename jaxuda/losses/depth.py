"""Depth regression."""

import jax
import jax.numpy as jnp

from jaxuda.losses.reduction import global_max, masked_mean


def berhu(prediction: jax.Array, target: jax.Array, *, axis_name: str | None = None) -> jax.Array:
    """Reverse Huber loss (Laina et al., 3DV 2016, equation 1; used by DADA, Vu et al., ICCV 2019).

    With a = |prediction - target| and c = 0.2 * max(a) over the global batch: a where a <= c, else
    (a^2 + c^2) / (2c). The threshold c carries no gradient.

    Args:
      prediction: (N, H, W, 1) or (N, H, W) float.
      target: (N, H, W), in the same unit.
      axis_name: device axis over which the maximum and the mean are taken.

    Returns:
      Scalar; 0 where prediction and target agree everywhere.
    """
    difference = prediction.reshape(target.shape) - target
    error = difference * jnp.sign(difference)  # unlike abs, this has no gradient at 0
    threshold = 0.2 * global_max(error, axis_name)
    divisor = 2 * jnp.where(threshold > 0, threshold, 1)
    quadratic = (jnp.square(error) + jnp.square(threshold)) / divisor
    return masked_mean(jnp.where(error <= threshold, error, quadratic), axis_name=axis_name)
