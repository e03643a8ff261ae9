"""Using a trained stage: score it, or label images with it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from jaxuda import checkpoints, data, files, methods, parallel, pipeline
from jaxuda.errors import UserError
from jaxuda.metrics import iou_table
from jaxuda.models.deeplab import DeepLabV2
from jaxuda.sweeps.evaluate import make_evaluator
from jaxuda.sweeps.predict import ImageFiles, predictions, write_predictions
from jaxuda.sweeps.scores import make_scores, probabilities, resize, resize_matrices, score_grid
from jaxuda.train import abstract_variables, evaluation_devices, make_model

PyTree = Any
HEAD = "params.head.kernel0"  # the one array of every network whose last axis is the classes


class Predictor(NamedTuple):
    """A trained network that labels any image.

    classes: the names of its C classes in the order of the train ids, or None where its work folder does not tell.
    model, variables, config: what `restore` returns.
    """

    classes: tuple[str, ...] | None
    model: DeepLabV2
    variables: PyTree
    config: FrozenConfigDict

    def predict(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Labels one image of any size; the network sees it at the size of its evaluation, as in the tables.

        Args:
          image: (H, W, 3) uint8 RGB.

        Returns:
          labels (H, W) uint8, the train ids of the likeliest classes, and probabilities (H, W, C) float32.

        Raises:
          UserError: the image has another shape or type.
        """
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise UserError(f"predict takes one RGB image, (H, W, 3) uint8, not {image.dtype} {image.shape}")
        method, config = methods.load(self.config.train), self.config
        if not hasattr(method, "predict"):
            # Networks that differ in nothing but their weights share compiled code.
            method = None
            config = FrozenConfigDict({name: config[name] for name in ("preprocess", "align_corners", "evaluation")})
        grid, run = _compiled(self.model, method, config)
        transform = data.build_transform({"resize": tuple(config.evaluation.size)})
        small = transform({"image": image}, np.random.default_rng(0))["image"]
        rows, columns = resize_matrices(grid(self.variables), [image.shape[:2]], config.align_corners)
        found = np.asarray(run(self.variables, small[None], rows, columns))[0, : image.shape[0], : image.shape[1]]
        return found.argmax(-1).astype(np.uint8), found


@functools.lru_cache(maxsize=4)
def _compiled(model: DeepLabV2, method: ModuleType | None, config: FrozenConfigDict) -> tuple[Callable, Callable]:
    """`grid(variables)`: (h, w) of the scores; `run(variables, images, rows, columns)`: resized probabilities."""
    scores = make_scores(model, method, config)

    @jax.jit
    def run(variables: PyTree, images: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
        return probabilities(resize(scores(variables, images), rows, columns), method)

    return functools.partial(score_grid, scores, config=config), run


def load(checkpoint: str) -> Predictor:
    """The network of a training stage, ready to predict; see `jaxuda.load`."""
    model, variables, config = restore(checkpoint)
    if config.label_space:
        return Predictor(data.labels.label_space(config.label_space).classes, model, variables, config)
    results = files.read_json(Path(checkpoint).absolute().parent / "results.json")
    return Predictor(tuple(results["classes"]) if results else None, model, variables, config)


def restore(checkpoint: str, num_classes: int | None = None) -> tuple[DeepLabV2, dict[str, Any], FrozenConfigDict]:
    """The network of a finished or running training stage.

    Args:
      checkpoint: the stage's folder.
      num_classes: of the label space it was trained on; None: as many as its head has.

    Returns:
      The network, its variables (host arrays), and the stage's resolved config.

    Raises:
      UserError: there is no such stage, or it has no whole checkpoint of this network.
    """
    if not checkpoint:
        raise UserError("say which model: --checkpoint DIR, a stage's folder such as runs/minent-streets-seed0/adapt")
    record = files.read_json(Path(checkpoint) / "stage.json")
    if record is None or "train" not in record["identity"]:
        raise UserError(f"{checkpoint} is not the folder of a training stage (it has no stage.json that says so)")
    config = FrozenConfigDict(record["identity"])
    arrays, _ = checkpoints.read_variables(Path(checkpoint) / "checkpoints")
    model = make_model(config, num_classes or arrays[HEAD].shape[-1])
    return model, checkpoints.unflatten(arrays, abstract_variables(model, config), checkpoint), config


def evaluate(config: ConfigDict, checkpoint: str) -> None:
    """Prints the table of a stage on the evaluation split of `config`."""
    domains = pipeline.load_domains(config)
    if domains.target_val is None or not domains.target_val.labelled:
        raise UserError(f"the target has no labelled split '{config.evaluation.split}' to score on")
    model, variables, trained = restore(checkpoint, domains.source.label_space.num_classes)
    method = methods.load(trained.train)
    devices = parallel.choose_devices(config.evaluation.batch, config.devices, config.platform)
    run = make_evaluator(model, method, trained, evaluation_devices(trained, devices))
    confusion = run(variables, domains.target_val).confusion
    print(f"IoU in % of {checkpoint} on {domains.target_val.name}\n")
    print(iou_table({Path(checkpoint).name: confusion}, domains.source.label_space.classes))


def predict(config: ConfigDict, checkpoint: str, images: str, workdir: str) -> None:
    """Writes predictions for the files that match a glob to WORKDIR/predictions (default: beside the checkpoint)."""
    if not images:
        raise UserError("say which images: --images 'DIR/*.png' (quoted, so that the shell leaves it alone)")
    found = ImageFiles(images)
    space = data.labels.label_space(config.label_space) if config.label_space else _source_space(config)
    model, variables, trained = restore(checkpoint, space.num_classes)
    folder = Path(workdir or checkpoint) / "predictions"
    method = methods.load(trained.train)
    write_predictions(predictions(variables, found, model=model, method=method, config=trained), folder, space)
    print(f"{len(found)} predictions in {folder}/colour and {folder}/ids")


def _source_space(config: ConfigDict) -> Any:
    return pipeline.open_records(config, "source", config.source.split).label_space
