"""Source partners for target images: a pair should show the same classes, or its features cannot be associated.

LFASS's report asks for it: for each target image a few source images are drawn at random, and the one that best covers
the classes predicted in the target image is used.
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
    """See `data.orders`; `config.pairing` names the target_classes stage, `pairing_pool`: the number of candidates."""
    folder = artifacts[config.pairing]
    return partners(folder, labelled, unlabelled, count, config.seed, config.pairing_pool)


def class_shares(records: Sequence[Record], num_classes: int) -> np.ndarray:
    """The share of each labelled record that every class covers: (n, C) float32 in 0..1."""
    pixels = class_pixels(records, num_classes)
    return (pixels[:, :-1] / pixels.sum(1, keepdims=True)).astype(np.float32)


def coverage(candidates: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """(K, C) shares of source images and (C,) of a target image -> (K,) how well each covers it.

    The number of the target's classes that the source shows, plus the common area (below 1), which decides equals.
    """
    shown = np.sum((candidates > 0) & (wanted > 0), axis=1)
    return shown + np.minimum(candidates, wanted).sum(axis=1)


def paired_order(source: np.ndarray, target: np.ndarray, drawn: np.ndarray, seed: int, pool: int) -> np.ndarray:
    """Indices of the source partners of target images.

    The arguments alone decide the order, and a longer order begins with the shorter one.

    Args:
      source: (n, C) shares of the classes in each source image.
      target: (m, C) shares of the predicted classes in each target image.
      drawn: (draws,) indices of the target images in the order of training.
      seed: of the random generator.
      pool: the number of source images that are candidates for each target image.

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
      target: records; that stage must have predicted all of them.
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
