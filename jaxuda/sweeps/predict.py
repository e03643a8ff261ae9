"""Predictions for any images: a colour picture and a map of class ids for each."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxuda import files
from jaxuda.data import encoding, labels
from jaxuda.errors import UserError
from jaxuda.models.deeplab import DeepLabV2
from jaxuda.sweeps.evaluate import sweep
from jaxuda.sweeps.scores import make_scores, resize, resize_matrices
from jaxuda.writers import progress_bar

PyTree = Any


class ImageFiles(Sequence):
    """The images that match a glob pattern, read as records without labels.

    Raises:
      UserError: nothing matches, or (when read) a file is no image.
    """

    def __init__(self, pattern: str):
        found = sorted(Path(name) for name in glob.glob(pattern, recursive=True))
        if found and all(path.is_dir() for path in found):
            raise UserError(f"--images '{pattern}' names a folder: name the files, such as '{pattern}/*.png'")
        self._paths = [path for path in found if path.is_file()]
        if not self._paths:
            raise UserError(f"--images '{pattern}' matches no file")
        stems = [path.stem for path in self._paths]
        # Predictions are named after the image; two of one name would overwrite each other.
        self._names = stems if len(set(stems)) == len(stems) else ["_".join(path.parts[-2:]) for path in self._paths]

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            image = encoding.decode_image(self._paths[index].read_bytes())
        except ValueError as error:
            raise UserError(f"{self._paths[index]}: {error}; leave it out of --images") from error
        return {"image": image, "id": self._names[index]}


def predict(
    variables: PyTree,
    images: Sequence,
    folder: Path,
    *,
    model: DeepLabV2,
    method: Any,
    config: Any,
    space: Any,
) -> None:
    """Writes `folder`/colour/ID.png and `folder`/ids/ID.png (grey, train ids) at each image's own size.

    Args:
      variables: "params" and "batch_stats" of `model`.
      images: records with "image" (H, W, 3) uint8 and "id".
      folder: made if missing.
      config: for `evaluation.size`, `evaluation.batch`, `preprocess` and `align_corners`.
      space: the label space, for the colours.
    """
    scores = make_scores(model, method, config)

    @partial(jax.jit)
    def label_maps(variables: PyTree, image: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
        return jnp.argmax(resize(scores(variables, image)[0], rows, columns), -1).astype(jnp.uint8)

    for kind in ("colour", "ids"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    width, height = config.evaluation.size
    shape = jax.ShapeDtypeStruct((config.evaluation.batch, height, width, 3), jnp.uint8)
    grid = jax.eval_shape(scores, variables, shape)[0].shape[1:3]
    with progress_bar(len(images), "predict", "img") as bar:
        for batch in sweep(images, config):
            sizes = batch["size"] + batch["size"][-1:] * (len(batch["image"]) - batch["count"])
            maps = label_maps(variables, batch["image"], *resize_matrices(grid, sizes, config.align_corners))
            for name, (rows, columns), ids in zip(batch["id"], batch["size"], np.asarray(maps), strict=False):
                ids = ids[:rows, :columns]
                files.write_bytes(folder / "ids" / f"{name}.png", encoding.encode_label(ids))
                colour = encoding.encode_image(labels.colourise(ids, space))
                files.write_bytes(folder / "colour" / f"{name}.png", colour)
            bar.update(batch["count"])
