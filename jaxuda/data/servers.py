"""What the test servers of Cityscapes, ACDC and Dark Zurich take: checked predictions of the test images as one zip."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxuda.data import encoding
from jaxuda.data.checking import Complaints
from jaxuda.data.datasets import acdc, cityscapes, darkzurich
from jaxuda.data.threads import map_ahead
from jaxuda.errors import UserError

_CERTAIN = np.uint16(65535)


class Server(NamedTuple):
    """A test server.

    ending: of the names of the test images, without ".png"; predictions have the names of the images.
    size: (width, height) of the test images.
    count: the number of test images.
    folders: folder in the zip -> what it holds of an image's raw ids of Cityscapes, (H, W) uint8, as PNG bytes.
    classes: the raw ids that predictions may hold.
    """

    ending: str
    size: tuple[int, int]
    count: int
    folders: Mapping[str, Callable[[np.ndarray], bytes]]
    classes: Sequence[int]


def _train_ids(raw: np.ndarray) -> bytes:
    return encoding.encode_label(cityscapes.TRAIN_IDS[raw])


def _certain(raw: np.ndarray) -> bytes:
    """A confidence of 1 everywhere."""
    return encoding.encode_depth(np.full(raw.shape, _CERTAIN))


_TRAIN_ID_FOLDER = "labelTrainIds"
# Cityscapes: raw ids; its scripts accept any. Dark Zurich also wants the predictions with pixels left out as invalid
# (here none is) and confidences, for scores of its own that recipes here do not report.
SERVERS = {
    "cityscapes": Server(
        "_leftImg8bit", cityscapes.Cityscapes.SIZE, 1525, {"": encoding.encode_label}, [*cityscapes.CLASSES]
    ),
    "acdc": Server(
        "_rgb_anon", acdc.Acdc.SIZE, acdc.Acdc.PUBLISHED[acdc.ALL]["test"], {_TRAIN_ID_FOLDER: _train_ids},
        [*cityscapes.CLASSES],
    ),
    "darkzurich": Server(
        "_rgb_anon", darkzurich.DarkZurich.SIZE, darkzurich.DarkZurich.PUBLISHED[""]["test"],
        {_TRAIN_ID_FOLDER: _train_ids, "labelTrainIds_invalid": _train_ids, "confidence": _certain},
        [*cityscapes.CLASSES],
    ),
}  # fmt: skip


def pack(name: str, predictions: Path, images: Sequence[str], out: Path) -> list[str]:
    """Checks predictions for a server, and writes them as a zip.

    Args:
      name: one of `SERVERS`.
      predictions: a folder of raw ids of Cityscapes, IMAGE.png for each image.
      images: names of the test images, without ".png".
      out: the zip, which must not exist.

    Returns:
      Warnings.

    Raises:
      UserError: there is no such server; or predictions are missing, or have the wrong size or ids: all are named, and
        nothing is written.
    """
    if name not in SERVERS:
        raise UserError(f"unknown server {name!r}; choose one of: {', '.join(SERVERS)}")
    if out.exists():
        raise UserError(f"{out} exists already: give the zip another name")
    server, complaints = SERVERS[name], Complaints(f"the predictions {predictions}")
    for image in images:
        if not image.endswith(server.ending):
            complaints.add(f"{image}.png: test images of {name} are named *{server.ending}.png")
    complaints.raise_any()
    places = [predictions / f"{image}.png" for image in images]
    for problem in filter(None, map_ahead(lambda file: _problem(file, server), places)):
        complaints.add(problem)
    complaints.raise_any()
    _write(out, _contents(server, places))
    if len(images) == server.count:
        return []
    return [f"these are {len(images)} images; the test set of {name} has {server.count}"]


def _problem(file: Path, server: Server) -> str:
    """What is wrong with a prediction; "" if nothing is."""
    if not file.is_file():
        return f"{file}: is missing"
    try:
        ids = encoding.read_label_file(file.read_bytes())
    except (OSError, ValueError) as error:
        return f"{file}: {error}"
    if ids.shape[::-1] != tuple(server.size):
        return f"{file}: is {ids.shape[1]}x{ids.shape[0]}, not {server.size[0]}x{server.size[1]}"
    found = np.flatnonzero(encoding.count_ids(ids))
    if unknown := sorted(set(found.tolist()) - set(server.classes)):
        return f"{file}: has ids that are none of the classes of Cityscapes: {', '.join(map(str, unknown))}"
    return ""


def _contents(server: Server, places: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    """Name in the zip, and content, of each file."""
    for file in places:
        raw = encoding.read_label_file(file.read_bytes())
        for folder, encode in server.folders.items():
            yield f"{folder}/{file.name}" if folder else file.name, encode(raw)


def _write(out: Path, contents: Iterator[tuple[str, bytes]]) -> None:
    """A zip that is complete or missing; the files are compressed already."""
    aside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED) as archive:
            for name, content in contents:
                archive.writestr(zipfile.ZipInfo(name), content)  # a fixed date: equal input, equal bytes
        os.replace(aside, out)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error}") from error
    finally:
        aside.unlink(missing_ok=True)
