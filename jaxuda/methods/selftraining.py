"""Shared by the methods with an EMA teacher: the teacher, its pseudo-labels, ClassMix, augmentation, masks.

Tranheden et al., DACS: Domain Adaptation via Cross-domain Mixed Sampling, WACV 2021; Hoyer et al., DAFormer, CVPR
2022, and MIC: Masked Image Consistency, CVPR 2023.

Functions that draw at random take `Keys`, one `keys.use("a name")` for each purpose; what they draw does not depend on
the number of devices or of parts of a batch. The others take what was drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxuda.data.photometric import blur_size, gaussian_blur, kornia_jitter
from jaxuda.errors import UserError
from jaxuda.losses.reduction import masked_mean
from jaxuda.losses.segmentation import IGNORE
from jaxuda.methods import Keys
from jaxuda.models import Outputs
from jaxuda.models.layers import denormalise, normalise, resize_labels

PyTree = Any

_SEEN_BY_DAY = 0.4  # from this probability on, what is seen by day is there by night
_SIGMA = (0.15, 1.15)  # range of the blur's deviation, in pixels
_REACH = 15  # what lies further than 7 pixels away weighs less than 1e-10 at the largest deviation


# The teacher ------------------------------------------------------------------------------------------------


class Teacher(NamedTuple):
    """A network that follows the student.

    params: its parameters.
    batch_stats: its own running statistics, moved by its own forward passes. Batch normalisation in batch mode (the
      published one) never reads them; frozen normalisation does.
    """

    params: PyTree
    batch_stats: PyTree


def start_teacher(variables: PyTree) -> Teacher:
    """The teacher before the first step, a copy of the student: variables {"params", "batch_stats"} of the network."""
    return Teacher(*(jax.tree.map(jnp.array, variables.get(name, {})) for name in Teacher._fields))


def follow(teacher: PyTree, student: PyTree, step: jax.Array, alpha: float) -> PyTree:
    """The parameters of the teacher for a step: a * teacher + (1 - a) * student with a = min(1 - 1/(step + 1), alpha).

    So the teacher is the student at step 0, and the plain mean of all students until `a` reaches `alpha`.

    Args:
      teacher: its parameters in the step before.
      student: parameters of the same structure, before the step.
      step: integer scalar, the number of updates done. In a method's `after_update` this is `state.step`.
      alpha: the largest weight of the teacher's own parameters.

    Returns:
      A pytree like `teacher`, with its dtypes.
    """
    # In float32, 1 - a would be a thousandth of a percent off at alpha = 0.999. Two rounded weights would not add up to
    # 1: the teacher would drift away from a student that stands still.
    taken = jnp.maximum(1 / (jnp.asarray(step, float) + 1), 1 - alpha)
    return jax.tree.map(lambda t, s: (t + taken * (s - t)).astype(t.dtype), teacher, student)


def student_and_teacher(state: Any, teacher: PyTree) -> dict[str, PyTree]:
    """The networks to evaluate: the student and the teacher (its parameters), both with the student's statistics."""
    networks = {"student": state.params["model"], "teacher": teacher}
    return {name: {"params": params, "batch_stats": state.batch_stats} for name, params in networks.items()}


def teacher_forward(
    model: Any, teacher: Teacher, images: jax.Array, axis_name: str | None = None
) -> tuple[Outputs, Teacher]:
    """A forward pass of the teacher on normalised images (N, H, W, 3): batch statistics as in training, no dropout.

    Returns:
      The outputs at network resolution, without a gradient, and the teacher with its running statistics moved.
    """
    # Without a key, layers that draw at random do nothing.
    outputs, updated = model.clone(axis_name=axis_name).apply(
        {"params": teacher.params, "batch_stats": teacher.batch_stats}, images, train=True, mutable=["batch_stats"]
    )
    moved = teacher._replace(batch_stats=updated.get("batch_stats", teacher.batch_stats))
    return lax.stop_gradient((outputs, moved))


# Pseudo-labels ----------------------------------------------------------------------------------------------


