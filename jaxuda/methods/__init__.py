"""One file per adaptation method, found by its name.

A method is a module with two pure functions:

    init(key, *, model, batch, config, artifacts) -> (extra_params, extra)
    train_step(state, batch, key, *, model, tx, config, axis_name=None) -> (state, metrics)

and optionally `predict(variables, images, *, model, config) -> probabilities`. `batch` holds normalised float
images and int32 labels; `metrics` are scalars that are already equal on all devices.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from jaxuda.errors import UserError


def names() -> list[str]:
    """The methods that exist: every module here that has a train step."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return [name for name in found if hasattr(importlib.import_module(f"{__name__}.{name}"), "train_step")]


def load(name: str) -> ModuleType:
    """The method called `name`; raises UserError with the known names if there is none."""
    if name not in names():
        raise UserError(f"there is no method '{name}' (known: {', '.join(names())}); mend the stage's field `train`")
    return importlib.import_module(f"{__name__}.{name}")
