"""Everything that changes during training, in one checkpointed pytree."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

PyTree = Any


@flax.struct.dataclass
class TrainState:
    """The state of one training stage.

    Attributes:
      step: int32 scalar, the number of optimizer updates done.
      params: one entry per learnable module: "model", and those that a method adds ("discriminator", ...).
      opt_state: the state of the one optimizer, which is partitioned over all of `params`.
      batch_stats: running means and variances of the model's batch normalisation.
      extra: the method's own pytree (teacher, memories, statistics, ...); never differentiated.
    """

    step: jax.Array
    params: dict[str, PyTree]
    opt_state: PyTree
    batch_stats: PyTree
    extra: PyTree

    @classmethod
    def create(
        cls,
        params: dict[str, PyTree],
        tx: optax.GradientTransformation,
        batch_stats: PyTree,
        extra: PyTree = (),
    ) -> TrainState:
        """A state before its first update."""
        return cls(jnp.zeros((), jnp.int32), params, tx.init(params), batch_stats, extra)

    def apply_gradients(self, grads: dict[str, PyTree], tx: optax.GradientTransformation) -> TrainState:
        """One optimizer update with the global gradient, a tree like `params`."""
        updates, opt_state = tx.update(grads, self.opt_state, self.params)
        return self.replace(step=self.step + 1, params=optax.apply_updates(self.params, updates), opt_state=opt_state)
