"""Orders in which labelled images are drawn: one file each, found by the name in a stage's `order`.

An order is a module with one function,

    order(labelled, unlabelled, count, config, artifacts) -> (count,) int32 indices of `labelled`, `Draws`, or None

labelled, unlabelled: the records that the stage learns from; unlabelled may be None.
count: steps * batch. The arguments alone decide the result, and a longer result begins with the shorter one: a run
  that resumes computes it again and continues in the middle.
config: the stage's settings; `seed` decides the draws.
artifacts: the artifacts of earlier stages for this stage, stage -> folder.

`jaxuda.data.input.Draws` also says which class each crop should show. None: the input decides the order, and shuffles
anew every epoch.
"""

from __future__ import annotations

from types import ModuleType

from jaxuda import plugins


def load(name: str) -> ModuleType:
    """The order called `name`, of jaxuda or (a dotted path) of the user; see `plugins.load`."""
    return plugins.load(__name__, "order", name, "order")
