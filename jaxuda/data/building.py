"""Shared by the builders of datasets that come as files: listing, storing, and the contract of a builder.

Files are stored unchanged wherever possible, and read once: the counts that `prepare` reports and that training needs
are collected on the way (`checking`).
"""

import abc
from collections.abc import Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core import splits

from jaxuda.data import encoding, names
from jaxuda.data.checking import Complaints, Examples, Findings, Item
from jaxuda.data.example import serialise

_SHARD_BYTES = 2**30


def find_folder(manual_dir: Path, name: str) -> Path:
    """A folder of a dataset, directly in `manual_dir` or one deeper, as archives are often unpacked.

    If there is no such folder, or there are several, this is `manual_dir / name`.
    """
    direct = manual_dir / name
    if direct.is_dir():
        return direct / name if (direct / name).is_dir() else direct
    around = [folder for folder in manual_dir.iterdir() if folder.is_dir() and not folder.name.startswith((".", "__"))]
    nested = [folder / name for folder in around if (folder / name).is_dir()]
    return nested[0] if len(nested) == 1 else direct


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


def listed_below(folder: Path, ending: str, complaints: Complaints, what: str) -> dict[str, Path] | None:
    """As `listed`, for the files of all folders in a folder; `what` these are, such as "cities", is for messages."""
    if not folder.is_dir():
        complaints.add(f"{folder}: there is no such folder")
        return None
    inside = sorted(each for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))
    if not inside:
        complaints.add(f"{folder}: holds no folders of {what}")
    found = [listed(each, (ending,), complaints) for each in inside]
    return {name: file for files in found if files for name, file in files.items()} or None


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
        image, other = min(pairing.partners.items())
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
      HAS_REFERENCE: whether items may have a reference image.
      RESIZE_LABELS: whether labels of another size than their image are resized instead of refused.
      TRAIN_IDS: the number of train ids that copies made by other tools hold in place of the published ids, of which
        the most common ones are higher; 0 if there are no such copies.
      stored_ids: (256,) uint8, ids in label files -> ids to store; None: the same. `items` may set it.
      image_bits: the bits that images of 16 bits use, see `encoding.decode_image`; below 16 they are stored with 8.
      findings: what was found in the files of all splits.
    """

    VERSION = tfds.core.Version("1.0.0")
    # The folder in which tfds looks for files of metadata. It cannot find the folder of a user's module by itself.
    pkg_dir_path = Path(__file__).parent
    PUBLISHED: ClassVar[dict[str, dict[str, int]]] = {}
    SIZE: ClassVar[tuple[int, int] | None] = None
    HAS_DEPTH: ClassVar[bool] = False
    HAS_REFERENCE: ClassVar[bool] = False
    RESIZE_LABELS: ClassVar[bool] = False
    TRAIN_IDS: ClassVar[int] = 0
    stored_ids: np.ndarray | None = None
    image_bits = 16

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

    def doubt(self, pixels: np.ndarray) -> str:
        """What is wrong with all labels of a split, which together have so many pixels (256,) of each id; "": nothing.

        It follows the name of one of the files in a message.
        """
        return ""

    @classmethod
    def has_config(cls, manual_dir: Path, config: str) -> bool:
        """Whether a folder holds a config's files, for datasets whose configs come from their own folders."""
        return True

    def has_labels(self) -> bool:
        """Whether any split has labels."""
        return True

    def config_name(self) -> str:
        """The config's name, "" if the dataset has no configs."""
        return self.builder_config.name if self.builder_config else ""

    def _info(self) -> tfds.core.DatasetInfo:
        # In the order of the listing, so that index i is the same image on every machine.
        features = encoding.features(label=self.has_labels(), depth=self.HAS_DEPTH, reference=self.HAS_REFERENCE)
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: Any) -> dict[str, Examples]:
        items = self.items(Path(dl_manager.manual_dir))
        self.findings = Findings(self.image_bits)
        return {split: self._generate_examples(files) for split, files in items.items()}

    def _generate_examples(self, items: list[Item]) -> Examples:
        return Examples(items, self, self.findings)

    def _generate_splits(self, dl_manager: Any, download_config: Any) -> list[splits.SplitInfo]:
        # Writes directly into the shards. tfds itself writes everything twice, and sorts a whole dataset of fixed
        # order in memory.
        del download_config
        infos = [self._write_split(*entry) for entry in self._split_generators(dl_manager).items()]
        self.findings.complaints.raise_any()
        return infos

    def _write_split(self, split: str, examples: Examples) -> splits.SplitInfo:
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
        next(rows, None)  # reads the last files, if they are bad
        return splits.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size, filename_template=template)
