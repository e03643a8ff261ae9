"""Trained stages as networks: one, or several as an ensemble."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict, FrozenConfigDict

from jaxuda import files, methods, parallel
from jaxuda.errors import UserError
from jaxuda.models import abstract_variables, make_model
from jaxuda.models.deeplab import DeepLabV2
from jaxuda.sweeps.ensemble import Ensemble, Member
from jaxuda.training import checkpoints

ALL = "all"
HEAD = "params.head.kernel0"  # the one array of every network whose last axis is the classes


def restore(
    checkpoint: str, num_classes: int | None = None, which: str = "last"
) -> tuple[DeepLabV2, dict[str, Any], FrozenConfigDict]:
    """The network of a finished or running training stage.

    Args:
      checkpoint: the stage's folder.
      num_classes: of the label space it was trained on; None: as many as its head has.
      which: "last", "best" (chosen with target labels), or a step.

    Returns:
      The network, its variables (host arrays), and the stage's resolved config.

    Raises:
      UserError: there is no such stage, or it has no whole checkpoint of this network.
    """
    config = stage_config(checkpoint)
    arrays, _ = checkpoints.read_variables(Path(checkpoint) / "checkpoints", which)
    model = make_model(config.model, num_classes or arrays[HEAD].shape[-1], imported=True)
    return model, checkpoints.unflatten(arrays, abstract_variables(model, config.evaluation.size), checkpoint), config


def stage_config(checkpoint: str) -> FrozenConfigDict:
    if not checkpoint:
        raise UserError("say which model: --checkpoint DIR, a stage's folder such as runs/minent-streets-seed0/adapt")
    record = files.read_json(Path(checkpoint) / "stage.json")
    if record is None or "train" not in record["identity"]:
        raise UserError(f"{checkpoint} is not the folder of a training stage (it has no stage.json that says so)")
    return FrozenConfigDict(record["identity"])


def parse_checkpoint(text: str) -> list[tuple[str, str]]:
    """The stages and checkpoints that `--checkpoint` names: "DIR[:last|best|STEP|all]", several with commas.

    Returns:
      (folder, "last", "best" or a step) of each; "all" becomes all that the stage has kept.

    Raises:
      UserError: "all" is asked of a stage that has none, or beside others.
    """
    found = []
    for part in text.split(","):
        folder, which = re.fullmatch(rf"(.*?)(?::(last|best|{ALL}|\d+))?", part.strip()).groups()
        if which != ALL:
            found.append((folder, which or "last"))
            continue
        if "," in text:
            raise UserError(f"--checkpoint {text}: '{ALL}' scores one stage after the other, it is no ensemble")
        steps = checkpoints.kept_steps(Path(folder) / "checkpoints")
        if not steps:
            raise UserError(f"there are no checkpoints in {Path(folder) / 'checkpoints'}")
        found += [(folder, str(step)) for step in steps]
    return found


def make_ensemble(
    config: ConfigDict, chosen: list[tuple[str, str]], num_classes: int, overrides: Mapping[str, Any]
) -> tuple[Ensemble, list[Any]]:
    """The networks of several checkpoints as one, averaged as `config.test` says, and their variables.

    Each sees images as in its own training's evaluation, but for the fields of `evaluation` that `overrides` sets.
    """
    weights = tuple(config.test.weights) or (1.0,) * len(chosen)
    if len(weights) != len(chosen):
        raise UserError(f"config.test.weights has {len(weights)} weights, but --checkpoint names {len(chosen)}")
    members, variables = [], []
    for (folder, which), weight in zip(chosen, weights, strict=True):
        theirs, ours = (space or "its source" for space in (stage_config(folder).label_space, config.label_space))
        if theirs != ours:
            raise UserError(
                f"{folder} was trained on the classes of {theirs}, this config has those of {ours}: use the config "
                "it was trained with"
            )
        model, arrays, trained = restore(folder, num_classes, which)
        members.append(
            Member(model, methods.load(trained.train, imported=True), _with_asked(trained, overrides), weight)
        )
        variables.append(arrays)
    return Ensemble(members, flip=config.test.flip, scales=tuple(config.test.scales)), variables


def _with_asked(trained: FrozenConfigDict, overrides: Mapping[str, Any]) -> FrozenConfigDict:
    """A stage's config with `overrides` of `evaluation` ("evaluation.size": ...) in place of its own fields.

    Raises:
      UserError: the size is none.
    """
    size = overrides.get("evaluation.size", (1, 1))
    if not isinstance(size, tuple) or len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        raise UserError(f"config.evaluation.size={size} must be (width, height), set once")
    config = ConfigDict(trained, type_safe=False)
    for field, value in overrides.items():
        section, _, name = field.partition(".")
        if section == "evaluation":
            config.evaluation[name] = value
    return FrozenConfigDict(config)


def ensemble_devices(config: ConfigDict, ensemble: Ensemble) -> list[jax.Device]:
    batch = ensemble.members[0].config.evaluation.batch
    return parallel.chooseensemble_devices(batch, config.devices, config.platform, "--config.evaluation.batch")


def title(members: list[tuple[str, str]], every: bool) -> str:
    if every:
        return f"step {members[0][1]}"
    return " + ".join(Path(folder).name + ("" if which == "last" else f":{which}") for folder, which in members)
