"""Checks the files of a dataset while they are stored, counts their pixels, and collects what is wrong with them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxuda.data import encoding
from jaxuda.data.threads import map_ahead
from jaxuda.data.transforms import resize_nearest
from jaxuda.errors import UserError

if TYPE_CHECKING:
    from jaxuda.data.building import FilesBuilder

_MOST_COMPLAINTS = 1000  # more wrong files than these mean a wrong folder
_TRAIN_IDS = "these are train ids, which other tools write; take the published label files"
_ZERO_SHARE = 0.03  # of the pixels


class Item(NamedTuple):
    """One image of the user, what belongs to it if there is such a file, and the id under which it is stored.

    reference: another image of the same place, such as one by day.
    """

    id: str
    image: Path
    label: Path | None
    depth: Path | None = None
    reference: Path | None = None

    def files(self) -> list[Path]:
        """Those files that exist."""
        return [file for file in (self.image, self.label, self.depth, self.reference) if file is not None]


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


class Findings:
    """What the files of all splits show.

    Attributes:
      complaints: what makes files unusable.
      turned: images with a label that their EXIF tag turns, see `encoding.turned_in_place`.
      ranges: `encoding.value_range` of each image of 16 bits.
    """

    def __init__(self, image_bits: int):
        self.complaints = Complaints("the dataset")
        self.turned: list[Path] = []
        self.ranges: dict[str, tuple[int, int]] = {}
        self._image_bits = image_bits

    def warnings(self) -> list[str]:
        """What the user should look at, a sentence each."""
        found = []
        if self.turned:
            found.append(
                f"{len(self.turned)} images are turned or mirrored by their EXIF tag, such as {self.turned[0]}: their "
                "labels must belong to the upright images, as viewers show them, not to the stored ones; compare some"
            )
        return found + list(filter(None, [encoding.range_warning(self.ranges, self._image_bits)]))


class _Encoded(NamedTuple):
    """A record to store, and what its files show.

    record: None if a file is bad.
    pixels: those of each raw id, (256,), if it has a label.
    size: (width, height).
    remark: what was corrected, or "".
    complaint: what is bad about which file, or "".
    values: see `encoding.value_range`.
    turned: see `encoding.turned_in_place`.
    """

    record: dict[str, Any] | None = None
    pixels: np.ndarray | None = None
    size: tuple[int, int] = (0, 0)
    remark: str = ""
    complaint: str = ""
    values: tuple[int, int] | None = None
    turned: bool = False


class Examples:
    """Iterates over (key, encoded record) of a split, checked and encoded in threads; knows its length.

    Bad files are left out and named in the complaints of `findings`.

    Attributes:
      file_bytes: size of all files together.
      tally: what was counted so far.
      remarks: what was corrected or is unusual, a line each.
    """

    def __init__(self, items: list[Item], builder: FilesBuilder, findings: Findings):
        self._items, self._builder, self._findings = items, builder, findings
        self._known = np.zeros(256, bool)
        self._known[list(builder.raw_ids())] = True
        self.file_bytes = sum(file.stat().st_size for item in items for file in item.files())
        self.tally, self.remarks = Tally(), []

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        other_size, labels = [], {}
        for key, (item, result) in enumerate(zip(self._items, map_ahead(self._encode, self._items), strict=True)):
            if result.pixels is not None:
                labels[item.label] = result.pixels
            if result.values:
                self._findings.ranges[str(item.image)] = result.values
            if result.complaint:
                self._findings.complaints.add(result.complaint)
                continue
            if result.remark:
                self.remarks.append(result.remark)
            if result.turned:
                self._findings.turned.append(item.image)
            if self._builder.SIZE not in (None, result.size):
                other_size.append(item.image)
            self.tally.add(result.record, self._stored(result.pixels))
            yield key, result.record
        if self._builder.TRAIN_IDS:
            self._look_for_train_ids(labels)
        if labels and (doubt := self._builder.doubt(sum(labels.values()))):
            self._findings.complaints.add(f"{min(labels)}: {doubt}")
        if other_size:
            width, height = self._builder.SIZE
            self.remarks.append(
                f"{len(other_size)} images are not {width}x{height} as published, such as {other_size[0]}"
            )

    def _stored(self, pixels: np.ndarray | None) -> np.ndarray | None:
        """The number of pixels of each stored id, from that of each id in the file."""
        table = self._builder.stored_ids
        if pixels is None or table is None:
            return pixels
        return np.bincount(table, pixels, 256).astype(np.int64)

    def _look_for_train_ids(self, labels: Mapping[Path, np.ndarray]) -> None:
        """Complains of labels that only hold ids which train ids can have, if it is plain that they are some.

        Several rare classes have such ids too, but 0 is rare in published labels, and road or sky among train ids.
        """
        last = self._builder.TRAIN_IDS - 1
        low = {file: pixels for file, pixels in labels.items() if not pixels[last + 1 : 255].any()}
        wrong = [file for file, pixels in low.items() if pixels[255] and not self._known[255]]
        total = sum(low.values(), np.zeros(256, np.int64))
        doubtful = [file for file in low if file not in wrong]
        if not doubtful or total[0] < _ZERO_SHARE * total.sum():
            return
        if wrong or len(low) == len(labels):
            others = "others" if len(low) < len(labels) else "all labels"
            for file in doubtful:
                text = f"{file}: holds no id above {last}, as {others} of its split: {_TRAIN_IDS}"
                self._findings.complaints.add(text)
        else:
            self.remarks.append(
                f"{len(doubtful)} of {len(labels)} labels hold no id above {last}, such as {doubtful[0]}; look whether "
                f"they hold train ids, not the published ones"
            )

    def _encode(self, item: Item) -> _Encoded:
        """The encoded record of an item, or what is wrong with one of its files."""
        file, found = item.image, _Encoded()
        try:
            data = file.read_bytes()
            height, width = encoding.check_image(data)
            values = encoding.value_range(data)
            turned = item.label is not None and encoding.turned_in_place(data)
            found = _Encoded(size=(width, height), values=values, turned=turned)
            if values and self._builder.image_bits < 16:
                data = encoding.encode_image(encoding.decode_image(data, self._builder.image_bits))
            record = {"image": data, "id": item.id}
            if item.label is not None:
                file = item.label
                found = self._with_label(record, item, found)
            elif self._builder.has_labels():
                record["label"] = b""
            if self._builder.HAS_REFERENCE:
                record["reference"] = b""
            if item.reference is not None and not found.complaint:
                file = item.reference
                record["reference"] = file.read_bytes()
                shape = encoding.check_image(record["reference"])
                if shape != (height, width):
                    differs = f"is {shape[1]}x{shape[0]}, but its image {item.image.name} is {width}x{height}"
                    return found._replace(complaint=f"{file}: {differs}")
            if item.depth is not None and not found.complaint:
                file = item.depth
                record["depth"], shape = encoding.store_depth(file.read_bytes())
                if shape != (height, width):
                    differs = f"is {shape[1]}x{shape[0]}, but its image {item.image.name} is {width}x{height}"
                    return found._replace(complaint=f"{file}: {differs}")
        except (OSError, ValueError) as error:
            return found._replace(complaint=f"{file}: {error}")
        return found._replace(record=record)

    def _with_label(self, record: dict[str, Any], item: Item, found: _Encoded) -> _Encoded:
        """Adds the label of an item to its record; returns what is known of the files, with the label's pixels."""
        (width, height), file = found.size, item.label
        stored, label = self._builder.store_label(file.read_bytes())
        if label.shape != (height, width):
            differs = f"{file}: is {label.shape[1]}x{label.shape[0]}, but its image {item.image.name} is "
            differs += f"{width}x{height}"
            if label.shape == (width, height):
                differs += " (upright: if its EXIF tag turns it, turn the label too)"
            if not self._builder.RESIZE_LABELS:
                return found._replace(complaint=differs)
            label = resize_nearest(label, (width, height))
            stored = encoding.encode_label(label)
            found = found._replace(remark=f"{differs}; it was resized to this")
        table = self._builder.stored_ids
        record["label"] = stored if table is None else encoding.encode_label(table[label])
        pixels = encoding.count_ids(label)
        unknown = np.flatnonzero((pixels > 0) & ~self._known)
        complaint = ""
        train_ids = self._builder.TRAIN_IDS
        if train_ids and list(unknown) == [255] and not pixels[train_ids:255].any():
            complaint = f"{file}: holds only the ids 0-{train_ids - 1} and 255: {_TRAIN_IDS}"
        elif len(unknown):
            advice = self._builder.advice(unknown.tolist())
            ids = ", ".join(map(str, unknown))
            complaint = f"{file}: has ids that the dataset does not define: {ids}{advice}"
        return found._replace(pixels=pixels, complaint=complaint)
