"""One file per optimizer family, found by its name in `config.optim.name`.

A family is a module with one function,

    make(group, config) -> optax.GradientTransformation

which returns the optimizer for one of `GROUPS`. A network puts each of its parameters in a group (`parameter_group`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import optax

from jaxuda import plugins
from jaxuda.errors import UserError
from jaxuda.optimizers.schedules import poly_schedule

PyTree = Any
# Backbone convolutions are divided into "stem", "block" and "shortcut", since the published loops updated each a
# different number of times per step; "norm" is the affine part of normalisation.
GROUPS = ("stem", "block", "shortcut", "norm", "head")


def make_optimizer(config: Mapping[str, Any], model: Any) -> optax.GradientTransformation:
    """The optimizer of a training stage, partitioned over the groups of all parameters.

    Args:
      config: the stage's settings. Besides the family's own fields it reads `optim.name`, `optim.train_norm` (False
        freezes the group "norm"), `discriminator_lr` (Adam, where the method has a discriminator) and `train_head`
        (where it has a projection head: False freezes it, True trains it like the other heads).
      model: the network, which names the group of each of its parameters.

    Raises:
      UserError: the family is unknown. The optimizer's `init` raises one if the group of a parameter is unknown.
    """
    optim = config["optim"]
    family = plugins.load(__name__, "make", optim.get("name", "sgd"), "optim.name")
    transforms = {group: family.make(group, config) for group in GROUPS} | {"frozen": optax.set_to_zero()}
    if not optim["train_norm"]:
        transforms["norm"] = transforms["frozen"]
    if "discriminator_lr" in config:
        schedule = poly_schedule(config["discriminator_lr"], config["schedule_steps"], optim["power"])
        transforms["discriminator"] = optax.adam(schedule, b1=0.9, b2=0.99)
    if "train_head" in config:
        transforms["projection"] = transforms["head"] if config["train_head"] else transforms["frozen"]

    def group(path: tuple, _: Any) -> str:
        module, *rest = (entry.key for entry in path)
        found = "head"  # also for what a method adds to the network, such as a second classifier
        if module == "model":
            found = model.parameter_group(tuple(rest))
        elif module in ("discriminator", "projection"):
            found = module
        if found not in transforms:
            raise UserError(
                f"the parameter {module}.{'.'.join(rest)} is in the group '{found}', which the optimizer does not have "
                f"(it has: {', '.join(transforms)})"
            )
        return found

    return optax.partition(transforms, lambda params: jax.tree_util.tree_map_with_path(group, params))
