"""Forward-only passes over a dataset: evaluation, predictions, statistics, rankings, pseudo-labels.

A sweep that can be a stage of a recipe is a module with one function:

    run(variables, domains, folder, *, model, method, config, devices, say) -> None

It writes its artifacts to `folder` and may be called again after an interruption. `variables` and `method` are None
if the stage starts from no other stage: such a sweep uses the data alone.
"""

from __future__ import annotations

from types import ModuleType

from jaxuda import plugins


def names() -> list[str]:
    """The sweeps that can be stages: every module here that has `run`."""
    return plugins.names(__name__, "run")


def load(name: str) -> ModuleType:
    """The sweep called `name`; raises UserError with the known names if there is none."""
    return plugins.load(__name__, "run", name, "sweep")