def pseudo_labels(
    logits: jax.Array, threshold: float, axis_name: str | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The teacher's labels, and how many of them it is sure of.

    Args:
      logits: (N, H, W, C) of the teacher, at the size of the image.
      threshold: the probability from which on a pixel is confident.
      axis_name: the device axis, or None.

    Returns:
      The likeliest class (N, H, W) int32, the share of confident pixels in the whole batch of all devices (scalar),
      and the confidence (N, H, W), the probability of the likeliest class.
    """
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), *_confident(jax.nn.softmax(logits), threshold, axis_name)


def _confident(probs: jax.Array, threshold: float, axis_name: str | None) -> tuple[jax.Array, jax.Array]:
    """The share of pixels (N, H, W, C) whose highest value is at least `threshold`, and these values (N, H, W)."""
    confidence = jnp.max(probs, axis=-1)
    share = masked_mean((confidence >= threshold).astype(jnp.int32), axis_name=axis_name)
    return share.astype(confidence.dtype), confidence


def pseudo_labels_by_day(
    night: jax.Array,
    day: jax.Array,
    threshold: float,
    *,
    ratio: float,
    static: Sequence[int],
    weights: Sequence[float],
    axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `pseudo_labels`, for images by night, with images by day of the same places (SePiCo, after Wu et al., DANNet).

    With p the class probabilities of a pixel, a class c that does not move has m p_day,c + (1 - m) p_night,c with
    m = ratio where p_day,c > 0.4 and 1 - ratio elsewhere; any other class has p_night,c. Both are
    multiplied by the class's weight: the confidence of a class with a weight below the threshold never reaches it.

    Args:
      night, day: logits (N, H, W, C) of the teacher, at the size of the images.
      threshold, axis_name: as for `pseudo_labels`.
      ratio: 0..1, how much the day counts.
      static: the classes that do not move.
      weights: C class weights; (): all are 1.
    """
    night, day = jax.nn.softmax(night), jax.nn.softmax(day)
    share_of_day = jnp.where(day > _SEEN_BY_DAY, ratio, 1 - ratio)
    moves = jnp.ones(night.shape[-1], bool).at[jnp.asarray(static, int)].set(False)
    mixed = jnp.where(moves, night, share_of_day * day + (1 - share_of_day) * night)
    if len(weights):
        mixed *= jnp.asarray(weights, mixed.dtype)
    return jnp.argmax(mixed, axis=-1).astype(jnp.int32), *_confident(mixed, threshold, axis_name)


def trusted(share: jax.Array, images: Mapping[str, jax.Array], config: Any) -> jax.Array:
    """The weights of pseudo-labels, (N, H, W): `share` where the teacher's labels are trusted, 0 elsewhere.

    Args:
      share: of confident pixels.
      images: of the target: "image", and "trusted" if the target has margins (`data.transforms`).
      config: the first `ignore_top` and the last `ignore_bottom` rows are not trusted.

    Raises:
      UserError: no row is left.
    """
    shape, top, bottom = images["image"].shape[:3], config.ignore_top, config.ignore_bottom
    height = shape[1]
    if top + bottom >= height:
        raise UserError(
            f"ignore_top={top} and ignore_bottom={bottom} leave none of the {height} rows of a target image: make them "
            "smaller, or the target's images larger"
        )
    rows = jnp.arange(height)
    inside = (rows >= top) & (rows < height - bottom)
    weights = jnp.broadcast_to(jnp.where(inside, share, 0)[:, None], shape)
    return weights * images["trusted"] if "trusted" in images else weights


# ClassMix ---------------------------------------------------------------------------------------------------


def present_classes(labels: jax.Array, num_classes: int, axis_name: str | None = None) -> jax.Array:
    """The values that occur in the labels (N, H, W) of all devices: (C + 1,) bool, the last one for 255."""
    values = jnp.asarray([*range(num_classes), IGNORE], labels.dtype)
    found = jnp.any(labels[..., None] == values, axis=(0, 1, 2))
    return found if axis_name is None else lax.pmax(found.astype(jnp.int32), axis_name) > 0


def draw_classes(keys: Keys, present: jax.Array) -> jax.Array:
    """For each image half of the n present values, rounded up, without replacement: (C + 1,) -> (N, C + 1) bool."""
    draws = jax.vmap(lambda key: jax.random.uniform(key, present.shape))(keys.examples)
    ranks = jnp.argsort(jnp.argsort(jnp.where(present, draws, 2), axis=-1), axis=-1)
    return present & (ranks < (jnp.sum(present) + 1) // 2)


def class_mask(labels: jax.Array, drawn: jax.Array) -> jax.Array:
    """Where the labels (N, H, W) have a value that was drawn, (N, C + 1) bool, for their image: (N, H, W) bool."""
    places = jnp.where(labels == IGNORE, drawn.shape[-1] - 1, labels)
    return jax.vmap(lambda values, image: values[image])(drawn, places)


def mix(mask: jax.Array, source: jax.Array | float, target: jax.Array) -> jax.Array:
    """`source` where the mask (N, H, W) is true, else `target`; both (N, H, W, ...), or a number as the source.

    Source and target images, labels and pseudo-labels, 1 and the weights of the pseudo-labels are mixed with one mask:
    pasted pixels weigh 1, also where pseudo-labels are not trusted.
    """
    return jnp.where(mask.reshape(*mask.shape, *(1,) * (target.ndim - mask.ndim)), source, target)


# Masked images ----------------------------------------------------------------------------------------------


def block_draws(keys: Keys, size: tuple[int, int], block: int) -> jax.Array:
    """A number in 0..1 for every block of every image: (N, round(H / block), round(W / block)), .5 to the even number.

    Raises:
      UserError: the image has less than half a block.
    """
    rows, columns = (round(side / block) for side in size)
    if not rows or not columns:
        raise UserError(f"mask_block={block} is too large for images of {size[0]} rows and {size[1]} columns")
    return jax.vmap(lambda key: jax.random.uniform(key, (rows, columns)))(keys.examples)


def block_mask(draws: jax.Array, size: tuple[int, int], ratio: float) -> jax.Array:
    """True in the blocks that are kept, those with a draw above `ratio`: (N, rows, columns) -> (N, H, W) bool.

    A masked image is `images * mask[..., None]`: what is hidden has the mean colour.
    """
    return resize_labels(draws > ratio, size)


# Augmentation -----------------------------------------------------------------------------------------------


class Coins(NamedTuple):
    """Whether the images of a step are jittered, and whether they are blurred: bool scalars."""

    jitter: jax.Array
    blur: jax.Array


def flip_coins(keys: Keys) -> Coins:
    """Jitter in 80% of the steps, blur in 50%, the same for all images of the update."""
    jitter, blur = jax.random.uniform(keys.batch, (2,))
    return Coins(jitter > 0.2, blur > 0.5)


def augment(
    images: jax.Array, keys: Keys, preprocess: str, *, coins: Coins, strength: float = 0.2, per_batch: bool = False
) -> jax.Array:
    """Colour jitter, then a Gaussian blur, each if its coin says so.

    Args:
      images: (N, H, W, 3) float, normalised.
      keys: the keys of this use.
      preprocess: how they are normalised, see `normalise`.
      coins: see `flip_coins`.
      strength: brightness, contrast and saturation are at most this far from 1, and the hue, in turns, from 0.
      per_batch: draw one order of the jitter's operations and one deviation of the blur for the whole batch of all
        devices, instead of one per image. The jitter's factors are always drawn per image.

    Returns:
      (N, H, W, 3), normalised.
    """
    drawn = augment_parameters(keys, strength, images.dtype, per_batch)
    return augmented(images, preprocess, coins, *drawn)


def augment_parameters(
    keys: Keys, strength: float, dtype: Any, per_batch: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What `augment` draws for N images: the jitter's factors (N, 4) and order (N, 4), the blur's deviation (N,)."""

    def draw(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        colour, operations, blur = jax.random.split(key, 3)
        changes = jax.random.uniform(colour, (4,), dtype, -strength, strength)
        factors = changes + jnp.asarray([1, 1, 1, 0])
        return factors, jax.random.permutation(operations, 4), jax.random.uniform(blur, (), dtype, *_SIGMA)

    factors, order, sigma = jax.vmap(draw)(keys.examples)
    if per_batch:
        _, *shared = draw(keys.batch)
        order, sigma = (jnp.broadcast_to(one, each.shape) for one, each in zip(shared, (order, sigma), strict=True))
    return factors, order, sigma


def augmented(
    images: jax.Array, preprocess: str, coins: Coins, factors: jax.Array, order: jax.Array, sigma: jax.Array
) -> jax.Array:
    """`augment` with given parameters: factors (N, 4) and order (N, 4) of `kornia_jitter`, sigma (N,) of the blur."""
    jittered = 255 * kornia_jitter(denormalise(images, preprocess) / 255, factors, order)
    images = jnp.where(coins.jitter, normalise(jittered, preprocess).astype(images.dtype), images)
    sizes = tuple(min(blur_size(side), _REACH) for side in images.shape[1:3])
    return jnp.where(coins.blur, gaussian_blur(images, sigma, sizes), images)
