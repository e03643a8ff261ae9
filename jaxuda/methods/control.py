"""Control: what training on both domains gains without any loss on the target.

The supervised loss on the source, and a forward pass on the target that moves the statistics of batch normalisation.
All else is as in the adaptation stage, so that the gain of a method can be measured against this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxuda.methods import Carry, Keys
from jaxuda.methods.supervised import forward, source_pass

PyTree = Any


def passes(config: Any, step: int) -> tuple[Callable, ...]:
    """The source pass, then the target pass, as in the other methods."""
    return source_pass, target_pass


def target_pass(
    params: PyTree, carry: Carry, batch: PyTree, *, model: Any, keys: Keys, axis_name: str | None, **_: Any
) -> tuple[jax.Array, Carry]:
    """A forward pass in training mode, and a loss of 0."""
    images = batch["target"]["image"]
    _, carry = forward(model, params["model"], carry, images, keys=keys, use="target", axis_name=axis_name)
    return jnp.zeros((), images.dtype), carry
