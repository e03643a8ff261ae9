"""Mapillary Vistas v2.0: the images of v1.2 with 124 categories (Neuhold et al., ICCV 2017).

The manual folder holds {training,validation}/images/*.jpg and {training,validation}/v2.0/labels/*.png, palette PNGs
whose index is the id: the place of the category in config_v2.0.json. By default it is read in the 19 classes of
Cityscapes; `label_space` "super7" reads it in the 7 super-classes of v1.2.
Published: 18,000 training and 2,000 validation images.

Categories that v1.2 has too belong to the same classes (see `mapillary`). Of the new ones, driveways and road shoulders
are road, traffic islands are sidewalk, garages are building, and groups belong to what they are groups of. The fronts
of all traffic signs are sign, parking and temporary ones too. Ignored, since they can be several classes: all other
barriers (ambiguous and temporary ones, concrete blocks, road medians, road sides and lane separators), parking aisles,
ambiguous traffic signs, vehicle groups, traffic cones, signage of all kinds, water valves, and what is called dynamic,
ground or static. In the 7 super-classes, what v1.2 calls barrier or does not have is grouped as the names of the
categories are in the package: construction--barrier is construction, construction--flat is flat; signage and traffic
cones stay out, as billboards in v1.2.
"""

import numpy as np

from jaxuda.data.datasets import Dataset
from jaxuda.data.datasets import mapillary as v1

_MARKINGS = (
    "dashed line", "straight line", "zigzag line", "ambiguous", "arrow (left)", "arrow (other)", "arrow (right)",
    "arrow (split left or straight)", "arrow (split right or straight)", "arrow (straight)", "crosswalk",
    "give way (row)", "give way (single)", "hatched (chevron)", "hatched (diagonal)", "other", "stop line",
    "symbol (bicycle)", "symbol (other)", "text",
)  # fmt: skip
MARKINGS = (
    *(f"lane marking - {name}" for name in _MARKINGS),
    *(f"lane marking (only) - {name}" for name in ("dashed line", "crosswalk", "other", "test")),
)
_LIGHTS = tuple(
    f"traffic light - {kind}"
    for kind in (
        "general (single)", "pedestrians", "general (upright)", "general (horizontal)", "cyclists", "other",
    )
)  # fmt: skip
_SIGN_FRONTS = ("traffic sign - direction (front)", "traffic sign - parking", "traffic sign - temporary (front)")
_SIGN_BACKS = ("traffic sign - direction (back)", "traffic sign - temporary (back)")
# In the order of their ids.
CATEGORIES = (
    "bird", "ground animal", "ambiguous barrier", "concrete block", "curb", "fence", "guard rail", "barrier",
    "road median", "road side", "lane separator", "temporary barrier", "wall", "bike lane", "crosswalk - plain",
    "curb cut", "driveway", "parking", "parking aisle", "pedestrian area", "rail track", "road", "road shoulder",
    "service lane", "sidewalk", "traffic island", "bridge", "building", "garage", "tunnel", "person", "person group",
    "bicyclist", "motorcyclist", "other rider", *MARKINGS, "mountain", "sand", "sky", "snow", "terrain", "vegetation",
    "water", "banner", "bench", "bike rack", "catch basin", "cctv camera", "fire hydrant", "junction box", "mailbox",
    "manhole", "parking meter", "phone booth", "pothole", "signage - advertisement", "signage - ambiguous",
    "signage - back", "signage - information", "signage - other", "signage - store", "street light", "pole",
    "pole group", "traffic sign frame", "utility pole", "traffic cone", *_LIGHTS, "traffic sign - ambiguous",
    "traffic sign (back)", "traffic sign - direction (back)", "traffic sign - direction (front)",
    "traffic sign (front)", "traffic sign - parking", "traffic sign - temporary (back)",
    "traffic sign - temporary (front)", "trash can", "bicycle", "boat", "bus", "car", "caravan", "motorcycle",
    "on rails", "other vehicle", "trailer", "truck", "vehicle group", "wheeled slow", "water valve", "car mount",
    "dynamic", "ego vehicle", "ground", "static", "unlabeled",
)  # fmt: skip
# What v1.2 does not have.
_NINETEEN = {
    "road": ("driveway", "road shoulder", *MARKINGS),
    "sidewalk": ("traffic island",),
    "building": ("garage",),
    "pole": ("pole group",),
    "light": _LIGHTS,
    "sign": _SIGN_FRONTS,
    "person": ("person group",),
}
_SUPER = {
    "flat": ("driveway", "parking aisle", "road shoulder", "traffic island", *MARKINGS),
    "construction": (
        "ambiguous barrier", "concrete block", "road median", "road side", "lane separator", "temporary barrier",
        "garage",
    ),
    "object": ("pole group", *_LIGHTS, "traffic sign - ambiguous", *_SIGN_FRONTS, *_SIGN_BACKS),
    "human": ("person group",),
    "vehicle": ("vehicle group",),
}  # fmt: skip
SUPER = v1.SUPER | {name: super_class for super_class, names in _SUPER.items() for name in names}


class Mapillary2(v1.Mapillary, skip_registration=True):
    """Labels are the published ids 0..123."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "the folder with training and validation of Mapillary Vistas v2.0, https://www.mapillary.com/dataset/vistas"
    )
    VERSION_OF_LABELS = "v2.0"
    PLAIN_LABELS = False
    NAMES = CATEGORIES

    def advice(self, unknown: list[int]) -> str:
        """No version has more ids."""
        return ""

    def doubt(self, pixels: np.ndarray) -> str:
        """Labels of v1.2: all of its ids exist here, but cars, poles and void have higher ones."""
        if pixels[len(v1.CATEGORIES) :].any():
            return ""
        return f"holds no id above {len(v1.CATEGORIES) - 1}, as all labels of its split: these are labels of v1.2"


DATASET = Dataset(
    builder=Mapillary2,
    classes=v1.nineteen(CATEGORIES, _NINETEEN),
    space="cityscapes19",
    tables={"super7": {index: SUPER[name] for index, name in enumerate(CATEGORIES) if name in SUPER}},
)
