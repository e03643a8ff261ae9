"""Confidence thresholds per class for pseudo-labels, from one pass and a histogram of fixed size.

Li et al., arXiv 2105.05013, self-training: a class's threshold is the median confidence of the pixels predicted as
it, at most `cap`. The histogram gives the median to within `1 / BINS`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxuda.losses.segmentation import IGNORE

# A power of two: scaling a confidence by it is exact, so that no pixel falls into a bin above its confidence.
BINS = 8192


def confidence_histogram(probs: jax.Array, counts: jax.Array | None = None) -> jax.Array:
    """How many pixels are predicted as each class, by their confidence.

    Args:
      probs: (..., C) float probabilities, for instance (N, H, W, C).
      counts: bool, broadcastable to (...): which pixels count; None for all.

    Returns:
      (C, BINS) int32; bin b holds confidences b / BINS <= p < (b + 1) / BINS, the last bin also 1. Add up batches in
      64 bits on the host: a dataset has more pixels than 32 bits can count.
    """
    classes = probs.shape[-1]
    confidence, label = jnp.max(probs, axis=-1), jnp.argmax(probs, axis=-1)
    place = jnp.clip((confidence * BINS).astype(jnp.int32), 0, BINS - 1)
    weight = jnp.ones(label.shape, jnp.int32) if counts is None else jnp.broadcast_to(counts, label.shape)
    histogram = jnp.zeros(classes * BINS, jnp.int32)
    histogram = histogram.at[(label * BINS + place).reshape(-1)].add(weight.reshape(-1).astype(jnp.int32))
    return histogram.reshape(classes, BINS)


def class_thresholds(histogram: np.ndarray, cap: float) -> np.ndarray:
    """Thresholds from the summed histogram (C, BINS) of a dataset: min(cap, median) per class, (C,) float32.

    The median is the element with index round(n / 2), half to even, of the n sorted confidences. The result has the
    lower end of its bin, at most 1 / BINS below it, so that the median pixel itself always keeps its label. A class
    that was never predicted gets 0.
    """
    counts = np.cumsum(np.asarray(histogram, np.int64), axis=1)
    total = counts[:, -1]
    middle = total // 2 + ((total % 4) == 3)  # round(n / 2) in integers
    bins = np.sum(counts <= middle[:, None], axis=1)
    median = np.where(total > 0, bins / histogram.shape[1], 0.0)
    return np.minimum(median, cap).astype(np.float32)


def apply_thresholds(labels: jax.Array, confidence: jax.Array, thresholds: jax.Array) -> jax.Array:
    """Labels whose confidence is strictly below the threshold of their class become 255.

    Args:
      labels: (...) integers in 0..C-1, or 255 = ignore, which stays.
      confidence: (...) float.
      thresholds: (C,) float.

    Returns:
      (...) like `labels`.
    """
    labels, thresholds = jnp.asarray(labels), jnp.asarray(thresholds)
    own = thresholds[jnp.minimum(labels, thresholds.shape[0] - 1)]
    return jnp.where((labels == IGNORE) | (confidence < own), jnp.asarray(IGNORE, labels.dtype), labels)
