"""Pseudo-labels as readable files: one PNG of train ids per image, coloured by the label space's palette."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxuda import files
from jaxuda.data import encoding
from jaxuda.data.labels import LabelSpace
from jaxuda.data.records import Records
from jaxuda.errors import UserError

LABELS = "labels"


def write_pseudo_label(folder: Path, name: str, ids: np.ndarray, space: LabelSpace) -> None:
    """Writes (H, W) uint8 train ids, 255 = ignore, as folder/labels/NAME.png, atomically."""
    files.write_bytes(files.inside(folder / LABELS, f"{name}.png"), encoding.encode_indexed(ids, space.palette))


class PseudoLabelled(Sequence):
    """Records whose labels are pseudo-labels; their own labels, if they have any, are never read.

    Args:
      records: the images.
      folder: the artifacts of a pseudo-label stage.
      space: the label space of the ids.

    Raises:
      UserError: an image has no pseudo-label, or (when read) one does not fit its image.
    """

    labelled = True

    def __init__(self, records: Records, folder: Path, space: LabelSpace):
        self._records, self._folder, self.label_space = records.images_only(), folder / LABELS, space
        self.name = f"{records.name} with pseudo-labels"
        missing = [name for name in records.ids() if not (self._folder / f"{name}.png").exists()]
        if missing:
            raise UserError(
                f"{len(missing)} images of {records.name} have no pseudo-label in {self._folder}, such as "
                f"'{missing[0]}': were they made for other data? Run their stage again with --from_stage"
            )

    def __len__(self) -> int:
        return len(self._records)

    def ids(self) -> list[str]:
        """Ids of all records in the order of their index."""
        return self._records.ids()

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._records[index]
        path = self._folder / f"{record['id']}.png"
        try:
            label = encoding.read_label_file(path.read_bytes())
        except (ValueError, OSError) as error:
            raise UserError(f"the pseudo-label {path} {error}: run its stage again with --from_stage") from error
        if label.shape != record["image"].shape[:2]:
            raise UserError(f"{path} is {label.shape[1]}x{label.shape[0]}, unlike its image: make it again")
        return {**record, "label": label}
