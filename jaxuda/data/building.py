"""Shared by the builders of datasets that come as files: listing, checking, storing and counting them.

Files are stored unchanged wherever possible, and read once: the counts that `prepare` reports and that training needs
are collected on the way.
"""

import abc
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core import splits

from jaxuda.data import encoding, names
from jaxuda.data.example import serialise
from jaxuda.data.threads import map_ahead
from jaxuda.data.transforms import resize_nearest
from jaxuda.errors import UserError

_MOST_COMPLAINTS = 1000  # more wrong files than these mean a wrong folder
_SHARD_BYTES = 2**30


class Item(NamedTuple):
    """One image of the user, its label and depth if it has them, and the id under which it is stored."""

    id: str
    image: Path
    label: Path | None
    depth: Path | None = None

    def files(self) -> list[Path]:
        """Those files that exist."""
        return [file for file in (self.image, self.label, self.depth) if file is not None]


class Complaints:
    """Collects what is wrong with files, so that one message reports all of them."""

    def __init__(self, what: str):
        self._what = what
        self._texts = []

    def add(self, text: str) -> None:
        """Adds one complaint, which names its file; at the thousandth, all are raised as one `UserError`."""
        self._texts.append(text)
        if len(self._texts) == _MOST_COMPLAINTS:
            self._texts.append("and perhaps more")
            self.raise_any()

    def raise_any(self) -> None:
        """Raises a `UserError` if there are complaints."""
        if self._texts:
            raise UserError("\n  ".join([f"{self._what} cannot be used:", *self._texts]))


def listed(folder: Path, endings: Sequence[str], complaints: Complaints) -> dict[str, Path] | None:
    """Name without its ending -> file, for the files of a folder with these endings; others are ignored.

    A folder that is missing or has no such file is a complaint; then the result is None.
    """
    found, rest = {}, []
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if file.name.startswith("."):
            continue
        ending = next((ending for ending in endings if file.name.lower().endswith(ending.lower())), None)
        if ending is None:
            rest.append(file.name)
            continue
        name = names.plain(file.name[: -len(ending)])
        if name in found:
            complaints.add(f"{file}: has the same name as {found[name].name}")
        found[name] = file
    if not found:
        wanted = " or ".join(f"*{ending}" for ending in endings)
        others = f" (but {len(rest)} others, such as {rest[0]})" if rest else ""
        problem = f"holds no files {wanted}{others}" if folder.is_dir() else "there is no such folder"
        complaints.add(f"{folder}: {problem}")
    return found or None


def paired(images: dict[str, Path] | None, complaints: Complaints, **others: dict[str, Path] | None) -> list[Item]:
    """Items of the images by name, each with its `label=` and `depth=`; a file without a partner is a complaint.

    Files that other tools derived from a partner ("00001_labelTrainIds.png" beside "00001.png") are ignored. If one
    listing is None there are no items: this is a complaint already.
    """
    if images is None or None in others.values():
        return []
    for kind, files in others.items():
        complete = images.keys() & files.keys()
        used = {name: file for name, file in files.items() if name in complete or not names.is_derived(name, complete)}
        complain_of_unpaired(images, used, kind, complaints)
    label, depth = others.get("label", {}), others.get("depth", {})
    return [Item(name, images[name], label.get(name), depth.get(name)) for name in sorted(images)]


def complain_of_unpaired(
    images: dict[str, Path], files: dict[str, Path], kind: str, complaints: Complaints, but: str = ""
) -> None:
    """Complains of each image without a file of its name, and the reverse; once if the names differ altogether.

    Args:
      images, files: name -> file.
      kind: what the files are, such as "label".
      complaints: they are added here.
      but: why an image needs such a file.
    """
    alone, orphans = images.keys() - files.keys(), files.keys() - images.keys()
    alike = names.pairings(alone, orphans)
    for pairing in alike:
        image, other = next(iter(pairing.partners.items()))
        complaints.add(
            f"{images[image]}: has no {kind} of the same name, and so {len(pairing.partners)} images: is it "
            f"{files[other]}? Give both the same name"
        )
    if not alike and len(alone) == len(images) > 1 and len(orphans) == len(files) > 1:
        complaints.add(
            f"{images[min(images)]}: none of the {len(images)} images has a {kind} of the same name; those are named "
            f"like {files[min(files)]}"
        )
        return
    known = {name for pairing in alike for pair in pairing.partners.items() for name in pair}
    for name in sorted(alone - known):
        complaints.add(f"{images[name]}: has no {kind}{but}")
    for name in sorted(orphans - known):
        complaints.add(f"{files[name]}: has no image")


class FilesBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A builder of image and label files; subclasses define where they are and which ids they may hold.

    Attributes:
      PUBLISHED: config ("" if there are none) -> split -> number of images in the published dataset.
      SIZE: (width, height) of the published images, if all have the same; other sizes give a warning.
      HAS_DEPTH: whether every item has a depth file.
      RESIZE_LABELS: whether labels of another size than their image are resized instead of refused.
    """

    VERSION = tfds.core.Version("1.0.0")
    # The folder in which tfds looks for files of metadata. It cannot find the folder of a user's module by itself.
    pkg_dir_path = Path(__file__).parent
    PUBLISHED: ClassVar[dict[str, dict[str, int]]] = {}
    SIZE: ClassVar[tuple[int, int] | None] = None
    HAS_DEPTH: ClassVar[bool] = False
    RESIZE_LABELS: ClassVar[bool] = False

    @abc.abstractmethod
    def items(self, manual_dir: Path) -> dict[str, list[Item]]:
        """Lists the files of every split; raises a `UserError` if the layout is not the expected one."""

    @abc.abstractmethod
    def raw_ids(self) -> Sequence[int]:
        """Ids that the label files may hold, including those that are ignored."""

    def store_label(self, data: bytes) -> tuple[bytes, np.ndarray]:
        """The bytes to store for a label file, and its ids (H, W) uint8; raises ValueError with what is wrong."""
        return encoding.store_label(data)

    def advice(self, unknown: Sequence[int]) -> str:
        """Advice about a label file with these ids, which `raw_ids` lacks; "" if there is none."""
        return ""

    def has_labels(self) -> bool:
        """Whether any split has labels."""
        return True

    def config_name(self) -> str:
        """The config's name, "" if the dataset has no configs."""
        return self.builder_config.name if self.builder_config else ""

    def _info(self) -> tfds.core.DatasetInfo:
        # In the order of the listing, so that index i is the same image on every machine.
        features = encoding.features(label=self.has_labels(), depth=self.HAS_DEPTH)
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: Any) -> dict[str, "Examples"]:
        items = self.items(Path(dl_manager.manual_dir))
        return {split: self._generate_examples(files) for split, files in items.items()}

    def _generate_examples(self, items: list[Item]) -> "Examples":
        return Examples(items, self)

    def _generate_splits(self, dl_manager: Any, download_config: Any) -> list[splits.SplitInfo]:
        # Writes directly into the shards. tfds itself writes everything twice, and sorts a whole dataset of fixed
        # order in memory.
        del download_config
        return [self._write_split(*entry) for entry in self._split_generators(dl_manager).items()]

    def _write_split(self, split: str, examples: "Examples") -> splits.SplitInfo:
        template = self._get_filename_template(split_name=split)
        count = min(len(examples), max(1, -(-examples.file_bytes // _SHARD_BYTES)))
        edges = [len(examples) * index // count for index in range(count + 1)]
        lengths = [stop - start for start, stop in pairwise(edges)]
        rows, size = iter(examples), 0
        for index, length in enumerate(lengths):
            # Images are compressed already; records must be readable one by one.
            path = str(template.sharded_filepath(shard_index=index, num_shards=count))
            writer = ArrayRecordWriter(path, "group_size:1,uncompressed")
            for _, record in islice(rows, length):
                data = serialise(record)
                writer.write(data)
                size += len(data)
            writer.close()
        next(rows, None)  # raises the complaints of the last files
        return splits.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size, filename_template=template)


class Tally:
    """The entries of a split in `prepared.json` (see `prepared.SUMMARY`), collected while its records are written."""

    def __init__(self):
        self._digest, self._ids, self._pixels = hashlib.sha256(), [], []

    def add(self, record: Mapping[str, Any], pixels: np.ndarray | None) -> None:
        """Counts one encoded record, with "id" as text; `pixels` (256,): the number of pixels of each raw id."""
        self._ids.append(record["id"])
        for key in sorted(record):
            value = record[key].encode() if key == "id" else record[key]
            self._digest.update(f"{key} {len(value)}\0".encode())
            self._digest.update(value)
        self._pixels.append(np.zeros(256, np.int32) if pixels is None else pixels.astype(np.int32))

    def pixels(self) -> np.ndarray:
        """The number of pixels of each raw id in each image, (n, 256) int32."""
        return np.array(self._pixels, np.int32).reshape(-1, 256)

    def summary(self) -> dict[str, Any]:
        """The entries as plain values; raises a `UserError` if ids repeat."""
        repeated = sorted(name for name, count in Counter(self._ids).items() if count > 1)
        if repeated:
            raise UserError(f"ids are not unique: {', '.join(repeated)}")
        total = self.pixels().sum(0, dtype=np.int64)
        pixels = {int(raw): int(total[raw]) for raw in np.flatnonzero(total)}
        return {
            "labelled": bool(pixels),
            "sha256": self._digest.hexdigest(),
            "ids": self._ids,
            "pixels": pixels,
        }


class _Encoded(NamedTuple):
    """A record to store, the pixels of each raw id if it has a label, (width, height), and a remark or ""."""

    record: dict[str, Any]
    pixels: np.ndarray | None
    size: tuple[int, int]
    remark: str


class Examples:
    """Iterates over (key, encoded record) of a split, checked and encoded in threads; knows its length.

    Raises a `UserError` that names all bad files at the end, or at the thousandth.

    Attributes:
      file_bytes: size of all files together.
      tally: what was counted so far.
      remarks: what was corrected or is unusual, a line each.
    """

    def __init__(self, items: list[Item], builder: FilesBuilder):
        self._items, self._builder = items, builder
        self._known = np.zeros(256, bool)
        self._known[list(builder.raw_ids())] = True
        self.file_bytes = sum(file.stat().st_size for item in items for file in item.files())
        self.tally, self.remarks = Tally(), []

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        complaints, other_size = Complaints("the dataset"), []
        for key, result in enumerate(map_ahead(self._encode, self._items)):
            if isinstance(result, str):
                complaints.add(result)
                continue
            if result.remark:
                self.remarks.append(result.remark)
            if self._builder.SIZE not in (None, result.size):
                other_size.append(self._items[key].image)
            self.tally.add(result.record, result.pixels)
            yield key, result.record
        complaints.raise_any()
        if other_size:
            width, height = self._builder.SIZE
            self.remarks.append(
                f"{len(other_size)} images are not {width}x{height} as published, such as {other_size[0]}"
            )

    def _encode(self, item: Item) -> _Encoded | str:
        """The encoded record of an item, or what is wrong with one of its files."""
        file, pixels, remark = item.image, None, ""
        try:
            image = file.read_bytes()
            height, width = encoding.check_image(image)
            record = {"image": image, "id": item.id}
            if item.label is not None:
                file = item.label
                stored, label = self._builder.store_label(file.read_bytes())
                if label.shape != (height, width):
                    differs = f"{file}: is {label.shape[1]}x{label.shape[0]}, but its image {item.image.name} is "
                    differs += f"{width}x{height}"
                    if not self._builder.RESIZE_LABELS:
                        return f"{differs} (upright, as its EXIF tag says)"
                    remark, label = f"{differs}; it was resized to this", resize_nearest(label, (width, height))
                    stored = encoding.encode_label(label)
                pixels = encoding.count_ids(label)
                unknown = np.flatnonzero((pixels > 0) & ~self._known)
                if len(unknown):
                    advice = self._builder.advice(unknown.tolist())
                    return f"{file}: has ids that the dataset does not define: {', '.join(map(str, unknown))}{advice}"
                record["label"] = stored
            elif self._builder.has_labels():
                record["label"] = b""
            if item.depth is not None:
                file = item.depth
                record["depth"], shape = encoding.store_depth(file.read_bytes())
                if shape != (height, width):
                    return f"{file}: is {shape[1]}x{shape[0]}, but its image {item.image.name} is {width}x{height}"
        except (OSError, ValueError) as error:
            return f"{file}: {error}"
        return _Encoded(record, pixels, (width, height), remark)
