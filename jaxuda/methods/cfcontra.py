"""CFContra: contrast of pixels with class prototypes of both domains, after MinEnt has done the coarse work.

Coarse-to-fine contrastive unsupervised domain adaptation. With m_s and m_t the prototypes of source and target, g
the projected features, y the labels of the source and q pseudo-labels of the target,
L = L_MinEnt + lambda_source CON(g_s, y, m_s) + lambda_target CON(g_t, q, m_t)
  + lambda_target_to_source CON(g_t, q, m_s) + lambda_source_to_target CON(g_s, y, m_t),
CON being `prototype_contrast`. q is the class of the nearest source prototype where it is nearer than the second by
a margin, else ignored. Then each prototype moves towards the class centres of the batch, of both domains in turn.

Two departures from the published code. There, prototypes move during the backward pass, in between the four terms'
gradients; here all terms see the prototypes as they were, and the gradient is that of L. There, the optimizer never
gets the head's parameters; here it does, unless `train_head` is False.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxuda.data import labels as label_spaces
from jaxuda.losses.contrastive import class_centres, nearest_prototype_labels, prototype_contrast, update_memory
from jaxuda.losses.reduction import masked_mean
from jaxuda.losses.segmentation import IGNORE
from jaxuda.methods.minent import target_entropy
from jaxuda.methods.supervised import forward, supervised_loss
from jaxuda.models.deeplab import DeepLabV2
from jaxuda.models.heads import ProjectionHead
from jaxuda.models.layers import resize_labels
from jaxuda.optim import poly_schedule
from jaxuda.prototypes import FILE, Memories, init_projection, read_prototypes
from jaxuda.train_state import TrainState

PyTree = Any
__all__ = ["init", "train_step"]


def init(key: jax.Array, *, model: DeepLabV2, batch: PyTree, config: Any, artifacts: PyTree) -> tuple[dict, Memories]:
    """The projection head as a player of its own, since only training needs it; `extra` holds the two memories.

    Both are what an earlier stage left in one of the folders of `artifacts` (stage name -> folder); or a new head,
    and empty memories that the first batches fill.

    Raises:
      UserError: the prototypes belong to another network, head or label space, or there is no such head.
    """
    image = jax.ShapeDtypeStruct((1, *batch["source"]["image"].shape[1:]), jnp.float32)
    outputs = jax.eval_shape(lambda image: model.init_with_output(key, image)[0], image)
    channels, dtype = outputs.features.shape[-1], outputs.features.dtype
    projection = init_projection(key, config.projection, channels)
    empty = jnp.zeros((model.num_classes, channels), dtype)
    memories = Memories(empty, empty)
    for folder in artifacts.values():
        if (folder / FILE).exists():
            space = config.label_space
            classes = label_spaces.label_space(space).classes if space else None
            saved = read_prototypes(folder, config.projection, model, channels, classes)
            memories, projection = jax.tree.map(lambda x: jnp.asarray(x, dtype), saved)
    return {"projection": projection} if projection else {}, memories


def train_step(
    state: TrainState,
    batch: PyTree,
    key: jax.Array,
    *,
    model: DeepLabV2,
    tx: optax.GradientTransformation,
    config: Any,
    axis_name: str | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update on `batch["source"]` ("image", "label") and `batch["target"]` ("image").

    A "label" of the target would only be used for the figure `pseudo_accuracy_using_target_labels`.
    """
    source, target = batch["source"], batch["target"]
    head, memories = ProjectionHead(config.projection, model.dtype), state.extra
    margin = config.margin
    if config.margin_decay:
        margin = poly_schedule(margin, config.schedule_steps, config.optim.power)(state.step)

    def objective(params: PyTree) -> tuple[jax.Array, tuple]:
        ours, batch_stats = forward(model, params["model"], state.batch_stats, source["image"], axis_name)
        loss, metrics = supervised_loss(ours, source, config, axis_name)
        theirs, batch_stats = forward(model, params["model"], batch_stats, target["image"], axis_name)
        entropy, more = target_entropy(theirs, target["image"], config, axis_name)
        loss, metrics = loss + entropy, metrics | more

        projected, labels = {}, {"source": resize_labels(source["label"], ours.main.shape[1:3])}
        for domain, outputs in (("source", ours), ("target", theirs)):
            projected[domain] = head.apply({"params": params.get("projection", {})}, outputs.features)
        labels["target"] = nearest_prototype_labels(
            projected["target"], memories.source, margin, config.normalise_for_labels
        )
        for term, pixels, memory in (
            ("source", "source", memories.source),
            ("target", "target", memories.target),
            ("target_to_source", "target", memories.source),
            ("source_to_target", "source", memories.target),
        ):
            value = prototype_contrast(projected[pixels], labels[pixels], memory, config.temperature, axis_name)
            metrics[f"contrast_{term}"] = value
            loss += config[f"lambda_{term}"] * value
        return loss, (batch_stats, projected, labels, {"loss": loss, **metrics})

    grads, (batch_stats, projected, labels, metrics) = jax.grad(objective, has_aux=True)(state.params)

    centres = {name: class_centres(projected[name], labels[name], model.num_classes, axis_name) for name in projected}
    moved = {}
    for name, order in (("source", ("target", "source")), ("target", ("source", "target"))):
        moved[name] = getattr(memories, name)
        for domain in order:
            moved[name] = update_memory(moved[name], *centres[domain], config.momentum)
    extra = Memories(**moved)

    metrics |= _pseudo_label_figures(labels["target"], target, axis_name)
    for name in Memories._fields:
        metrics |= _memory_figures(name, getattr(memories, name), getattr(extra, name))
    state = state.apply_gradients(grads, tx, axis_name=axis_name, batch_stats=batch_stats, extra=extra)
    return state, metrics


def _pseudo_label_figures(
    pseudo: jax.Array, target: dict[str, jax.Array], axis_name: str | None
) -> dict[str, jax.Array]:
    """Share of pixels that have a pseudo-label, and, where the batch happens to have labels, how many are right."""
    kept = pseudo != IGNORE
    figures = {"pseudo_kept": masked_mean(kept.astype(jnp.float32), axis_name=axis_name)}
    if "label" in target:
        label = resize_labels(target["label"], pseudo.shape[1:3])
        right = (pseudo == label).astype(jnp.float32)
        figures["pseudo_accuracy_using_target_labels"] = masked_mean(right, kept & (label != IGNORE), axis_name)
    return figures


def _memory_figures(name: str, before: jax.Array, after: jax.Array) -> dict[str, jax.Array]:
    """Of the classes seen: mean distance that prototypes moved, and mean cosine of pairs of different prototypes."""
    seen = jnp.any(before != 0, axis=-1)
    drift = masked_mean(jnp.linalg.norm(after - before, axis=-1), seen)
    seen = jnp.any(after != 0, axis=-1)
    pairs = seen[:, None] & seen & ~jnp.eye(len(seen), dtype=bool)
    return {f"drift_{name}": drift, f"cosine_{name}": masked_mean(after @ after.T, pairs)}
