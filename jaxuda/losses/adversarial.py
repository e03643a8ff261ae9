"""Adversarial losses on a domain discriminator's output."""

import jax
import jax.numpy as jnp

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


def class_domain_ce(logits: jax.Array, probs: jax.Array, domain: int, *, axis_name: str | None = None) -> jax.Array:
    """Cross-entropy over the classes of both domains, with soft labels in one domain (FADA, equations 4 to 7).

    Args:
      logits: (..., 2C) float: the C source classes, then the C target classes.
      probs: (..., C), the soft labels; they need not sum to 1.
      domain: 0 = source, 1 = target: the domain of the soft labels; those of the other domain are 0.
      axis_name: device axis over which the mean is taken.

    Returns:
      Scalar: mean over positions of -sum_c probs_c * log softmax(logits)_(domain, c).

    Raises:
      ValueError: the logits do not have twice as many channels as the soft labels.
    """
    classes = probs.shape[-1]
    if logits.shape != (*probs.shape[:-1], 2 * classes):
        raise ValueError(f"logits {logits.shape} must have twice as many channels as the soft labels {probs.shape}")
    log_probs = jax.nn.log_softmax(logits)[..., domain * classes : (domain + 1) * classes]
    return masked_mean(-jnp.sum(probs * log_probs, axis=-1), axis_name=axis_name)
