"""How losses reduce over devices: sums and counts are added over the devices, then they are divided.

Every loss returns the global value, the same on each device. A step that differentiates it and takes `pmean`
of the gradients once gets the gradient that a single device computes on the whole batch.
"""

import jax
import jax.numpy as jnp
from jax import lax


def global_sum(x: jax.Array, axis_name: str | None = None) -> jax.Array:
    """Sum of all entries over all devices of `axis_name`, a scalar."""
    total = jnp.sum(x)
    return total if axis_name is None else lax.psum(total, axis_name)


def global_max(x: jax.Array, axis_name: str | None = None) -> jax.Array:
    """Largest entry over all devices, a scalar that carries no gradient."""
    largest = jnp.max(lax.stop_gradient(x))
    return largest if axis_name is None else lax.pmax(largest, axis_name)


def masked_mean(values: jax.Array, mask: jax.Array | None = None, axis_name: str | None = None) -> jax.Array:
    """Mean of `values` where `mask` (bool, same shape; None: everywhere) over all devices; 0 if the mask is empty.

    Masked entries must be finite for their gradient to be zero rather than NaN.
    """
    if mask is None:
        mask = jnp.ones(values.shape, bool)
    total = global_sum(jnp.where(mask, values, 0), axis_name)
    # The count is an integer: a float32 sum of ones is not exact beyond 2**24 pixels.
    count = global_sum(mask.astype(jnp.int32), axis_name)
    return total / jnp.maximum(count, 1).astype(total.dtype)
