"""SePiCo: self-training with an EMA teacher, and contrast of the pixels of both domains with the source's classes.

Xie et al., SePiCo: Semantic-Guided Pixel Contrast for Domain Adaptive Semantic Segmentation, TPAMI 2023
(arXiv 2204.08808). With f the projected features, y the labels of the source, q the teacher's labels of the target,
x_m, y_m, w_m the mixed image, its labels and its weights (ClassMix), and s and t the augmented images,
L = wCE(s, y) + wCE(x_m, y_m, w_m) + CL(f_s, y) + CL(f_t, q) + R(f_s) + R(f_t).
The last four terms begin at the step `contrast_start`. CL contrasts a pixel with the distribution of each class in the
source (`contrast` = "dist"), with its mean ("proto"), or with a bank of the means of earlier batches ("bank"); R is
`losses.contrastive.uniformity`. The teacher's features of the source give the statistics and the bank. A target image
that is larger than the source's is cropped where its pseudo-labels are balanced best. Where target images come with
images by day of the same places (`target.reference`), both decide the pseudo-labels.

Two differences from the published code: a stage that continues has its statistics, its bank and its teacher; and the
teacher's predictions for the source, which nothing reads, are not computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxuda.errors import UserError
from jaxuda.losses.contrastive import (
    Bank,
    ClassStatistics,
    bank_contrast,
    distribution_contrast,
    empty_bank,
    empty_statistics,
    uniformity,
    update_bank,
    update_statistics,
)
from jaxuda.losses.feature_distance import shrink_labels
from jaxuda.losses.segmentation import IGNORE
from jaxuda.methods import Carry, Keys, Start
from jaxuda.methods.daformer import mixed_images, mixed_pass, source_loss
from jaxuda.methods.selftraining import (
    Teacher,
    augment,
    flip_coins,
    follow,
    pseudo_labels,
    pseudo_labels_by_day,
    start_teacher,
    student_and_teacher,
    teacher_forward,
    trusted,
)
from jaxuda.methods.supervised import forward, upsample
from jaxuda.models import Outputs, output_shapes
from jaxuda.models.heads import Projection

PyTree = Any
CONTRASTS = ("proto", "bank", "dist")
MIN_RATIO = 0.75  # share of a feature's cell that its class must cover
CANDIDATES = 10  # crops of a target image of which the best is taken


class Sepico(NamedTuple):
    """What the method keeps beside the network.

    teacher: the teacher's network.
    projection: the parameters of the teacher's projection head.
    projection_stats: the running statistics of the student's head.
    statistics: of the source's projected features.
    bank: with `contrast` = "bank", else ().
    """

    teacher: Teacher
    projection: PyTree
    projection_stats: PyTree
    statistics: ClassStatistics
    bank: Bank | tuple[()]


def init(key: jax.Array, *, model: Any, variables: PyTree, batch: PyTree, config: Any, **_: Any) -> Start:
    """The projection head, a module of its own since only training needs it; `extra` is a `Sepico`.

    Raises:
      UserError: `contrast` is unknown.
    """
    if config.contrast not in CONTRASTS:
        raise UserError(f"contrast = {config.contrast!r} is unknown; choose one of: {', '.join(CONTRASTS)}")
    maps = contrasted(output_shapes(model, batch["source"]["image"].shape[1:3]))
    dtype, classes, channels = maps[0].dtype, model.num_classes, config.channels
    # On one position: a head starts the same on maps of any size.
    positions = [jnp.zeros((1, 1, 1, each.shape[-1]), dtype) for each in maps]
    head = jax.tree.map(lambda x: x.astype(dtype), _head(maps, config, model.dtype).init(key, positions))
    bank = empty_bank(classes, config.bank, channels, dtype) if config.contrast == "bank" else ()
    teacher, statistics = start_teacher(variables), empty_statistics(classes, channels, dtype)
    copy = jax.tree.map(jnp.array, head["params"])
    return Start({"projection": head["params"]}, Sepico(teacher, copy, head["batch_stats"], statistics, bank))


def passes(config: Any, step: int) -> tuple[Callable, ...]:
    """The source pass, the target's contrast once that has started, and the pass of mixed images."""
    if step < config.contrast_start:
        return partial(source_pass, contrasts=False), mixed_pass
    return partial(source_pass, contrasts=True), target_pass, mixed_pass


