"""A user's dataset: boxes on the ground, by day and by night.

The manual folder holds, for day and for night, {train,val}/NAME.png and {train,val}/NAME_ids.png.
"""

from pathlib import Path
from typing import ClassVar

import tensorflow_datasets as tfds

from jaxuda.data.building import Complaints, FilesBuilder, Item, listed, paired
from jaxuda.data.datasets import Dataset
from jaxuda.data.labels import make_label_space


class Toydata(FilesBuilder, skip_registration=True):
    """Labels are 1 (ground), 4 (box), 9 (sky) and 0 (unlabelled)."""

    BUILDER_CONFIGS: ClassVar = [tfds.core.BuilderConfig(name=name) for name in ("day", "night")]
    MANUAL_DOWNLOAD_INSTRUCTIONS = "the folder with day and night that tests/plugins/test_toydata.py draws"

    def raw_ids(self) -> tuple[int, ...]:
        """The classes and void."""
        return 0, 1, 4, 9

    def items(self, manual_dir: Path) -> dict[str, list[Item]]:
        """Lists the images of this config by split."""
        complaints = Complaints(f"the folder {manual_dir}")
        splits = {}
        for split in ("train", "val"):
            folder = manual_dir / self.config_name() / split
            labels = listed(folder, ("_ids.png",), complaints)
            images = listed(folder, (".png",), complaints)
            images = images and {name: file for name, file in images.items() if not name.endswith("_ids")}
            splits[split] = paired(images, complaints, label=labels)
        complaints.raise_any()
        return splits


DATASET = Dataset(
    builder=Toydata,
    classes={1: "ground", 4: "box", 9: "sky"},
    space="toy3",
    spaces=(make_label_space("toy3", {"ground": (90, 90, 90), "box": (200, 60, 40), "sky": (60, 120, 230)}),),
)
