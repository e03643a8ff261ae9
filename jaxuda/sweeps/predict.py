"""Predictions for any images: a colour picture and maps of class ids for each."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxuda import files, parallel
from jaxuda.data import encoding, labels
from jaxuda.data.datasets import cityscapes
from jaxuda.errors import UserError
from jaxuda.sweeps.ensemble import Ensemble, Member, Passes
from jaxuda.training.logs import progress_bar

PyTree = Any
SUFFIXES = (".jpg", ".jpeg", ".png")


class ImageFiles(Sequence):
    """The images in a folder and all below it, or those that match a glob pattern, read as records without labels.

    Predictions are named after the image; if two have the same name, after its path below their common folder.

    Raises:
      UserError: there are no images, or (when it is read) a file is not an image.
    """

    def __init__(self, pattern: str):
        if Path(pattern).is_dir():
            found = sorted(path for path in Path(pattern).rglob("*") if path.suffix.lower() in SUFFIXES)
        else:
            found = sorted(Path(name) for name in glob.glob(pattern, recursive=True))
        self._paths = [path for path in found if path.is_file()]
        if not self._paths:
            kinds = f" ({', '.join(SUFFIXES)})" if Path(pattern).is_dir() else ""
            raise UserError(f"--images '{pattern}' matches no file{kinds}")
        self._names = [path.stem for path in self._paths]
        if len(set(self._names)) < len(self._names):
            top = os.path.commonpath([path.parent for path in self._paths])
            relative = [path.relative_to(top) for path in self._paths]
            self._names = ["__".join(path.with_suffix("").parts) for path in relative]
            if len(set(self._names)) < len(self._names):  # a.png and a.jpg
                self._names = ["__".join(path.parts) for path in relative]

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            image = encoding.read_image_file(self._paths[index].read_bytes())
        except (ValueError, OSError) as error:
            raise UserError(f"{self._paths[index]}: {error}; leave it out of --images") from error
        return {"image": image, "id": self._names[index]}


def predictions(
    variables: PyTree, images: Sequence, *, model: nn.Module, method: Any, config: Any
) -> Iterator[tuple[str, np.ndarray]]:
    """The id and the (H, W) uint8 train ids of each image in turn, at its own size.

    Args:
      variables: "params" and "batch_stats" of `model`.
      images: records with "image" (H, W, 3) uint8 and "id".
      model: the network.
      method: the module of the method that trained it.
      config: `evaluation.size`, `evaluation.batch`, `preprocess` and `align_corners` are read.
    """
    return ensemble_predictions(Ensemble([Member(model, method, config)]), [variables], images)


def ensemble_predictions(
    ensemble: Ensemble, variables: Sequence[PyTree], images: Sequence, devices: list[jax.Device] | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Like `predictions`, for an ensemble and the variables of each of its members.

    The number of `devices` must divide the batch; default: one.
    """
    devices = devices or jax.local_devices()[:1]
    variables = [parallel.everywhere(each, devices) for each in variables]

    @jax.jit
    def label_maps(variables: list[PyTree], passes: Passes) -> jax.Array:
        return jnp.argmax(ensemble.average(ensemble.coarse(variables, passes), passes), -1).astype(jnp.uint8)

    with progress_bar(len(images), "predict", "img") as bar:
        for batch, passes in ensemble.batches(images, variables):
            maps = np.asarray(label_maps(variables, parallel.spread(passes, devices)))
            for name, (height, width), ids in zip(batch["id"], batch["size"], maps, strict=False):
                yield name, np.ascontiguousarray(ids[:height, :width])
            bar.update(batch["count"])


def write_predictions(found: Iterable[tuple[str, np.ndarray]], folder: Path, space: labels.LabelSpace) -> list[Path]:
    """Writes `folder`/KIND/ID.png for each prediction, at its image's size.

    Args:
      found: ids, and (H, W) uint8 train ids.
      folder: created if missing.
      space: the label space of the train ids.

    Returns:
      The folders of the kinds: colour (the label space's palette), ids (grey train ids) and, where all classes are
      classes of Cityscapes, cityscapes_ids (grey raw ids, as its test server takes them).
    """
    kinds = {
        "colour": lambda ids: encoding.encode_image(labels.colourise(ids, space)),
        "ids": encoding.encode_label,
    }
    raw = cityscapes.raw_ids(space)
    if raw is not None:
        kinds["cityscapes_ids"] = lambda ids: encoding.encode_label(raw[ids])
    for kind in kinds:
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for name, ids in found:
        for kind, encode in kinds.items():
            files.write_bytes(files.inside(folder / kind, f"{name}.png"), encode(ids))
    return [folder / kind for kind in kinds]
