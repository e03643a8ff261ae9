"""Rare class sampling: a class is drawn, rare ones more often, then an image that shows enough of it, then a crop.

(Hoyer, Dai, Van Gool: DAFormer, CVPR 2022, sec. 3.2.)
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from jaxuda.data.input import Draws
from jaxuda.data.records import class_pixels
from jaxuda.errors import UserError

# The smallest image size for which the published minimum of pixels was used: SYNTHIA's.
_AREA = 1280 * 760


def order(labelled: Any, unlabelled: Any, count: int, config: Any, artifacts: Any) -> Draws:
    """See `data.orders`; these fields of `config` may be set.

    rare_class_temperature: 0.01; see `rare_class_probabilities`.
    rare_class_pixels: 3000. An image shows enough of a class if it has more pixels of it than this, as stored; in
      images smaller than SYNTHIA's, the number is smaller in proportion to their area.
    rare_class_crop_ratio: 0.5. A crop, after the resize, should show more pixels of its class than this times the
      number for the image; 0.5 as published for crops of 512, 2.0 for crops of 1024 (HRDA, MIC).
    """
    classes = labelled.label_space.classes
    counts = class_pixels(labelled, len(classes))
    least = config.get("rare_class_pixels", 3000) * np.minimum(counts.sum(1, keepdims=True) / _AREA, 1)
    eligible = counts[:, :-1] > least
    if left_out := [classes[c] for c in np.flatnonzero(counts[:, :-1].any(0) & ~eligible.any(0))]:
        text = f"no image of {labelled.name} shows enough of {', '.join(left_out)} to be drawn for it"
        warnings.warn(text, stacklevel=2)
    temperature = config.get("rare_class_temperature", 0.01)
    indices, drawn = rare_class_order(counts[:, :-1].sum(0), eligible, count, config.seed, temperature)
    return Draws(indices, drawn, least[indices, 0] * config.get("rare_class_crop_ratio", 0.5))


def rare_class_probabilities(pixels: np.ndarray, temperature: float) -> np.ndarray:
    """The probability of drawing each class: softmax of (1 - f) / temperature over the classes that occur.

    Args:
      pixels: (C,) pixels of each class in all images together; f is a class's share of them.
      temperature: above 0; a lower one draws rare classes more often. Infinite: all classes alike.

    Returns:
      (C,) float64; 0 for classes without pixels.
    """
    logits = np.where(pixels > 0, (1 - pixels / max(pixels.sum(), 1)) / temperature, -np.inf)
    weights = np.exp(logits - logits.max()) if (pixels > 0).any() else np.zeros(len(pixels))
    return weights / max(weights.sum(), 1)


def rare_class_order(
    pixels: np.ndarray, eligible: np.ndarray, draws: int, seed: int, temperature: float = 0.01
) -> tuple[np.ndarray, np.ndarray]:
    """The images to draw, and the class that each is drawn for; draws are independent of each other.

    The arguments alone decide the order, and a longer order begins with the shorter one.

    Args:
      pixels: (C,) pixels of each class in all images together.
      eligible: (n, C) bool: images that may be drawn for a class. Classes without any are left out.
      draws: the number of indices.
      seed: of the random generator.
      temperature: see `rare_class_probabilities`.

    Returns:
      (draws,) int32 indices in 0..n-1, and (draws,) int32 classes.

    Raises:
      UserError: no class has an image.
    """
    if not eligible.any():
        raise UserError(
            "rare class sampling: no image of the source shows enough of any class; lower rare_class_pixels"
        )
    probabilities = np.where(eligible.any(0), rare_class_probabilities(pixels, temperature), 0)
    edges = np.cumsum(probabilities)
    uniform = np.random.default_rng(np.random.SeedSequence([seed, len(pixels)])).random((draws, 2))
    # "right" skips classes of probability 0, also at 0.
    chosen = np.searchsorted(edges, uniform[:, 0] * edges[-1], side="right")
    images = [np.flatnonzero(column) for column in eligible.T]
    sizes = np.array([len(each) for each in images])
    places = (uniform[:, 1] * sizes[chosen]).astype(int)
    indices = np.array([images[c][place] for c, place in zip(chosen, places, strict=True)], np.int32)
    return indices, chosen.astype(np.int32)
