"""Pseudo-labels for the target's training images: the predicted class, or 255 where the network is not sure.

With `threshold_cap` > 0 a pixel keeps its label if its confidence is at least min(threshold_cap, median confidence
of its class) (Li et al., arXiv 2105.05013, self-training); with 0 every pixel is labelled (Pan et al., IntraDA,
CVPR 2020). Thresholds are computed at the network's input size, labels at each image's own size.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxuda import files, parallel
from jaxuda.data.labels import LabelSpace
from jaxuda.data.pseudo import LABELS, write_pseudo_label
from jaxuda.data.records import Domains, Subset
from jaxuda.models.layers import resize_bilinear
from jaxuda.sweeps.scores import (
    make_scores,
    padded_sizes,
    probabilities,
    resize,
    resize_matrices,
    score_grid,
    shown_pixels,
    sweep,
)
from jaxuda.sweeps.thresholds import apply_thresholds, class_thresholds, confidence_histogram
from jaxuda.training.logs import progress_bar

PyTree = Any
THRESHOLDS = "thresholds.json"


def run(
    variables: PyTree,
    domains: Domains,
    folder: Path,
    *,
    model: nn.Module,
    method: Any,
    config: Any,
    devices: list[jax.Device],
    say: Callable[[str], None],
) -> None:
    """Writes `folder`/labels/ID.png for every target image, and the thresholds by class as thresholds.json.

    Files that an interrupted run has written are kept.
    """
    space, target = domains.label_space, domains.target.images_only()
    variables = parallel.everywhere(variables, devices)
    scores = make_scores(model, method, config)
    thresholds = np.zeros(space.num_classes, np.float32)
    if config.threshold_cap:
        saved = files.read_json(folder / THRESHOLDS)
        if saved is None:
            histogram = _histogram(scores, method, variables, target, config, devices)
            values = class_thresholds(histogram, config.threshold_cap)
            saved = dict(zip(space.classes, map(float, values), strict=True))
            files.write_json(folder / THRESHOLDS, saved)
        thresholds = np.array([saved[name] for name in space.classes], np.float32)
    (folder / LABELS).mkdir(exist_ok=True)
    kept = _write_labels(scores, method, variables, target, folder, thresholds, config, space, devices)
    say(f"pseudo-labels of {len(target)} images: {kept:.1%} of the pixels written now are labelled")
    if kept == 0:
        say("no pixel is confident enough: a stage that learns from these labels alone will learn nothing")


def _histogram(
    scores: Callable, method: Any, variables: PyTree, target: Any, config: Any, devices: list[jax.Device]
) -> np.ndarray:
    """Confidences of all target pixels by predicted class: (C, BINS) int64."""
    width, height = config.evaluation.size

    @jax.jit
    def count(variables: PyTree, images: jax.Array, shown: jax.Array) -> jax.Array:
        values = resize_bilinear(scores(variables, images), (height, width), config.align_corners)
        return confidence_histogram(probabilities(values, method), shown)

    total = np.zeros((), np.int64)
    with progress_bar(len(target), "thresholds", "img") as bar:
        for batch in sweep(target, config):
            arrays = parallel.spread((batch["image"], shown_pixels(batch, config)), devices)
            total = total + np.asarray(count(variables, *arrays), np.int64)
            bar.update(batch["count"])
    return total


def _write_labels(
    scores: Callable,
    method: Any,
    variables: PyTree,
    target: Any,
    folder: Path,
    thresholds: np.ndarray,
    config: Any,
    space: LabelSpace,
    devices: list[jax.Device],
) -> float:
    """Writes the missing label maps; returns the share of their pixels that are labelled."""

    @jax.jit
    def label(variables: PyTree, images: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
        probs = probabilities(resize(scores(variables, images), rows, columns), method)
        return apply_thresholds(jnp.argmax(probs, -1).astype(jnp.uint8), jnp.max(probs, -1), thresholds)

    names = target.ids()
    missing = [name for name in names if not (folder / LABELS / f"{name}.png").exists()]
    grid = score_grid(scores, variables, config)
    labelled = pixels = 0
    with progress_bar(len(names), "pseudo-labels", "img", initial=len(names) - len(missing)) as bar:
        for batch in sweep(Subset(target, missing), config):
            sizes = padded_sizes(batch["size"], len(batch["image"]))
            arrays = (batch["image"], *resize_matrices(grid, sizes, config))
            maps = np.asarray(label(variables, *parallel.spread(arrays, devices)))
            for name, (height, width), ids in zip(batch["id"], batch["size"], maps, strict=False):
                ids = np.ascontiguousarray(ids[:height, :width])
                write_pseudo_label(folder, name, ids, space)
                labelled, pixels = labelled + np.count_nonzero(ids != 255), pixels + ids.size
            bar.update(batch["count"])
    return labelled / max(pixels, 1)
