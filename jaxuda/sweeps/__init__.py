"""Forward-only walks over a dataset: evaluation, predictions, statistics, rankings, pseudo-labels.

A sweep that can be a stage of a recipe is a module with one function:

    run(variables, domains, folder, *, model, method, config, devices, say) -> None

It leaves its artefacts in `folder` and may be called again after it was interrupted. `variables` and `method` are
None where the stage starts from no other: such a sweep looks at the data alone.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from jaxuda.errors import UserError


def names() -> list[str]:
    """The sweeps that can be stages: every module here that has `run`."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return [name for name in found if hasattr(importlib.import_module(f"{__name__}.{name}"), "run")]


def load(name: str) -> ModuleType:
    """The sweep called `name`; raises UserError with the known names if there is none."""
    if name not in names():
        raise UserError(f"there is no sweep '{name}' (known: {', '.join(names())}); mend the stage's field `sweep`")
    return importlib.import_module(f"{__name__}.{name}")
