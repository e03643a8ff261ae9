"""Learning rates over the steps of a stage."""

from __future__ import annotations

import jax.numpy as jnp
import optax


def poly_schedule(lr: float, max_steps: int, power: float = 0.9) -> optax.Schedule:
    """lr(k) = lr * (1 - k / max_steps) ** power, k counting optimizer updates from 0."""
    return lambda step: lr * jnp.maximum(1.0 - step / max_steps, 0.0) ** power
