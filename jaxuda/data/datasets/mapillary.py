"""Mapillary Vistas v1.2: streets from all over the world (Neuhold et al., ICCV 2017), images of any size.

The manual folder holds {training,validation}/images/*.jpg and {training,validation}/labels/*.png (v1.2/labels in the
package that also has v2.0), palette PNGs whose index is the id: the place of the category in config_v1.2.json. By
default it is read in 7 super-classes.
Published: 18,000 training and 2,000 validation images.
"""

import json
from pathlib import Path

from jaxuda.data.building import Complaints, FilesBuilder, Item, find_folder, listed, paired
from jaxuda.data.datasets import Dataset

_SPLITS = {"train": "training", "val": "validation"}
_CONFIG = "config_v1.2.json"
# Categories in the order of their ids, with the super-class of those that have one, as published with DADA.
_ROWS = (
    ("bird", ""), ("ground animal", ""), ("curb", "construction"), ("fence", "construction"),
    ("guard rail", "construction"), ("barrier", "construction"), ("wall", "construction"), ("bike lane", "flat"),
    ("crosswalk - plain", "flat"), ("curb cut", "flat"), ("parking", "flat"), ("pedestrian area", "flat"),
    ("rail track", "flat"), ("road", "flat"), ("service lane", "flat"), ("sidewalk", "flat"),
    ("bridge", "construction"), ("building", "construction"), ("tunnel", "construction"), ("person", "human"),
    ("bicyclist", "human"), ("motorcyclist", "human"), ("other rider", "human"),
    ("lane marking - crosswalk", "flat"), ("lane marking - general", "flat"), ("mountain", ""), ("sand", ""),
    ("sky", "sky"), ("snow", ""), ("terrain", "flat"), ("vegetation", "nature"), ("water", ""), ("banner", ""),
    ("bench", ""), ("bike rack", ""), ("billboard", ""), ("catch basin", ""), ("cctv camera", ""),
    ("fire hydrant", ""), ("junction box", ""), ("mailbox", ""), ("manhole", ""), ("phone booth", ""),
    ("pothole", "object"), ("street light", "object"), ("pole", "object"), ("traffic sign frame", "object"),
    ("utility pole", "object"), ("traffic light", "object"), ("traffic sign (back)", "object"),
    ("traffic sign (front)", "object"), ("trash can", ""), ("bicycle", "vehicle"), ("boat", "vehicle"),
    ("bus", "vehicle"), ("car", "vehicle"), ("caravan", "vehicle"), ("motorcycle", "vehicle"),
    ("on rails", "vehicle"), ("other vehicle", "vehicle"), ("trailer", "vehicle"), ("truck", "vehicle"),
    ("wheeled slow", "vehicle"), ("car mount", ""), ("ego vehicle", ""), ("unlabeled", ""),
)  # fmt: skip
CATEGORIES = tuple(name for name, _ in _ROWS)


class Mapillary(FilesBuilder, skip_registration=True):
    """Labels are the published ids 0..65."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "the folder with training and validation of Mapillary Vistas v1.2, https://www.mapillary.com/dataset/vistas"
    )
    PUBLISHED = {"": {"train": 18_000, "val": 2_000}}  # noqa: RUF012
    TRAIN_IDS = 19

    def raw_ids(self) -> range:
        """All categories, unlabelled ones included."""
        return range(len(CATEGORIES))

    def items(self, manual_dir: Path) -> dict[str, list[Item]]:
        """Lists both splits; if config_v1.2.json is beside them, its categories must be ours."""
        complaints = Complaints(f"the Mapillary folder {manual_dir}")
        root = find_folder(manual_dir, _SPLITS["train"]).parent
        _check_categories(root / _CONFIG, complaints)
        result = {}
        for split, folder in _SPLITS.items():
            images = listed(root / folder / "images", (".jpg",), complaints)
            versioned, plain = root / folder / "v1.2" / "labels", root / folder / "labels"
            if (root / folder / "v2.0").is_dir() and not versioned.is_dir() and not plain.is_dir():
                complaints.add(f"{root / folder / 'v2.0'}: are labels of v2.0; only v1.2 can be used")
                continue
            labels = listed(versioned if versioned.is_dir() else plain, (".png",), complaints)
            result[split] = paired(images, complaints, label=labels)
        complaints.raise_any()
        return result


def _check_categories(file: Path, complaints: Complaints) -> None:
    if not file.exists():
        return
    try:
        names = [entry["readable"].lower() for entry in json.loads(file.read_bytes())["labels"]]
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        complaints.add(f"{file}: cannot be read ({error!r})")
        return
    for index, (theirs, ours) in enumerate(zip(names, CATEGORIES, strict=False)):
        if theirs != ours:
            complaints.add(f"{file}: category {index} is '{theirs}', in v1.2 it is '{ours}'; only v1.2 can be used")
            return
    if len(names) != len(CATEGORIES):
        complaints.add(f"{file}: has {len(names)} categories, v1.2 has {len(CATEGORIES)}; only v1.2 can be used")


DATASET = Dataset(
    builder=Mapillary,
    classes=dict(enumerate(CATEGORIES)),
    space="super7",
    tables={"super7": {index: super_class for index, (_, super_class) in enumerate(_ROWS) if super_class}},
)
