"""Prepared datasets as random-access sources of decoded records."""

import contextlib
import copy
import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from jaxuda import files
from jaxuda.data import encoding, labels
from jaxuda.data.joined import PLUS, Joined, part_names
from jaxuda.data.prepared import (
    open_split,
    prepare_command,
    prepared_folder,
    read_pixel_counts,
    read_summary,
    root,
    write_pixel_counts,
)
from jaxuda.data.threads import map_ahead
from jaxuda.errors import UserError

# The lists of ids that a ranking of the target writes.
EASY, HARD = "easy.txt", "hard.txt"


class Records:
    """Random access to the decoded records of one split; cheap to pickle, opens its files when first read.

    `records[i]` is a dict: "image" (H, W, 3) uint8 RGB; "label" (H, W) uint8 train ids with 255 = ignore,
    missing if the split has no labels; "depth" (H, W) float32 inverse depth, only if the dataset has it;
    "id" str; after `with_reference` also "reference" (H, W, 3) uint8 RGB.

    Attributes:
      name: name and split for messages, such as "camvid/day train".
      label_space: the space of the labels, or None for unlabelled data without known classes.
      fingerprint: hex text that changes with the prepared data, the split, or the classes.
      labelled: whether records have a "label".
      table: (256,) uint8, ids in the files -> train ids.
    """

    def __init__(
        self, name: str, folder: Path, split: str, summary: dict[str, Any],
        space: labels.LabelSpace | None, table: np.ndarray,
    ):  # fmt: skip
        self.name = f"{name} {split}"
        self.label_space = space
        self.labelled = bool(summary["labelled"])
        classes = (space.name, space.classes) if space else None
        identity = f"{split} {summary['sha256']} {classes} {table.tobytes().hex()}"
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()[:32]
        self._folder, self._split, self._sha256, self.table = folder, split, summary["sha256"], table
        self._ids = summary["ids"]
        self._decoded = {"image", "label", "depth"}
        for id_ in self._ids:
            files.inside(folder, f"{id_}.png")  # predictions and pseudo-labels will have this name
        self._reader = None

    def images_only(self) -> "Records":
        """The same records without labels and depth, which are then not decoded."""
        records = copy.copy(self)
        records.labelled, records._decoded = False, self._decoded & {"image", "reference"}
        return records

    @property
    def has_depth(self) -> bool:
        """Whether records have a "depth"."""
        return "depth" in self._decoded and "depth" in self._features()

    def without_depth(self) -> "Records":
        """The same records without depth, which is then not decoded."""
        records = copy.copy(self)
        records._decoded = self._decoded - {"depth"}
        return records

    def with_reference(self) -> "Records":
        """The same records with their reference images, such as those by day of the same places.

        Raises:
          UserError: the dataset has none, or, when it is read, an image lacks its own.
        """
        if "reference" not in self._features():
            raise UserError(f"{self.name} has no reference images")
        records = copy.copy(self)
        records._decoded = self._decoded | {"reference"}
        return records

    def _features(self) -> Any:
        return tfds.builder_from_directory(self._folder).info.features

    def labels_only(self) -> "Records":
        """The same records without images and depth, which are then not decoded: that is most of the work."""
        records = copy.copy(self)
        records._decoded = {"label"}
        return records

    def __len__(self) -> int:
        return len(self._ids)

    def ids(self) -> list[str]:
        """Ids of all records in the order of their index, without reading the records."""
        return list(self._ids)

    def class_pixels(self) -> np.ndarray:
        """The number of pixels of each class in each label, (n, C + 1) int64; the last column counts ignored pixels.

        `prepare` counts them. Datasets of an older `prepare`, which did not, are counted when this is first called, and
        the counts are stored beside them; if the folder cannot be written, they are counted every time.
        """
        place = (self._folder, self._split, self._sha256)
        counts = read_pixel_counts(*place)
        if counts is None:
            raw = self.labels_only()
            raw.table = np.arange(256, dtype=np.uint8)
            counts = _count(raw)
            with contextlib.suppress(OSError):
                write_pixel_counts(*place, counts)
        classes = self.label_space.num_classes
        return counts @ np.eye(classes + 1, dtype=np.int64)[np.minimum(self.table, classes)]

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        index = index.__index__()
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {self.name}, which has {len(self)}")
        if self._reader is None:
            self._reader = open_split(self._folder, self._split)
        record = {"id": self._ids[index]}
        try:
            stored = self._reader[index % len(self)]
            if stored["id"].decode() != record["id"]:
                raise ValueError(f"it is {stored['id']!a}")
            if "image" in self._decoded:
                record["image"] = encoding.decode_image(stored["image"])
            if self.labelled and "label" in self._decoded:
                record["label"] = self.table[encoding.decode_label(stored["label"])]
            if "depth" in stored and "depth" in self._decoded:
                record["depth"] = encoding.inverse_depth(encoding.decode_depth(stored["depth"]))
            if "reference" in self._decoded and stored["reference"]:
                record["reference"] = encoding.decode_image(stored["reference"])
        except (ValueError, KeyError, RuntimeError, OSError) as error:  # array_record raises the last two
            raise UserError(
                f"{self.name}: record {record['id']!r} is corrupt ({error}); "
                f"delete {self._folder} and prepare the dataset again"
            ) from error
        if "reference" in self._decoded and "reference" not in record:
            raise UserError(
                f"{self.name}: record {record['id']!r} has no reference image; the dataset was prepared from a folder "
                "without them"
            )
        return record

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}

    def __repr__(self) -> str:
        return f"Records({self.name!r}, {len(self)} records)"


