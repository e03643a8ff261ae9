"""Contrast of pixels with the distribution (SDCA, SePiCo), the prototype (CFContra, SePiCo) or a bank of each class.

SDCA: Li et al., Semantic Distribution-aware Contrastive Adaptation for Semantic Segmentation, arXiv 2105.05013.
SePiCo: Xie et al., SePiCo: Semantic-Guided Pixel Contrast for Domain Adaptive Semantic Segmentation, arXiv 2204.08808.
CFContra: coarse-to-fine contrastive adaptation with one memory of class prototypes for each domain. A memory is
(C, A) float with rows of unit length; the row of a class that was never seen is zero.

Everything is a product of (pixels x classes) and (pixels x channels) matrices: no array of size pixels x classes x
channels, or pixels x pixels, is ever built.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxuda.losses.reduction import masked_mean
from jaxuda.losses.segmentation import IGNORE

_HIGHEST = lax.Precision.HIGHEST


class ClassStatistics(NamedTuple):
    """Distribution of features per class, over all pixels seen so far.

    mean: (C, A) float.
    var: (C, A) float, biased; only the diagonal of the covariance is kept.
    count: (C,) float, number of pixels. Not an integer: a long training would overflow 32 bits. The count only weighs
      past pixels against new ones, so that rounding does no harm.
    """

    mean: jax.Array
    var: jax.Array
    count: jax.Array


def empty_statistics(num_classes: int, channels: int, dtype: str = "float32") -> ClassStatistics:
    """Statistics before the first pixel: all zero."""
    zeros = jnp.zeros((num_classes, channels), dtype)
    return ClassStatistics(zeros, zeros, jnp.zeros((num_classes,), dtype))


def update_statistics(
    stats: ClassStatistics, features: jax.Array, labels: jax.Array, axis_name: str | None = None
) -> ClassStatistics:
    """Statistics of everything seen before and of one more batch.

    With n pixels of a class in the batch, their mean m and biased variance v, and w = n / (n + count):
    var <- (1 - w) var + w v + w (1 - w) (mean - m)^2, mean <- (1 - w) mean + w m, count <- count + n. The result
    is the pooled mean and variance. Classes without pixels stay as they are. Carries no gradient.

    Args:
      stats: (C, A) statistics.
      features: (N, h, w, A) or (P, A) float.
      labels: (N, h, w) or (P,) integers in 0..C-1, or 255 = ignore.
      axis_name: device axis; the batch is then that of all devices together.

    Returns:
      Statistics of the same shapes and dtypes.
    """
    features = _flat(lax.stop_gradient(features))
    members = _members(labels, stats.mean.shape[0])
    weights = members.astype(features.dtype)

    def total(values: jax.Array) -> jax.Array:
        sums = jnp.matmul(weights.T, values, precision=_HIGHEST)
        return sums if axis_name is None else lax.psum(sums, axis_name)

    count = jnp.sum(members, axis=0, dtype=jnp.int32)
    count = (count if axis_name is None else lax.psum(count, axis_name)).astype(features.dtype)
    divisor = jnp.maximum(count, 1)[:, None]
    mean = total(features) / divisor
    # The mean over all devices is subtracted before squaring: differences of sums of squares would cancel in float32.
    centred = features - jnp.matmul(weights, mean, precision=_HIGHEST)
    var = total(jnp.square(centred)) / divisor

    new = (count / jnp.maximum(count + stats.count, 1))[:, None]
    spread = new * (1 - new) * jnp.square(stats.mean - mean)
    moved = ClassStatistics(
        stats.mean * (1 - new) + mean * new, stats.var * (1 - new) + var * new + spread, stats.count + count
    )
    return jax.tree.map(lambda after, before: after.astype(before.dtype), moved, stats)


def distribution_contrast(
    features: jax.Array,
    labels: jax.Array,
    stats: ClassStatistics,
    tau: float,
    axis_name: str | None = None,
    *,
    unit: bool = True,
) -> jax.Array:
    """Contrastive loss against infinitely many samples of the distribution of every class, in closed form.

    With features, means and variances scaled to unit length (hats), for pixel i and class c
    l_ic = (f^_i . mean^_c + 1/(2 tau) sum_a f^_ia^2 var^_ca) / tau; the loss is the mean over labelled pixels of
    -log softmax(l_i)[y_i] + 1/(2 tau^2) sum_a f^_ia^2 var^_{y_i,a}  (the paper's pixel loss with diagonal
    covariances). At the paper's tau of 100 its value stays within 2 / tau of log C. With variances of zero it is the
    contrast with prototypes, -log softmax(features . mean / tau)[y].

    Args:
      features: (N, h, w, A) or (P, A) float.
      labels: (N, h, w) or (P,) integers in 0..C-1, or 255 = ignore.
      stats: (C, A) statistics, constants here; a class that was never seen is all zero: a negative with l = 0.
      tau: temperature, above 0.
      axis_name: device axis over which the mean is taken.
      unit: SDCA's scaling to unit length; False takes features and statistics as they are, as SePiCo does, whose
        features have unit length.

    Returns:
      Scalar; 0 if no pixel is labelled.
    """
    scaled = _unit if unit else lambda rows: rows
    features = scaled(_flat(features))
    mean, var = (scaled(lax.stop_gradient(rows)).astype(features.dtype) for rows in (stats.mean, stats.var))
    likeness = jnp.matmul(features, mean.T, precision=_HIGHEST)
    spread = jnp.matmul(jnp.square(features), var.T, precision=_HIGHEST) / (2 * tau)
    logits = (likeness + spread) / tau  # (P, C)

    own = jnp.where(_members(labels, mean.shape[0]), spread / tau - logits, 0)
    loss = jax.nn.logsumexp(logits, axis=-1) + jnp.sum(own, axis=-1)
    return masked_mean(loss, labels.reshape(-1) != IGNORE, axis_name)


class Bank(NamedTuple):
    """The latest mean features of each class (SePiCo).

    rows: (C, L, A) float. A class that has had more than L rows has lost the oldest ones.
    count: (C,) int32, how many rows each class has had.
    """

    rows: jax.Array
    count: jax.Array

    @property
    def lengths(self) -> jax.Array:
        """(C,) int32: how many rows each class has."""
        return jnp.minimum(self.count, self.rows.shape[1])


def empty_bank(num_classes: int, length: int, channels: int, dtype: str = "float32") -> Bank:
    """A bank before the first pixel: as published, each class has one row of zeros."""
    return Bank(jnp.zeros((num_classes, length, channels), dtype), jnp.ones((num_classes,), jnp.int32))


def update_bank(bank: Bank, features: jax.Array, labels: jax.Array, axis_name: str | None = None) -> Bank:
    """The bank with one more row for each class that has pixels: the mean of its features in this batch.

    Args:
      bank: (C, L, A); a full class loses its oldest row.
      features: (N, h, w, A) or (P, A) float. They get no gradient.
      labels: (N, h, w) or (P,) integers in 0..C-1, or 255 = ignore.
      axis_name: device axis; the batch is then that of all devices together.
    """
    classes, length, channels = bank.rows.shape
    batch = update_statistics(empty_statistics(classes, channels, bank.rows.dtype), features, labels, axis_name)
    place = bank.count % length
    here = (batch.count > 0)[:, None] & (place[:, None] == jnp.arange(length))
    rows = jnp.where(here[..., None], batch.mean[:, None], bank.rows)
    return Bank(rows, bank.count + (batch.count > 0))


def bank_contrast(
    features: jax.Array,
    labels: jax.Array,
    bank: jax.Array,
    lengths: jax.Array,
    tau: float,
    axis_name: str | None = None,
) -> jax.Array:
    """Contrast of pixels with each row of their own class, and with the mean row of every other class (SePiCo).

    With s_c = features . mean(bank_c) / tau, the loss of a pixel of class y is the mean over the rows b of y's bank of
    log(1 + sum_{c != y} exp(s_c) / exp(features . b / tau)). A bank of one row per class gives the contrast with
    prototypes; see `distribution_contrast`.

    Args:
      features: (N, h, w, A) or (P, A) float, of unit length.
      labels: (N, h, w) or (P,) integers in 0..C-1, or 255 = ignore.
      bank: (C, L, A) rows, constants here.
      lengths: (C,) integers, at least 1: how many rows each class has, from the first. The rows of a class that was
        never seen are zero: a negative with s = 0.
      tau: temperature, above 0.
      axis_name: device axis over which the mean is taken.

    Returns:
      Scalar; 0 if no pixel is labelled.
    """
    features = _flat(features)
    bank = lax.stop_gradient(bank).astype(features.dtype)
    filled = (jnp.arange(bank.shape[1]) < lengths[:, None]).astype(features.dtype)  # (C, L)
    share = filled / lengths[:, None].astype(features.dtype)
    means = jnp.einsum("cl,cla->ca", share, bank, precision=_HIGHEST)
    members = _members(labels, len(bank))
    scores = jnp.matmul(features, means.T, precision=_HIGHEST) / tau
    others = jax.nn.logsumexp(jnp.where(members, jnp.finfo(scores.dtype).min, scores), axis=-1)

    # One class at a time, computed again for the gradient: the products with all rows of all classes are P x C x L.
    @jax.checkpoint
    def own(loss: jax.Array, of_class: tuple) -> tuple[jax.Array, None]:
        rows, share, member = of_class
        likeness = jnp.matmul(features, rows.T, precision=_HIGHEST) / tau  # (P, L)
        mean = jnp.sum(jax.nn.softplus(others[:, None] - likeness) * share, axis=-1)
        return jnp.where(member, mean, loss), None

    loss, _ = lax.scan(own, jnp.zeros_like(others), (bank, share, members.T))
    return masked_mean(loss, labels.reshape(-1) != IGNORE, axis_name)


def uniformity(
    features: jax.Array, labels: jax.Array, means: jax.Array, tau: float, axis_name: str | None = None
) -> jax.Array:
    """SePiCo's regulariser: sum_c log p_c / (C log C), p = softmax(m . means / tau), m the mean labelled feature.

    It is at most -1, for a uniform p: minimising it drives p away from uniform. The published sign is kept.

    Args:
      features: (N, h, w, A) or (P, A) float, of unit length.
      labels: (N, h, w) or (P,) integers, 255 = ignore.
      means: (C, A), constants here.
      tau: temperature, above 0.
      axis_name: device axis; the batch is then that of all devices together.

    Returns:
      Scalar; 0 if no pixel is labelled.
    """
    features = _flat(features)
    labelled = (labels.reshape(-1) != IGNORE).astype(features.dtype)
    count, total = jnp.sum(labelled), jnp.matmul(labelled, features, precision=_HIGHEST)
    if axis_name is not None:
        count, total = lax.psum((count, total), axis_name)
    means = lax.stop_gradient(means).astype(features.dtype)
    logits = jnp.matmul(means, total / jnp.maximum(count, 1), precision=_HIGHEST) / tau
    value = jnp.mean(jax.nn.log_softmax(logits)) / jnp.log(jnp.asarray(len(means), features.dtype))
    return jnp.where(count > 0, value, 0)


def prototype_contrast(
    features: jax.Array, labels: jax.Array, memory: jax.Array, temperature: float, axis_name: str | None = None
) -> jax.Array:
    """Contrast of pixels with class prototypes (CFContra): a pixel moves to its own prototype, away from the others.

    With f^ the features scaled to unit length, the loss is the mean over labelled pixels of
    -log(softmax_c(f^ . memory_c / temperature)[label] + 1e-6). Classes that were never seen take no part in the
    softmax, and pixels labelled with them do not count.

    Args:
      features: (N, h, w, A) or (P, A) float.
      labels: (N, h, w) or (P,) integers in 0..C-1, or 255 = ignore.
      memory: (C, A) prototypes, constants here.
      temperature: above 0; 0.07 in the published experiments.
      axis_name: device axis over which the mean is taken.

    Returns:
      Scalar; 0 if no pixel is left.
    """
    features = _unit(_flat(features))
    memory = lax.stop_gradient(memory).astype(features.dtype)
    # Not minus infinity: before any class has been seen, the softmax would be NaN.
    logits = jnp.matmul(features, memory.T, precision=_HIGHEST) / temperature
    probs = jax.nn.softmax(jnp.where(_seen(memory), logits, jnp.finfo(logits.dtype).min))
    members = _members(labels, memory.shape[0]) & _seen(memory)
    own = jnp.sum(jnp.where(members, probs, 0), axis=-1)
    return masked_mean(-jnp.log(own + 1e-6), jnp.any(members, axis=-1), axis_name)


def class_centres(
    features: jax.Array, labels: jax.Array, num_classes: int, axis_name: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Class centres (CFContra): the mean feature of a class in each image that shows it, averaged, at unit length.

    All images have the same weight, however many pixels of the class they have. Carries no gradient.

    Args:
      features: (N, h, w, A) float, or (P, A) for a single image.
      labels: (N, h, w) or (P,) integers in 0..C-1, or 255 = ignore.
      num_classes: C.
      axis_name: device axis; the batch is then that of all devices together.

    Returns:
      (C, A) centres, zero for a class without pixels, and (C,) bool: whether a class has pixels.
    """
    sums, images = image_means(features, labels, num_classes)
    if axis_name is not None:
        sums, images = lax.psum((sums, images), axis_name)
    return _unit(sums), images > 0


