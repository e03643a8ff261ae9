"""Class statistics of a network at two levels, and the file in which a sweep hands them to a training stage."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxuda import files
from jaxuda.errors import UserError
from jaxuda.losses.contrastive import ClassStatistics
from jaxuda.models.deeplab import DeepLabV2

FILE = "class_statistics.npz"
_REMEDY = "run the stage that collects the statistics again, with this network and label space (--from_stage NAME)"


class LevelStatistics(NamedTuple):
    """features: (C, A) statistics of the last features. logits: (C, C) statistics of the class logits."""

    features: ClassStatistics
    logits: ClassStatistics


def network_name(model: DeepLabV2) -> str:
    """The fields of a network that decide what its features are, as one line of text."""
    kind = "" if model.backbone == "vgg16" else f" {model.variant}"
    blocks = "" if model.blocks is None else f", blocks {'-'.join(map(str, model.blocks))}"
    return f"{model.backbone}{kind}, width {model.width}{blocks}"


def write_statistics(folder: Path, statistics: LevelStatistics, model: DeepLabV2, classes: Sequence[str]) -> None:
    """Writes `FILE` in `folder`, with the network, its number of channels and the class names beside the numbers."""
    arrays = {
        f"{level}_{name}": np.asarray(value)
        for level, stats in statistics._asdict().items()
        for name, value in stats._asdict().items()
    }
    buffer = io.BytesIO()
    np.savez(
        buffer,
        **arrays,
        classes=np.array(classes, dtype=str),
        network=np.array(network_name(model)),
        channels=np.int64(statistics.features.mean.shape[1]),
    )
    files.write_bytes(folder / FILE, buffer.getvalue())


def read_statistics(
    folder: Path, model: DeepLabV2, channels: int, classes: Sequence[str] | None = None
) -> LevelStatistics:
    """Reads what `write_statistics` wrote, as float NumPy arrays.

    Args:
      folder: where `FILE` lies.
      model: the network that is going to use them.
      channels: A, the number of channels of its features.
      classes: its class names in order; None where only their number is known.

    Raises:
      UserError: the file is missing or damaged, or comes from another network or label space.
    """
    path = folder / FILE
    try:
        with np.load(path, allow_pickle=False) as saved:
            arrays = {name: saved[name] for name in saved.files}
        levels = {
            level: ClassStatistics(*(arrays[f"{level}_{name}"] for name in ClassStatistics._fields))
            for level in LevelStatistics._fields
        }
        known, network = tuple(arrays["classes"].tolist()), str(arrays["network"])
        found = int(arrays["channels"])
    except FileNotFoundError as error:
        raise UserError(f"there are no class statistics in {folder}: {_REMEDY}") from error
    except (OSError, KeyError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it, then {_REMEDY}") from error
    if network != network_name(model) or found != channels:
        raise UserError(
            f"{path} holds statistics of another network: {network}, {found} channels, against "
            f"{network_name(model)}, {channels} channels here; {_REMEDY}"
        )
    if len(known) != model.num_classes or (classes is not None and known != tuple(classes)):
        ours = f"{model.num_classes}" if classes is None else f"{len(classes)} ({', '.join(classes)})"
        raise UserError(
            f"{path} holds statistics of another label space: {len(known)} classes ({', '.join(known)}), against "
            f"{ours} here; {_REMEDY}"
        )
    return LevelStatistics(**levels)
