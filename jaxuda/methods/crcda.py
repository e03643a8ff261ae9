"""CrCDA: relations between classes in small regions kept alike in both domains, by an entropy max-min game.

Huang et al., Contextual-Relation Consistent Domain Adaptation for Semantic Segmentation, ECCV 2020. The authors
published no code; this is our reading of the paper. Beside the pixel classifier, a region classifier names the local
contextual relation of each region (`jaxuda.relations`), one for every region size. With E = `adaptive_entropy`, whose
margin closes as training goes on:

  classifiers        L_seg(source) + lambda_region_ce * CE(regions, source) - lambda_pixels * E(pixels, target)
                                                                            - lambda_regions * E(regions, target)
  feature extractor  the same with + for -

Gradient reversal makes one gradient of both. It acts on the classifiers' weights as the target pass sees them: they
climb what the extractor descends, exactly as if it stood between features and classifiers under -lambda * E.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxuda.data import labels as label_spaces
from jaxuda.losses.entropy import adaptive_entropy
from jaxuda.losses.reduction import masked_mean
from jaxuda.losses.segmentation import IGNORE, cross_entropy
from jaxuda.methods.supervised import forward, supervised_loss, upsample
from jaxuda.models.deeplab import DeepLabV2, Head, feature_shape
from jaxuda.models.layers import gradient_reversal
from jaxuda.optim import poly_schedule
from jaxuda.relations import Relations, class_relations, cut_regions, label_regions, read_relations, region_grid
from jaxuda.train_state import TrainState

PyTree = Any


def init(
    key: jax.Array, *, model: DeepLabV2, batch: PyTree, config: Any, artifacts: PyTree
) -> tuple[dict, dict[str, Relations]]:
    """A region classifier and the relations it tells apart for each of `config.region_sizes`; none: pixels alone.

    The relations are those that an earlier stage left in a folder of `artifacts` (stage name -> folder). Where no
    stage is read, each class alone stands for a relation, and the nearest class labels every region.

    Raises:
      UserError: the images are smaller than a region, or the relations missing or of another label space.
    """
    sizes, space = tuple(config.region_sizes), config.label_space
    *grid, channels = feature_shape(model, batch["source"]["image"].shape[1:3])
    classes = label_spaces.label_space(space).classes if space else None
    relations = {size: class_relations(model.num_classes) for size in sizes}
    for folder in artifacts.values() if sizes else ():
        relations = read_relations(folder, sizes, model.num_classes, classes)

    heads = {}
    for size, own_key in zip(sizes, jax.random.split(key, max(len(sizes), 1)), strict=False):
        region_grid(tuple(grid), size)  # complains if none fits
        head = region_head(model, relations[size])
        heads[name_of(size)] = head.init(own_key, jnp.zeros((1, *grid, channels)))["params"]
    extra = {name_of(size): jax.tree.map(jnp.asarray, kind) for size, kind in relations.items()}
    return ({"regions": heads} if heads else {}), extra


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
    """One update of classifiers and extractor on `batch["source"]` ("image", "label") and `batch["target"]` ("image").

    `state.step` of `config.schedule_steps` decides how far the margins have closed; `config.adaptive` = False: wholly.
    """
    source, target = batch["source"], batch["target"]
    opening = poly_schedule(1.0, config.schedule_steps)(state.step) if config.adaptive else 0.0

    def objective(params: PyTree) -> tuple[jax.Array, tuple]:
        ours, batch_stats = forward(model, params["model"], state.batch_stats, source["image"], axis_name)
        loss, metrics = supervised_loss(ours, source, config, axis_name)

        opponents = reverse_classifiers(params)
        theirs, batch_stats = forward(model, opponents["model"], batch_stats, target["image"], axis_name)
        for level, logits, weight in (
            ("entropy", theirs.main, config.lambda_pixels),
            ("entropy_aux", theirs.aux, config.lambda_pixels_aux),
        ):
            if logits is not None:
                probs = jax.nn.softmax(upsample(logits, target["image"], config))
                metrics[level] = adaptive_entropy(probs, opening, axis_name=axis_name)
                loss += weight * metrics[level]

        for size in config.region_sizes:
            name, relations = name_of(size), state.extra[name_of(size)]
            regions = cut_regions(source["label"], ours.main.shape[1:3], size)
            label = label_regions(regions, relations, model.num_classes)
            logits = region_logits(model, params["regions"][name], ours.features, relations, size)
            ce = cross_entropy(logits, label, axis_name=axis_name)
            logits = region_logits(model, opponents["regions"][name], theirs.features, relations, size)
            entropy = adaptive_entropy(jax.nn.softmax(logits), opening, axis_name=axis_name)
            loss += config.lambda_region_ce * ce + config.lambda_regions * entropy
            known = masked_mean((label != IGNORE).astype(loss.dtype), axis_name=axis_name)
            metrics |= {f"ce_{name}": ce, f"entropy_{name}": entropy, f"known_{name}": known}
        return loss, (batch_stats, {"loss": loss, **metrics})

    grads, (batch_stats, metrics) = jax.grad(objective, has_aux=True)(state.params)
    return state.apply_gradients(grads, tx, axis_name=axis_name, batch_stats=batch_stats), metrics


def reverse_classifiers(params: PyTree) -> PyTree:
    """The same parameters, with the gradients of all pixel and region classifiers turned round."""

    def turn(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda weight: gradient_reversal(weight, 1.0), tree)

    model = {part: turn(tree) if part in ("head", "aux_head") else tree for part, tree in params["model"].items()}
    return {player: model if player == "model" else turn(tree) for player, tree in params.items()}


def name_of(size: int) -> str:
    """Name of a region size in the parameters, the state and the metrics."""
    return f"regions{size}"


def region_head(model: DeepLabV2, relations: Relations) -> Head:
    """A region classifier, of the same form and precision as the network's own head."""
    return Head(len(relations.radii), model.head_bias, model.dtype)


def region_logits(model: DeepLabV2, params: PyTree, features: jax.Array, relations: Relations, size: int) -> jax.Array:
    """Scores of the relations in each region: features (N, h, w, A) -> (N, R, Q, M), the mean over a region's cells."""
    logits = region_head(model, relations).apply({"params": params}, features).astype(features.dtype)
    rows, columns = region_grid(logits.shape[1:3], size)
    logits = logits[:, : rows * size, : columns * size].reshape(len(logits), rows, size, columns, size, -1)
    return jnp.mean(logits, axis=(2, 4))
