"""Using a trained stage: score it, or label images with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from jaxuda import checkpoints, data, files, methods, parallel, pipeline
from jaxuda.errors import UserError
from jaxuda.metrics import iou_table
from jaxuda.models.deeplab import DeepLabV2
from jaxuda.sweeps.evaluate import make_evaluator
from jaxuda.sweeps.predict import ImageFiles, predictions, write_predictions
from jaxuda.train import abstract_variables, evaluation_devices, make_model


def restore(checkpoint: str, num_classes: int) -> tuple[DeepLabV2, dict[str, Any], FrozenConfigDict]:
    """The network of a finished or running training stage.

    Args:
      checkpoint: the stage's folder.
      num_classes: of the label space it was trained on.

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
    model = make_model(config, num_classes)
    arrays, _ = checkpoints.read_variables(Path(checkpoint) / "checkpoints")
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
