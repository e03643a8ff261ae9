"""Dark Zurich: streets of Zurich at night (Sakaridis et al., ICCV 2019 and TPAMI 2020), 1920x1080, 19 classes.

The manual folder holds the contents of Dark_Zurich_train_anon.zip, Dark_Zurich_val_anon.zip and, if it is there,
Dark_Zurich_test_anon_withoutGt.zip, in one folder or each in a folder of its own:

rgb_anon/train/{night,day}/SEQUENCE/*_rgb_anon.png
corresp/train/night/**/*.csv                                    train/night/SEQUENCE/NAME,train/day/SEQUENCE/NAME
rgb_anon/{val,test}/night/SEQUENCE/*_rgb_anon.png
gt/val/night/SEQUENCE/*_gt_labelTrainIds.png                    or, if there are none of these, *_gt_labelIds.png

Published: 2,416 training images at night, without labels, 50 validation images and 151 test images; the test images
have no public labels. `corresp` names an image by day of the same place for each training image. These are stored
beside them, as "reference", which SePiCo's recipe needs; a copy without `corresp` or day images does not have them.

File names and counts are those of the papers and of code that reads the published folders; no copy was at hand.
"""

import csv
from pathlib import Path

from jaxuda.data.building import Complaints, Item
from jaxuda.data.datasets import Dataset
from jaxuda.data.datasets.acdc import NightLabels
from jaxuda.data.datasets.cityscapes import COLOURS

_IMAGE = "_rgb_anon.png"


class DarkZurich(NightLabels, skip_registration=True):
    """An image has the id SEQUENCE_frame_NUMBER."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "the folder with rgb_anon, gt and corresp of https://www.trace.ethz.ch/publications/2019/GCMA_UIoU"
    )
    PUBLISHED = {"": {"train": 2416, "val": 50, "test": 151}}  # noqa: RUF012
    HAS_REFERENCE = True

    def items(self, manual_dir: Path) -> dict[str, list[Item]]:
        """Lists the images of the night sequence by sequence; a copy without test images has no such split."""
        complaints = Complaints(f"the Dark Zurich folder {manual_dir}")
        self.choose_ids(_root(manual_dir, "val") / "gt")
        found = {}
        for split in ("train", "val", "test"):
            root = _root(manual_dir, split)
            images, labels = (root / kind / split / "night" for kind in ("rgb_anon", "gt"))
            if split != "test" or images.is_dir():
                found[split] = self.split(images, labels, complaints, labelled=split == "val", flat=False)
        found["train"] = _with_references(found["train"], _root(manual_dir, "train"), complaints)
        complaints.raise_any()
        return found


def _root(manual_dir: Path, split: str) -> Path:
    """The folder of a split's rgb_anon: the manual folder, or one in it."""
    around = [folder for folder in sorted(manual_dir.iterdir()) if folder.is_dir() and folder.name[0] not in "._"]
    places = [folder for folder in (manual_dir, *around) if (folder / "rgb_anon" / split / "night").is_dir()]
    return places[0] if places else manual_dir


def _with_references(items: list[Item], root: Path, complaints: Complaints) -> list[Item]:
    """The items with the images by day that `corresp` names for them, if it is there."""
    tables = sorted((root / "corresp" / "train" / "night").rglob("*.csv"))
    if not tables or not (root / "rgb_anon" / "train" / "day").is_dir():
        return items
    days: dict[str, Path] = {}
    for table in tables:
        for number, row in enumerate(csv.reader(table.read_text(encoding="utf-8").splitlines()), 1):
            if len(row) != 2:
                complaints.add(f"{table}, line {number}: must be NIGHT,DAY, but has {len(row)} columns")
                return items
            night, day = (cell.strip().removeprefix("rgb_anon/").removesuffix(_IMAGE) for cell in row)
            days[night.rpartition("/")[2]] = root / "rgb_anon" / f"{day}{_IMAGE}"
    for item in items:
        if item.id not in days:
            complaints.add(f"{item.image}: has no image by day in {root / 'corresp' / 'train' / 'night'}")
        elif not days[item.id].is_file():
            complaints.add(f"{days[item.id]}: there is no such file, but corresp names it for {item.image}")
    return [item._replace(reference=days.get(item.id)) for item in items]


DATASET = Dataset(builder=DarkZurich, classes=dict(enumerate(COLOURS)), space="cityscapes19")
