"""One file per adaptation method, found by its name.

A method is a module with two pure functions:

    init(key, *, model, batch, config, artifacts) -> (extra_params, extra)
    train_step(state, batch, key, *, model, tx, config, axis_name=None) -> (state, metrics)

and optionally `predict(variables, images, *, model, config) -> probabilities`. `batch` holds normalised float
images and int32 labels; `metrics` are scalars that are already equal on all devices.
"""

from __future__ import annotations

from types import ModuleType

from jaxuda import plugins


def names() -> list[str]:
    """The methods that exist: every module here that has a train step."""
    return plugins.names(__name__, "train_step")


def load(name: str) -> ModuleType:
    """The method called `name`; raises UserError with the known names if there is none."""
    return plugins.load(__name__, "train_step", name, "train")
