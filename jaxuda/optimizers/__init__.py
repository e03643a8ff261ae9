"""One file per optimizer family, found by its name in `config.optim.name`.

A family is a module with one function,

    make(group, config, start=0) -> optax.GradientTransformation

which returns the optimizer for one of `GROUPS`, whose first update is that of step `start`. A network puts each of its
parameters in a group (`parameter_group`). `start` is only given for modules of a method that learn later than the
network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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
        freezes the group "norm"), `discriminator_lr` (Adam, where the method has a discriminator) and, where it has a
        projection head, which learns like the other heads, `train_head` (False freezes it) or `contrast_start` (the
        step until which it is held).
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
    if "contrast_start" in config:
        transforms["projection"] = hold(family.make("head", config, config["contrast_start"]), config["contrast_start"])
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


class Held(NamedTuple):
    """step: int32 scalar, the number of updates so far. inner: the state of the optimizer that is held."""

    step: jax.Array
    inner: PyTree


def hold(inner: optax.GradientTransformation, start: int) -> optax.GradientTransformation:
    """`inner` from update `start` on, counted from 0; before, neither the parameters nor its state change."""

    def init(params: PyTree) -> Held:
        return Held(jnp.zeros((), jnp.int32), inner.init(params))

    def update(grads: PyTree, state: Held, params: PyTree) -> tuple[PyTree, Held]:
        released = state.step >= start
        updates, moved = inner.update(grads, state.inner, params)
        updates = jax.tree.map(lambda x: jnp.where(released, x, 0), updates)
        moved = jax.tree.map(lambda after, before: jnp.where(released, after, before), moved, state.inner)
        return updates, Held(state.step + 1, moved)

    return optax.GradientTransformation(init, update)
