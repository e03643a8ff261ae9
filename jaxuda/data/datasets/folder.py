"""The user's own data: a folder with images/, labels/ and classes.json.

images/ and labels/ hold files of the same relative names: JPEG or PNG images, and grey or palette PNG labels. Names
may also differ by one ending or beginning, as in x_leftImg8bit.png and x_gtFine_labelIds.png.
If images/ has sub-folders train, val or test (or `_SPLITS`' other names for these), they are the splits; otherwise all
files are split "train". A split without labels has no folder in labels/; a folder without any labels needs no
classes.json. Otherwise this is

    {"name": "mine", "ignore": [9],
     "classes": [{"name": "road", "ids": [0, 7], "color": [128, 64, 128]}, ...]}

with train ids in the order of the classes. "id": 0 means "ids": [0]; "ignore" lists the ids of no class (255 is
always one of them) and may be left out.
"""

import dataclasses
import hashlib
import io
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from jaxuda import files
from jaxuda.data import names
from jaxuda.data.building import Complaints, FilesBuilder, Item, complain_of_unpaired
from jaxuda.data.datasets import Dataset
from jaxuda.data.labels import IGNORE
from jaxuda.errors import UserError

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
# Split -> names of its folder, in any case.
_SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
_MOST_BYTES = 2**20  # of classes.json


@dataclasses.dataclass(kw_only=True)
class FolderConfig(tfds.core.BuilderConfig):
    """One folder of the user; its name has a hash of the listing: changed files are another dataset."""

    path: str
    classes: dict[str, Any] | None  # see `read_classes`
    splits: dict[str, dict[str, str]]  # "images" or "labels" -> split -> name of its folder there


class Folder(FilesBuilder, skip_registration=True):
    """Labels are the ids of the user's files; `classes` of the config gives their meaning."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = "a folder with images/, labels/ and classes.json"

    @staticmethod
    def config_of(path: str) -> FolderConfig:
        """Reads classes.json and the listing of a folder.

        Raises:
          UserError: there is no such folder, folders seem to be splits but are not named like these, or classes.json
            is wrong or missing.
        """
        root = files.user_path(path).resolve()
        if not (root / "images").is_dir():
            nested = next(root.glob("*/images"), None) if root.is_dir() else None
            hint = f"; move {nested} to {root / 'images' / nested.parent.name}" if nested else ""
            raise UserError(f"{path}: a dataset folder needs a folder 'images'; it is missing{hint}")
        splits = _split_folders(root)
        classes = read_classes(root / "classes.json")
        if classes is None and (root / "labels").exists():
            raise UserError(f"{root / 'classes.json'}: is missing; it gives the meaning of the labels")
        name = re.sub(r"[^a-z0-9]+", "_", (classes["name"] if classes else root.name).lower()).strip("_")[:64]
        name = f"{name or 'folder'}_{_listing_hash(root, splits)}"
        return FolderConfig(name=name, path=str(root), classes=classes, splits=splits)

    def has_labels(self) -> bool:
        """Whether any split has labels."""
        return (Path(self.builder_config.path) / "labels").is_dir()

    def raw_ids(self) -> list[int]:
        """Ids that classes.json names, and 255."""
        classes = self.builder_config.classes or {"classes": [], "ignore": []}
        return [raw for entry in classes["classes"] for raw in entry["ids"]] + classes["ignore"] + [IGNORE]

    def advice(self, unknown: Sequence[int]) -> str:
        """Advice on what classes.json needs for these ids."""
        known = sorted(set(self.raw_ids()) - {IGNORE})
        text = f" (classes.json names {_ranges(known)}"
        if list(unknown) == [known[-1] + 1]:
            text += f"; do the labels count from {known[0] + 1}?"
        elif list(unknown) == [known[0] - 1]:
            text += f"; do the labels count from {known[0] - 1}?"
        return f'{text}; ids of no class belong in its "ignore")'

    def store_label(self, data: bytes) -> tuple[bytes, np.ndarray]:
        """As in every builder; an error message describes the colours in a file that should hold ids."""
        try:
            return super().store_label(data)
        except ValueError as error:
            raise ValueError(f"{error}{_about_colours(data, self.builder_config.classes)}") from error

    def items(self, manual_dir: Path) -> dict[str, list[Item]]:
        """Lists images and labels by split; the error names every file that does not belong there."""
        root = Path(self.builder_config.path)
        complaints = Complaints(f"the folder {root}")
        images, labels = self.builder_config.splits["images"], self.builder_config.splits["labels"]
        if not images:
            images, labels = {"train": ""}, {"train": ""}
        else:
            for kind, folders in (("images", images), ("labels", labels)):
                for entry in sorted((root / kind).glob("*")):
                    if entry.name not in [folders.get(split) for split in images] and not entry.name.startswith("."):
                        complaints.add(f"{entry}: lies beside the splits {' and '.join(images.values())}")
        result = {}
        for split, folder in images.items():
            place = root / "labels" / labels.get(split, split)
            result[split] = _pair(root, root / "images" / folder, place, complaints)
        complaints.raise_any()
        return result


def _split_folders(root: Path) -> dict[str, dict[str, str]]:
    """The folders of the splits, as in `FolderConfig`; raises UserError for folders that only look like splits."""
    complaints = Complaints(f"the folder {root}")
    found: dict[str, dict[str, str]] = {}
    for kind in ("images", "labels"):
        found[kind] = {}
        for split, synonyms in _SPLITS.items():
            fitting = sorted(e.name for e in (root / kind).glob("*") if e.name.lower() in synonyms and e.is_dir())
            for other in fitting[1:]:
                complaints.add(f"{root / kind / other}: is the split {split}, and so is {fitting[0]}; keep one of them")
            found[kind] |= {split: fitting[0]} if fitting else {}
    if not found["images"]:
        for folder in sorted(path for kind in ("images", "labels") for path in _folders(root / kind)):
            if names.looks_like_split(folder.name):
                complaints.add(
                    f"{folder}: is this a split? Splits are folders {', '.join(_SPLITS)} directly in images (and in "
                    "labels); if it is not one, give it another name"
                )
    complaints.raise_any()
    return found


def _ranges(ids: Sequence[int]) -> str:
    """0, 1, 2, 7 as "0-2, 7"."""
    runs: list[list[int]] = []
    for value in ids:
        if runs and runs[-1][-1] == value - 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _about_colours(data: bytes, classes: dict[str, Any] | None) -> str:
    """A description of the colours of a label file that should hold ids; "" if it has none."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if classes is None or image.mode not in ("RGB", "RGBA"):
                return ""
            found = np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3) @ (1 << np.array([16, 8, 0])))
    except (OSError, SyntaxError, Image.DecompressionBombError):
        return ""
    colours = {tuple(entry["color"]): entry["name"] for entry in classes["classes"]}
    split = [(int(v) >> 16, int(v) >> 8 & 255, int(v) & 255) for v in found]
    if all(red == green == blue for red, green, blue in split):
        return "; its three channels are alike, so keep one of them"
    if known := [colours[colour] for colour in split if colour in colours]:
        return f"; it is colour-coded ({', '.join(known[:3])}, ...): write the id of each class where its colour is"
    return ""


