"""ACDC: Swiss streets in fog, at night, in rain and in snow (Sakaridis et al., ICCV 2021), 1920x1080, 19 classes.

The manual folder holds the contents of rgb_anon_trainvaltest.zip and gt_trainval.zip:

rgb_anon/CONDITION/{train,val,test}/SEQUENCE/*_rgb_anon.png
gt/CONDITION/{train,val}/SEQUENCE/*_gt_labelTrainIds.png      or, if there are none of these, *_gt_labelIds.png

with CONDITION fog, night, rain or snow, one config each; train/CONDITION in place of CONDITION/train is read too. All
four are one domain as "acdc/fog+acdc/night+acdc/rain+acdc/snow", without being stored twice.

Some self-training repositories copy the files to {rgb_anon,gt}/{train,val}/*.png, which loses the conditions: such a
folder is the config `all`.

Published: 400 training, 100 validation (night: 106) and 500 test images of each condition, 1,600, 406 and 2,000
together. The test images have no public labels. The images of the same places in clear weather (*_rgb_ref_anon.png)
are not read.

File names and counts are those of the paper and of code that reads the published folders; no copy was at hand.
"""

from pathlib import Path
from typing import ClassVar

import tensorflow_datasets as tfds

from jaxuda.data.building import Complaints, FilesBuilder, Item, find_folder, listed, listed_below, paired
from jaxuda.data.datasets import Dataset
from jaxuda.data.datasets.cityscapes import CLASSES, COLOURS, TRAIN_IDS
from jaxuda.data.labels import IGNORE

CONDITIONS = ("fog", "night", "rain", "snow")
ALL = "all"
_IMAGE, _TRAIN_IDS, _RAW_IDS = "_rgb_anon.png", "_gt_labelTrainIds.png", "_gt_labelIds.png"
_VAL = {"night": 106}
_WHOLE = {"train": 1600, "val": 406, "test": 2000}


class NightLabels(FilesBuilder, skip_registration=True):
    """Labels of ACDC and Dark Zurich, stored as train ids of Cityscapes; files may hold its raw ids instead.

    The ending of their names says which ids files hold, and their content must be of that kind.
    """

    SIZE = (1920, 1080)

    def raw_ids(self) -> list[int]:
        """Train ids and void, or the published ids of Cityscapes."""
        return [*range(len(CLASSES)), IGNORE] if self.stored_ids is None else [*range(34)]

    def advice(self, unknown: list[int]) -> str:
        """Raw ids in files of train ids."""
        raw = self.stored_ids is None and max(unknown) < 34
        return f" (raw ids of Cityscapes: files of these end in {_RAW_IDS})" if raw else ""

    def split(self, images: Path, labels: Path, complaints: Complaints, *, labelled: bool, flat: bool) -> list[Item]:
        """The items of a split whose images and labels are in these folders, or with `flat` directly in them.

        Of a split without public labels, labels are a complaint: somebody made them.
        """
        found = _files(images, _IMAGE, complaints, flat)
        if not labelled:
            made = sorted(labels.rglob("*.png")) if labels.is_dir() else []
            if made:
                complaints.add(f"{made[0]}: is a label of the test split, which has no public ones; move {labels} away")
            return paired(found, complaints)
        ending = _TRAIN_IDS if self.stored_ids is None else _RAW_IDS
        return paired(found, complaints, label=_files(labels, ending, complaints, flat))

    def choose_ids(self, gt: Path) -> None:
        """Reads raw ids if there are no labels of train ids anywhere in a folder."""
        raw = next(gt.rglob(f"*{_RAW_IDS}"), None) and not next(gt.rglob(f"*{_TRAIN_IDS}"), None)
        self.stored_ids = TRAIN_IDS if raw else None
        self.TRAIN_IDS = len(CLASSES) if raw else 0


def _files(folder: Path, ending: str, complaints: Complaints, flat: bool) -> dict[str, Path] | None:
    return listed(folder, (ending,), complaints) if flat else listed_below(folder, ending, complaints, "sequences")


class Acdc(NightLabels, skip_registration=True):
    """An image has the id SEQUENCE_frame_NUMBER."""

    BUILDER_CONFIGS: ClassVar = [
        *(tfds.core.BuilderConfig(name=name, description=f"streets in {name}") for name in CONDITIONS),
        tfds.core.BuilderConfig(name=ALL, description="a folder without conditions"),
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = "the folder with rgb_anon and gt of https://acdc.vision.ee.ethz.ch"
    PUBLISHED: ClassVar = {
        **{name: {"train": 400, "val": _VAL.get(name, 100), "test": 500} for name in CONDITIONS},
        ALL: _WHOLE,
    }

    @classmethod
    def has_config(cls, manual_dir: Path, config: str) -> bool:
        """Whether a condition has a folder; `all`: whether none has, but there are images."""
        images = find_folder(manual_dir, "rgb_anon")
        if config == ALL:
            apart = any(cls.has_config(manual_dir, name) for name in CONDITIONS)
            return not apart and any((images / "train").glob(f"*{_IMAGE}"))
        return (images / config).is_dir() or (images / "train" / config).is_dir()

    def items(self, manual_dir: Path) -> dict[str, list[Item]]:
        """Lists this condition's images sequence by sequence; a copy without test images has no such split."""
        config = self.config_name()
        complaints = Complaints(f"the ACDC folder {manual_dir}")
        images, gt = find_folder(manual_dir, "rgb_anon"), find_folder(manual_dir, "gt")
        self.choose_ids(gt)
        flat = config == ALL
        found = {}
        for split in ("train", "val", "test"):
            place = Path(split)
            if not flat:
                place = place / config if (images / split / config).is_dir() else Path(config, split)
            if split == "test" and not (images / place).is_dir():
                continue
            found[split] = self.split(images / place, gt / place, complaints, labelled=split != "test", flat=flat)
        complaints.raise_any()
        return found


DATASET = Dataset(builder=Acdc, classes=dict(enumerate(COLOURS)), space="cityscapes19", apart=True)
