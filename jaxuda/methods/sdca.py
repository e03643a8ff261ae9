"""SDCA: features of both domains drawn to the class distributions of the source, and away from the others.

Li et al., Semantic Distribution-aware Contrastive Adaptation for Semantic Segmentation, arXiv 2105.05013:
L = CE(s) + lambda_lovasz * Lovasz(s) + lambda_features * [PCL(f_s, y_s) + PCL(f_t, q_t)]
  + lambda_logits * [PCL(z_s, y_s) + PCL(z_t, q_t)]
with q_t = argmax p_t where max p_t >= confidence, else ignored, all at the resolution of the features.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxuda.data import labels as label_spaces
from jaxuda.losses.contrastive import distribution_contrast, empty_statistics, update_statistics
from jaxuda.losses.reduction import masked_mean
from jaxuda.losses.segmentation import IGNORE
from jaxuda.methods.supervised import forward, supervised_loss
from jaxuda.models.deeplab import DeepLabV2
from jaxuda.models.layers import resize_labels
from jaxuda.statistics import FILE, LevelStatistics, read_statistics
from jaxuda.train_state import TrainState

PyTree = Any
__all__ = ["init", "train_step"]


def init(
    key: jax.Array, *, model: DeepLabV2, batch: PyTree, config: Any, artifacts: PyTree
) -> tuple[dict, LevelStatistics]:
    """No parameters of its own; `extra` holds the class statistics of the source.

    They are those that an earlier stage left in one of the folders of `artifacts` (stage name -> folder), or
    zero, to be filled by the first batches.

    Raises:
      UserError: the statistics belong to another network or label space.
    """
    image = jax.ShapeDtypeStruct((1, *batch["source"]["image"].shape[1:]), jnp.float32)
    outputs = jax.eval_shape(lambda image: model.init_with_output(key, image)[0], image)
    channels, dtype = outputs.features.shape[-1], outputs.features.dtype
    for folder in artifacts.values():
        if (folder / FILE).exists():
            space = config.label_space
            classes = label_spaces.label_space(space).classes if space else None
            saved = read_statistics(folder, model, channels, classes)
            return {}, jax.tree.map(lambda x: jnp.asarray(x, dtype), saved)
    empty = (empty_statistics(model.num_classes, width, dtype) for width in (channels, model.num_classes))
    return {}, LevelStatistics(*empty)


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
    """One update on `batch["source"]` ("image", "label") and `batch["target"]` ("image")."""
    source, target = batch["source"], batch["target"]

    def objective(params: PyTree) -> tuple[jax.Array, tuple]:
        ours, batch_stats = forward(model, params["model"], state.batch_stats, source["image"], axis_name)
        loss, metrics = supervised_loss(ours, source, config, axis_name)
        theirs, batch_stats = forward(model, params["model"], batch_stats, target["image"], axis_name)

        label = resize_labels(source["label"], ours.main.shape[1:3])
        pseudo = confident_labels(theirs.main, config.confidence)
        metrics["confident"] = masked_mean((pseudo != IGNORE).astype(loss.dtype), axis_name=axis_name)

        # This batch's source pixels count already when it is compared with the statistics.
        levels = {"features": (ours.features, theirs.features), "logits": (ours.main, theirs.main)}
        extra = LevelStatistics(
            **{
                level: update_statistics(getattr(state.extra, level), maps[0], label, axis_name)
                for level, maps in levels.items()
            }
        )
        for level, maps in levels.items():
            for domain, values, classes in zip(("source", "target"), maps, (label, pseudo), strict=True):
                term = distribution_contrast(values, classes, getattr(extra, level), config.tau, axis_name)
                metrics[f"{level}_{domain}"] = term
                loss += config[f"lambda_{level}"] * term
        return loss, (batch_stats, extra, {"loss": loss, **metrics})

    grads, (batch_stats, extra, metrics) = jax.grad(objective, has_aux=True)(state.params)
    state = state.apply_gradients(grads, tx, axis_name=axis_name, batch_stats=batch_stats, extra=extra)
    return state, metrics


def confident_labels(logits: jax.Array, confidence: float) -> jax.Array:
    """The predicted class where its probability is at least `confidence`, else 255: (N, h, w, C) -> (N, h, w) int32."""
    best = jnp.max(jax.nn.softmax(jax.lax.stop_gradient(logits)), axis=-1)
    return jnp.where(best >= confidence, jnp.argmax(logits, axis=-1), IGNORE).astype(jnp.int32)
