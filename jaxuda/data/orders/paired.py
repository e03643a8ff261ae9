"""Source partners for target images: the images of a pair should show the same classes, or nothing can be associated.

The wish of LFASS's report: for each target image, of a few source images drawn at random, the one that best covers the
classes predicted in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxuda import files
from jaxuda.data.input import draw_order
from jaxuda.data.records import Records, class_pixels
from jaxuda.data.transforms import Record
from jaxuda.errors import UserError

FILE = "target_classes.json"


def order(labelled: Records, unlabelled: Records, count: int, config: Any, artifacts: Any) -> np.ndarray:
    """See `data.orders`; `config.pairing` names the target_classes stage, `pairing_pool` is how many candidates."""
    folder = artifacts[config.pairing]
    return partners(folder, labelled, unlabelled, count, config.seed, config.pairing_pool)


def class_shares(records: Sequence[Record], num_classes: int) -> np.ndarray:
    """How much of each labelled record every class covers: (n, C) float32 in 0..1."""
    pixels = class_pixels(records, num_classes)
    return (pixels[:, :-1] / pixels.sum(1, keepdims=True)).astype(np.float32)


def coverage(candidates: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """(K, C) shares of source images and (C,) of a target image -> (K,) how well each covers it.

    The number of the target's classes that the source shows, and among equals the common area, which is below 1.
    """
    shown = np.sum((candidates > 0) & (wanted > 0), axis=1)
    return shown + np.minimum(candidates, wanted).sum(axis=1)


def paired_order(source: np.ndarray, target: np.ndarray, drawn: np.ndarray, seed: int, pool: int) -> np.ndarray:
    """Indices of the source images that go with target images.

    The order follows from the arguments alone, and a longer one begins with a shorter one.

    Args:
      source: (n, C) shares of the classes in each source image.
      target: (m, C) those predicted in each target image.
      drawn: (draws,) indices of the target images in the order of training.
      seed: of the generator.
      pool: how many source images are candidates for each target image.

    Returns:
      (draws,) int32 indices in 0..n-1.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, pool]))
    order = np.empty(len(drawn), np.int32)
    for position, index in enumerate(drawn):
        candidates = rng.integers(len(source), size=pool)
        order[position] = candidates[np.argmax(coverage(source[candidates], target[index]))]
    return order


def partners(folder: Path, source: Records, target: Records, draws: int, seed: int, pool: int) -> np.ndarray:
    """The order of the source, (draws,) indices, for the first `draws` target images of a training.

    Args:
      folder: the artifacts of a target_classes stage.
      source: labelled records.
      target: records, all of them predicted by that stage.
      draws: steps * batch.
      seed: of the run, which decides the order of the target.
      pool: see `paired_order`.

    Raises:
      UserError: the stage predicted other classes or images.
    """
    saved = files.read_json(folder / FILE)
    classes, ids = source.label_space.classes, target.ids()
    if tuple(saved["classes"]) != tuple(classes) or not set(ids) <= saved["images"].keys():
        raise UserError(f"{folder / FILE} is of other classes or images: run its stage again with --from_stage")
    predicted = np.array([saved["images"][name] for name in ids], np.float32)
    drawn = draw_order(len(ids), draws, seed, "target")
    return paired_order(class_shares(source, len(classes)), predicted, drawn, seed, pool)
