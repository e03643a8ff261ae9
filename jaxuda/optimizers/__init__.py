"""One file per optimizer family, found by its name in `config.optim.name`.

A family is a module with one function,

    make(group, config) -> optax.GradientTransformation

the optimizer of one of `GROUPS`, the groups into which a network sorts its parameters (`parameter_group`).
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
# Backbone convolutions are told apart as "stem", "block" and "shortcut" because the published loops moved them a
# different number of times; "norm" is the affine part of normalisation.
GROUPS = ("stem", "block", "shortcut", "norm", "head")


def make_optimizer(config: Mapping[str, Any], model: Any) -> optax.GradientTransformation:
    """The optimizer of a training stage: one, partitioned over the groups of everything that learns.

    Args:
      config: the stage's settings. Beside what the family reads: `optim.name`, `optim.train_norm` (False freezes the
        group "norm"), `discriminator_lr` (Adam, where the method has a discriminator) and `train_head` (where it has a
        projection head: whether that learns, like the other heads).
      model: the network, which sorts its parameters.

    Raises:
      UserError: there is no such family. `init` raises one where a parameter is of an unknown group.
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
        found = "head"  # also what a method adds beside the network, such as a second classifier
        if module == "model":
            found = model.parameter_group(tuple(rest))
        elif module in ("discriminator", "projection"):
            found = module
        if found not in transforms:
            raise UserError(
                f"the parameter {module}.{'.'.join(rest)} is of the group '{found}', which the optimizer does not have "
                f"(it has: {', '.join(transforms)})"
            )
        return found

    return optax.partition(transforms, lambda params: jax.tree_util.tree_map_with_path(group, params))
