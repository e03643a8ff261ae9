"""SYNTHIA, the part RAND_CITYSCAPES: rendered streets with depth (Ros et al., CVPR 2016), 1280x760, 16 classes.

The manual folder, or RAND_CITYSCAPES in it, holds:

RGB/*.png               images
GT/LABELS/*.png         16-bit PNGs, class in the first channel and instance in the second
  or parsed_LABELS      grey PNGs of only the class
Depth/Depth/*.png       16-bit PNGs of centimetres
  or Depth/*.png

All files of an image have the same name. Published: 9,400 images.
"""

from pathlib import Path

import numpy as np

from jaxuda.data import encoding, png
from jaxuda.data.building import Complaints, FilesBuilder, Item, find_folder, listed, paired
from jaxuda.data.datasets import Dataset
from jaxuda.data.datasets.cityscapes import COLOURS
from jaxuda.data.labels import make_label_space

_CLASSES = {
    1: "sky", 2: "building", 3: "road", 4: "sidewalk", 5: "fence", 6: "vegetation", 7: "pole", 8: "car",
    9: "sign", 10: "person", 11: "bicycle", 12: "motorcycle", 15: "light", 17: "rider", 19: "bus",
    21: "wall",
}  # fmt: skip
# As published with DADA: lane markings (22) are flat; wall, rider, bus and motorcycle are ignored.
_SUPER = {
    1: "sky", 2: "construction", 3: "flat", 4: "flat", 5: "construction", 6: "nature", 7: "object",
    8: "vehicle", 9: "object", 10: "human", 11: "vehicle", 15: "object", 22: "flat",
}  # fmt: skip
_SIXTEEN = {name: colour for name, colour in COLOURS.items() if name not in ("terrain", "truck", "train")}
# The classes that SYNTHIA, Cityscapes and Cross-City have in common.
COMMON = {name: colour for name, colour in _SIXTEEN.items() if name not in ("wall", "fence", "pole")}


class Synthia(FilesBuilder, skip_registration=True):
    """Labels are the published ids 0..22; depth is stored as published."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = "the folder RAND_CITYSCAPES of https://synthia-dataset.net, with RGB, GT and Depth"
    PUBLISHED = {"": {"train": 9_400}}  # noqa: RUF012
    SIZE = (1280, 760)
    HAS_DEPTH = True
    TRAIN_IDS = 19

    def raw_ids(self) -> range:
        """Void and 22 classes."""
        return range(23)

    def store_label(self, data: bytes) -> tuple[bytes, np.ndarray]:
        """Extracts the class from a file that also holds instances; other files must hold only the class."""
        found = png.check(data)
        if found.bits != 16 or found.colour == png.GREY:
            return super().store_label(data)
        label = encoding.read_first_channel(data)
        return encoding.encode_label(label), label

    def items(self, manual_dir: Path) -> dict[str, list[Item]]:
        """Lists all images, as training images."""
        root = find_folder(manual_dir, "RAND_CITYSCAPES")
        root = root if root.is_dir() else find_folder(manual_dir, "RGB").parent
        complaints = Complaints(f"the SYNTHIA folder {root}")
        parsed, nested = root / "parsed_LABELS", root / "Depth" / "Depth"
        items = paired(
            listed(root / "RGB", (".png",), complaints),
            complaints,
            label=listed(parsed if parsed.is_dir() else root / "GT" / "LABELS", (".png",), complaints),
            depth=listed(nested if nested.is_dir() else root / "Depth", (".png",), complaints),
        )
        complaints.raise_any()
        return {"train": items}


_SPACES = (
    make_label_space("synthia16", _SIXTEEN, starred=tuple(COMMON)),
    make_label_space("common13", COMMON),
    # DAFormer's authors: a network for all 19 classes, three of which SYNTHIA never shows. The target's terrain, trucks
    # and trains count as errors of the classes that are predicted there; mIoU* is the mean of the 16 (their mIoU16).
    make_label_space("synthia19", COLOURS, starred=tuple(_SIXTEEN), unseen=("terrain", "truck", "train")),
)

DATASET = Dataset(
    builder=Synthia,
    classes=_CLASSES,
    space="synthia16",
    spaces=_SPACES,
    tables={"super7": _SUPER},
)
