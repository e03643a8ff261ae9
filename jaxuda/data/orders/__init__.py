"""In which order labelled images are drawn: one file each, found by its name in a stage's `order`.

An order is a module with one function,

    order(labelled, unlabelled, count, config, artifacts) -> (count,) int32 indices of `labelled`, or None

labelled, unlabelled: the records that the stage learns from; unlabelled may be None.
count: steps * batch. The result follows from the arguments alone, and a longer one begins with a shorter one: a run
  that resumes makes it again and goes on in the middle.
config: the stage's settings; `seed` decides the draws.
artifacts: what earlier stages left for the stage, stage -> folder.

None leaves the order to the input, which shuffles anew every epoch.
"""

from __future__ import annotations

from types import ModuleType

from jaxuda import plugins


def load(name: str) -> ModuleType:
    """The order called `name`, of jaxuda or (a dotted path) of the user's; see `plugins.load`."""
    return plugins.load(__name__, "order", name, "order")
