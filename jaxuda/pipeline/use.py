"""Uses trained stages, one or several as an ensemble: scores them, or labels images with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxuda import parallel
from jaxuda.data.labels import LabelSpace
from jaxuda.errors import UserError
from jaxuda.inference.restore import ALL, make_ensemble, network_names, parse_checkpoint, stage_config, title
from jaxuda.metrics import iou_table
from jaxuda.pipeline import domains
from jaxuda.pipeline.stages import import_named
from jaxuda.sweeps.ensemble import Ensemble
from jaxuda.sweeps.evaluate import make_ensemble_evaluator
from jaxuda.sweeps.predict import FOLDER, ImageFiles, ensemble_predictions, write_predictions
from jaxuda.training.classes import of_stage


def evaluate(config: ConfigDict, checkpoint: str, overrides: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Prints the IoU of a stage, of each of its checkpoints, or of an ensemble on the evaluation sets of `config`.

    Other networks of a stage (its method's teacher) are scored beside the one that was evaluated in training.

    Args:
      config: names the datasets; `config.test` says which predictions are averaged.
      checkpoint: see `parse_checkpoint`.
      overrides: what the command line sets, "evaluation.size" and the like; otherwise a network's own settings apply.
    """
    import_named(config)
    validation, space = domains.load_validation(config)
    labelled = [records for records in validation if records.labelled]
    if not labelled:
        raise UserError(f"the target has no labelled split '{config.evaluation.split}' to score on")
    chosen = parse_checkpoint(checkpoint)
    each = [[one] for one in chosen] if checkpoint.endswith(f":{ALL}") else [chosen]
    columns: dict[str, dict[str, np.ndarray]] = {}
    for members in each:
        asked = overrides.get("evaluation.network", "")
        networks = network_names(*members[0], asked) if len(members) == 1 else [""]
        for network in networks:
            heading = title(members, every=len(each) > 1, network=network if len(networks) > 1 else "")
            for manner, test in _with_and_without_weights(config.test).items():
                ensemble, variables = make_ensemble(members, space.classes, test, overrides, network)
                score = make_ensemble_evaluator(ensemble, _devices(config, ensemble))
                for records in labelled:
                    found = score(variables, records)
                    for name, scores in {records.name: found, **found.parts}.items():
                        columns.setdefault(name, {})[heading + manner] = scores.confusion
    for name, column in columns.items():
        print(f"IoU in % of {checkpoint} on {name}{_manner(config, overrides)}\n")
        print(iou_table(column, space.classes, space.starred))


def _with_and_without_weights(test: ConfigDict) -> dict[str, ConfigDict]:
    """What to add to a heading -> settings: those of `test`, and before them those without its class weights."""
    if not test.get("class_weights", ()):
        return {"": test}
    plain = ConfigDict(test)
    plain.class_weights = ()
    return {"": plain, ", weighted": test}


def _devices(config: ConfigDict, ensemble: Ensemble) -> list[jax.Device]:
    batch = ensemble.members[0].config.evaluation.batch
    return parallel.choose_devices(batch, config.devices, config.platform, "--config.evaluation.batch")


def _manner(config: ConfigDict, overrides: Mapping[str, Any]) -> str:
    size, scales = overrides.get("evaluation.size"), tuple(config.test.scales)
    parts = [f"input of {size[0]}x{size[1]}"] if size else []
    if scales != (1.0,):
        parts.append(("" if size else "input ") + f"scaled by {' and '.join(map(str, scales))}")
    if config.test.flip:
        parts.append("mirrored images too")
    return "".join(f", {part}" for part in parts)


def predict(
    config: ConfigDict | None,
    checkpoint: str,
    images: str,
    workdir: str,
    overrides: Mapping[str, Any] = MappingProxyType({}),
    bits: int = 16,
) -> None:
    """Writes predictions for images to WORKDIR/predictions (default: beside the checkpoint).

    Args:
      config: names the classes; `config.test` says which predictions are averaged. None: the classes of the checkpoint
        (of the first of several), and nothing is averaged.
      checkpoint: see `parse_checkpoint`.
      images: see `ImageFiles`.
      workdir: see above.
      overrides: as for `evaluate`.
      bits: of 16-bit images, as for `encoding.decode_image`.

    Raises:
      UserError: there are no images, the checkpoint does not fit; or images cannot be read: the others are labelled.
    """
    if not images:
        raise UserError("name the images: --images DIR or --images 'DIR/*.png' (quoted, or the shell expands it)")
    if config is None:
        config = ConfigDict({"test": {"flip": False, "scales": (1.0,), "weights": ()}, "devices": 0, "platform": ""})
    else:
        import_named(config)
    found = ImageFiles(images, bits)
    chosen = parse_checkpoint(checkpoint)
    if checkpoint.endswith(f":{ALL}"):
        raise UserError("--mode predict takes one checkpoint, or several named ones as an ensemble, but not 'all'")
    space = _space(config, chosen[0][0])
    ensemble, variables = make_ensemble(chosen, space.classes, config.test, overrides)
    readable, unreadable, dark = found.checked()
    for line in filter(None, [*found.left_out, dark and f"warning: {dark}"]):
        print(line)
    if readable:
        folder = Path(workdir or chosen[0][0]) / FOLDER
        labelled = ensemble_predictions(ensemble, variables, readable, _devices(config, ensemble))
        written = write_predictions(labelled, folder, space)
        print(f"{len(readable)} predictions in {' and '.join(map(str, written))}")
    if unreadable:
        listed = "\n  ".join(unreadable)
        raise UserError(f"{len(unreadable)} of {len(found)} images cannot be read and have no prediction:\n  {listed}")


def _space(config: ConfigDict, folder: str) -> LabelSpace:
    """The classes that predictions are written in: those of the config, else those of the stage in `folder`.

    A config may leave it to its source's data which classes there are, and these need not be on this machine.
    """
    stage_config(folder)  # if it is no stage, this is reported now
    trained, problem = of_stage(Path(folder)), "add --config, the recipe that it was trained with"
    if "source" in config:
        try:
            return domains.defined_classes(config)[0]
        except UserError as error:
            if config.label_space:
                raise
            problem = str(error)
    if trained is None or len(trained.palette) < trained.num_classes:
        raise UserError(f"{folder} does not have the colours of its classes (an older jaxuda trained it): {problem}")
    return trained
