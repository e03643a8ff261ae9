"""Learning rates over the steps of a stage."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax


def poly_schedule(
    lr: float,
    max_steps: int,
    power: float = 0.9,
    warmup_steps: int = 0,
    warmup_ratio: float = 0.0,
    start: int = 0,
) -> optax.Schedule:
    """lr(k) = lr * (1 - k / max_steps) ** power, k counting steps from 0; the first update is that of step `start`.

    While k < warmup_steps, this is multiplied by a factor that grows linearly from `warmup_ratio` to 1.
    """

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        step = start + jnp.asarray(step, float)  # a count is int32, whose quotient would be float32 also among float64
        rate = lr * jnp.maximum(1.0 - step / max_steps, 0.0) ** power
        if not warmup_steps:
            return rate
        # Not 1 - (1 - step / warmup_steps) * (1 - warmup_ratio): in float32 this loses a small ratio.
        return rate * (warmup_ratio + (1.0 - warmup_ratio) * jnp.minimum(step / warmup_steps, 1.0))

    return schedule
