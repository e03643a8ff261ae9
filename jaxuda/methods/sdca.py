"""SDCA: draws features of both domains to the source distribution of their class, and away from the others.

Li et al., Semantic Distribution-aware Contrastive Adaptation for Semantic Segmentation, arXiv 2105.05013:
L = CE(s) + lambda_lovasz * Lovasz(s) + lambda_features * [PCL(f_s, y_s) + PCL(f_t, q_t)]
  + lambda_logits * [PCL(z_s, y_s) + PCL(z_t, q_t)]
with q_t = argmax p_t where max p_t >= confidence, else ignored, all at the resolution of the features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxuda.artifacts.statistics import FILE, LevelStatistics, read_statistics
from jaxuda.data import labels as label_spaces
from jaxuda.losses.contrastive import distribution_contrast, empty_statistics, update_statistics
from jaxuda.losses.reduction import masked_mean
from jaxuda.losses.segmentation import IGNORE
from jaxuda.methods import Carry, Keys, Start
from jaxuda.methods.supervised import forward, supervise
from jaxuda.models import Outputs, output_shapes
from jaxuda.models.layers import resize_labels

PyTree = Any


def init(key: jax.Array, *, model: Any, batch: PyTree, config: Any, artifacts: PyTree, **_: Any) -> Start:
    """Adds no parameters; `extra` holds the class statistics of the source.

    An earlier stage wrote them to one of the folders of `artifacts` (stage name -> folder). Otherwise they are zero
    until the first batches fill them.

    Raises:
      UserError: the statistics belong to another network or label space.
    """
    features = output_shapes(model, batch["source"]["image"].shape[1:3]).features
    channels, dtype = features.shape[-1], features.dtype
    for folder in artifacts.values():
        if (folder / FILE).exists():
            space = config.label_space
            classes = label_spaces.label_space(space).classes if space else None
            saved = read_statistics(folder, model, channels, classes)
            return Start(extra=jax.tree.map(lambda x: jnp.asarray(x, dtype), saved))
    empty = (empty_statistics(model.num_classes, width, dtype) for width in (channels, model.num_classes))
    return Start(extra=LevelStatistics(*empty))


def passes(config: Any, step: int) -> tuple[Callable, ...]:
    """The source pass, then the target pass."""
    return source_pass, target_pass


def source_pass(
    params: PyTree, carry: Carry, batch: PyTree, *, model: Any, config: Any, axis_name: str | None, **given: Any
) -> tuple[jax.Array, Carry]:
    """The supervised loss, and the contrast of source pixels with statistics that already include them."""
    outputs, loss, carry = supervise(params, carry, batch, model=model, config=config, axis_name=axis_name, **given)
    label = resize_labels(batch["source"]["label"], outputs.main.shape[1:3])
    moved = {
        level: update_statistics(getattr(carry.extra, level), maps, label, axis_name)
        for level, maps in levels(outputs).items()
    }
    carry = carry._replace(extra=LevelStatistics(**moved))
    contrast, terms = contrasts(outputs, label, carry.extra, "source", config, axis_name)
    return loss + contrast, carry.log(**terms)


def target_pass(
    params: PyTree, carry: Carry, batch: PyTree, *, model: Any, config: Any, keys: Keys, axis_name: str | None, **_: Any
) -> tuple[jax.Array, Carry]:
    """The contrast of target pixels with a confident prediction."""
    images = batch["target"]["image"]
    outputs, carry = forward(model, params["model"], carry, images, keys=keys, use="target", axis_name=axis_name)
    pseudo = confident_labels(outputs.main, config.confidence)
    confident = masked_mean((pseudo != IGNORE).astype(outputs.main.dtype), axis_name=axis_name)
    contrast, terms = contrasts(outputs, pseudo, carry.extra, "target", config, axis_name)
    return contrast, carry.log(confident=confident, **terms)


def levels(outputs: Outputs) -> dict[str, jax.Array]:
    """The maps that are contrasted, (N, h, w, A) and (N, h, w, C)."""
    return {"features": outputs.features, "logits": outputs.main}


def contrasts(
    outputs: Outputs, labels: jax.Array, statistics: LevelStatistics, domain: str, config: Any, axis_name: str | None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The weighted sum of PCL at both levels, labels (N, h, w) int32, and its terms."""
    loss, terms = 0.0, {}
    for level, maps in levels(outputs).items():
        term = distribution_contrast(maps, labels, getattr(statistics, level), config.tau, axis_name)
        terms[f"{level}_{domain}"] = term
        loss += config[f"lambda_{level}"] * term
    return loss, terms


def confident_labels(logits: jax.Array, confidence: float) -> jax.Array:
    """The predicted class where its probability is at least `confidence`, else 255: (N, h, w, C) -> (N, h, w) int32."""
    best = jnp.max(jax.nn.softmax(jax.lax.stop_gradient(logits)), axis=-1)
    return jnp.where(best >= confidence, jnp.argmax(logits, axis=-1), IGNORE).astype(jnp.int32)