class Subset(Sequence):
    """Some of the records, in a given order.

    Args:
      records: all of them.
      ids: the chosen ones.

    Raises:
      UserError: there is no record with one of the ids.
    """

    def __init__(self, records: Records, ids: Sequence[str]):
        place = {name: index for index, name in enumerate(records.ids())}
        unknown = [name for name in ids if name not in place]
        if unknown:
            raise UserError(
                f"{records.name} has no image '{unknown[0]}' ({len(unknown)} ids are unknown): the list was made for "
                "other data"
            )
        self.name, self.label_space, self.labelled = records.name, records.label_space, records.labelled
        self._records, self._ids, self._indices = records, list(ids), [place[name] for name in ids]

    def __len__(self) -> int:
        return len(self._indices)

    def ids(self) -> list[str]:
        """Ids of the records in the order of their index."""
        return list(self._ids)

    def class_pixels(self) -> np.ndarray:
        """As `Records.class_pixels`."""
        return self._records.class_pixels()[self._indices]

    @property
    def fingerprint(self) -> str:
        """As that of `Records`; changes with the chosen ids and their order."""
        return hashlib.sha256(f"{self._records.fingerprint} {self._ids}".encode()).hexdigest()[:32]

    @property
    def has_depth(self) -> bool:
        """Whether records have a "depth"."""
        return self._records.has_depth

    def without_depth(self) -> "Subset":
        """The same records without depth."""
        return Subset(self._records.without_depth(), self._ids)

    def images_only(self) -> "Subset":
        """The same records without labels and depth."""
        return Subset(self._records.images_only(), self._ids)

    def labels_only(self) -> "Subset":
        """The same records without images and depth."""
        return Subset(self._records.labels_only(), self._ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._records[self._indices[index]]


def class_pixels(records: Sequence[dict[str, Any]], num_classes: int) -> np.ndarray:
    """`Records.class_pixels` of any labelled records, (n, C + 1); records without counts are decoded once."""
    if hasattr(records, "class_pixels"):
        return records.class_pixels()
    counts = _count(records)
    return np.column_stack([counts[:, :num_classes], counts[:, num_classes:].sum(1)])


def _count(records: Sequence[dict[str, Any]]) -> np.ndarray:
    """The number of pixels of each value in each label, (n, 256) int64."""
    rows = map_ahead(lambda index: encoding.count_ids(records[index]["label"]), range(len(records)))
    bar = tqdm(rows, "counts the labels' pixels", len(records), unit="image", disable=not sys.stderr.isatty())
    return np.array(list(bar), np.int64).reshape(-1, 256)


def write_split(folder: Path, part: str, ids: Sequence[str]) -> None:
    """Writes one list of a ranking, `EASY` or `HARD`: one id per line."""
    files.write_bytes(folder / part, "".join(f"{name}\n" for name in ids).encode())


def read_split(folder: Path, part: str) -> list[str]:
    """What `write_split` wrote."""
    try:
        ids = (folder / part).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{folder / part} cannot be read ({error}): run its stage again with --from_stage") from error
    if len(set(ids)) < len(ids):
        raise UserError(f"{folder / part} names an image twice: run its stage again with --from_stage")
    return ids


def load(
    name: str,
    split: str,
    *,
    label_space: str | labels.LabelSpace | None = None,
    data_dir: str | os.PathLike | None = None,
    path: str = "",
) -> "Records | Joined":
    """Opens one split of a prepared dataset.

    Args:
      name: "folder", a dataset without configs ("gta5"), or a config of a dataset ("camvid/day"). A dataset of the
        user is named by the dotted path of its module. Several are joined with "+".
      split: "train" or "val", or any other split the dataset has.
      label_space: the label space of the labels, or its name (`jaxuda.data.labels.label_space`); default: the
        dataset's own. Classes of "folder" are matched with it by name; its labels of other classes become 255.
      data_dir: the folder of prepared datasets; default: $TFDS_DATA_DIR, else ~/tensorflow_datasets.
      path: the user's folder, only for "folder".

    Raises:
      UserError: the name, split or label space is unknown, or the dataset is not prepared (the message
        gives the command).
    """
    if PLUS in name:
        parts: dict[str, Records] = {}
        for part in part_names(name):
            where = path if part == "folder" else ""
            parts[part] = _load(part, split, label_space, data_dir, where, part_names(name))
            label_space = label_space or parts[part].label_space
        return Joined(parts)
    return _load(name, split, label_space, data_dir, path)


def _load(
    name: str,
    split: str,
    label_space: str | labels.LabelSpace | None,
    data_dir: str | os.PathLike | None,
    path: str,
    joined: Sequence[str] = (),
) -> Records:
    """One dataset; `joined`: all of those that it is joined with, of which one must have labels for each class."""
    folder = prepared_folder(name, data_dir, path)
    summary = read_summary(folder)
    if summary is None:
        raise UserError(f"{name} is not prepared in {root(data_dir)}; run\n  {prepare_command(name, data_dir, path)}")
    if split not in summary["splits"]:
        raise UserError(f"{name} has no split {split!r}; it has {', '.join(summary['splits'])}")
    dataset = name.partition("/")[0]
    if dataset == "folder":
        space, table = _folder_labels(summary.get("classes"), label_space)
    else:
        space = _space(label_space) or labels.own_space(dataset)
        others = [part.partition("/")[0] for part in joined if part != "folder"]
        table = labels.lookup_table(dataset, space, others)
    shown = f"folder {Path(path).name}" if dataset == "folder" else name
    return Records(shown, folder, split, summary["splits"][split], space, table)


def _folder_labels(
    classes: dict[str, Any] | None, wanted: str | labels.LabelSpace | None
) -> tuple[labels.LabelSpace | None, np.ndarray]:
    """Label space and lookup table of a user's folder, from the classes.json that was stored with it."""
    nothing = np.full(256, labels.IGNORE, np.uint8)
    if classes is None:
        return _space(wanted), nothing
    names = {raw: entry["name"] for entry in classes["classes"] for raw in entry["ids"]}
    own = labels.make_label_space(classes["name"], {c["name"]: c["color"] for c in classes["classes"]})
    space = own if wanted == own.name else _space(wanted) or own
    if not set(space.classes) & set(names.values()):
        raise UserError(f"the classes.json names none of the classes of {space.name}: {', '.join(space.classes)}")
    return space, labels.table_by_name(names, space)


def _space(wanted: str | labels.LabelSpace | None) -> labels.LabelSpace | None:
    return labels.label_space(wanted) if wanted and isinstance(wanted, str) else wanted or None


class Domains(NamedTuple):
    """The datasets of a run.

    source, target: the datasets that stages train on; None if the config names none: then no stage may read it.
    validation: the datasets that networks are scored on; () if there are none. The first decides which checkpoint is
      "best".
    """

    source: Records | None
    target: Records | None
    validation: tuple[Records, ...] = ()

    @property
    def label_space(self) -> labels.LabelSpace | None:
        """The classes of the run; None if no domain has labels."""
        opened = filter(None, (self.source, self.target, *self.validation))
        return next((each.label_space for each in opened if each.label_space is not None), None)