def starts(config: Any) -> tuple[int, ...]:
    """The step at which the contrast begins."""
    return (config.contrast_start,)


def before_passes(
    params: PyTree, carry: Carry, batch: PyTree, *, model: Any, config: Any, keys: Keys, axis_name: str | None, **_: Any
) -> Carry:
    """The teacher's crop and labels of the target, the statistics of the source, augmented and mixed images."""
    source = batch["source"]
    cut, teacher = cropped(carry.extra.teacher, batch, model, config, keys, axis_name)
    images, (labels, share, teacher) = cut["image"], labelled(teacher, cut, model, config, axis_name)
    weights = trusted(share, cut, config)
    target = {"image": images, "label": labels, "weight": weights}

    outputs, teacher = teacher_forward(model, teacher, source["image"], axis_name)
    extra = learnt(carry.extra._replace(teacher=teacher), outputs, source["label"], model, config, axis_name)

    coins = flip_coins(keys.use("coins"))
    coloured = partial(augment, preprocess=config.preprocess, coins=coins, strength=config.strength, per_batch=True)
    return (
        carry._replace(extra=extra)
        .log(share=share)
        .keep(
            source={**source, "image": coloured(source["image"], keys.use("source colours"))},
            target={
                "image": coloured(images, keys.use("target colours")),
                "label": jnp.where(weights > 0, labels, IGNORE),
            },
            mixed=mixed_images(source, target, model.num_classes, coins, keys, config, axis_name),
        )
    )


def source_pass(
    params: PyTree,
    carry: Carry,
    batch: PyTree,
    *,
    model: Any,
    config: Any,
    keys: Keys,
    axis_name: str | None,
    contrasts: bool,
    **_: Any,
) -> tuple[jax.Array, Carry]:
    """The supervised loss, and the contrast of the source."""
    source = carry.values["source"]
    outputs, carry = forward(
        model, params["model"], carry, source["image"], keys=keys, use="source", axis_name=axis_name
    )
    loss, metrics = source_loss(outputs, source, config, axis_name)
    carry = carry.log(**metrics)
    if contrasts:
        contrast, carry = contrast_loss(params, carry, outputs, source["label"], "source", model, config, axis_name)
        loss += contrast
    return loss, carry


def target_pass(
    params: PyTree, carry: Carry, batch: PyTree, *, model: Any, config: Any, keys: Keys, axis_name: str | None, **_: Any
) -> tuple[jax.Array, Carry]:
    """The contrast of the target with all labels of the teacher inside the margins, however confident."""
    target = carry.values["target"]
    outputs, carry = forward(
        model, params["model"], carry, target["image"], keys=keys, use="target", axis_name=axis_name
    )
    return contrast_loss(params, carry, outputs, target["label"], "target", model, config, axis_name)


def after_update(state: Any, *, config: Any) -> Any:
    """The teacher and its head for the next step."""
    extra = state.extra
    network, head = follow(
        (extra.teacher.params, extra.projection),
        (state.params["model"], state.params["projection"]),
        state.step,
        config.alpha,
    )
    return state.replace(extra=extra._replace(teacher=extra.teacher._replace(params=network), projection=head))


def evaluated(state: Any, *, config: Any) -> dict[str, PyTree]:
    """Student and teacher, both with the student's running statistics."""
    return student_and_teacher(state, state.extra.teacher.params)


def pictures(carry: Carry, batch: PyTree, *, config: Any) -> dict[str, jax.Array]:
    """The augmented images of a step, the labels of the target's contrast, and the mixed images as in DAFormer."""
    source, target, mixed = (carry.values[name] for name in ("source", "target", "mixed"))
    return {
        "source": source["image"],
        "target": target["image"],
        "target_label": target["label"],
        "mixed": mixed["image"],
        "mixed_label": mixed["label"],
        "weights": mixed["weight"],
    }


# Contrast ---------------------------------------------------------------------------------------------------


