"""Files of numbers that a sweep hands to a training stage: npz, checked to be of the same network and classes."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxuda import files
from jaxuda.errors import UserError
from jaxuda.models.deeplab import DeepLabV2

REMEDY = "run the stage that makes them again, with this network and label space (--from_stage NAME)"


def network_name(model: DeepLabV2) -> str:
    """The fields of a network that decide what its features are, as one line of text."""
    kind = "" if model.backbone == "vgg16" else f" {model.variant}"
    blocks = "" if model.blocks is None else f", blocks {'-'.join(map(str, model.blocks))}"
    return f"{model.backbone}{kind}, width {model.width}{blocks}"


def write_arrays(
    path: Path, arrays: Mapping[str, np.ndarray], model: DeepLabV2, channels: int, classes: Sequence[str]
) -> None:
    """Writes `arrays` with the network, its number of feature channels and the class names beside them."""
    buffer = io.BytesIO()
    identity = {
        "classes": np.array(classes, dtype=str),
        "network": np.array(network_name(model)),
        "channels": np.int64(channels),
    }
    np.savez(buffer, **arrays, **identity)
    files.write_bytes(path, buffer.getvalue())


def read_arrays(
    path: Path, what: str, names: Sequence[str], model: DeepLabV2, channels: int, classes: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """Reads what `write_arrays` wrote.

    Args:
      path: the file.
      what: its content, in the plural, for messages.
      names: the arrays that it must hold.
      model: the network that is going to use them.
      channels: the number of channels of its features.
      classes: its class names in order; None where only their number is known.

    Raises:
      UserError: the file is missing or damaged, or comes from another network or label space.
    """
    try:
        with np.load(path, allow_pickle=False) as saved:
            arrays = {name: saved[name] for name in names}
            known, network = tuple(saved["classes"].tolist()), str(saved["network"])
            found = int(saved["channels"])
    except FileNotFoundError as error:
        raise UserError(f"there are no {what} in {path.parent}: {REMEDY}") from error
    except (OSError, KeyError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it, then {REMEDY}") from error
    if network != network_name(model) or found != channels:
        raise UserError(
            f"{path} holds {what} of another network: {network}, {found} channels, against "
            f"{network_name(model)}, {channels} channels here; {REMEDY}"
        )
    if len(known) != model.num_classes or (classes is not None and known != tuple(classes)):
        ours = f"{model.num_classes}" if classes is None else f"{len(classes)} ({', '.join(classes)})"
        raise UserError(
            f"{path} holds {what} of another label space: {len(known)} classes ({', '.join(known)}), against "
            f"{ours} here; {REMEDY}"
        )
    return arrays
