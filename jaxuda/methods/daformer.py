"""DAFormer's step: self-training on mixed images that an EMA teacher labels. DACS, MIC and VFM-UDA are configs of it.

Hoyer, Dai, Van Gool: DAFormer, CVPR 2022 (section 3); Tranheden et al.: DACS, WACV 2021 (mixed images); Hoyer et al.:
MIC, CVPR 2023 (masked images); Englert et al.: VFM-UDA, CVPR 2024 workshop (masked tokens):
L = wCE(s, y_s) + lambda_lovasz * Lovasz(s, y_s) + lambda_features * FD(s, y_s) + wCE(m, y_m, w_m)
  + lambda_mask * wCE(k, q, w)
with s source images; m: target images into which classes of source images are pasted; k: target images with hidden
blocks or tokens; q, w: the teacher's labels of the target, and how much they count. wCE is a mean over all pixels, also
ignored ones. FD is the distance to the features of a frozen ImageNet network.

As in the published code, where it differs from the papers: w is one number for the whole batch, the share of its
confident pixels; all images draw from the classes of the whole source batch, "ignore" among them; the teacher's batch
normalisation uses the batch, and its running statistics are its own. As in the papers, `alpha` grows from 0 to its
value: at first the teacher is the mean of all students so far.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxuda.errors import UserError
from jaxuda.losses.feature_distance import feature_distance, shrink_labels
from jaxuda.losses.segmentation import IGNORE, weighted_cross_entropy
from jaxuda.methods import Carry, Keys, Start
from jaxuda.methods.selftraining import (
    Coins,
    Teacher,
    augment,
    block_draws,
    block_mask,
    class_mask,
    draw_classes,
    flip_coins,
    follow,
    mix,
    present_classes,
    pseudo_labels,
    start_teacher,
    student_and_teacher,
    teacher_forward,
    trusted,
)
from jaxuda.methods.supervised import forward, lovasz_term, predicted_loss, upsample
from jaxuda.models import Outputs

PyTree = Any
Labelled = Mapping[str, jax.Array]  # "image" (N, H, W, 3), "label" (N, H, W) int32, and "weight" (N, H, W)
MASK_IMAGES = ("augmented", "separate", "tokens")


def init(key: jax.Array, *, variables: PyTree, config: Any, weights: Callable[[str], PyTree], **_: Any) -> Start:
    """The teacher starts as the student; the ImageNet network is a constant, if `lambda_features` is not 0."""
    if not config.lambda_features:
        return Start(extra=start_teacher(variables))
    if "imagenet" not in config.get("weights", ()):
        raise UserError(
            f"lambda_features={config.lambda_features} needs the network's ImageNet weights: set the stage's weights "
            "to ('imagenet',), or lambda_features to 0"
        )
    return Start(extra=start_teacher(variables), constants={"reference": weights("imagenet")})


def passes(config: Any, step: int) -> tuple[Callable, ...]:
    """Source, mixed and, if `lambda_mask` is not 0, masked images: the order in which running statistics move."""
    if config.lambda_mask and config.mask_images not in MASK_IMAGES:
        raise UserError(f"mask_images={config.mask_images!r}: choose one of: {', '.join(MASK_IMAGES)}")
    return (source_pass, mixed_pass, masked_pass) if config.lambda_mask else (source_pass, mixed_pass)


def before_passes(
    params: PyTree, carry: Carry, batch: PyTree, *, model: Any, config: Any, keys: Keys, axis_name: str | None, **_: Any
) -> Carry:
    """The teacher's labels of the target, the mixed images, and the masked ones."""
    source, images = batch["source"], batch["target"]["image"]
    if source["image"].shape != images.shape:
        (height, width), (rows, columns) = source["image"].shape[1:3], images.shape[1:3]
        raise UserError(
            f"source images are {width}x{height} and target images {columns}x{rows}, but parts of source images are "
            "pasted into target images: set crop, or resize, of config.source and config.target to one size"
        )
    logits, teacher = teacher_logits(model, carry.extra, images, config, axis_name)
    labels, share, _ = pseudo_labels(logits, config.threshold, axis_name)
    target = {"image": images, "label": labels, "weight": trusted(share, batch["target"], config)}
    mixed = mixed_images(
        source, target, model.num_classes, flip_coins(keys.use("mixed coins")), keys, config, axis_name
    )
    carry = carry._replace(extra=teacher).log(share=share).keep(mixed=mixed)
    return carry.keep(masked=masked_images(source, target, keys, config, axis_name)) if config.lambda_mask else carry


