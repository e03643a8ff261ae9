"""Label spaces: class names, colours, and the lookup tables from the ids in a dataset's files to train ids.

The dataset modules define the spaces and the meaning of the ids in their files (see `jaxuda.data.datasets`). Train ids
are uint8; 255 means "ignore".
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxuda import plugins
from jaxuda.errors import UserError

IGNORE = 255

_DATASETS = "jaxuda.data.datasets"  # looked up by name: those modules import this one


class LabelSpace(NamedTuple):
    """The classes that a network predicts, in the order of their train ids.

    name, classes: see above.
    palette: (C, 3) uint8 RGB.
    members: classes of other spaces -> the class that they belong to here.
    starred: the classes whose mean is reported as mIoU*; () for none.
    unseen: classes that a dataset may lack.
    """

    name: str
    classes: tuple[str, ...]
    palette: np.ndarray
    members: Mapping[str, str] | None = None
    starred: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """Number of classes C; train ids are 0 .. C - 1."""
        return len(self.classes)


def make_label_space(name: str, colours: Mapping[str, tuple[int, int, int]], **more: Any) -> LabelSpace:
    """Makes a label space from class name -> RGB colour, in the order of the train ids; `more`: its other fields."""
    palette = np.array(list(colours.values()), np.uint8).reshape(-1, 3)
    return LabelSpace(name, tuple(colours), palette, **more)


def dataset(name: str, *, imported: bool = False) -> Any:
    """The description of a dataset, a `jaxuda.data.datasets.Dataset`.

    Args:
      name: a file in `jaxuda/data/datasets`, or the dotted path of a module of the user.
      imported: see `plugins.load`.

    Raises:
      UserError: there is no dataset of this name; the message lists the known ones.
    """
    return plugins.load(_DATASETS, "DATASET", name, "dataset", imported=imported).DATASET


def _spaces() -> Iterator[LabelSpace]:
    for name in plugins.names(_DATASETS, "DATASET"):
        yield from dataset(name).spaces


def label_space(name: str) -> LabelSpace:
    """Returns a label space by name: cityscapes19, synthia16, synthia19, common13, crosscity13, super7 or camvid11.

    Raises:
      UserError: the name is unknown; the message lists the known ones.
    """
    known = {space.name: space for space in _spaces()}
    if name not in known:
        raise UserError(f"unknown label space {name!r}; known: {', '.join(sorted(known))}")
    return known[name]


def own_space(name: str) -> LabelSpace | None:
    """The label space in which a dataset is read by default; None for "folder", which has many."""
    about = dataset(name)
    own = {space.name: space for space in about.spaces}
    return own.get(about.space) or (label_space(about.space) if about.space else None)


def lookup_table(name: str, space: str | LabelSpace, others: Sequence[str] = ()) -> np.ndarray:
    """Maps the ids in a dataset's label files to train ids of a label space.

    Args:
      name: the dataset's name, see `dataset`.
      space: a label space or its name.
      others: datasets that are joined with this one, which may have labels for classes that it lacks.

    Returns:
      (256,) uint8; entry r is the train id of raw id r, or 255 where pixels with that id are ignored.

    Raises:
      UserError: a dataset or the space is unknown, or the space has classes that none of the datasets has.
    """
    space = label_space(space) if isinstance(space, str) else space
    names = _classes_in(name, space)
    there = set(names.values()).union(*(_classes_in(other, space).values() for other in others))
    if missing := sorted(set(space.classes) - there - set(space.unseen)):
        who, verb = " and ".join(dict.fromkeys([name, *others])), "have" if {*others} - {name} else "has"
        raise UserError(f"{who} {verb} no labels for {', '.join(missing)}, which the label space {space.name} needs")
    return table_by_name(names, space)


def _classes_in(name: str, space: LabelSpace) -> Mapping[int, str]:
    """Raw id -> class of a label space, or another class, for the ids of a dataset."""
    about = dataset(name)
    names = about.tables.get(space.name, about.classes)
    return {raw: space.members.get(class_, class_) for raw, class_ in names.items()} if space.members else names


def table_by_name(names: Mapping[int, str], space: LabelSpace) -> np.ndarray:
    """Makes the (256,) uint8 table raw id -> train id from raw id -> class name; all else gets 255."""
    train_ids = {name: index for index, name in enumerate(space.classes)}
    table = np.full(256, IGNORE, np.uint8)
    for raw, name in names.items():
        table[raw] = train_ids.get(name, IGNORE)
    return table


def colourise(label: np.ndarray, space: LabelSpace) -> np.ndarray:
    """Paints train ids (H, W) in the space's palette as (H, W, 3) uint8 RGB; ignored pixels become black."""
    table = np.zeros((256, 3), np.uint8)
    table[: space.num_classes] = space.palette
    return table[label]
