"""Cross-City: streets of four cities around the world (Chen et al., No More Discrimination, ICCV 2017), 13 classes.

The manual folder holds, for each of Rio, Rome, Taipei and Tokyo:

CITY/Images/Train/*     3,200 images without labels, JPEG or PNG
CITY/Images/Test/*      100 images
CITY/Labels/Test/*_eval.png

with the ids of Cityscapes. Each city is a config; `prepare` reads only the folder of that city, which may be the manual
folder itself.
"""

from pathlib import Path
from typing import ClassVar

import tensorflow_datasets as tfds

from jaxuda.data.building import Complaints, FilesBuilder, Item, find_folder, listed, paired
from jaxuda.data.datasets import Dataset
from jaxuda.data.datasets.cityscapes import CLASSES
from jaxuda.data.datasets.synthia import COMMON
from jaxuda.data.labels import make_label_space

CITIES = ("rio", "rome", "taipei", "tokyo")
_IMAGES = (".jpg", ".jpeg", ".png")


class Crosscity(FilesBuilder, skip_registration=True):
    """Labels are the published ids, those of Cityscapes; there are none in split `train`."""

    BUILDER_CONFIGS: ClassVar = [
        tfds.core.BuilderConfig(name=city, description=f"the streets of {city.capitalize()}") for city in CITIES
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "the folder with Rio, Rome, Taipei and Tokyo of https://yihsinchen.github.io/segmentation_adaptation"
    )
    PUBLISHED = {city: {"train": 3200, "test": 100} for city in CITIES}  # noqa: RUF012
    TRAIN_IDS = 19

    def raw_ids(self) -> list[int]:
        """Those of Cityscapes, and 255 for void."""
        return [*range(34), 255]

    @classmethod
    def has_config(cls, manual_dir: Path, config: str) -> bool:
        """Whether the folder of a city is there."""
        return _city(manual_dir, config).is_dir()

    def items(self, manual_dir: Path) -> dict[str, list[Item]]:
        """Lists the images of this config's city."""
        root = _city(manual_dir, self.config_name())
        complaints = Complaints(f"the Cross-City folder {root}")
        train = listed(root / "Images" / "Train", _IMAGES, complaints)
        test = listed(root / "Images" / "Test", _IMAGES, complaints)
        labels = listed(root / "Labels" / "Test", ("_eval.png",), complaints)
        result = {"train": paired(train, complaints), "test": paired(test, complaints, label=labels)}
        complaints.raise_any()
        return result


def _city(manual_dir: Path, city: str) -> Path:
    if manual_dir.name.lower() == city and (manual_dir / "Images").is_dir():
        return manual_dir
    return find_folder(manual_dir, city.capitalize())


DATASET = Dataset(
    builder=Crosscity,
    classes=CLASSES,
    space="crosscity13",
    spaces=(make_label_space("crosscity13", COMMON),),
    apart=True,
)
