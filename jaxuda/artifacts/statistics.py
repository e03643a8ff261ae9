"""Class statistics of a network at two levels, and the file in which a sweep passes them to a training stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import numpy as np

from jaxuda.artifacts.arrays import read_arrays, write_arrays
from jaxuda.losses.contrastive import ClassStatistics

FILE = "class_statistics.npz"


class LevelStatistics(NamedTuple):
    """features: (C, A) statistics of the last features. logits: (C, C) statistics of the class logits."""

    features: ClassStatistics
    logits: ClassStatistics


def write_statistics(folder: Path, statistics: LevelStatistics, model: nn.Module, classes: Sequence[str]) -> None:
    """Writes `FILE` in `folder`: the statistics, the network, its number of channels and the class names."""
    arrays = {
        f"{level}_{name}": np.asarray(value)
        for level, stats in statistics._asdict().items()
        for name, value in stats._asdict().items()
    }
    write_arrays(folder / FILE, arrays, classes, (model, statistics.features.mean.shape[1]))


def read_statistics(
    folder: Path, model: nn.Module, channels: int, classes: Sequence[str] | None = None
) -> LevelStatistics:
    """Reads what `write_statistics` wrote, as float NumPy arrays.

    Args:
      folder: the folder of `FILE`.
      model: the network that will use them.
      channels: A, the number of channels of its features.
      classes: its class names in order; None if only their number is known.

    Raises:
      UserError: the file is missing or corrupt, or comes from another network or label space.
    """
    names = [f"{level}_{name}" for level in LevelStatistics._fields for name in ClassStatistics._fields]
    arrays = read_arrays(folder / FILE, "class statistics", names, model.num_classes, classes, (model, channels))
    return LevelStatistics(
        **{
            level: ClassStatistics(*(arrays[f"{level}_{name}"] for name in ClassStatistics._fields))
            for level in LevelStatistics._fields
        }
    )
