"""Adversarial losses on a domain discriminator's output."""

import jax

from jaxuda.losses.reduction import masked_mean

SOURCE = 0
TARGET = 1


def domain_bce(logits: jax.Array, domain: int, *, axis_name: str | None = None) -> jax.Array:
    """Binary cross-entropy of discriminator logits against one domain label.

    Args:
      logits: any shape, float; positive means target.
      domain: 0 = source, 1 = target; the same for all entries.
      axis_name: device axis over which the mean is taken.

    Returns:
      Scalar: mean of softplus(z) - domain * z.
    """
    return masked_mean(jax.nn.softplus(logits) - domain * logits, axis_name=axis_name)