def image_means(features: jax.Array, labels: jax.Array, num_classes: int) -> tuple[jax.Array, jax.Array]:
    """The sums of `class_centres`: (C, A) sum over images of class means, (C,) int32 number of images with the class.

    The arguments are the same.
    """
    images = features.shape[0] if features.ndim > 2 else 1
    flat = _flat(lax.stop_gradient(features))
    members = _members(labels, num_classes).reshape(images, -1, num_classes)
    count = jnp.sum(members, axis=1, dtype=jnp.int32)  # (N, C)
    sums = jnp.einsum(
        "npc,npa->nca", members.astype(flat.dtype), flat.reshape(images, -1, flat.shape[-1]), precision=_HIGHEST
    )
    means = sums / jnp.maximum(count, 1)[..., None].astype(flat.dtype)
    return jnp.sum(means, axis=0), jnp.sum(count > 0, axis=0, dtype=jnp.int32)


def update_memory(memory: jax.Array, centres: jax.Array, present: jax.Array, momentum: float) -> jax.Array:
    """Prototypes moved towards a batch's class centres: memory_c <- unit(momentum memory_c + (1 - momentum) centre_c).

    Args:
      memory: (C, A) prototypes. The prototype of a class that was never seen becomes the centre.
      centres, present: as `class_centres` returns them; classes that are not present stay as they are.
      momentum: 0..1; 0.9 in the published experiments.

    Returns:
      (C, A), the dtype of `memory`.
    """
    moved = _unit(momentum * memory + (1 - momentum) * lax.stop_gradient(centres))
    return jnp.where(present[:, None], moved, memory).astype(memory.dtype)


