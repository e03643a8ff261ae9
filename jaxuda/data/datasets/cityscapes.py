"""Cityscapes: videos of 50 cities in and around Germany (Cordts et al., CVPR 2016), 2048x1024, 19 classes.

The manual folder holds the contents of leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip:

leftImg8bit/{train,val,test}/CITY/*_leftImg8bit.png
gtFine/{train,val}/CITY/*_gtFine_labelIds.png

Published: 2,975 training, 500 validation and 1,525 test images. The test images have no public labels: gtFine/test is
not read. A copy without leftImg8bit/test is prepared without that split.
"""

from pathlib import Path

import numpy as np

from jaxuda.data.building import Complaints, FilesBuilder, Item, find_folder, listed_below, paired
from jaxuda.data.datasets import Dataset
from jaxuda.data.labels import IGNORE, LabelSpace, make_label_space

# Raw id, name, official colour and super-class of the 19 classes, in the order of their train ids.
_ROWS = (
    (7, "road", (128, 64, 128), "flat"),
    (8, "sidewalk", (244, 35, 232), "flat"),
    (11, "building", (70, 70, 70), "construction"),
    (12, "wall", (102, 102, 156), "construction"),
    (13, "fence", (190, 153, 153), "construction"),
    (17, "pole", (153, 153, 153), "object"),
    (19, "light", (250, 170, 30), "object"),
    (20, "sign", (220, 220, 0), "object"),
    (21, "vegetation", (107, 142, 35), "nature"),
    (22, "terrain", (152, 251, 152), "nature"),
    (23, "sky", (70, 130, 180), "sky"),
    (24, "person", (220, 20, 60), "human"),
    (25, "rider", (255, 0, 0), "human"),
    (26, "car", (0, 0, 142), "vehicle"),
    (27, "truck", (0, 0, 70), "vehicle"),
    (28, "bus", (0, 60, 100), "vehicle"),
    (31, "train", (0, 80, 100), "vehicle"),
    (32, "motorcycle", (0, 0, 230), "vehicle"),
    (33, "bicycle", (119, 11, 32), "vehicle"),
)
CLASSES = {raw: name for raw, name, _, _ in _ROWS}
COLOURS = {name: colour for _, name, colour, _ in _ROWS}
_SUPER = {name: super_class for _, name, _, super_class in _ROWS}
# Raw id -> train id of the 19 classes, 255 elsewhere.
TRAIN_IDS = np.full(256, IGNORE, np.uint8)
TRAIN_IDS[list(CLASSES)] = range(len(CLASSES))
# A super-class has the colour of its most common member.
_SUPER_COLOURS = {
    "flat": (128, 64, 128),
    "construction": (70, 70, 70),
    "object": (153, 153, 153),
    "nature": (107, 142, 35),
    "sky": (70, 130, 180),
    "human": (220, 20, 60),
    "vehicle": (0, 0, 142),
}
# Super-classes of the published category column, which also has ids outside of the 19 (parking, rail track; guard rail,
# bridge, tunnel; pole group; caravan, trailer).
CATEGORIES = {
    **{raw: super_class for raw, _, _, super_class in _ROWS},
    9: "flat", 10: "flat", 14: "construction", 15: "construction", 16: "construction", 18: "object",
    29: "vehicle", 30: "vehicle",
}  # fmt: skip


class Cityscapes(FilesBuilder, skip_registration=True):
    """Labels are the published ids 0..33; an image has the id CITY_SEQUENCE_FRAME."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = "the folder with leftImg8bit and gtFine of https://www.cityscapes-dataset.com"
    PUBLISHED = {"": {"train": 2975, "val": 500, "test": 1525}}  # noqa: RUF012
    SIZE = (2048, 1024)
    TRAIN_IDS = 19

    def raw_ids(self) -> range:
        """All ids in label files."""
        return range(34)

    def items(self, manual_dir: Path) -> dict[str, list[Item]]:
        """Lists images and labels city by city."""
        complaints = Complaints(f"the Cityscapes folder {manual_dir}")
        result = {split: _split(manual_dir, split, complaints) for split in ("train", "val")}
        if (find_folder(manual_dir, "leftImg8bit") / "test").is_dir():
            result["test"] = _split(manual_dir, "test", complaints)
        complaints.raise_any()
        return result


def _split(root: Path, split: str, complaints: Complaints) -> list[Item]:
    images = listed_below(find_folder(root, "leftImg8bit") / split, "_leftImg8bit.png", complaints, "cities")
    if split == "test":
        return paired(images, complaints)
    labels = listed_below(find_folder(root, "gtFine") / split, "_gtFine_labelIds.png", complaints, "cities")
    return paired(images, complaints, label=labels)


def raw_ids(space: LabelSpace) -> np.ndarray | None:
    """Maps train ids to the raw ids of Cityscapes, as its test server expects them: (256,) uint8, 255 -> 0.

    None for a label space with classes that Cityscapes lacks, or has several ids for.
    """
    raw = {name: index for index, name in CLASSES.items()}
    if not set(space.classes) <= raw.keys():
        return None
    table = np.zeros(256, np.uint8)
    table[: space.num_classes] = [raw[name] for name in space.classes]
    return table


DATASET = Dataset(
    builder=Cityscapes,
    classes=CLASSES,
    space="cityscapes19",
    spaces=(make_label_space("cityscapes19", COLOURS), make_label_space("super7", _SUPER_COLOURS, members=_SUPER)),
    tables={"super7": CATEGORIES},
)
