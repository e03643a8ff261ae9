"""A user's method: an EMA teacher labels the target, the student learns from noisy images.

It shows all that a method can have: random draws, a teacher and a bank of features in `extra`, a constant, and
pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxuda.losses.segmentation import cross_entropy
from jaxuda.methods import Carry, Keys, Start
from jaxuda.methods.supervised import forward, supervised_loss, upsample
from jaxuda.training.state import TrainState

PyTree = Any


class Memory(NamedTuple):
    """teacher: parameters like the student's. total, count: sum (A,) and number () of features since the last update.
    centre: their mean before that update, (A,)."""

    teacher: PyTree
    total: jax.Array
    count: jax.Array
    centre: jax.Array


def init(key: jax.Array, *, model: Any, variables: PyTree, batch: PyTree, **_: Any) -> Start:
    """The teacher starts as the student; a copy of the student before the first step is a constant."""
    features = jax.eval_shape(model.apply, variables, batch["target"]["image"]).features
    nothing = jnp.zeros(features.shape[-1:], features.dtype)
    teacher = jax.tree.map(jnp.array, variables["params"])
    return Start(extra=Memory(teacher, nothing, nothing[0], nothing), constants={"first": variables["params"]})


def passes(config: Any, step: int) -> tuple[Callable, ...]:
    """The source pass, then the target pass; the latter starts at `config.target_starts`."""
    return (source_pass, target_pass) if step >= config.target_starts else (source_pass,)


def starts(config: Any) -> tuple[int, ...]:
    """The steps at which the tuple of passes changes."""
    return (config.target_starts,)


def before_passes(
    params: PyTree, carry: Carry, batch: PyTree, *, model: Any, config: Any, axis_name: str | None, **_: Any
) -> Carry:
    """The teacher's labels of the target images, (N, H, W) int32, and where it is confident of them, (N, H, W) bool."""
    images = batch["target"]["image"]
    variables = {"params": carry.extra.teacher, "batch_stats": carry.batch_stats}
    logits = upsample(model.apply(variables, images).main, images, config)
    confident = jnp.max(jax.nn.softmax(logits), axis=-1) > 0.5
    share = jnp.mean(confident, dtype=images.dtype)
    if axis_name is not None:
        share = lax.pmean(share, axis_name)
    pseudo = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return carry.keep(pseudo=pseudo, confident=confident).log(share=share)


def pictures(carry: Carry, batch: PyTree, *, config: Any) -> dict[str, jax.Array]:
    """What the student learns from: both images, the teacher's labels, and where it is confident."""
    source, target = batch["source"]["image"], batch["target"]["image"]
    return {
        "source": source,
        "target": target,
        "pseudo_label": carry.values["pseudo"],
        "confident": carry.values["confident"],
    }


def source_pass(
    params: PyTree, carry: Carry, batch: PyTree, *, model: Any, config: Any, keys: Keys, axis_name: str | None, **_: Any
) -> tuple[jax.Array, Carry]:
    """The supervised loss on noisy images."""
    source = {**batch["source"], "image": noisy(batch["source"]["image"], keys.use("source noise"), config)}
    outputs, carry = forward(
        model, params["model"], carry, source["image"], keys=keys, use="source", axis_name=axis_name
    )
    loss, metrics = supervised_loss(outputs, source, config, axis_name)
    return loss, carry.log(**metrics)


def target_pass(
    params: PyTree,
    carry: Carry,
    batch: PyTree,
    *,
    model: Any,
    config: Any,
    constants: PyTree,
    keys: Keys,
    axis_name: str | None,
    **_: Any,
) -> tuple[jax.Array, Carry]:
    """Cross-entropy with the teacher's labels, and the distance of the student from its start."""
    images = noisy(batch["target"]["image"], keys.use("target noise"), config)
    outputs, carry = forward(model, params["model"], carry, images, keys=keys, use="target", axis_name=axis_name)
    ce = cross_entropy(upsample(outputs.main, images, config), carry.values["pseudo"], axis_name=axis_name)
    squares = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), params["model"], constants["first"])
    distance = sum(jax.tree.leaves(squares))

    features = lax.stop_gradient(outputs.features)
    total, count = jnp.sum(features, axis=(0, 1, 2)), jnp.asarray(features[..., 0].size, features.dtype)
    if axis_name is not None:
        total, count = lax.psum((total, count), axis_name)
    extra = carry.extra._replace(total=carry.extra.total + total, count=carry.extra.count + count)
    return ce + 1e-3 * distance, carry.log(ce_target=ce, distance=distance)._replace(extra=extra)


def after_update(state: TrainState, *, config: Any) -> TrainState:
    """The teacher follows the student, and the bank is emptied into the centre."""
    memory, alpha = state.extra, config.alpha
    teacher = jax.tree.map(lambda t, s: alpha * t + (1 - alpha) * s, memory.teacher, state.params["model"])
    empty = jnp.zeros_like
    centre = memory.total / jnp.maximum(memory.count, 1)
    return state.replace(extra=Memory(teacher, empty(memory.total), empty(memory.count), centre))


def evaluated(state: TrainState, *, config: Any) -> dict[str, PyTree]:
    """Both networks, with the student's running statistics."""
    networks = {"student": state.params["model"], "teacher": state.extra.teacher}
    return {name: {"params": params, "batch_stats": state.batch_stats} for name, params in networks.items()}


def noisy(images: jax.Array, keys: Keys, config: Any) -> jax.Array:
    """Images (N, H, W, 3) with noise of deviation `config.noise`, drawn for each example independently."""
    noise = jax.vmap(lambda key: jax.random.normal(key, images.shape[1:], images.dtype))(keys.examples)
    return images + config.noise * noise