def nearest_prototype_labels(
    features: jax.Array, memory: jax.Array, margin: float | jax.Array, normalise: bool = False
) -> jax.Array:
    """The class of the nearest prototype in Euclidean distance, where it is clearly nearer than the second (CFContra).

    A pixel is labelled if the second smallest distance minus the smallest is at least `margin`. Classes that were
    never seen are no candidates; with fewer than two candidates no pixel is labelled.

    Args:
      features: (..., A) float, such as (N, h, w, A).
      memory: (C, A) prototypes.
      margin: 0 labels every pixel. The prototypes have unit length, the features do not: the effect of a margin
        depends on the length of the features, unless `normalise` is set.
      normalise: compares features scaled to unit length.

    Returns:
      (...) int32 labels, 255 where two prototypes are about equally near. Carries no gradient.
    """
    flat = _flat(lax.stop_gradient(features))
    flat = _unit(flat) if normalise else flat
    memory = lax.stop_gradient(memory).astype(flat.dtype)
    # Squared distances without |f|^2, which all have in common: differences of large numbers would cancel.
    far = jnp.finfo(flat.dtype).max / 4
    scores = jnp.sum(jnp.square(memory), axis=-1) - 2 * jnp.matmul(flat, memory.T, precision=_HIGHEST)
    scores = jnp.where(_seen(memory), scores, far)
    nearest = jnp.argmin(scores, axis=-1).astype(jnp.int32)
    first = jnp.min(scores, axis=-1)
    second = jnp.min(jnp.where(nearest[:, None] == jnp.arange(len(memory)), far, scores), axis=-1)
    squares = jnp.sum(jnp.square(flat), axis=-1)
    lengths = (jnp.sqrt(jnp.maximum(squares + score, 0)) for score in (first, second))
    gap = (second - first) / jnp.maximum(sum(lengths), jnp.finfo(flat.dtype).tiny)
    kept = (gap >= margin) & (jnp.sum(_seen(memory)) >= 2)
    return jnp.where(kept, nearest, IGNORE).reshape(features.shape[:-1])


def _flat(features: jax.Array) -> jax.Array:
    """(..., A) -> (P, A), at least float32."""
    features = jnp.asarray(features).reshape(-1, features.shape[-1])
    return features.astype(jnp.promote_types(features.dtype, jnp.float32))


def _seen(memory: jax.Array) -> jax.Array:
    """(C,) bool: the classes for which a memory has a prototype."""
    return jnp.any(memory != 0, axis=-1)


def _members(labels: jax.Array, num_classes: int) -> jax.Array:
    """(P, C) bool: whether a pixel belongs to a class; ignored pixels belong to none."""
    return labels.reshape(-1, 1).astype(jnp.int32) == jnp.arange(num_classes)


def _unit(rows: jax.Array) -> jax.Array:
    """Rows scaled to unit length; a row of zeros stays zero and gets no gradient."""
    squares = jnp.sum(jnp.square(rows), axis=-1, keepdims=True)
    tiny = jnp.asarray(1e-24, rows.dtype)
    return rows * jnp.where(squares > tiny, lax.rsqrt(jnp.maximum(squares, tiny)), 0)
