"""Prepared datasets on disk: their folders, and the files that describe them.

`jaxuda.prepare` writes `DATA_DIR/NAME/CONFIG/VERSION/`: the files of tfds, `prepared.json` (see `SUMMARY`), and for
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
# "pixels": {raw id: count}}}}; for "folder" also "classes", the content of its classes.json, and "warnings", those of
# `review`. "image_bits" if images of 16 bits were stored with 8.
SUMMARY = "prepared.json"


def root(data_dir: str | os.PathLike | None) -> Path:
    """The folder of prepared datasets: the argument, else $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    return files.user_path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").absolute()


def prepared_folder(name: str, data_dir: str | os.PathLike | None, path: str = "") -> Path:
    """The folder in which "dataset/config" (or "folder" with its path) is, or would be, prepared.

    Raises:
      UserError: the name or the user's folder does not exist.
    """
    dataset, _, config = name.partition("/")
    builder = labels.dataset(dataset).builder
    if dataset == "folder":
        if config or not path:
            raise UserError("the dataset 'folder' takes no config and needs the path of the user's folder")
        config = builder.config_of(path).name
    elif config not in (config_names(dataset) or [""]):
        choices = ", ".join(f"{dataset}/{known}" for known in config_names(dataset)) or dataset
        raise UserError(f"unknown dataset {name!r}; choose from {choices}")
    elif path:
        raise UserError(f"{name} takes no path; only 'folder' does")
    return root(data_dir) / dataset / config / str(builder.VERSION)


def read_summary(folder: Path) -> dict[str, Any] | None:
    """Reads `prepared.json` of a prepared dataset; None if it is missing, UserError if it is corrupt."""
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
    """The command that prepares a dataset, for messages."""
    dataset = name.partition("/")[0]
    command = f"python -m jaxuda.prepare {name if labels.dataset(dataset).apart else dataset}"
    if dataset == "folder":
        command += f" --path {path}"
    elif not is_drawn(dataset):
        command += " --manual_dir DIR"
    return command + (f" --data_dir {data_dir}" if data_dir else "")


def open_split(folder: Path, split: str):
    """Opens a prepared split as a random-access source of tfds; the images of its records are still bytes."""
    builder = tfds.builder_from_directory(folder)
    skip = {key: tfds.decode.SkipDecoding() for key in builder.info.features if key != "id"}
    return builder.as_data_source(split, decoders=skip)


def read_pixel_counts(folder: Path, split: str, sha256: str) -> np.ndarray | None:
    """The stored number of pixels of each raw id in each image of a labelled split, (n, 256) int32.

    Args:
      folder, split: those of the prepared dataset.
      sha256: the checksum of the split, from its summary.

    Returns:
      None if there are no counts (folders that were prepared before `prepare` wrote them), or they are corrupt or of
      other data.
    """
    try:
        with np.load(folder / _pixels_file(split), allow_pickle=False) as stored:
            counts = np.zeros((len(stored["pixels"]), 256), np.int32)
            counts[:, stored["raw_ids"]] = stored["pixels"]
            return counts if stored["sha256"] == sha256 else None
    except (OSError, EOFError, ValueError, LookupError, zipfile.BadZipFile):
        return None


def write_pixel_counts(folder: Path, split: str, sha256: str, counts: np.ndarray) -> None:
    """Writes what `read_pixel_counts` reads, atomically: several processes may write it, all the same."""
    raw_ids = np.flatnonzero(counts.any(0))
    content = io.BytesIO()
    np.savez(content, raw_ids=raw_ids, pixels=counts[:, raw_ids].astype(np.int32), sha256=sha256)
    files.write_bytes(folder / _pixels_file(split), content.getvalue())


def _pixels_file(split: str) -> str:
    return f"pixels-{split}.npz"