def _pair(root: Path, image_folder: Path, label_folder: Path, complaints: Complaints) -> list[Item]:
    """The images of a split with their labels, sorted by name."""
    images, refused = _files(root, image_folder, _IMAGE_SUFFIXES, complaints)
    labels = None
    if not images and not refused:
        complaints.add(f"{image_folder}: holds no images")
    if label_folder.is_dir():
        labels, other = _files(root, label_folder, (".png",), complaints)
        for name in refused:  # one complaint about a pair is enough
            labels.pop(name, None)
        images = {name: file for name, file in images.items() if name not in other}
        ways = names.pairings(images.keys() - labels.keys(), labels.keys() - images.keys())
        if len(ways) == 1:
            labels |= {image: labels.pop(label) for image, label in ways[0].partners.items()}
        complain_of_unpaired(images, labels, "label", complaints, f", though {label_folder} exists")
    ids = {}
    for name in sorted(images):
        # Files that are written later are named after an id, so it must be one plain file name.
        id_ = name.replace("/", "__")
        if len(id_.encode()) > 200:
            complaints.add(f"{images[name]}: its name below the folder is longer than 200 bytes")
        if id_ in ids:
            complaints.add(f"{images[name]}: would get the same name as {ids[id_].image}; rename one")
        ids[id_] = Item(id_, images[name], labels.get(name) if labels is not None else None)
    return list(ids.values())


