"""CrCDA: keeps relations between classes in small regions alike in both domains, by an entropy max-min game.

Huang et al., Contextual-Relation Consistent Domain Adaptation for Semantic Segmentation, ECCV 2020. The authors
published no code; this is our reading of the paper. Besides the pixel classifier, there is a region classifier for each
region size, which predicts the local contextual relation of each region (`jaxuda.artifacts.relations`). With
E = `adaptive_entropy`, whose margin closes as training goes on:

  classifiers        L_seg(source) + lambda_region_ce * CE(regions, source) - lambda_pixels * E(pixels, target)
                                                                            - lambda_regions * E(regions, target)
  feature extractor  the same with + for -

Gradient reversal makes one gradient of both. It is applied to the classifiers' weights in the target pass: they ascend
where the extractor descends, exactly as with a reversal between features and classifiers and the loss -lambda * E.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxuda.artifacts.relations import (
    Relations,
    class_relations,
    cut_regions,
    label_regions,
    read_relations,
    region_grid,
)
from jaxuda.data import labels as label_spaces
from jaxuda.losses.entropy import adaptive_entropy
from jaxuda.losses.reduction import masked_mean
from jaxuda.losses.segmentation import IGNORE, cross_entropy
from jaxuda.methods import Carry, Keys, Start
from jaxuda.methods.supervised import forward, supervise, upsample
from jaxuda.models import output_shapes
from jaxuda.models.layers import gradient_reversal
from jaxuda.optimizers.schedules import poly_schedule

PyTree = Any


def init(key: jax.Array, *, model: Any, batch: PyTree, config: Any, artifacts: PyTree, **_: Any) -> Start:
    """A region classifier and its relations for each of `config.region_sizes`; without sizes, pixels alone are used.

    An earlier stage wrote the relations to a folder of `artifacts` (stage name -> folder). If no stage is read, each
    class alone is a relation, and every region is labelled with the nearest class.

    Raises:
      UserError: the images are smaller than a region, or the relations are missing or of another label space.
    """
    sizes, space = tuple(config.region_sizes), config.label_space
    *grid, channels = output_shapes(model, batch["source"]["image"].shape[1:3]).features.shape[1:]
    classes = label_spaces.label_space(space).classes if space else None
    relations = {size: class_relations(model.num_classes) for size in sizes}
    for folder in artifacts.values() if sizes else ():
        relations = read_relations(folder, sizes, model.num_classes, classes)

    heads = {}
    for size, own_key in zip(sizes, jax.random.split(key, max(len(sizes), 1)), strict=False):
        region_grid(tuple(grid), size)  # raises if no region fits
        head = model.classifier(len(relations[size].radii))
        heads[name_of(size)] = head.init(own_key, jnp.zeros((1, *grid, channels)))["params"]
    extra = {name_of(size): jax.tree.map(jnp.asarray, kind) for size, kind in relations.items()}
    return Start({"regions": heads} if heads else {}, extra)


def passes(config: Any, step: int) -> tuple[Callable, ...]:
    """The source pass, then the target pass."""
    return source_pass, target_pass


def source_pass(
    params: PyTree, carry: Carry, batch: PyTree, *, model: Any, config: Any, axis_name: str | None, **given: Any
) -> tuple[jax.Array, Carry]:
    """The supervised loss of pixels, and of the regions whose relation is known."""
    outputs, loss, carry = supervise(params, carry, batch, model=model, config=config, axis_name=axis_name, **given)
    for size in config.region_sizes:
        name, relations = name_of(size), carry.extra[name_of(size)]
        regions = cut_regions(batch["source"]["label"], outputs.main.shape[1:3], size)
        label = label_regions(regions, relations, model.num_classes)
        logits = region_logits(model, params["regions"][name], outputs.features, relations, size)
        ce = cross_entropy(logits, label, axis_name=axis_name)
        loss += config.lambda_region_ce * ce
        known = masked_mean((label != IGNORE).astype(loss.dtype), axis_name=axis_name)
        carry = carry.log(**{f"ce_{name}": ce, f"known_{name}": known})
    return loss, carry


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
    """The entropy of pixels and regions, which the extractor lowers and the classifiers raise.

    `step` out of `config.schedule_steps` sets how far the margins are closed; `config.adaptive` = False: completely.
    """
    images = batch["target"]["image"]
    opening = poly_schedule(1.0, config.schedule_steps)(step) if config.adaptive else 0.0
    opponents = reverse_classifiers(model, params)
    outputs, carry = forward(model, opponents["model"], carry, images, keys=keys, use="target", axis_name=axis_name)
    loss, metrics = 0.0, {}
    for level, logits, weight in (
        ("entropy", outputs.main, config.lambda_pixels),
        ("entropy_aux", outputs.aux, config.lambda_pixels_aux),
    ):
        if logits is not None:
            probs = jax.nn.softmax(upsample(logits, images, config))
            metrics[level] = adaptive_entropy(probs, opening, axis_name=axis_name)
            loss += weight * metrics[level]
    for size in config.region_sizes:
        name, relations = name_of(size), carry.extra[name_of(size)]
        logits = region_logits(model, opponents["regions"][name], outputs.features, relations, size)
        metrics[f"entropy_{name}"] = adaptive_entropy(jax.nn.softmax(logits), opening, axis_name=axis_name)
        loss += config.lambda_regions * metrics[f"entropy_{name}"]
    return loss, carry.log(**metrics)


def reverse_classifiers(model: Any, params: PyTree) -> PyTree:
    """The same parameters, with the gradients of all pixel and region classifiers reversed."""

    def turn(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda weight: gradient_reversal(weight, 1.0), tree)

    network = {part: turn(tree) if part in model.CLASSIFIERS else tree for part, tree in params["model"].items()}
    return {module: network if module == "model" else turn(tree) for module, tree in params.items()}


def name_of(size: int) -> str:
    """Name of a region size in the parameters, the state and the metrics."""
    return f"regions{size}"


def region_logits(model: Any, params: PyTree, features: jax.Array, relations: Relations, size: int) -> jax.Array:
    """Scores of the relations in each region: features (N, h, w, A) -> (N, R, Q, M), the mean over a region's cells."""
    logits = model.classifier(len(relations.radii)).apply({"params": params}, features).astype(features.dtype)
    rows, columns = region_grid(logits.shape[1:3], size)
    logits = logits[:, : rows * size, : columns * size].reshape(len(logits), rows, size, columns, size, -1)
    return jnp.mean(logits, axis=(2, 4))