def source_pass(
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
    """The supervised loss, and the distance to the features of the ImageNet network."""
    source = batch["source"]
    outputs, carry = forward(
        model, params["model"], carry, source["image"], keys=keys, use="source", axis_name=axis_name
    )
    loss, metrics = source_loss(outputs, source, config, axis_name)
    if config.lambda_features:
        reference = model.apply(constants["reference"], source["image"])
        distance = reference_distance(outputs, reference, source["label"], model.num_classes, config, axis_name)
        loss, metrics = loss + config.lambda_features * distance, {**metrics, "feature_distance": distance}
    return loss, carry.log(**metrics)


def mixed_pass(
    params: PyTree, carry: Carry, batch: PyTree, *, model: Any, config: Any, keys: Keys, axis_name: str | None, **_: Any
) -> tuple[jax.Array, Carry]:
    """The loss on mixed images."""
    mixed = carry.values["mixed"]
    outputs, carry = forward(model, params["model"], carry, mixed["image"], keys=keys, use="mixed", axis_name=axis_name)
    loss = pixel_loss(outputs, mixed, config, axis_name)
    return loss, carry.log(ce_mixed=loss)


def masked_pass(
    params: PyTree, carry: Carry, batch: PyTree, *, model: Any, config: Any, keys: Keys, axis_name: str | None, **_: Any
) -> tuple[jax.Array, Carry]:
    """The loss on masked images."""
    masked = carry.values["masked"]
    if config.mask_images == "separate":
        # Every device has the same two images.
        axis_name, keys = None, keys._replace(index=jnp.arange(2, dtype=jnp.int32))
    elif config.mask_images == "tokens":
        if not hasattr(model, "mask_ratio"):
            raise UserError(
                "mask_images='tokens' hides tokens of the network, and this network has none: set mask_images to "
                "'augmented', which hides blocks of the image, or model.name to dinov2"
            )
        model = model.clone(mask_ratio=config.mask_ratio)
    outputs, carry = forward(
        model, params["model"], carry, masked["image"], keys=keys, use="masked", axis_name=axis_name
    )
    loss = pixel_loss(outputs, masked, config, axis_name)
    return config.lambda_mask * loss, carry.log(ce_masked=loss)


def after_update(state: Any, *, config: Any) -> Any:
    """The teacher of the next step follows the student of this one."""
    teacher = state.extra
    params = follow(teacher.params, state.params["model"], state.step, config.alpha)
    return state.replace(extra=teacher._replace(params=params))


def evaluated(state: Any, *, config: Any) -> dict[str, PyTree]:
    """Student and teacher, both with the student's running statistics."""
    return student_and_teacher(state, state.extra.params)


def pictures(carry: Carry, batch: PyTree, *, config: Any) -> dict[str, jax.Array]:
    """The images of a step, the labels and weights of the mixed ones, and all target images masked, if they are."""
    mixed = carry.values["mixed"]
    shown = {
        "source": batch["source"]["image"],
        "target": batch["target"]["image"],
        "mixed": mixed["image"],
        "mixed_label": mixed["label"],
        "weights": mixed["weight"],
    }
    # "Separate" masked images are two, whatever the number of the others.
    masked = config.lambda_mask and config.mask_images != "separate"
    return {**shown, "masked": carry.values["masked"]["image"]} if masked else shown


# What the passes are made of --------------------------------------------------------------------------------


def teacher_logits(
    model: Any, teacher: Teacher, images: jax.Array, config: Any, axis_name: str | None
) -> tuple[jax.Array, Teacher]:
    """The teacher's logits at the size of the images, (N, H, W, C), and the teacher as `teacher_forward` returns it.

    config: with `teacher_flip` (if it is set) the probabilities are the mean of those of the images and of their mirror
        images, as in VFM-UDA; the logits are their logarithms.
    """
    outputs, teacher = teacher_forward(model, teacher, images, axis_name)
    logits = upsample(outputs.main, images, config)
    if not config.get("teacher_flip", False):
        return logits, teacher
    outputs, teacher = teacher_forward(model, teacher, images[:, :, ::-1], axis_name)
    mirrored = upsample(outputs.main, images, config)[:, :, ::-1]
    return jnp.log((jax.nn.softmax(logits) + jax.nn.softmax(mirrored)) / 2), teacher


def source_loss(
    outputs: Outputs, source: Labelled, config: Any, axis_name: str | None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """wCE + lambda_lovasz * Lovasz-softmax, and its terms; arguments as for `supervised.supervised_loss`."""
    ce = pixel_loss(outputs, source, config, axis_name)
    lovasz, terms = lovasz_term(outputs, source, config, axis_name)
    return ce + lovasz, {"ce": ce, **terms}


def pixel_loss(outputs: Outputs, images: Labelled, config: Any, axis_name: str | None) -> jax.Array:
    """wCE(up(main)) + lambda_aux * wCE(up(aux)), a mean over all pixels, also over ignored ones.

    Args:
      outputs: those of the images; the first term is that of `predicted_loss`, the term of `aux` exists if the network
        has a second level.
      images: without "weight" all labelled pixels count the same.
      config: `class_weights`, if there are any, multiply the weights of the pixels.
      axis_name: the device axis, or None.
    """
    label, weight = images["label"], images.get("weight")
    if len(classes := config.get("class_weights", ())):
        by_class = jnp.asarray(classes, outputs.main.dtype)[jnp.minimum(label, len(classes) - 1)]
        weight = by_class if weight is None else weight * by_class

    def ce(logits: jax.Array, maps: Labelled) -> jax.Array:
        return weighted_cross_entropy(logits, maps["label"], maps.get("weight"), axis_name)

    maps = {"label": label} if weight is None else {"label": label, "weight": weight}
    loss = predicted_loss(ce, outputs, maps, config)
    if outputs.aux is not None:
        loss += config.lambda_aux * ce(upsample(outputs.aux, images["image"], config), maps)
    return loss


def reference_distance(
    outputs: Outputs, reference: Outputs, labels: jax.Array, num_classes: int, config: Any, axis_name: str | None
) -> jax.Array:
    """The mean distance between the backbone's last maps where one of `feature_classes` covers a position.

    Args:
      outputs: those of the student.
      reference: those of the ImageNet network on the same images.
      labels: (N, H, W) int32, 255 = ignore.
      num_classes: C.
      config: `feature_classes`: train ids; (): all. A class covers a position if it has at least a share
        `feature_ratio` of its pixels.
      axis_name: the device axis, or None.
    """
    features, fixed = (x.features if x.levels is None else x.levels[-1] for x in (outputs, reference))
    # Maps of sizes that the stride does not divide have a position more than the labels have whole cells.
    factor = math.ceil(labels.shape[2] / features.shape[2])
    small = shrink_labels(labels, factor, config.feature_ratio, num_classes)
    height, width = (min(sizes) for sizes in zip(features.shape[1:3], small.shape[1:3], strict=True))
    features, fixed, small = (x[:, :height, :width] for x in (features, fixed, small))
    classes = config.feature_classes
    counted = jnp.isin(small, jnp.asarray(classes)) if len(classes) else small != IGNORE
    return feature_distance(features, fixed, counted, axis_name)


def mixed_images(
    source: Labelled,
    target: Labelled,
    num_classes: int,
    coins: Coins,
    keys: Keys,
    config: Any,
    axis_name: str | None,
) -> Labelled:
    """ClassMix (Olsson et al., WACV 2021): half of the classes of source images, pasted into target images.

    Args:
      source: "image" and "label".
      target: "image", the teacher's "label", and its "weight"; pasted pixels have the weight 1.
      num_classes: C.
      coins: whether colours change, see `selftraining.augment`.
      keys: decide which classes are pasted, and how the colours of the result change.
      config: `preprocess`, and `strength` of the changes of colours.
      axis_name: the device axis, or None.
    """
    present = present_classes(source["label"], num_classes, axis_name)
    pasted = class_mask(source["label"], draw_classes(keys.use("mixed classes"), present))
    image = mix(pasted, source["image"], target["image"])
    return {
        "image": augment(image, keys.use("mixed colours"), config.preprocess, coins=coins, strength=config.strength),
        "label": mix(pasted, source["label"], target["label"]),
        "weight": mix(pasted, 1.0, target["weight"]),
    }


def masked_images(source: Labelled, target: Labelled, keys: Keys, config: Any, axis_name: str | None) -> Labelled:
    """Images of which blocks are hidden, with the labels of the complete images.

    Args:
      source, target: as for `mixed_images`.
      keys: decide which blocks are hidden, and how colours change.
      config: `mask_images`: all target images with changed colours ("augmented"), or the first source and the first
        target image of the whole batch as they are ("separate"). "tokens": as "augmented", but nothing is hidden here:
        the network hides tokens. `mask_block`: the side of a block in pixels; `mask_ratio`: the share of hidden blocks;
        `preprocess` and `strength`.
      axis_name: the device axis, or None.

    Raises:
      UserError: the images are "separate", and the batch, or a part of it, has one image.
    """
    if config.mask_images == "separate":
        if len(source["image"]) * (1 if axis_name is None else lax.axis_size(axis_name)) < 2:
            raise UserError(
                "mask_images='separate' needs at least 2 images of each domain at a time: raise the stage's batch, or "
                "lower accumulate (config.accumulate, or the stage's)"
            )
        weighted = {**source, "weight": jnp.ones_like(target["weight"])}
        masked = {
            name: jnp.concatenate([_first(weighted[name], axis_name), _first(target[name], axis_name)])
            for name in ("image", "label", "weight")
        }
        keys = keys._replace(index=jnp.arange(2, dtype=jnp.int32))
    else:
        image = augment(
            target["image"],
            keys.use("masked colours"),
            config.preprocess,
            coins=flip_coins(keys.use("masked coins")),
            strength=config.strength,
            per_batch=True,
        )
        masked = {**target, "image": image}
        if config.mask_images == "tokens":
            return masked
    size = masked["image"].shape[1:3]
    shown = block_mask(block_draws(keys.use("masked blocks"), size, config.mask_block), size, config.mask_ratio)
    return {**masked, "image": masked["image"] * shown[..., None].astype(masked["image"].dtype)}


def _first(x: jax.Array, axis_name: str | None) -> jax.Array:
    """The first example of the whole batch, (1, ...), on every device."""
    if axis_name is None:
        return x[:1]
    return lax.psum(jnp.where(lax.axis_index(axis_name) == 0, x[:1], 0), axis_name)
