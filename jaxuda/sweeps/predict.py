"""Predictions for any images: a colour picture and a map of class ids for each."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxuda import files
from jaxuda.data import encoding, labels
from jaxuda.errors import UserError
from jaxuda.models.deeplab import DeepLabV2
from jaxuda.sweeps.scores import make_scores, padded_sizes, resize, resize_matrices, score_grid, sweep
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


def predictions(
    variables: PyTree, images: Sequence, *, model: DeepLabV2, method: Any, config: Any
) -> Iterator[tuple[str, np.ndarray]]:
    """The id and the (H, W) uint8 train ids of each image in turn, at its own size.

    Args:
      variables: "params" and "batch_stats" of `model`.
      images: records with "image" (H, W, 3) uint8 and "id".
      model: the network.
      method: the module it was trained with.
      config: for `evaluation.size`, `evaluation.batch`, `preprocess` and `align_corners`.
    """
    scores = make_scores(model, method, config)

    @jax.jit
    def label_maps(variables: PyTree, image: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
        return jnp.argmax(resize(scores(variables, image), rows, columns), -1).astype(jnp.uint8)

    grid = score_grid(scores, variables, config)
    with progress_bar(len(images), "predict", "img") as bar:
        for batch in sweep(images, config):
            sizes = padded_sizes(batch["size"], len(batch["image"]))
            maps = label_maps(variables, batch["image"], *resize_matrices(grid, sizes, config.align_corners))
            for name, (height, width), ids in zip(batch["id"], batch["size"], np.asarray(maps), strict=False):
                yield name, ids[:height, :width]
            bar.update(batch["count"])


def write_predictions(found: Iterable[tuple[str, np.ndarray]], folder: Path, space: labels.LabelSpace) -> None:
    """`folder`/colour/ID.png in the label space's palette and `folder`/ids/ID.png (grey train ids) for each."""
    for kind in ("colour", "ids"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for name, ids in found:
        files.write_bytes(folder / "ids" / f"{name}.png", encoding.encode_label(ids))
        files.write_bytes(folder / "colour" / f"{name}.png", encoding.encode_image(labels.colourise(ids, space)))