def contrasted(outputs: Outputs) -> tuple[jax.Array, ...]:
    """The maps (N, h_i, w_i, A_i) that the head projects: those of all stages where the network has them."""
    return outputs.levels or (outputs.features,)


def project(
    params: PyTree, statistics: PyTree, outputs: Outputs, model: Any, config: Any, axis_name: str | None
) -> tuple[jax.Array, PyTree]:
    """Unit vectors (N, h, w, channels) of a network's outputs, and the head's running statistics after that."""
    maps = contrasted(outputs)
    head = _head(maps, config, model.dtype).clone(axis_name=axis_name)
    variables = {"params": params, "batch_stats": statistics}
    features, moved = head.apply(variables, maps, True, mutable=["batch_stats"])
    return features, lax.stop_gradient(moved["batch_stats"])


def _head(maps: tuple[jax.Array, ...], config: Any, dtype: str) -> Projection:
    """The head for maps with these shapes; the published one reduces joined maps to a quarter of their channels."""
    joined = sum(each.shape[-1] for each in maps)
    return Projection(joined if len(maps) == 1 else joined // 4, config.channels, dtype)


def learnt(
    extra: Sepico, outputs: Outputs, labels: jax.Array, model: Any, config: Any, axis_name: str | None
) -> Sepico:
    """The statistics and the bank after the teacher's outputs for the source, labels (N, H, W)."""
    features, _ = project(extra.projection, extra.projection_stats, outputs, model, config, axis_name)
    cells = cell_labels(labels, features.shape[1:3], model.num_classes)
    bank = update_bank(extra.bank, features, cells, axis_name) if config.contrast == "bank" else ()
    return extra._replace(statistics=update_statistics(extra.statistics, features, cells, axis_name), bank=bank)


def cell_labels(labels: jax.Array, size: tuple[int, int], num_classes: int) -> jax.Array:
    """Labels (N, H, W) at the `size` (h, w) of features, see `shrink_labels`.

    The cells are the smallest squares that cover the image; what lies beyond it counts as 255.
    """
    factor = max(-(-side // cells) for side, cells in zip(labels.shape[1:], size, strict=True))
    beyond = [(0, cells * factor - side) for side, cells in zip(labels.shape[1:], size, strict=True)]
    return shrink_labels(jnp.pad(labels, ((0, 0), *beyond), constant_values=IGNORE), factor, MIN_RATIO, num_classes)


def contrast_loss(
    params: PyTree,
    carry: Carry,
    outputs: Outputs,
    labels: jax.Array,
    domain: str,
    model: Any,
    config: Any,
    axis_name: str | None,
) -> tuple[jax.Array, Carry]:
    """contrast_weight * CL + reg_weight * R of the student's outputs, labels (N, H, W); logs CL and R."""
    extra = carry.extra
    features, moved = project(params["projection"], extra.projection_stats, outputs, model, config, axis_name)
    cells = cell_labels(labels, features.shape[1:3], model.num_classes)
    if config.contrast == "bank":
        loss = bank_contrast(features, cells, extra.bank.rows, extra.bank.lengths, config.tau, axis_name)
    else:
        statistics = extra.statistics
        if config.contrast == "proto":
            statistics = statistics._replace(var=jnp.zeros_like(statistics.var))
        loss = distribution_contrast(features, cells, statistics, config.tau, axis_name, unit=False)
    metrics, loss = {f"contrast_{domain}": loss}, config.contrast_weight * loss
    if config.reg_weight:
        metrics[f"uniformity_{domain}"] = uniformity(features, cells, extra.statistics.mean, config.tau, axis_name)
        loss += config.reg_weight * metrics[f"uniformity_{domain}"]
    return loss, carry._replace(extra=extra._replace(projection_stats=moved)).log(**metrics)


# The crop of the target -------------------------------------------------------------------------------------


def labelled(
    teacher: Teacher, target: Mapping[str, jax.Array], model: Any, config: Any, axis_name: str | None
) -> tuple[jax.Array, jax.Array, Teacher]:
    """The teacher's labels of target images (N, H, W), the share of confident ones, and the teacher after that.

    Args:
      teacher: see above.
      target: "image" (N, H, W, 3) and, if there are images by day of the same places, "reference".
      model, axis_name: as for `before_passes`.
      config: `threshold`; with images by day also `day_ratio`, `static_classes`, and `class_weights` if there are any.
    """

    def predict(teacher: Teacher, images: jax.Array) -> tuple[jax.Array, Teacher]:
        outputs, teacher = teacher_forward(model, teacher, images, axis_name)
        return upsample(outputs.main, images, config), teacher

    night, teacher = predict(teacher, target["image"])
    if "reference" not in target:
        labels, share, _ = pseudo_labels(night, config.threshold, axis_name)
        return labels, share, teacher
    day, teacher = predict(teacher, target["reference"])
    labels, share, _ = pseudo_labels_by_day(
        night,
        day,
        config.threshold,
        ratio=config.day_ratio,
        static=config.static_classes,
        weights=config.get("class_weights", ()),
        axis_name=axis_name,
    )
    return labels, share, teacher


def cropped(
    teacher: Teacher, batch: PyTree, model: Any, config: Any, keys: Keys, axis_name: str | None
) -> tuple[Mapping[str, jax.Array], Teacher]:
    """Target images cropped to the size of the source's where the teacher's labels are balanced best.

    Images by day of the same places are cropped alike.

    Raises:
      UserError: they are smaller than the source's.
    """
    target, size = batch["target"], batch["source"]["image"].shape[1:3]
    images = target["image"]
    if images.shape[1:3] == size:
        return target, teacher
    if images.shape[1] < size[0] or images.shape[2] < size[1]:
        height, width = images.shape[1:3]
        raise UserError(
            f"SePiCo mixes source images with crops of the target's, which are smaller here ({width}x{height}, the "
            f"source's {size[1]}x{size[0]}): set source.crop to at most the size of target.resize"
        )
    labels, _, teacher = labelled(teacher, target, model, config, axis_name)
    corners = draw_corners(keys.use("corners"), images.shape[1:3], size)
    best = jax.vmap(lambda labels, corners: best_crop(labels, corners, size, config.crop_limit, model.num_classes))
    cut = jax.vmap(lambda target, corner: jax.tree.map(lambda x: _window(x, corner, size), target))
    return cut(target, best(labels, corners)), teacher


def draw_corners(keys: Keys, image: tuple[int, int], size: tuple[int, int]) -> jax.Array:
    """The candidates for the upper left corners (y, x) of crops of images, uniform: (N, 10, 2) int32."""
    ends = jnp.asarray([whole - part + 1 for whole, part in zip(image, size, strict=True)])
    return jax.vmap(lambda key: jax.random.randint(key, (CANDIDATES, 2), 0, ends))(keys.examples)


def best_crop(
    labels: jax.Array, corners: jax.Array, size: tuple[int, int], limit: float, num_classes: int
) -> jax.Array:
    """The first of those candidates whose crops have the largest product of the pixel counts of their classes.

    A crop scores sum_c ln(n_c) over the classes that it shows, or 0 if it shows only one or if one covers at least
    `limit` of its labelled pixels.

    Args:
      labels: (H, W) integers in 0..C-1, or 255 = ignore.
      corners: (K, 2) int32, the upper left corners (y, x).
      size: (height, width) of the crop; an image that is smaller limits it.
      limit: 0..1.
      num_classes: C.

    Returns:
      (2,), one of the corners.
    """

    def score(corner: jax.Array) -> jax.Array:
        counts = jnp.sum(_window(labels, corner, size)[..., None] == jnp.arange(num_classes), axis=(0, 1))
        mixed = (jnp.sum(counts > 0) > 1) & (jnp.max(counts) / jnp.sum(counts) < limit)
        return jnp.where(mixed, jnp.sum(jnp.log(jnp.maximum(counts, 1))), 0)

    return corners[jnp.argmax(jax.vmap(score)(corners))]


def _window(image: jax.Array, corner: jax.Array, size: tuple[int, int]) -> jax.Array:
    """The part (h, w, ...) of an image (H, W, ...) from a corner (y, x) on."""
    shape = tuple(min(part, whole) for part, whole in zip(size, image.shape, strict=False))
    return lax.dynamic_slice(image, jnp.pad(corner, (0, image.ndim - 2)), (*shape, *image.shape[2:]))
