"""One update from several parts of a batch, whose gradients are added up: large batches on a device with little memory.

The gradient is the mean of those of the parts. It is that of the whole batch where a loss is a mean over as many
pixels in each part and nothing is computed over the batch; batch normalisation, Lovasz terms, statistics and memories
see a part at a time and move with each. The schedule counts updates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxuda.errors import UserError
from jaxuda.train_state import TrainState

PyTree = Any
# In the place of the optimizer's, the state is the sum of the gradients so far.
_COLLECT = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, total, params=None: (jax.tree.map(jnp.zeros_like, grads), jax.tree.map(jnp.add, total, grads)),
)


def in_parts(train_step: Callable, tx: optax.GradientTransformation, parts: int) -> Callable:
    """`step(state, batch, key, axis_name)` of one update.

    Args:
      train_step: a method's, with all but state, batch, key, `tx` and `axis_name` given.
      tx: the optimizer.
      parts: as many as the batch on each device is cut into. With 1 nothing is cut, and there is no loop, in which
        XLA's convolutions on CPU are many times slower.
    """

    def step(state: TrainState, batch: PyTree, key: jax.Array, axis_name: str | None) -> tuple[TrainState, dict]:
        if parts == 1:
            return train_step(state, batch, key, tx=tx, axis_name=axis_name)

        def add(carry: tuple, numbered: tuple) -> tuple[tuple, dict]:
            (batch_stats, extra, total), (index, part) = carry, numbered
            before = state.replace(batch_stats=batch_stats, extra=extra, opt_state=total)
            own_key = jax.random.fold_in(key, index)
            after, metrics = train_step(before, part, own_key, tx=_COLLECT, axis_name=axis_name)
            return (after.batch_stats, after.extra, after.opt_state), metrics

        start = state.batch_stats, state.extra, _COLLECT.init(state.params)
        (batch_stats, extra, total), metrics = lax.scan(add, start, (jnp.arange(parts), split(batch, parts)))
        grads = jax.tree.map(lambda x: x / parts, total)
        # Each part has taken the mean over devices already.
        state = state.apply_gradients(grads, tx, axis_name=None, batch_stats=batch_stats, extra=extra)
        return state, jax.tree.map(lambda x: jnp.mean(x, axis=0), metrics)

    return step


def split(batch: PyTree, parts: int) -> PyTree:
    """Each (N, ...) as (parts, N / parts, ...), image n in part n % parts, so that devices do not matter."""

    def cut(x: jax.Array) -> jax.Array:
        if len(x) % parts:
            raise UserError(
                f"accumulate={parts} does not divide the {len(x)} images per device: change the stage's batch or "
                "accumulate, or config.devices"
            )
        return jnp.moveaxis(x.reshape(len(x) // parts, parts, *x.shape[1:]), 1, 0)

    return jax.tree.map(cut, batch)
