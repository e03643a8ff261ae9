"""Updates of a method on normalised batches, for tests of methods."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax

from jaxuda.methods import Start
from jaxuda.training.start import method_start
from jaxuda.training.step import make_update


def begin(
    method: ModuleType, model: Any, config: Any, batch: dict, artifacts: dict | None = None, variables: Any = None
) -> Start:
    """What the method's `init` adds."""
    return method_start(method, jax.random.key(0), model, batch, config, artifacts or {}, {}, variables)


def update(method: ModuleType, model: Any, tx: Any, config: Any) -> Callable:
    """`step(state, batch) -> (state, metrics)`, not compiled."""
    step = make_update(method, model, tx, config)
    return lambda state, batch: step(state, (), 0, batch)
