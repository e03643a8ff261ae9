"""A user's optimizer family: each weight moves by the learning rate, against the sign of its momentum."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxuda.optimizers.schedules import poly_schedule


def make(group: str, config: Any) -> optax.GradientTransformation:
    """The optimizer of one group of parameters; heads move `optim.head_factor` times as far."""
    optim = config["optim"]
    factor = optim["head_factor"] if group == "head" else 1.0
    schedule = poly_schedule(config["lr"] * factor, config["schedule_steps"])
    sign = optax.stateless(lambda updates, params: jax.tree.map(jnp.sign, updates))
    return optax.chain(optax.trace(optim["momentum"]), sign, optax.scale_by_learning_rate(schedule))
