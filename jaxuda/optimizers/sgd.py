"""SGD as the published training loops of segmentation networks define it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxuda.errors import UserError
from jaxuda.optimizers.schedules import poly_schedule

PyTree = Any


def make(group: str, config: Any, start: int = 0) -> optax.GradientTransformation:
    """The optimizer of one group of a network's parameters.

    Args:
      group: one of `optimizers.GROUPS`.
      config: the stage's settings. It reads `lr`, `schedule_steps`, and from `optim`: `head_factor` (the learning rate
        of heads is this many times larger), `momentum`, `weight_decay`, `power`, `repeat` (updates per step for
        "stem", "block", "shortcut") and `repeat_decay`.
      start: the step of its first update.
    """
    optim = config["optim"]
    factor = optim["head_factor"] if group == "head" else 1.0
    schedule = poly_schedule(config["lr"] * factor, config["schedule_steps"], optim["power"], start=start)
    repeat = optim["repeat"].get(group, 1)
    return sgd(schedule, optim["momentum"], optim["weight_decay"], repeat, optim["repeat_decay"])


class SGDState(NamedTuple):
    """step: int32 scalar. momentum: a pytree with the shapes and dtypes of the parameters."""

    step: jax.Array
    momentum: PyTree


def sgd(
    schedule: optax.Schedule,
    momentum: float,
    weight_decay: float,
    repeat: int = 1,
    repeat_decay: str = "fresh",
) -> optax.GradientTransformation:
    """SGD with momentum and coupled weight decay as torch computes it, optionally with repeated updates.

    One update is `buffer = momentum * buffer + gradient + weight_decay * weight; weight -= lr * buffer`.

    Args:
      schedule: learning rate for each step.
      momentum: 0..1.
      weight_decay: added to the gradient before the momentum.
      repeat: how many times the whole update runs per step with the same gradient. The loops of the ADVENT
        family did this by accident: they listed each backbone weight once per enclosing module.
      repeat_decay: "fresh": each repetition adds the decay to the original gradient (torch 1.6 and later);
        "accumulate": it adds the decay to the decayed gradient of the repetition before (torch 0.4 to 1.2).
    """
    if repeat_decay not in ("fresh", "accumulate"):
        raise UserError(f"config.optim.repeat_decay={repeat_decay} is unknown; choose fresh or accumulate")
    accumulate = repeat_decay == "accumulate"

    def init(params: PyTree) -> SGDState:
        return SGDState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(grads: PyTree, state: SGDState, params: PyTree) -> tuple[PyTree, SGDState]:
        lr = schedule(state.step)

        def move(grad: jax.Array, buffer: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
            weight = start
            for _ in range(repeat):
                decayed = grad + weight_decay * weight
                if accumulate:
                    grad = decayed
                buffer = momentum * buffer + decayed
                weight = weight - (lr * buffer).astype(weight.dtype)
            return weight - start, buffer

        leaves, structure = jax.tree.flatten(grads)
        moved = list(map(move, leaves, jax.tree.leaves(state.momentum), jax.tree.leaves(params)))
        updates, buffers = (structure.unflatten([pair[i] for pair in moved]) for i in (0, 1))
        return updates, SGDState(state.step + 1, buffers)

    return optax.GradientTransformation(init, update)
