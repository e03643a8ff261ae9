"""Optimizers as the published training loops define them, one partitioned optimizer for all players."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxuda.errors import UserError

PyTree = Any


def poly_schedule(lr: float, max_steps: int, power: float = 0.9) -> optax.Schedule:
    """lr(k) = lr * (1 - k / max_steps) ** power, k counting optimizer updates from 0."""
    return lambda step: lr * jnp.maximum(1.0 - step / max_steps, 0.0) ** power


class SGDState(NamedTuple):
    """step: int32 scalar. momentum: like the parameters."""

    step: jax.Array
    momentum: PyTree


def sgd(
    schedule: optax.Schedule,
    momentum: float,
    weight_decay: float,
    repeat: int = 1,
    repeat_decay: str = "fresh",
) -> optax.GradientTransformation:
    """SGD with momentum and coupled weight decay as torch computes it, optionally with repeated updates.

    One update is `buffer = momentum * buffer + gradient + weight_decay * weight; weight -= lr * buffer`.

    Args:
      schedule: learning rate for each step.
      momentum: 0..1.
      weight_decay: added to the gradient before the momentum.
      repeat: how many times the whole update runs per step with the same gradient. The loops of the ADVENT
        family listed each backbone weight once per enclosing module and so did this without meaning to.
      repeat_decay: "fresh", each repetition decays from the gradient as it came (torch 1.6 and later);
        "accumulate", the decayed gradient is what the next repetition starts from (torch 0.4 to 1.2).
    """
    if repeat_decay not in ("fresh", "accumulate"):
        raise UserError(f"config.optim.repeat_decay={repeat_decay} is unknown; choose fresh or accumulate")
    accumulate = repeat_decay == "accumulate"

    def init(params: PyTree) -> SGDState:
        return SGDState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(grads: PyTree, state: SGDState, params: PyTree) -> tuple[PyTree, SGDState]:
        lr = schedule(state.step)

        def move(grad: jax.Array, buffer: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
            weight = start
            for _ in range(repeat):
                decayed = grad + weight_decay * weight
                if accumulate:
                    grad = decayed
                buffer = momentum * buffer + decayed
                weight = weight - (lr * buffer).astype(weight.dtype)
            return weight - start, buffer

        leaves, structure = jax.tree.flatten(grads)
        moved = list(map(move, leaves, jax.tree.leaves(state.momentum), jax.tree.leaves(params)))
        updates, buffers = (structure.unflatten([pair[i] for pair in moved]) for i in (0, 1))
        return updates, SGDState(state.step + 1, buffers)

    return optax.GradientTransformation(init, update)


def parameter_group(path: tuple[str, ...], train_norm: bool) -> str:
    """The optimizer group of one parameter, from its path in `TrainState.params`.

    Backbone convolutions are told apart as "stem", "block" and "shortcut" because the published loops moved
    them a different number of times; "norm" is the affine part of batch normalisation.
    """
    player, *rest = path
    if player in ("discriminator", "projection"):
        return player
    if player != "model" or rest[0] != "backbone":
        return "head"  # also what a method adds beside the network, such as a second classifier
    layer = rest[-2]
    if layer.startswith("bn") or layer.endswith("_bn"):
        return "norm" if train_norm else "frozen"
    if layer.startswith("downsample"):
        return "shortcut"
    return "block" if rest[1].startswith("layer") else "stem"


def make_optimizer(config: Mapping[str, Any]) -> optax.GradientTransformation:
    """The optimizer of a training stage.

    Args:
      config: the stage's resolved config. Read are `lr`, `schedule_steps`, `discriminator_lr` (Adam, where the
        method has a discriminator), `train_head` (where it has a projection head: whether that learns, like the
        other heads), and from `optim`: `head_factor` (heads learn this many times faster), `momentum`,
        `weight_decay`, `power`, `train_norm`, `repeat` (updates per step for "stem", "block", "shortcut") and
        `repeat_decay`.
    """
    optim = config["optim"]

    def segmenter(factor: float, repeat: int = 1) -> optax.GradientTransformation:
        schedule = poly_schedule(config["lr"] * factor, config["schedule_steps"], optim["power"])
        return sgd(schedule, optim["momentum"], optim["weight_decay"], repeat, optim["repeat_decay"])

    transforms = {group: segmenter(1.0, optim["repeat"][group]) for group in ("stem", "block", "shortcut")}
    transforms |= {
        "norm": segmenter(1.0),
        "head": segmenter(optim["head_factor"]),
        "frozen": optax.set_to_zero(),
    }

    if "discriminator_lr" in config:
        schedule = poly_schedule(config["discriminator_lr"], config["schedule_steps"], optim["power"])
        transforms["discriminator"] = optax.adam(schedule, b1=0.9, b2=0.99)

    if "train_head" in config:
        transforms["projection"] = transforms["head"] if config["train_head"] else transforms["frozen"]

    def groups(params: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: parameter_group(tuple(entry.key for entry in path), optim["train_norm"]), params
        )

    return optax.partition(transforms, groups)
