"""GTA5: frames of a computer game (Richter et al., Playing for Data, ECCV 2016), 1914x1052, 19 classes.

The manual folder holds images/*.png and labels/*.png of the same names, the contents of the ten published parts.
Labels are palette PNGs whose index is the id, with the ids of Cityscapes. Published: 24,966 images; a few labels differ
in size from their image and are resized to it.
"""

from pathlib import Path

from jaxuda.data.building import Complaints, FilesBuilder, Item, find_folder, listed, paired
from jaxuda.data.datasets import Dataset
from jaxuda.data.datasets.cityscapes import CATEGORIES, CLASSES


class Gta5(FilesBuilder, skip_registration=True):
    """Labels are the published ids: those of Cityscapes, and 34 for licence plates."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "the folder with images and labels of https://download.visinf.tu-darmstadt.de/data/from_games"
    )
    PUBLISHED = {"": {"train": 24_966}}  # noqa: RUF012
    RESIZE_LABELS = True
    TRAIN_IDS = 19

    def raw_ids(self) -> range:
        """The 34 ids of Cityscapes, and licence plates."""
        return range(35)

    def items(self, manual_dir: Path) -> dict[str, list[Item]]:
        """Lists all frames, as training images."""
        complaints = Complaints(f"the GTA5 folder {manual_dir}")
        images = listed(find_folder(manual_dir, "images"), (".png",), complaints)
        items = paired(images, complaints, label=listed(find_folder(manual_dir, "labels"), (".png",), complaints))
        complaints.raise_any()
        return {"train": items}


DATASET = Dataset(builder=Gta5, classes=CLASSES, space="cityscapes19", tables={"super7": CATEGORIES})
