"""What the builders of datasets that come as files share: listing, checking and encoding them."""

import abc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from jaxuda.data import encoding
from jaxuda.data.threads import map_ahead
from jaxuda.errors import UserError

_MOST_COMPLAINTS = 10


class Item(NamedTuple):
    """One image of the user's, its label if it has one, and the id under which it is stored."""

    id: str
    image: Path
    label: Path | None


class Complaints:
    """Collects what is wrong with files, so that the user reads of the first few at once."""

    def __init__(self, what: str):
        self._what = what
        self._texts = []

    def add(self, text: str) -> None:
        """Adds one complaint, which names its file; at the tenth, all are raised as one `UserError`."""
        self._texts.append(text)
        if len(self._texts) == _MOST_COMPLAINTS:
            self._texts.append("and perhaps more")
            self.raise_any()

    def raise_any(self) -> None:
        """Raises a `UserError` if there are complaints."""
        if self._texts:
            raise UserError("\n  ".join([f"{self._what} cannot be used:", *self._texts]))


class FilesBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A builder of image and label files; subclasses say where they are and which ids they may hold.

    Attributes:
        PUBLISHED: config -> split -> number of images in the published dataset, if there is one.
    """

    VERSION = tfds.core.Version("1.0.0")
    PUBLISHED: ClassVar[dict[str, dict[str, int]]] = {}

    @abc.abstractmethod
    def items(self, manual_dir: Path) -> dict[str, list[Item]]:
        """Lists the files of every split; raises a `UserError` if the layout is not the expected one."""

    @abc.abstractmethod
    def raw_ids(self) -> Sequence[int]:
        """Ids that the label files may hold, those that are ignored included."""

    def has_labels(self) -> bool:
        """Whether any split has labels."""
        return True

    def _info(self) -> tfds.core.DatasetInfo:
        # In the order of the listing, so that index i is the same image on every machine.
        return tfds.core.DatasetInfo(
            builder=self, features=encoding.features(label=self.has_labels()), disable_shuffling=True
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, "Examples"]:
        items = self.items(Path(dl_manager.manual_dir))
        return {split: self._generate_examples(files) for split, files in items.items()}

    def _generate_examples(self, items: list[Item]) -> "Examples":
        return Examples(items, self.raw_ids(), store_label=self.has_labels())


class Examples:
    """Iterates over (key, encoded record) of a split, checked and encoded in threads; knows its length.

    Raises a `UserError` at the tenth bad file, or at the end if there were fewer.
    """

    def __init__(self, items: list[Item], raw_ids: Sequence[int], *, store_label: bool):
        self._items, self._store_label = items, store_label
        self._known = np.zeros(256, bool)
        self._known[list(raw_ids)] = True

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        complaints = Complaints("the dataset")
        for key, result in enumerate(map_ahead(self._encode, self._items)):
            if isinstance(result, str):
                complaints.add(result)
            else:
                yield key, result
        complaints.raise_any()

    def _encode(self, item: Item) -> dict[str, Any] | str:
        """The encoded record of an item, or what is wrong with one of its files."""
        file = item.image
        try:
            image = file.read_bytes()
            height, width = encoding.check_image(image)
            record = {"image": image, "id": item.id}
            if item.label is not None:
                file = item.label
                label = encoding.read_label_file(file.read_bytes())
                if label.shape != (height, width):
                    return (
                        f"{file}: is {label.shape[1]}x{label.shape[0]}, but its image {item.image.name} is "
                        f"{width}x{height} (upright, as its EXIF tag says)"
                    )
                counts = np.bincount(label.ravel(), minlength=256)
                unknown = np.flatnonzero((counts > 0) & ~self._known)
                if len(unknown):
                    return f"{file}: holds ids that the dataset does not name: {', '.join(map(str, unknown))}"
                record["label"] = encoding.encode_label(label)
            elif self._store_label:
                record["label"] = b""
        except (OSError, ValueError) as error:
            return f"{file}: {error}"
        return record
