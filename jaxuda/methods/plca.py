"""PLCA: brings pixels of both domains together that are associated by a cycle; and LFASS, its smaller replication.

Kang et al., Pixel-Level Cycle Association: A New Perspective for Domain Adaptive Semantic Segmentation, NeurIPS 2020:
L = CE(s) + lambda_lovasz * Lovasz(s) + lambda_features * L_ass(features) + lambda_probs * L_ass(probabilities)
  + lambda_smooth * (LSR(s) + LSR(t))
All terms are at the resolution of the network; source image n is paired with target image n; target labels are never
used. LFASS is the same with features alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxuda.data.labels import label_space
from jaxuda.errors import UserError
from jaxuda.losses.association import aggregate, cycle_association, smoothness
from jaxuda.methods import Carry, Keys, Start
from jaxuda.methods.supervised import forward, supervised_loss
from jaxuda.models.layers import resize_labels

PyTree = Any


class SourceNorm(NamedTuple):
    """With `separate_norm`, the running statistics of the source; those of the target are the state's, and evaluation
    uses them. They start at 0 and 1: training uses the batch's statistics, and the start is forgotten in 50 steps."""

    batch_stats: PyTree


def init(key: jax.Array, *, variables: PyTree, config: Any, **_: Any) -> Start:
    """Adds no parameters; `extra` is `SourceNorm` with `separate_norm`, else nothing.

    Raises:
      UserError: `separate_norm` is set, but normalisation is frozen.
    """
    if not config.separate_norm:
        return Start()
    if config.model.get("norm") == "frozen":
        raise UserError("separate_norm keeps statistics that training moves: it needs model.norm=batch, not frozen")
    fresh = lambda path, leaf: jnp.full(leaf.shape, float(path[-1].key == "var"), leaf.dtype)  # noqa: E731
    return Start(extra=SourceNorm(jax.tree_util.tree_map_with_path(fresh, variables["batch_stats"])))


def passes(config: Any, step: int) -> tuple[Callable, ...]:
    """One pass, since the association joins both domains in one term."""
    return (joint_pass,)


def joint_pass(
    params: PyTree, carry: Carry, batch: PyTree, *, model: Any, config: Any, keys: Keys, axis_name: str | None, **_: Any
) -> tuple[jax.Array, Carry]:
    """All terms; the forward pass of the target comes first, as in the published loop."""
    source, run = batch["source"], {"keys": keys, "axis_name": axis_name}
    theirs, carry = forward(model, params["model"], carry, batch["target"]["image"], use="target", **run)
    if config.separate_norm:
        own = carry._replace(batch_stats=carry.extra.batch_stats)
        ours, moved = forward(model, params["model"], own, source["image"], use="source", **run)
        carry = carry._replace(extra=SourceNorm(moved.batch_stats))
    else:
        ours, carry = forward(model, params["model"], carry, source["image"], use="source", **run)

    loss, metrics = supervised_loss(ours, source, config, axis_name)
    label = resize_labels(source["label"], ours.main.shape[1:3])
    if config.lambda_features:
        term = cycle_association(
            ours.features, theirs.features, label, "cosine", config.aggregation, axis_name=axis_name
        )
        loss, metrics["features"] = loss + config.lambda_features * term, term
    if config.lambda_probs:
        probs = jax.nn.softmax(ours.main), jax.nn.softmax(theirs.main)
        term = cycle_association(*probs, label, "kl", config.aggregation, axis_name=axis_name)
        loss, metrics["probs"] = loss + config.lambda_probs * term, term
    if config.lambda_smooth:
        term = smoothness(ours.main, axis_name=axis_name) + smoothness(theirs.main, axis_name=axis_name)
        loss, metrics["smooth"] = loss + config.lambda_smooth * term, term
    return loss, carry.log(**metrics, **out_of_class(label, theirs.main, config, axis_name))


def out_of_class(label: jax.Array, logits: jax.Array, config: Any, axis_name: str | None) -> dict[str, jax.Array]:
    """How often a class is predicted in a target image but missing in its source partner: no cycle can match it.

    Args:
      label: (N, h, w) int32 of the source.
      logits: (N, h', w', C) of the target.
      config: `label_space` names the classes; without one they are numbered.
      axis_name: the device axis, or None.

    Returns:
      "out_of_class/CLASS": the share of the pairs, 0..1; "out_of_class": the share of all classes predicted.
    """
    classes = jnp.arange(logits.shape[-1])
    predicted = jnp.any(jnp.argmax(logits, axis=-1)[..., None] == classes, axis=(1, 2))  # (N, C)
    missing = predicted & ~jnp.any(label[..., None] == classes, axis=(1, 2))
    shares = jnp.mean(jnp.stack([missing, predicted]).astype(logits.dtype), axis=1)
    if axis_name is not None:
        shares = lax.pmean(shares, axis_name)
    names = label_space(config.label_space).classes if config.label_space else range(logits.shape[-1])
    by_class = {f"out_of_class/{name}": share for name, share in zip(names, shares[0], strict=False)}
    return {"out_of_class": jnp.sum(shares[0]) / jnp.sum(shares[1]), **by_class}


def predict(variables: PyTree, images: jax.Array, *, model: Any, config: Any) -> jax.Array:
    """Class probabilities (N, h, w, C) of normalised images (N, H, W, 3), at network resolution.

    With `config.test_aggregation` above 0, features are aggregated before the head and probabilities after it, as in
    the published evaluation.
    """
    outputs, share = model.apply(variables, images, train=False), config.test_aggregation
    if not share:
        return jax.nn.softmax(outputs.main)
    head = model.classifier(model.num_classes)
    features = aggregate(outputs.features, "cosine", share)
    logits = head.apply({"params": variables["params"][model.CLASSIFIERS[0]]}, features).astype(outputs.main.dtype)
    return aggregate(jax.nn.softmax(logits), "kl", share)
