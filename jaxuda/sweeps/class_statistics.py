"""Class statistics of a trained network over the whole source: one pass in evaluation mode.

SDCA's adaptation (Li et al., arXiv 2105.05013) starts from them: without them the first contrasts would be with the
distributions of a few images.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxuda import data, parallel
from jaxuda.artifacts.statistics import LevelStatistics, write_statistics
from jaxuda.data.records import Domains
from jaxuda.data.transforms import resize_nearest
from jaxuda.losses.contrastive import empty_statistics, update_statistics
from jaxuda.losses.segmentation import IGNORE
from jaxuda.models.layers import normalise, resize_labels
from jaxuda.training.logs import progress_bar

PyTree = Any


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
    """Collects the statistics of the source's training images and writes them to `folder` (`artifacts.statistics`).

    Reports the classes that never appear. The statistics of such a class stay zero: in the contrast it is a negative
    without direction until a batch shows it.
    """
    source = domains.source
    statistics = collect(variables, source, model=model, config=config, devices=devices)
    names = source.label_space.classes
    absent = [name for name, count in zip(names, statistics.features.count, strict=True) if not count]
    if absent:
        say(
            f"{source.name} has no pixel of {', '.join(absent)} at the resolution of the features: the statistics of "
            "these classes stay zero, and the adaptation learns nothing about them until a batch shows them"
        )
    write_statistics(folder, statistics, model, names)


def collect(
    variables: PyTree, source: data.Records, *, model: nn.Module, config: Any, devices: list[jax.Device]
) -> LevelStatistics:
    """The statistics of `source`, on the host; they do not depend on the number of devices.

    Args:
      variables: "params" and "batch_stats" of `model`.
      source: labelled records.
      model: the network.
      config: `preprocess`, `source.resize` (the size of the images; if the source is not simply resized,
        `evaluation.size`) and `evaluation.batch` are read.
      devices: their number must divide `evaluation.batch`.
    """
    size = tuple(config.source.resize or config.evaluation.size)

    @jax.jit
    def add(variables: PyTree, statistics: LevelStatistics, batch: dict[str, jax.Array]) -> LevelStatistics:
        outputs = model.apply(variables, normalise(batch["image"], config.preprocess), train=False)
        labels = resize_labels(batch["label"], outputs.main.shape[1:3])
        return LevelStatistics(
            update_statistics(statistics.features, outputs.features, labels),
            update_statistics(statistics.logits, outputs.main, labels),
        )

    shape = jax.ShapeDtypeStruct((config.evaluation.batch, size[1], size[0], 3), jnp.float32)
    outputs = jax.eval_shape(lambda images: model.apply(variables, images), shape)
    widths = outputs.features.shape[-1], model.num_classes
    statistics = LevelStatistics(*(empty_statistics(model.num_classes, width) for width in widths))
    variables, statistics = (parallel.everywhere(tree, devices) for tree in (variables, statistics))
    transform = data.build_transform({"resize": size, "interpolation": config.source.get("interpolation", "bicubic")})
    with progress_bar(len(source), "statistics", "img") as bar:
        for batch in data.sweep_batches(source, transform, config.evaluation.batch):
            # The images that only fill up the last batch must not count.
            labels = np.full(batch["image"].shape[:3], IGNORE, np.uint8)
            for row, label in zip(labels, batch["label"], strict=False):
                row[:] = resize_nearest(label, size)
            arrays = {"image": batch["image"], "label": labels}
            statistics = add(variables, statistics, parallel.spread(arrays, devices))
            bar.update(batch["count"])
    return jax.device_get(statistics)
