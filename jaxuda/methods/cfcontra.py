"""CFContra: contrast of pixels with class prototypes of both domains, after coarse alignment by MinEnt.

Coarse-to-fine contrastive unsupervised domain adaptation. With m_s and m_t the prototypes of source and target, g
the projected features, y the labels of the source and q the pseudo-labels of the target,
L = L_MinEnt + lambda_source CON(g_s, y, m_s) + lambda_target CON(g_t, q, m_t)
  + lambda_target_to_source CON(g_t, q, m_s) + lambda_source_to_target CON(g_s, y, m_t),
where CON is `prototype_contrast`. q is the class of the nearest source prototype where it is nearer than the second by
a margin, else ignored. Then each prototype moves towards the class centres of the batch, of both domains in turn.

Two differences from the published code: there, prototypes move during the backward pass, between the gradients of the
four terms; here all terms use the prototypes before the update, and the gradient is that of L. There, the optimizer
never gets the head's parameters; here it does, unless `train_head` is False.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from jaxuda.artifacts.prototypes import FILE, Memories, init_projection, read_prototypes
from jaxuda.data import labels as label_spaces
from jaxuda.losses.contrastive import class_centres, nearest_prototype_labels, prototype_contrast, update_memory
from jaxuda.losses.reduction import masked_mean
from jaxuda.losses.segmentation import IGNORE
from jaxuda.methods import Carry, Keys, Start
from jaxuda.methods.minent import target_entropy
from jaxuda.methods.supervised import forward, supervise
from jaxuda.models import output_shapes
from jaxuda.models.heads import ProjectionHead
from jaxuda.models.layers import resize_labels
from jaxuda.optimizers.schedules import poly_schedule

PyTree = Any


def init(key: jax.Array, *, model: Any, batch: PyTree, config: Any, artifacts: PyTree, **_: Any) -> Start:
    """The projection head as a separate module, since only training needs it; `extra` holds the two memories.

    An earlier stage wrote them to one of the folders of `artifacts` (stage name -> folder). Otherwise the head is new,
    and the memories are empty until the first batches fill them.

    Raises:
      UserError: the prototypes belong to another network, head or label space, or the kind of head is unknown.
    """
    features = output_shapes(model, batch["source"]["image"].shape[1:3]).features
    channels, dtype = features.shape[-1], features.dtype
    projection = init_projection(key, config.projection, channels)
    empty = jnp.zeros((model.num_classes, channels), dtype)
    memories = Memories(empty, empty)
    for folder in artifacts.values():
        if (folder / FILE).exists():
            space = config.label_space
            classes = label_spaces.label_space(space).classes if space else None
            saved = read_prototypes(folder, config.projection, model, channels, classes)
            memories, projection = jax.tree.map(lambda x: jnp.asarray(x, dtype), saved)
    return Start({"projection": projection} if projection else {}, memories)


def passes(config: Any, step: int) -> tuple[Callable, ...]:
    """The source pass, then the target pass, which moves both memories."""
    return source_pass, target_pass


def source_pass(
    params: PyTree, carry: Carry, batch: PyTree, *, model: Any, config: Any, axis_name: str | None, **given: Any
) -> tuple[jax.Array, Carry]:
    """The supervised loss, and the contrast of source pixels with both memories; keeps their class centres."""
    outputs, loss, carry = supervise(params, carry, batch, model=model, config=config, axis_name=axis_name, **given)
    projected = project(params, outputs.features, model, config)
    label = resize_labels(batch["source"]["label"], outputs.main.shape[1:3])
    for term, memory in (("source", carry.extra.source), ("source_to_target", carry.extra.target)):
        value = prototype_contrast(projected, label, memory, config.temperature, axis_name)
        loss, carry = loss + config[f"lambda_{term}"] * value, carry.log(**{f"contrast_{term}": value})
    centres = class_centres(stop_gradient(projected), label, model.num_classes, axis_name)
    return loss, carry.keep(source_centres=centres)


def target_pass(
    params: PyTree,
    carry: Carry,
    batch: PyTree,
    *,
    step: jax.Array,
    model: Any,
    config: Any,
    keys: Keys,
    axis_name: str | None,
    **_: Any,
) -> tuple[jax.Array, Carry]:
    """MinEnt's entropy, and the contrast of target pixels with both memories, which move at the end.

    A "label" of the target is used only for the figure `pseudo_accuracy_using_target_labels`.
    """
    target, memories = batch["target"], carry.extra
    outputs, carry = forward(
        model, params["model"], carry, target["image"], keys=keys, use="target", axis_name=axis_name
    )
    loss, metrics = target_entropy(outputs, target["image"], config, axis_name)
    projected = project(params, outputs.features, model, config)
    margin = config.margin
    if config.margin_decay:
        margin = poly_schedule(margin, config.schedule_steps, config.optim.power)(step)
    pseudo = nearest_prototype_labels(projected, memories.source, margin, config.normalise_for_labels)
    for term, memory in (("target", memories.target), ("target_to_source", memories.source)):
        value = prototype_contrast(projected, pseudo, memory, config.temperature, axis_name)
        metrics[f"contrast_{term}"] = value
        loss += config[f"lambda_{term}"] * value

    centres = class_centres(stop_gradient(projected), pseudo, model.num_classes, axis_name)
    moved = move_memories(memories, carry.values["source_centres"], centres, config.momentum)
    metrics |= _pseudo_label_figures(pseudo, target, axis_name)
    for name in Memories._fields:
        metrics |= _memory_figures(name, getattr(memories, name), getattr(moved, name))
    return loss, carry.log(**metrics)._replace(extra=moved)


def project(params: PyTree, features: jax.Array, model: Any, config: Any) -> jax.Array:
    """Features (N, h, w, A) through the projection head."""
    head = ProjectionHead(config.projection, model.dtype)
    return head.apply({"params": params.get("projection", {})}, features)


def move_memories(memories: Memories, source: tuple, target: tuple, momentum: float) -> Memories:
    """Each memory moves towards the centres of the other domain, then towards those of its own.

    Args:
      memories: those before the update.
      source, target: the result of `class_centres` for each domain.
      momentum: see `update_memory`.
    """
    orders = {"source": (target, source), "target": (source, target)}
    moved = {}
    for name, order in orders.items():
        moved[name] = getattr(memories, name)
        for centres in order:
            moved[name] = update_memory(moved[name], *centres, momentum)
    return Memories(**moved)


def _pseudo_label_figures(
    pseudo: jax.Array, target: dict[str, jax.Array], axis_name: str | None
) -> dict[str, jax.Array]:
    """Share of pixels that have a pseudo-label, and, if the batch has labels, share of these that are correct."""
    kept = pseudo != IGNORE
    figures = {"pseudo_kept": masked_mean(kept.astype(jnp.float32), axis_name=axis_name)}
    if "label" in target:
        label = resize_labels(target["label"], pseudo.shape[1:3])
        right = (pseudo == label).astype(jnp.float32)
        figures["pseudo_accuracy_using_target_labels"] = masked_mean(right, kept & (label != IGNORE), axis_name)
    return figures


def _memory_figures(name: str, before: jax.Array, after: jax.Array) -> dict[str, jax.Array]:
    """Over the classes seen: mean distance that prototypes moved, and mean cosine of pairs of different prototypes."""
    seen = jnp.any(before != 0, axis=-1)
    drift = masked_mean(jnp.linalg.norm(after - before, axis=-1), seen)
    seen = jnp.any(after != 0, axis=-1)
    pairs = seen[:, None] & seen & ~jnp.eye(len(seen), dtype=bool)
    return {f"drift_{name}": drift, f"cosine_{name}": masked_mean(after @ after.T, pairs)}
