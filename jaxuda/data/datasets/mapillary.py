"""Mapillary Vistas v1.2: streets from all over the world (Neuhold et al., ICCV 2017), images of any size.

The manual folder holds {training,validation}/images/*.jpg and {training,validation}/labels/*.png (v1.2/labels in the
package that also has v2.0), palette PNGs whose index is the id: the place of the category in config_v1.2.json. By
default it is read in 7 super-classes; `label_space` "cityscapes19" reads it in the classes of Cityscapes.
Published: 18,000 training and 2,000 validation images.

The 19 classes follow from the definitions that Cityscapes gives for its own. Where they leave a choice: markings,
crosswalks, bike and service lanes, and what lies in the road (manhole, catch basin, pothole) are road; curbs, curb cuts
and pedestrian areas are sidewalk; sand is terrain. Ignored, as classes that Cityscapes does not evaluate, or since they
can be several of its classes: parking, rail track, barrier, guard rail, bridge, tunnel, street light, traffic sign
frame, the back of signs, snow, caravan, trailer, boat, wheeled slow and other vehicle.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from jaxuda.data.building import Complaints, FilesBuilder, Item, find_folder, listed, paired
from jaxuda.data.datasets import Dataset

_SPLITS = {"train": "training", "val": "validation"}
# Class of Cityscapes -> the categories that belong to it.
_NINETEEN = {
    "road": (
        "road", "bike lane", "crosswalk - plain", "service lane", "lane marking - crosswalk",
        "lane marking - general", "manhole", "catch basin", "pothole",
    ),
    "sidewalk": ("sidewalk", "curb", "curb cut", "pedestrian area"),
    "building": ("building",),
    "wall": ("wall",),
    "fence": ("fence",),
    "pole": ("pole", "utility pole"),
    "light": ("traffic light",),
    "sign": ("traffic sign (front)",),
    "vegetation": ("vegetation",),
    "terrain": ("terrain", "sand"),
    "sky": ("sky",),
    "person": ("person",),
    "rider": ("bicyclist", "motorcyclist", "other rider"),
    "car": ("car",),
    "truck": ("truck",),
    "bus": ("bus",),
    "train": ("on rails",),
    "motorcycle": ("motorcycle",),
    "bicycle": ("bicycle",),
}  # fmt: skip
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
SUPER = {name: super_class for name, super_class in _ROWS if super_class}


def nineteen(categories: tuple[str, ...], more: Mapping[str, tuple[str, ...]]) -> dict[int, str]:
    """Id -> class of Cityscapes, for categories in the order of their ids.

    Args:
      categories: of one version of the dataset.
      more: class -> the categories that belong to it and that v1.2 does not have.
    """
    members = {name: class_ for class_, names in _NINETEEN.items() for name in (*names, *more.get(class_, ()))}
    return {index: members[name] for index, name in enumerate(categories) if name in members}


class Mapillary(FilesBuilder, skip_registration=True):
    """Labels are the published ids 0..65."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "the folder with training and validation of Mapillary Vistas v1.2, https://www.mapillary.com/dataset/vistas"
    )
    PUBLISHED = {"": {"train": 18_000, "val": 2_000}}  # noqa: RUF012
    TRAIN_IDS = 19
    VERSION_OF_LABELS: ClassVar[str] = "v1.2"
    PLAIN_LABELS: ClassVar[bool] = True  # whether training/labels may hold them, beside training/v1.2/labels
    NAMES: ClassVar[tuple[str, ...]] = CATEGORIES

    def raw_ids(self) -> range:
        """All categories, unlabelled ones included."""
        return range(len(self.NAMES))

    def advice(self, unknown: list[int]) -> str:
        """Ids that v2.0 has."""
        return " (v2.0 has such ids: prepare its labels as mapillary2)" if max(unknown) < 124 else ""

    def items(self, manual_dir: Path) -> dict[str, list[Item]]:
        """Lists both splits; if config_VERSION.json is beside them, its categories must be ours."""
        complaints = Complaints(f"the Mapillary folder {manual_dir}")
        root, version = find_folder(manual_dir, _SPLITS["train"]).parent, self.VERSION_OF_LABELS
        self._check_categories(root / f"config_{version}.json", complaints)
        result = {}
        for split, folder in _SPLITS.items():
            images = listed(root / folder / "images", (".jpg",), complaints)
            versioned, plain = root / folder / version / "labels", root / folder / "labels"
            others = [each for each in ("v1.2", "v2.0") if each != version and (root / folder / each).is_dir()]
            if others and not versioned.is_dir() and not (plain.is_dir() and self.PLAIN_LABELS):
                complaints.add(
                    f"{root / folder / others[0]}: holds labels of {others[0]}; those of {version} are missing "
                    f"({'mapillary2 reads v2.0' if version == 'v1.2' else 'mapillary reads v1.2'})"
                )
                continue
            labels = listed(plain if self.PLAIN_LABELS and not versioned.is_dir() else versioned, (".png",), complaints)
            result[split] = paired(images, complaints, label=labels)
        complaints.raise_any()
        return result

    def _check_categories(self, file: Path, complaints: Complaints) -> None:
        if not file.exists():
            return
        version = self.VERSION_OF_LABELS
        try:
            names = [entry["readable"].lower() for entry in json.loads(file.read_bytes())["labels"]]
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            complaints.add(f"{file}: cannot be read ({error!r})")
            return
        for index, (theirs, ours) in enumerate(zip(names, self.NAMES, strict=False)):
            if theirs != ours:
                complaints.add(f"{file}: category {index} is '{theirs}', in {version} it is '{ours}'")
                return
        if len(names) != len(self.NAMES):
            complaints.add(f"{file}: has {len(names)} categories, {version} has {len(self.NAMES)}")


DATASET = Dataset(
    builder=Mapillary,
    classes=nineteen(CATEGORIES, {}),
    space="super7",
    tables={"super7": {index: SUPER[name] for index, name in enumerate(CATEGORIES) if name in SUPER}},
)
