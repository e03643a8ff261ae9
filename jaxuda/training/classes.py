"""The classes of a checkpoint by name: recorded beside it, and put into the order of another run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxuda import files, models
from jaxuda.data import labels
from jaxuda.data.labels import LabelSpace
from jaxuda.errors import UserError
from jaxuda.training import weights

Arrays = Mapping[str, np.ndarray]


def describe(space: LabelSpace, table: np.ndarray | None = None) -> dict[str, Any]:
    """What `stage.json` records of a label space, in the form of a user's classes.json.

    It is no part of the stage's identity: it changes no fingerprint, and stages of older builds lack it.

    Args:
      space: the classes that the network predicts.
      table: (256,) the train id of each id in the files of the data that it learned from; None if there are several.

    Returns:
      {"name": str, "classes": [{"name": str, "ids": [int], "color": [r, g, b]}]} in the order of the train ids.
    """
    ids = [[] if table is None else np.flatnonzero(table == train).tolist() for train in range(space.num_classes)]
    entries = zip(space.classes, ids, space.palette.tolist(), strict=True)
    return {"name": space.name, "classes": [{"name": name, "ids": ids, "color": color} for name, ids, color in entries]}


def of_stage(folder: Path) -> LabelSpace | None:
    """The classes of a stage's network in the order of its classifier.

    Stages of older builds have no record: these are the classes of the label space that their config names, or those
    in the results of their run, which have no colours (an empty palette).

    Returns:
      None if they are not known.

    Raises:
      UserError: a file is corrupt.
    """
    record = files.read_json(folder / "stage.json") or {}
    if found := record.get("classes"):
        return labels.make_label_space(found["name"], {entry["name"]: entry["color"] for entry in found["classes"]})
    if name := record.get("identity", {}).get("label_space"):
        return labels.label_space(name)
    results = {} if "origin" in record else files.read_json(folder.absolute().parent / "results.json") or {}
    return LabelSpace("", tuple(results["classes"]), np.zeros((0, 3), np.uint8)) if results else None


def in_order(
    arrays: Arrays, model: Any, folder: Path, classes: Sequence[str], say: Callable[[str], None] = print
) -> Arrays:
    """The arrays of a network with its classes in the order of `classes`.

    Args:
      arrays: by dotted path, as `checkpoints.read_variables` returns them.
      model: their network.
      folder: the folder of their stage, which names their classes.
      classes: the names of the wanted classes, in the order of the train ids.
      say: called with a line of text if their order changes.

    Raises:
      UserError: the network has other classes.
    """
    space, count = of_stage(folder), models.saved_classes(arrays, model.CLASSIFIERS[0])
    theirs = space.classes if space is not None and space.num_classes == count else None
    if theirs is None and count in (None, len(classes)):
        return arrays  # their names are not known
    if theirs is None or set(theirs) != set(classes):
        raise UserError(
            f"{folder} was trained on {_shown(theirs, count)}, but this config has {_shown(classes)}: use the config "
            "it was trained with"
        )
    if theirs == tuple(classes):
        return arrays
    say(f"{folder}: {_note(theirs, classes)}")
    return reordered(arrays, model, _order(theirs, classes))


def fit_classes(
    arrays: Arrays, variables: Any, model: Any, folder: Path, classes: Sequence[str]
) -> tuple[Any, list[str]]:
    """As `weights.fit`, for a network of these classes that starts from a stage in `folder`.

    The same classes in another order are reordered; classifiers of other ones start anew.
    """
    space, count = of_stage(folder), models.saved_classes(arrays, model.CLASSIFIERS[0])
    if not classes or space is None or count != len(classes) or space.num_classes != count:
        return weights.fit(arrays, variables, model, str(folder))
    if set(space.classes) != set(classes):
        other = f"the checkpoint's is for {_shown(space.classes)}, this network has {_shown(classes)}"
        return weights.fit(arrays, variables, model, str(folder), other)
    ordered = reordered(arrays, model, _order(space.classes, classes))
    fitted, notes = weights.fit(ordered, variables, model, str(folder))
    return fitted, ([] if space.classes == tuple(classes) else [_note(space.classes, classes)]) + notes


def reordered(arrays: Arrays, model: Any, order: Sequence[int] | np.ndarray) -> Arrays:
    """The arrays of a network, by dotted path; class i of its new classifiers is class order[i] of the old ones."""
    return {
        name: array[..., order] if name.split(".")[1] in model.CLASSIFIERS else array for name, array in arrays.items()
    }


def _order(theirs: Sequence[str], ours: Sequence[str]) -> list[int]:
    """For `reordered`, from the names of the classes in both orders."""
    return [theirs.index(name) for name in ours]


def _note(theirs: Sequence[str], ours: Sequence[str]) -> str:
    return f"its classes were put in the order of this config: {', '.join(ours)} (it has {', '.join(theirs)})"


def _shown(classes: Sequence[str] | None, count: int | None = None) -> str:
    return f"{count} classes" if classes is None else f"the {len(classes)} classes {', '.join(classes)}"
