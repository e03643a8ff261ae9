"""A trained network for use from Python: `jaxuda.load(checkpoint).predict(image)`."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from ml_collections import FrozenConfigDict

from jaxuda import methods
from jaxuda.errors import UserError
from jaxuda.inference.restore import restore
from jaxuda.sweeps.scores import (
    input_transform,
    make_scores,
    probabilities,
    resize,
    resize_matrices,
    score_grid,
)
from jaxuda.training.classes import of_stage

PyTree = Any


class Predictor(NamedTuple):
    """A trained network that labels any image.

    classes: the names of its C classes in the order of the train ids, or None if they are not known (older builds).
    model, variables, config: what `jaxuda.inference.restore.restore` returns.
    """

    classes: tuple[str, ...] | None
    model: nn.Module
    variables: PyTree
    config: FrozenConfigDict

    def predict(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Labels one image of any size; the image is resized to the network's evaluation size, as for the tables.

        Args:
          image: (H, W, 3) uint8 RGB.

        Returns:
          labels (H, W) uint8, the train ids of the most likely classes, and probabilities (H, W, C) float32.

        Raises:
          UserError: the image has another shape or type.
        """
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise UserError(f"predict takes one RGB image, (H, W, 3) uint8, not {image.dtype} {image.shape}")
        method, config = methods.load(self.config.train, imported=True), self.config
        if not hasattr(method, "predict"):
            # Networks that differ only in their weights share compiled code.
            method = None
            config = FrozenConfigDict({name: config[name] for name in ("preprocess", "align_corners", "evaluation")})
        grid, run = _compiled(self.model, method, config)
        small = input_transform(config)({"image": image}, np.random.default_rng(0))["image"]
        rows, columns = resize_matrices(grid(self.variables), [image.shape[:2]], config)
        found = np.asarray(run(self.variables, small[None], rows, columns))[0, : image.shape[0], : image.shape[1]]
        return found.argmax(-1).astype(np.uint8), found


@functools.lru_cache(maxsize=4)
def _compiled(model: nn.Module, method: ModuleType | None, config: FrozenConfigDict) -> tuple[Callable, Callable]:
    """`grid(variables)`: (h, w) of the scores; `run(variables, images, rows, columns)`: resized probabilities."""
    scores = make_scores(model, method, config)

    @jax.jit
    def run(variables: PyTree, images: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
        return probabilities(resize(scores(variables, images), rows, columns), method)

    return functools.partial(score_grid, scores, config=config), run


def load(checkpoint: str, network: str = "") -> Predictor:
    """The network of a training stage, ready to predict; see `jaxuda.load`."""
    checkpoint = os.path.expanduser(checkpoint)
    model, variables, config = restore(checkpoint, network=network)
    methods.load(config.train, imported=True)  # if it cannot be loaded, this is reported now
    space = of_stage(Path(checkpoint))
    known = space is not None and space.num_classes == model.num_classes
    return Predictor(space.classes if known else None, model, variables, config)
