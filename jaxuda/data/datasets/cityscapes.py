"""Cityscapes: videos of 50 cities in and around Germany (Cordts et al., CVPR 2016), 2048x1024, 19 classes.

The manual folder holds what leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip unpack to:

leftImg8bit/{train,val,test}/CITY/*_leftImg8bit.png
gtFine/{train,val}/CITY/*_gtFine_labelIds.png

Published: 2,975 training, 500 validation and 1,525 test images. The test images have no public labels: what lies in
gtFine/test is not read. A copy without leftImg8bit/test is prepared without that split.
"""

from pathlib import Path

from jaxuda.data.building import Complaints, FilesBuilder, Item, listed, paired


class Cityscapes(FilesBuilder, skip_registration=True):
    """Labels are the published ids 0..33; an image is called CITY_SEQUENCE_FRAME."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = "the folder with leftImg8bit and gtFine of https://www.cityscapes-dataset.com"
    PUBLISHED = {"": {"train": 2975, "val": 500, "test": 1525}}  # noqa: RUF012
    SIZE = (2048, 1024)

    def raw_ids(self) -> range:
        """All that are drawn into label files."""
        return range(34)

    def items(self, manual_dir: Path) -> dict[str, list[Item]]:
        """Lists images and labels city by city."""
        complaints = Complaints(f"the Cityscapes folder {manual_dir}")
        result = {split: _split(manual_dir, split, complaints) for split in ("train", "val")}
        if (manual_dir / "leftImg8bit" / "test").is_dir():
            result["test"] = _split(manual_dir, "test", complaints)
        complaints.raise_any()
        return result


def _split(root: Path, split: str, complaints: Complaints) -> list[Item]:
    images = _of_all_cities(root / "leftImg8bit" / split, "_leftImg8bit.png", complaints)
    if split == "test":
        return paired(images, complaints)
    return paired(images, complaints, label=_of_all_cities(root / "gtFine" / split, "_gtFine_labelIds.png", complaints))


def _of_all_cities(folder: Path, ending: str, complaints: Complaints) -> dict[str, Path] | None:
    if not folder.is_dir():
        complaints.add(f"{folder}: there is no such folder")
        return None
    cities = sorted(city for city in folder.iterdir() if city.is_dir() and not city.name.startswith("."))
    if not cities:
        complaints.add(f"{folder}: holds no folders of cities")
    found = [listed(city, (ending,), complaints) for city in cities]
    return {name: file for files in found if files for name, file in files.items()} or None