def _files(
    root: Path, folder: Path, suffixes: tuple[str, ...], complaints: Complaints
) -> tuple[dict[str, Path], set[str]]:
    """Relative name without suffix, in NFC -> file, for all files below a folder; and the names of those refused."""
    result: dict[str, Path] = {}
    found = set()
    for file in files.visible(folder):
        name = names.plain(file.relative_to(folder).with_suffix("").as_posix())
        found.add(name)
        shown = ascii(str(file))[1:-1]  # the name may hold control characters for a terminal
        if not name.isprintable() or "\\" in name:
            complaints.add(f"{shown}: its name has characters that not every system allows in file names")
        elif not file.exists() or not file.resolve().is_relative_to(root):
            complaints.add(f"{shown}: is a link that leads out of the folder; put a copy or a hard link there")
        elif file.is_dir():
            complaints.add(f"{shown}: is a link to a folder; put the folder itself there")
        elif file.suffix.lower() not in suffixes:
            complaints.add(f"{shown}: is not {' or '.join(suffixes)}")
        elif name in result:
            complaints.add(f"{shown}: has the same name as {result[name].name}")
        else:
            result[name] = file
    return result, found - result.keys()


def _folders(folder: Path) -> list[Path]:
    """All folders below a folder, but no hidden ones."""
    found = []
    for top, folders, _ in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(top, name) for name in folders]
    return found


def _listing_hash(root: Path, splits: dict[str, dict[str, str]]) -> str:
    """16 hex digits that change with classes.json and with any file's name, size or time."""
    digest = hashlib.sha256()
    if {folder for part in splits.values() for folder in part.values()} - {"train", "val"}:
        # Earlier releases took these for folders of the split train: what they prepared is another dataset.
        digest.update(json.dumps(splits).encode())
    classes = root / "classes.json"
    digest.update(classes.read_bytes() if classes.exists() else b"")
    for kind in ("images", "labels"):
        for file in files.visible(root / kind):
            state = file.lstat()
            entry = f"{file.relative_to(root).as_posix()}\0{state.st_size}\0{state.st_mtime_ns}\0"
            digest.update(entry.encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def read_classes(file: Path) -> dict[str, Any] | None:
    """Reads and checks classes.json.

    Returns:
      {"name": str, "classes": [{"name": str, "ids": [int], "color": [r, g, b]}], "ignore": [int]}, or
      None if there is no such file.

    Raises:
      UserError: an entry is wrong; the message names it.
    """
    if not file.exists():
        return None
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES} bytes")
        content = json.loads(file.read_bytes())  # finds out itself whether it is UTF-8 or UTF-16, and about a BOM
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not a text in UTF-8; save it as this") from error
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict) or not _is_text(content.get("name")):
        raise UserError(f'{file}: must be {{"name": ..., "classes": [...]}} with a text as name')
    entries = content.get("classes")
    if not isinstance(entries, list) or not 1 <= len(entries) <= IGNORE:
        raise UserError(f'{file}: "classes" must be a list of 1 to 255 classes')
    complaints = Complaints(str(file))
    classes = [_read_class(index, entry, complaints) for index, entry in enumerate(entries)]
    ignore = content.get("ignore", [])
    if not _is_bytes(ignore):
        complaints.add('"ignore" must be a list of ids 0..255')
        ignore = []
    complaints.raise_any()
    _complain_of_repeats([entry["name"] for entry in classes], "class name", complaints)
    ids = [raw for entry in classes for raw in entry["ids"]] + [raw for raw in ignore if raw != IGNORE]
    _complain_of_repeats(ids, "id", complaints)
    complaints.raise_any()
    return {"name": names.plain(content["name"]), "classes": classes, "ignore": ignore}


def _read_class(index: int, entry: Any, complaints: Complaints) -> dict[str, Any]:
    where = f"class {index}"
    if not isinstance(entry, dict) or not _is_text(entry.get("name")):
        complaints.add(f'{where}: must be {{"name": ..., "ids": [...], "color": [r, g, b]}} with a text as name')
        return {}
    where = f"class {index} ({entry['name']})"
    ids = entry.get("ids", [entry["id"]] if "id" in entry else None)
    if not _is_bytes(ids) or not ids or IGNORE in ids:
        complaints.add(f'{where}: "ids" must be a list of numbers 0..254 (255 is always ignored)')
    color = entry.get("color")
    if not _is_bytes(color) or len(color) != 3:
        complaints.add(f'{where}: "color" must be three numbers 0..255')
    return {"name": names.plain(entry["name"]), "ids": ids, "color": color}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and value.isprintable()


def _is_bytes(value: Any) -> bool:
    """Whether it is a list of integers 0..255."""
    return isinstance(value, list) and all(type(v) is int and 0 <= v <= 255 for v in value)


def _complain_of_repeats(values: list, what: str, complaints: Complaints) -> None:
    for value in sorted({v for v in values if values.count(v) > 1}):
        complaints.add(f"{what} {value} appears more than once")


DATASET = Dataset(builder=Folder)  # classes.json gives the meaning of its ids
