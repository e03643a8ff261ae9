"""What a stage's training looks at, and what its networks predict, as pictures: two sheets at each evaluation.

The method's function `pictures` says what there is to see. The sheets are in the folder `pictures` of the stage, and in
TensorBoard. Training does not depend on them: they read the state and a batch, and change neither.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from jaxuda import files, parallel
from jaxuda.data import encoding
from jaxuda.data.labels import LabelSpace, colourise
from jaxuda.data.records import Domains
from jaxuda.data.sheet import contact_sheet
from jaxuda.data.transforms import resize_nearest
from jaxuda.errors import UserError
from jaxuda.models.layers import denormalise
from jaxuda.training.logs import RunLog
from jaxuda.training.state import TrainState
from jaxuda.training.step import before_update, to_float

PyTree = Any
FOLDER = "pictures"
TRAINING, PREDICTIONS = "training", "predictions"  # the kinds of sheets
EXAMPLES = 4  # rows of a sheet
WIDTH = 256  # pixels of a cell of a sheet, at most


def make_look(method: ModuleType, model: Any, config: Any) -> Callable[..., dict[str, jax.Array]]:
    """`look(state, constants, seed, batch, axis_name=None) -> {name: array}`: the method's `pictures`, in its order.

    They are those of the state's next update, if it were on `batch` (as for `make_step`): of the first `EXAMPLES`
    images of its first part; with several devices, of each device's own.
    """

    def look(
        state: TrainState, constants: PyTree, seed: int, batch: PyTree, axis_name: str | None = None
    ) -> dict[str, jax.Array]:
        batch = to_float(batch, config.preprocess)
        carry, part = before_update(method, model, config, state, constants, seed, batch, axis_name)
        found = method.pictures(carry, part, config=config)
        _check(found)
        return OrderedDict((name, jnp.asarray(array)[:EXAMPLES]) for name, array in found.items())

    return look


def _check(found: Mapping[str, jax.Array]) -> None:
    """Raises a UserError that names a picture of another shape or type than there may be."""
    known = "(N, H, W, 3) float, an image; (N, H, W) int, labels; or (N, H, W) float or bool, weights of 0 to 1"
    for name, array in found.items():
        shape, kind = jnp.shape(array), jnp.result_type(array)
        image = len(shape) == 4 and shape[3] == 3 and jnp.issubdtype(kind, jnp.floating)
        if not (image or len(shape) == 3):
            raise UserError(f"the method's function 'pictures' returns '{name}' as {kind}{list(shape)}: give {known}")
    if len({jnp.shape(array)[0] for array in found.values()}) != 1:
        shapes = ", ".join(f"{name} {list(jnp.shape(array))}" for name, array in found.items()) or "nothing"
        raise UserError(f"the method's function 'pictures' must return arrays of the same N images, not {shapes}")


def make_show(
    task: Any,
    model: Any,
    method: ModuleType,
    domains: Domains,
    log: RunLog,
    devices: list[jax.Device],
    make_labeller: Callable[..., Callable],
) -> Callable[[tuple, Mapping[str, PyTree], int], None] | None:
    """`show(arguments, networks, step)` writes and logs the sheets of one step; None if the method has no `pictures`.

    `arguments` are those of a compiled step, on the devices; `networks` the variables of each evaluated network, on the
    host. All processes call it together.

    Args:
      task: a `loop.Task`.
      model, method: as for `step.make_step`.
      domains: the first validation set has the images that the networks label.
      log: shows the sheets.
      devices: those that train.
      make_labeller: as for `loop.train`.
    """
    if not hasattr(method, "pictures"):
        return None
    config, space = task.config, domains.label_space
    look = parallel.compile_step(make_look(method, model, config), devices, donate=False)
    label = make_labeller(model, method, config, parallel.evaluation_devices(config, devices))
    shown: list[dict[str, Any]] = []  # the records of the predictions, read once

    def show(arguments: tuple, networks: Mapping[str, PyTree], step: int) -> None:
        found = parallel.first(look(*arguments), devices)
        parallel.on_first(lambda: write(found, networks, step))

    def write(found: Mapping[str, np.ndarray], networks: Mapping[str, PyTree], step: int) -> None:
        made = {TRAINING: training_sheet(found, config.preprocess, space)}
        if domains.validation:
            shown.extend(_some(domains.validation[0]) if not shown else ())
            chosen = config.evaluation.network
            ordered = {chosen: networks[chosen], **networks}
            labels = {name: label(variables, shown) for name, variables in ordered.items()}
            made[PREDICTIONS] = prediction_sheet(shown, labels, space)
        for kind, sheet in made.items():
            content = encoding.encode_image(sheet)
            path = sheet_path(task.folder, step, kind)
            path.parent.mkdir(exist_ok=True)
            files.write_bytes(path, content)
            log.picture(task.name, step, f"{FOLDER}/{kind}", content, sheet.shape[:2])

    return show


def sheet_path(stage: Path, step: int, kind: str) -> Path:
    """The file of a sheet: in the folder of a stage, the step, and `TRAINING` or `PREDICTIONS`."""
    return stage / FOLDER / f"{step:07d}-{kind}.png"


def sheets(stage: Path, kind: str) -> dict[int, Path]:
    """The sheets of a kind in the folder of a stage: step -> file, in rising order."""
    found = sorted((stage / FOLDER).glob(f"*-{kind}.png"))
    steps = {path.name.partition("-")[0]: path for path in found}
    return {int(step): path for step, path in steps.items() if step.isdecimal()}


def rewind(stage: Path, step: int) -> None:
    """Removes the sheets of later steps, which will run again."""
    for kind in (TRAINING, PREDICTIONS):
        for later, path in sheets(stage, kind).items():
            if later > step:
                path.unlink()


def training_sheet(found: Mapping[str, np.ndarray], preprocess: str, space: LabelSpace) -> np.ndarray:
    """(H, W, 3) uint8 RGB. Rows are the examples, columns the pictures that `make_look` describes.

    Args:
      found: name -> images (n, H, W, 3), labels (n, H, W) int, or weights (n, H, W) of 0 to 1, which become grey.
      preprocess: how the images were normalised.
      space: has the colours of the labels; ignored pixels are black.
    """
    count = len(next(iter(found.values())))
    return contact_sheet(
        [{name: _painted(array[row], preprocess, space) for name, array in found.items()} for row in range(count)]
    )


def _painted(array: np.ndarray, preprocess: str, space: LabelSpace) -> np.ndarray:
    """One picture of `training_sheet` as (H, W, 3) uint8 RGB, at most `WIDTH` wide."""
    if array.ndim == 3:
        image = np.asarray(denormalise(array.astype(np.float32), preprocess))
        return _shrunk(np.round(image.clip(0, 255)).astype(np.uint8))
    if np.issubdtype(array.dtype, np.integer):
        return _coloured(array.astype(np.uint8), space)
    weights = np.nan_to_num(array.astype(np.float32)).clip(0, 1)
    return _shrunk(np.round(255 * weights).astype(np.uint8)[..., None].repeat(3, -1))


def prediction_sheet(
    records: Sequence[Mapping[str, Any]], labels: Mapping[str, Sequence[np.ndarray]], space: LabelSpace
) -> np.ndarray:
    """(H, W, 3) uint8 RGB. Rows are images; columns are the image, its label if there is one, and each network's.

    Args:
      records: as `data.Records` reads them.
      labels: network -> (H, W) uint8 train ids for each record.
      space: their classes.
    """
    labelled = all("label" in record for record in records)
    rows = []
    for index, record in enumerate(records):
        truth = {"label": record["label"]} if labelled else {}
        ids = truth | {name: each[index] for name, each in labels.items()}
        rows.append({"image": _shrunk(record["image"])} | {name: _coloured(each, space) for name, each in ids.items()})
    return contact_sheet(rows)


def _some(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records spread evenly over all."""
    places = np.unique(np.linspace(0, len(records) - 1, EXAMPLES).astype(int)).tolist()
    return [records[place] for place in places]


def _coloured(ids: np.ndarray, space: LabelSpace) -> np.ndarray:
    return colourise(resize_nearest(ids, _size(ids)), space)


def _shrunk(image: np.ndarray) -> np.ndarray:
    return cv2.resize(image, _size(image), interpolation=cv2.INTER_AREA)


def _size(image: np.ndarray) -> tuple[int, int]:
    """(width, height), at most `WIDTH` wide."""
    height, width = image.shape[:2]
    wide = min(width, WIDTH)
    return wide, max(1, round(height * wide / width))
