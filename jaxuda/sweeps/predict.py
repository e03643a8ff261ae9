"""Predictions for any images: a colour picture and maps of class ids for each."""

from __future__ import annotations

import copy
import glob
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxuda import files, parallel
from jaxuda.data import encoding, labels
from jaxuda.data.datasets import cityscapes
from jaxuda.data.threads import map_ahead
from jaxuda.errors import UserError
from jaxuda.sweeps.ensemble import Ensemble, Member, Passes
from jaxuda.training.logs import progress_bar

PyTree = Any
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp")
FOLDER, COLOUR, IDS, CITYSCAPES_IDS = "predictions", "colour", "ids", "cityscapes_ids"


class ImageFiles(Sequence):
    """The images in a folder and all below it, one image, or those that match a pattern, as records without labels.

    Predictions are named after the image; if two have the same name, after its path below their common folder.

    Args:
      images: a folder or a file; a path that does not exist is a glob pattern below its longest part that exists.
      bits: of 16-bit images, as for `encoding.decode_image`.

    Attributes:
      left_out: a line for each kind of file in the folder that is not labelled.

    Raises:
      UserError: there are no images, or (when it is read) a file is not an image.
    """

    def __init__(self, images: str, bits: int = 16):
        images = os.path.expanduser(images)
        self._paths, self.left_out = _listed(images)
        if not self._paths:
            kinds = f" ({', '.join(SUFFIXES)})" if os.path.isdir(images) else ""
            raise UserError("; ".join([f"--images '{images}' matches no file{kinds}", *self.left_out]))
        self._bits = bits
        self._names = [path.stem for path in self._paths]
        if len(set(self._names)) < len(self._names):
            top = os.path.commonpath([path.parent for path in self._paths])
            relative = [path.relative_to(top) for path in self._paths]
            self._names = ["__".join(path.with_suffix("").parts) for path in relative]
            if len(set(self._names)) < len(self._names):  # a.png and a.jpg
                self._names = ["__".join(path.parts) for path in relative]

    def __len__(self) -> int:
        return len(self._paths)

    def names(self) -> list[str]:
        """The names of the predictions, without ".png", in order."""
        return list(self._names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            image = encoding.read_image_file(self._paths[index].read_bytes(), self._bits)
        except (ValueError, OSError) as error:
            raise UserError(f"{self._paths[index]}: {error}; leave it out of --images") from error
        return {"image": image, "id": self._names[index]}

    def checked(self) -> tuple[ImageFiles, list[str], str]:
        """Reads all images once.

        Returns:
          Those that can be read, a line for each of the others, and `encoding.range_warning`.
        """
        first = {name: index for index, name in reversed(list(enumerate(self._names)))}
        found = list(map_ahead(lambda index: self._check(index, first[self._names[index]]), range(len(self))))
        good = copy.copy(self)
        kept = [index for index, (problem, _) in enumerate(found) if not problem]
        good._paths, good._names = ([listed[index] for index in kept] for listed in (self._paths, self._names))
        ranges = {str(self._paths[index]): found[index][1] for index in kept if found[index][1] is not None}
        return good, [problem for problem, _ in found if problem], encoding.range_warning(ranges, self._bits)

    def _check(self, index: int, first: int) -> tuple[str, tuple[int, int] | None]:
        """What is wrong with an image, "" if nothing is; and `encoding.value_range`. first: the first of its name."""
        try:
            files.inside(Path(FOLDER), f"{self._names[index]}.png")  # the name of its prediction
            if first != index:  # a/b.png and a__b.png
                raise ValueError(f"its prediction would have the name of that of {self._paths[first]}; rename one")
            data = self._paths[index].read_bytes()
            encoding.read_image_file(data)
            return "", encoding.value_range(data)
        except (ValueError, OSError, UserError) as error:
            return f"{self._paths[index]}: {error}", None


def _listed(images: str) -> tuple[list[Path], list[str]]:
    """The images that a path or pattern names, in order, and a line for each kind of file that was left out."""
    folder = Path(os.path.realpath(images) if os.path.islink(images) else images)
    inside = folder.is_dir()
    found = [path for path in (files.visible(folder) if inside else _matches(images)) if inside or path.is_file()]
    ours = {path for path in found if _is_output(path)}
    others = {path for path in found if not path.is_file() or (inside and path.suffix.lower() not in SUFFIXES)} - ours
    left_out = []
    if ours:
        left_out.append(f"left out: {len(ours)} predictions of an earlier run, such as {min(ours)}")
    if others:
        left_out.append(f"left out: {len(others)} files that are not {', '.join(SUFFIXES)}, such as {min(others)}")
    return [path for path in found if path not in ours | others], left_out


def _matches(pattern: str) -> list[Path]:
    """The file at a path, or those that match a pattern. What exists is no pattern: many names have "[1]" in them."""
    parts = Path(pattern).parts
    count = max(n for n in range(len(parts) + 1) if os.path.exists(Path(*parts[:n])))
    if count == len(parts):
        return [Path(pattern)]
    start = glob.escape(str(Path(*parts[:count])))
    return sorted(Path(name) for name in glob.glob(os.path.join(start, *parts[count:]), recursive=True))


def _is_output(path: Path) -> bool:
    """Whether `write_predictions` wrote a file of a command."""
    kind = Path(os.path.abspath(path)).parent
    known = kind.name in (COLOUR, IDS, CITYSCAPES_IDS) and kind.parent.name == FOLDER
    return known and (kind.parent / COLOUR).is_dir() and (kind.parent / IDS).is_dir()


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
    yield from _make_label_maps(ensemble, devices or jax.local_devices()[:1])(variables, images)


def make_labeller(
    model: nn.Module, method: ModuleType, config: Any, devices: list[jax.Device]
) -> Callable[[PyTree, Sequence], list[np.ndarray]]:
    """`label(variables, images)`: the (H, W) uint8 train ids of each image, compiled once for all its calls.

    The arguments are those of `predictions`; the number of `devices` must divide the batch.
    """
    label_maps = _make_label_maps(Ensemble([Member(model, method, config)]), devices)
    return lambda variables, images: [ids for _, ids in label_maps([variables], images)]


def _make_label_maps(
    ensemble: Ensemble, devices: list[jax.Device]
) -> Callable[[Sequence[PyTree], Sequence], Iterator[tuple[str, np.ndarray]]]:
    @jax.jit
    def label_batch(variables: list[PyTree], passes: Passes) -> jax.Array:
        return jnp.argmax(ensemble.average(ensemble.coarse(variables, passes), passes), -1).astype(jnp.uint8)

    def label_maps(variables: Sequence[PyTree], images: Sequence) -> Iterator[tuple[str, np.ndarray]]:
        variables = [parallel.everywhere(each, devices) for each in variables]
        with progress_bar(len(images), "predict", "img") as bar:
            for batch, passes in ensemble.batches(images, variables):
                maps = np.asarray(label_batch(variables, parallel.spread(passes, devices)))
                for name, (height, width), ids in zip(batch["id"], batch["size"], maps, strict=False):
                    yield name, np.ascontiguousarray(ids[:height, :width])
                bar.update(batch["count"])

    return label_maps


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
        COLOUR: lambda ids: encoding.encode_image(labels.colourise(ids, space)),
        IDS: encoding.encode_label,
    }
    raw = cityscapes.raw_ids(space)
    if raw is not None:
        kinds[CITYSCAPES_IDS] = lambda ids: encoding.encode_label(raw[ids])
    for kind in kinds:
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for name, ids in found:
        for kind, encode in kinds.items():
            files.write_bytes(files.inside(folder / kind, f"{name}.png"), encode(ids))
    return [folder / kind for kind in kinds]
