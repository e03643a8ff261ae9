"""Uses trained stages, one or several as an ensemble: scores them, or labels images with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxuda import data, parallel
from jaxuda.errors import UserError
from jaxuda.inference.restore import ALL, make_ensemble, network_names, parse_checkpoint, title
from jaxuda.metrics import iou_table
from jaxuda.pipeline import domains
from jaxuda.pipeline.stages import import_named
from jaxuda.sweeps.ensemble import Ensemble
from jaxuda.sweeps.evaluate import make_ensemble_evaluator
from jaxuda.sweeps.predict import ImageFiles, ensemble_predictions, write_predictions


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
    columns: dict[str, dict[str, np.ndarray]] = {records.name: {} for records in labelled}
    for members in each:
        asked = overrides.get("evaluation.network", "")
        networks = network_names(*members[0], asked) if len(members) == 1 else [""]
        for network in networks:
            ensemble, variables = make_ensemble(
                members, space.num_classes, config.label_space, config.test, overrides, network
            )
            score = make_ensemble_evaluator(ensemble, _devices(config, ensemble))
            heading = title(members, every=len(each) > 1, network="" if network == networks[0] else network)
            for records in labelled:
                columns[records.name][heading] = score(variables, records).confusion
    for name, column in columns.items():
        print(f"IoU in % of {checkpoint} on {name}{_manner(config, overrides)}\n")
        print(iou_table(column, space.classes))


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
    config: ConfigDict,
    checkpoint: str,
    images: str,
    workdir: str,
    overrides: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Writes predictions for images to WORKDIR/predictions (default: beside the checkpoint).

    Args:
      config: names the label space; `config.test` says which predictions are averaged.
      checkpoint: see `parse_checkpoint`.
      images: a folder or a glob.
      workdir: see above.
      overrides: as for `evaluate`.
    """
    if not images:
        raise UserError("name the images: --images DIR or --images 'DIR/*.png' (quoted, or the shell expands it)")
    import_named(config)
    found = ImageFiles(images)
    chosen = parse_checkpoint(checkpoint)
    if checkpoint.endswith(f":{ALL}"):
        raise UserError("--mode predict takes one checkpoint, or several named ones as an ensemble, but not 'all'")
    space = data.labels.label_space(config.label_space) if config.label_space else _source_space(config)
    ensemble, variables = make_ensemble(chosen, space.num_classes, config.label_space, config.test, overrides)
    folder = Path(workdir or chosen[0][0]) / "predictions"
    labelled = ensemble_predictions(ensemble, variables, found, _devices(config, ensemble))
    written = write_predictions(labelled, folder, space)
    print(f"{len(found)} predictions in {' and '.join(map(str, written))}")


def _source_space(config: ConfigDict) -> Any:
    domain = "source" if config.source.name else "target"
    return domains.open_records(config, domain, config[domain].split).label_space
