"""Shared by all methods: a forward pass, and the supervised loss on the source."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxuda.losses.segmentation import cross_entropy, lovasz_softmax
from jaxuda.methods import Carry, Keys
from jaxuda.models import Outputs
from jaxuda.models.layers import cut, resize_bilinear, resize_labels

PyTree = Any


def forward(
    model: Any, params: PyTree, carry: Carry, images: jax.Array, *, keys: Keys, use: str, axis_name: str | None
) -> tuple[Outputs, Carry]:
    """A training forward pass of the network.

    Args:
      model: the network.
      params: its parameters.
      carry: its running statistics are read and updated.
      images: (N, H, W, 3) normalised float images.
      keys: the keys of the pass.
      use: what the forward pass is for; dropout draws independently for each use.
      axis_name: the device axis over which batch statistics are taken, or None.

    Returns:
      The outputs at network resolution, and the carry with the updated running statistics.
    """
    keys = keys.use(use)
    outputs, updated = model.clone(axis_name=axis_name).apply(
        {"params": params, "batch_stats": carry.batch_stats},
        images,
        train=True,
        index=keys.index,
        rngs={"dropout": keys.batch},
        mutable=["batch_stats"],
    )
    return outputs, carry._replace(batch_stats=updated.get("batch_stats", carry.batch_stats))


def supervise(
    params: PyTree, carry: Carry, batch: PyTree, *, model: Any, config: Any, keys: Keys, axis_name: str | None, **_: Any
) -> tuple[Outputs, jax.Array, Carry]:
    """A forward pass on the source and `supervised_loss`, with its terms logged; most source passes start with it."""
    source = batch["source"]
    outputs, carry = forward(
        model, params["model"], carry, source["image"], keys=keys, use="source", axis_name=axis_name
    )
    loss, metrics = supervised_loss(outputs, source, config, axis_name)
    return outputs, loss, carry.log(**metrics)


def source_pass(params: PyTree, carry: Carry, batch: PyTree, **given: Any) -> tuple[jax.Array, Carry]:
    """The supervised loss on the source alone, the first pass of many methods."""
    _, loss, carry = supervise(params, carry, batch, **given)
    return loss, carry


def upsample(logits: jax.Array, images: jax.Array, config: Any) -> jax.Array:
    """Resizes logits (N, h, w, C) to the size of `images` (N, H, W, 3)."""
    return resize_bilinear(logits, images.shape[1:3], align_corners=config.align_corners)


def predicted_loss(
    loss: Callable[[jax.Array, Mapping[str, jax.Array]], jax.Array],
    outputs: Outputs,
    maps: Mapping[str, jax.Array],
    config: Any,
) -> jax.Array:
    """A loss of the main prediction or, if the network has a detail prediction too (HRDA), the weighted mean of both.

    Args:
      loss: (logits (N, H, W, C), maps) -> a mean over pixels.
      outputs: those of the images. The detail prediction is compared with the part of the maps that it is of.
      maps: "label" (N, H, W) and what else the loss reads, of the same size.
      config: `align_corners`, by which logits are resized to the size of the maps.
    """
    size = maps["label"].shape[1:3]
    resize = functools.partial(resize_bilinear, align_corners=config.align_corners)
    whole = loss(resize(outputs.main, size), maps)
    if (detail := outputs.detail) is None:
        return whole
    pairs = zip(detail.main.shape[1:3], size, outputs.main.shape[1:3], strict=True)
    part = tuple(cells * side // all_cells for cells, side, all_cells in pairs)
    shown = {name: cut(values, detail.offset, part) for name, values in maps.items()}
    return (1 - detail.weight) * whole + detail.weight * loss(resize(detail.main, part), shown)


def supervised_loss(
    outputs: Outputs, batch: dict[str, jax.Array], config: Any, axis_name: str | None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """CE(up(main)) + lambda_aux * CE(up(aux)) + lambda_lovasz * Lovasz-softmax(main).

    Args:
      outputs: those of the source images; the first term is that of `predicted_loss`.
      batch: "image" (N, H, W, 3) and "label" (N, H, W) int32, 255 = ignore.
      config: `lambda_aux` is used if the network has a second level; `lambda_lovasz` = 0 drops the
        Lovasz term; `lovasz_shrink` computes it on a grid that many times smaller than the image
        (it sorts pixels x classes); `class_weights`, if there are any, weight the cross-entropy.
      axis_name: the device axis, or None.

    Returns:
      The loss and its terms.
    """
    image, label = batch["image"], batch["label"]
    ce = functools.partial(cross_entropy, weights=config.get("class_weights", ()), axis_name=axis_name)
    metrics = {"ce": predicted_loss(lambda logits, maps: ce(logits, maps["label"]), outputs, {"label": label}, config)}
    loss = metrics["ce"]
    if outputs.aux is not None:
        metrics["ce_aux"] = ce(upsample(outputs.aux, image, config), label)
        loss += config.lambda_aux * metrics["ce_aux"]
    lovasz, terms = lovasz_term(outputs, batch, config, axis_name)
    return loss + lovasz, metrics | terms


def lovasz_term(
    outputs: Outputs, batch: dict[str, jax.Array], config: Any, axis_name: str | None
) -> tuple[jax.Array | float, dict[str, jax.Array]]:
    """lambda_lovasz * Lovasz-softmax(main) and its value as a metric; 0 and none if lambda_lovasz is 0.

    Arguments as for `supervised_loss`.
    """
    if not config.lambda_lovasz:
        return 0.0, {}
    size = tuple(side // config.lovasz_shrink for side in batch["image"].shape[1:3])
    probs = jax.nn.softmax(resize_bilinear(outputs.main, size, align_corners=config.align_corners))
    lovasz = lovasz_softmax(probs, resize_labels(batch["label"], size), axis_name=axis_name)
    return config.lambda_lovasz * lovasz, {"lovasz": lovasz}
