"""Prepared datasets on the disk: where they are, and what is written about them.

`jaxuda.prepare` writes `DATA_DIR/NAME/CONFIG/VERSION/`: what tfds writes, `prepared.json` (see `SUMMARY`), and for
each labelled split `pixels-SPLIT.npz` (see `read_pixel_counts`).
"""

import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jaxuda import files
from jaxuda.data import labels
from jaxuda.data.datasets import config_names, is_drawn
from jaxuda.errors import UserError

# Written last when a dataset is prepared. {"splits": {split: {"ids": [...], "sha256": hex, "labelled": bool,
# "pixels": {raw id: count}}}}; for "folder" also "classes", what its classes.json says, and "warnings", what `review`
# found.
SUMMARY = "prepared.json"


def root(data_dir: str | os.PathLike | None) -> Path:
    """The folder of prepared datasets: the argument, else $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    return Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser().absolute()


def prepared_folder(name: str, data_dir: str | os.PathLike | None, path: str = "") -> Path:
    """Where "dataset/config" (or "folder" with its path) is, or would be, prepared.

    Raises:
      UserError: the name or the user's folder does not exist.
    """
    dataset, _, config = name.partition("/")
    builder = labels.dataset(dataset).builder
    if dataset == "folder":
        if config or not path:
            raise UserError("the dataset 'folder' is named without a config and needs the path of the user's folder")
        config = builder.config_of(path).name
    elif config not in (config_names(dataset) or [""]):
        choices = ", ".join(f"{dataset}/{known}" for known in config_names(dataset)) or dataset
        raise UserError(f"unknown dataset {name!r}; choose from {choices}")
    elif path:
        raise UserError(f"{name} takes no path; only 'folder' does")
    return root(data_dir) / dataset / config / str(builder.VERSION)


def read_summary(folder: Path) -> dict[str, Any] | None:
    """Reads `prepared.json` of a prepared dataset; None where there is none, UserError where it is corrupt."""
    try:
        summary = json.loads((folder / SUMMARY).read_bytes())
        for split in summary["splits"].values():
            if not {"sha256", "labelled"} <= split.keys() or not all(isinstance(id_, str) for id_ in split["ids"]):
                raise KeyError("splits")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder / SUMMARY} is corrupt: delete {folder} and prepare the dataset again") from error
    return summary


def prepare_command(name: str, data_dir: str | os.PathLike | None, path: str = "") -> str:
    """The command that prepares a dataset, to be shown to the user."""
    dataset = name.partition("/")[0]
    command = f"python -m jaxuda.prepare {name if labels.dataset(dataset).apart else dataset}"
    if dataset == "folder":
        command += f" --path {path}"
    elif not is_drawn(dataset):
        command += " --manual_dir DIR"
    return command + (f" --data_dir {data_dir}" if data_dir else "")


def open_split(folder: Path, split: str):
    """Opens a prepared split as tfds's random-access source of records whose images are still bytes."""
    builder = tfds.builder_from_directory(folder)
    skip = {key: tfds.decode.SkipDecoding() for key in builder.info.features if key != "id"}
    return builder.as_data_source(split, decoders=skip)


def read_pixel_counts(folder: Path, split: str, sha256: str) -> np.ndarray | None:
    """How many pixels of each image of a labelled split have each raw id, (n, 256) int32, where that is stored.

    Args:
      folder, split: of the prepared dataset.
      sha256: of the split, from its summary.

    Returns:
      None where there are no counts (folders that were prepared before `prepare` wrote them), where they are corrupt,
      or of other data.
    """
    try:
        with np.load(folder / _pixels_file(split), allow_pickle=False) as stored:
            counts = np.zeros((len(stored["pixels"]), 256), np.int32)
            counts[:, stored["raw_ids"]] = stored["pixels"]
            return counts if stored["sha256"] == sha256 else None
    except (OSError, EOFError, ValueError, LookupError, zipfile.BadZipFile):
        return None


def write_pixel_counts(folder: Path, split: str, sha256: str, counts: np.ndarray) -> None:
    """Stores what `read_pixel_counts` reads, atomically: of several processes, each writes the same."""
    raw_ids = np.flatnonzero(counts.any(0))
    content = io.BytesIO()
    np.savez(content, raw_ids=raw_ids, pixels=counts[:, raw_ids].astype(np.int32), sha256=sha256)
    files.write_bytes(folder / _pixels_file(split), content.getvalue())


def _pixels_file(split: str) -> str:
    return f"pixels-{split}.npz"
