"""Label spaces: class names, colours, and the lookup tables from the ids in a dataset's files to train ids.

Everything is derived by class name from the tables below: the 16, 13 and 7 classes from the 19, and each
dataset's table from the class that each of its ids stands for. Train ids are uint8; 255 means "ignore".
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxuda.errors import UserError

IGNORE = 255

# Name, official Cityscapes colour and super-class of the 19 Cityscapes classes, in the order of their train
# ids.
_CITYSCAPES = (
    ("road", (128, 64, 128), "flat"),
    ("sidewalk", (244, 35, 232), "flat"),
    ("building", (70, 70, 70), "construction"),
    ("wall", (102, 102, 156), "construction"),
    ("fence", (190, 153, 153), "construction"),
    ("pole", (153, 153, 153), "object"),
    ("light", (250, 170, 30), "object"),
    ("sign", (220, 220, 0), "object"),
    ("vegetation", (107, 142, 35), "nature"),
    ("terrain", (152, 251, 152), "nature"),
    ("sky", (70, 130, 180), "sky"),
    ("person", (220, 20, 60), "human"),
    ("rider", (255, 0, 0), "human"),
    ("car", (0, 0, 142), "vehicle"),
    ("truck", (0, 0, 70), "vehicle"),
    ("bus", (0, 60, 100), "vehicle"),
    ("train", (0, 80, 100), "vehicle"),
    ("motorcycle", (0, 0, 230), "vehicle"),
    ("bicycle", (119, 11, 32), "vehicle"),
)
_SUPER = {name: super_class for name, _, super_class in _CITYSCAPES}
# Super-classes wear the colour of their most common member.
_SUPER_COLOURS = {
    "flat": (128, 64, 128),
    "construction": (70, 70, 70),
    "object": (153, 153, 153),
    "nature": (107, 142, 35),
    "sky": (70, 130, 180),
    "human": (220, 20, 60),
    "vehicle": (0, 0, 142),
}
# Colours as the SegNet tutorial draws them; the order is that of its ids.
_CAMVID = (
    ("sky", (128, 128, 128)),
    ("building", (128, 0, 0)),
    ("pole", (192, 192, 128)),
    ("road", (128, 64, 128)),
    ("pavement", (60, 40, 222)),
    ("tree", (128, 128, 0)),
    ("sign", (192, 128, 128)),
    ("fence", (64, 64, 128)),
    ("car", (64, 0, 128)),
    ("pedestrian", (64, 64, 0)),
    ("bicyclist", (0, 128, 192)),
)

_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_CITYSCAPES_RAW = {raw: row[0] for raw, row in zip(_CITYSCAPES_IDS, _CITYSCAPES, strict=True)}
# What each id in a dataset's label files stands for; ids that are missing here are ignored.
_RAW_NAMES = {
    "cityscapes": _CITYSCAPES_RAW,
    "gta5": _CITYSCAPES_RAW,
    "crosscity": _CITYSCAPES_RAW,
    "streets": {index: row[0] for index, row in enumerate(_CITYSCAPES)},
    "camvid": {index: row[0] for index, row in enumerate(_CAMVID)},
    "synthia": {
        1: "sky", 2: "building", 3: "road", 4: "sidewalk", 5: "fence", 6: "vegetation", 7: "pole", 8: "car",
        9: "sign", 10: "person", 11: "bicycle", 12: "motorcycle", 15: "light", 17: "rider", 19: "bus",
        21: "wall",
    },
}  # fmt: skip
# Super-classes that do not follow from the 19 classes. Cityscapes: the ids outside the 19 that its category
# column still names (parking, rail track; guard rail, bridge, tunnel; pole group; caravan, trailer).
_CITYSCAPES_CATEGORIES = {
    9: "flat", 10: "flat", 14: "construction", 15: "construction", 16: "construction", 18: "object",
    29: "vehicle", 30: "vehicle",
}  # fmt: skip
_SUPER_RAW = {
    "cityscapes": {**{raw: _SUPER[name] for raw, name in _CITYSCAPES_RAW.items()}, **_CITYSCAPES_CATEGORIES},
    # As published with DADA: lane markings (22) are flat; wall, rider, bus and motorcycle are ignored.
    "synthia": {
        1: "sky", 2: "construction", 3: "flat", 4: "flat", 5: "construction", 6: "nature", 7: "object",
        8: "vehicle", 9: "object", 10: "human", 11: "vehicle", 15: "object", 22: "flat",
    },
}  # fmt: skip
_SUPER_RAW["gta5"] = _SUPER_RAW["cityscapes"]

# Categories of Mapillary Vistas v1.2 in the order of their ids, with the super-class of those that have one, as
# published with DADA.
_MAPILLARY = (
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
MAPILLARY = tuple(name for name, _ in _MAPILLARY)
_SUPER_RAW["mapillary"] = {index: row[1] for index, row in enumerate(_MAPILLARY) if row[1]}
_RAW_NAMES["mapillary"] = {}  # its categories are not the 19 classes

# The label space in which a dataset is read unless another one is asked for.
DEFAULT_SPACE = {
    "cityscapes": "cityscapes19",
    "gta5": "cityscapes19",
    "streets": "cityscapes19",
    "synthia": "synthia16",
    "crosscity": "crosscity13",
    "camvid": "camvid11",
    "mapillary": "super7",
}


class LabelSpace(NamedTuple):
    """The classes a network tells apart, in the order of their train ids."""

    name: str
    classes: tuple[str, ...]
    palette: np.ndarray  # (C, 3) uint8 RGB

    @property
    def num_classes(self) -> int:
        """Number of classes C; train ids are 0 .. C - 1."""
        return len(self.classes)


def make_label_space(name: str, colours: dict[str, tuple[int, int, int]]) -> LabelSpace:
    """Makes a label space from class name -> RGB colour, in the order of the train ids."""
    return LabelSpace(name, tuple(colours), np.array(list(colours.values()), np.uint8).reshape(-1, 3))


def _known_spaces() -> dict[str, LabelSpace]:
    nineteen = {name: colour for name, colour, _ in _CITYSCAPES}
    sixteen = {n: c for n, c in nineteen.items() if n not in ("terrain", "truck", "train")}
    thirteen = {n: c for n, c in sixteen.items() if n not in ("wall", "fence", "pole")}
    colours = {
        "cityscapes19": nineteen,
        "synthia16": sixteen,
        "common13": thirteen,
        "crosscity13": thirteen,
        "super7": _SUPER_COLOURS,
        "camvid11": dict(_CAMVID),
    }
    return {name: make_label_space(name, table) for name, table in colours.items()}


_SPACES = _known_spaces()


def label_space(name: str) -> LabelSpace:
    """Returns a label space by name: cityscapes19, synthia16, common13, crosscity13, super7 or camvid11.

    Raises:
        UserError: the name is unknown; the message lists the known ones.
    """
    if name not in _SPACES:
        raise UserError(f"unknown label space {name!r}; known: {', '.join(sorted(_SPACES))}")
    return _SPACES[name]


def lookup_table(dataset: str, space: str | LabelSpace) -> np.ndarray:
    """Maps the ids in a dataset's label files to train ids of a label space.

    Args:
        dataset: "cityscapes", "gta5", "synthia", "crosscity", "mapillary", "streets" or "camvid".
        space: a label space or its name.

    Returns:
        (256,) uint8; entry r is the train id of raw id r, or 255 where pixels with that id are ignored.

    Raises:
        UserError: the dataset or the space is unknown, or the space has classes that the dataset lacks.
    """
    space = label_space(space) if isinstance(space, str) else space
    if dataset not in _RAW_NAMES:
        raise UserError(f"no label table for dataset {dataset!r}; known: {', '.join(sorted(_RAW_NAMES))}")
    names = _RAW_NAMES[dataset]
    if space.name == "super7":
        names = _SUPER_RAW.get(dataset) or {r: _SUPER[n] for r, n in names.items() if n in _SUPER}
    missing = sorted(set(space.classes) - set(names.values()))
    if missing:
        raise UserError(f"{dataset} has no labels for {', '.join(missing)}, which label space {space.name} asks for")
    return table_by_name(names, space)


def table_by_name(names: dict[int, str], space: LabelSpace) -> np.ndarray:
    """Makes the (256,) uint8 table raw id -> train id from raw id -> class name; all else gets 255."""
    train_ids = {name: index for index, name in enumerate(space.classes)}
    table = np.full(256, IGNORE, np.uint8)
    for raw, name in names.items():
        table[raw] = train_ids.get(name, IGNORE)
    return table


def starred(classes: Sequence[str]) -> list[int] | None:
    """The places of the 13 common classes among the 16 of SYNTHIA, whose mean is called mIoU*; None for others."""
    if tuple(classes) != label_space("synthia16").classes:
        return None
    return [classes.index(name) for name in label_space("common13").classes]


def cityscapes_ids(space: LabelSpace) -> np.ndarray | None:
    """Maps train ids to the raw ids of Cityscapes, as its test server expects them: (256,) uint8, 255 -> 0.

    None for a label space with classes that Cityscapes does not have, or has several ids for.
    """
    raw = {name: index for index, name in _CITYSCAPES_RAW.items()}
    if not set(space.classes) <= raw.keys():
        return None
    table = np.zeros(256, np.uint8)
    table[: space.num_classes] = [raw[name] for name in space.classes]
    return table


def colourise(label: np.ndarray, space: LabelSpace) -> np.ndarray:
    """Paints train ids (H, W) in the space's palette as (H, W, 3) uint8 RGB; ignored pixels become black."""
    table = np.zeros((256, 3), np.uint8)
    table[: space.num_classes] = space.palette
    return table[label]
