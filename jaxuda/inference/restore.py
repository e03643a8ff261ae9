"""Restores the networks of trained stages: one, or several as an ensemble."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
from ml_collections import ConfigDict, FrozenConfigDict

from jaxuda import methods
from jaxuda.errors import UserError
from jaxuda.models import abstract_variables, make_saved_model
from jaxuda.sweeps.ensemble import Ensemble, Member
from jaxuda.training import checkpoints
from jaxuda.training.classes import in_order

ALL = "all"


def restore(
    checkpoint: str,
    num_classes: int | None = None,
    which: str = "last",
    network: str = "",
    *,
    classes: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> tuple[nn.Module, dict[str, Any], FrozenConfigDict]:
    """The network of a finished or running training stage.

    Args:
      checkpoint: the stage's folder.
      num_classes: that of the label space it was trained on; None: as many as its classifier has.
      which: "last", "best" (chosen with target labels), or a step.
      network: its name, if the stage's method has several ("student", "teacher"); "": the one that was evaluated.
      classes: the names of the wanted classes in their order; (): as in the checkpoint.
      say: called with a line of text if that is another order than in the checkpoint, or if its numbers were cast.

    Returns:
      The network, its variables (host arrays), and the stage's resolved config.

    Raises:
      UserError: there is no such stage, it has no valid checkpoint of this network, it has other classes, or its
        network is code outside jaxuda that is not imported.
    """
    config = stage_config(checkpoint)
    folder = Path(checkpoint) / "checkpoints"
    arrays, _ = checkpoints.read_variables(folder, which, network or evaluated_network(config))
    model = make_saved_model(config.model, arrays, checkpoint)
    if num_classes not in (None, model.num_classes):
        raise UserError(f"{checkpoint} was trained on {model.num_classes} classes, not on {num_classes}")
    if classes:
        arrays = in_order(arrays, model, Path(checkpoint), classes, say)
    like = abstract_variables(model, config.evaluation.size)
    return model, checkpoints.unflatten(arrays, like, checkpoint, say), config


def evaluated_network(config: FrozenConfigDict) -> str:
    """The network of a stage that is scored and that labels images; stages of earlier builds have only one."""
    return config.evaluation.get("network", checkpoints.STUDENT)


def network_names(checkpoint: str, which: str = "last", network: str = "") -> list[str]:
    """The networks in a stage's checkpoint: first `network` ("": the one that was evaluated), then the others."""
    first = network or evaluated_network(stage_config(checkpoint))
    names = checkpoints.network_names(Path(checkpoint) / "checkpoints", which)
    return [first, *(name for name in names if name != first)]


def stage_config(checkpoint: str) -> FrozenConfigDict:
    """The settings of a training stage, from its folder; raises UserError where there is no such stage."""
    if not checkpoint:
        raise UserError("name a model: --checkpoint DIR, a stage's folder such as runs/minent-streets-seed0/adapt")
    identity = checkpoints.stage_settings(Path(checkpoint))
    if identity is None:
        raise UserError(checkpoints.not_a_stage(Path(checkpoint)))
    return FrozenConfigDict(identity)


def parse_checkpoint(text: str) -> list[tuple[str, str]]:
    """The stages and checkpoints that `--checkpoint` names: "DIR[:last|best|STEP|all]", several with commas.

    Returns:
      (folder, "last", "best" or a step) of each; "all" becomes all checkpoints that the stage has kept.

    Raises:
      UserError: "all" is used for a stage without checkpoints, or together with other stages.
    """
    found = []
    for part in [text] if Path(text).is_dir() else text.split(","):
        folder, which = re.fullmatch(rf"(.*?)(?::(last|best|{ALL}|\d+))?", part.strip()).groups()
        folder = os.path.expanduser(folder)
        if which != ALL:
            found.append((folder, which or "last"))
            continue
        if "," in text:
            raise UserError(f"--checkpoint {text}: '{ALL}' scores the checkpoints of one stage, it is no ensemble")
        steps = checkpoints.kept_steps(Path(folder) / "checkpoints")
        if not steps:
            raise UserError(f"there are no checkpoints in {Path(folder) / 'checkpoints'}")
        found += [(folder, str(step)) for step in steps]
    return found


def make_ensemble(
    chosen: list[tuple[str, str]],
    classes: Sequence[str],
    test: ConfigDict,
    overrides: Mapping[str, Any],
    network: str = "",
) -> tuple[Ensemble, list[Any]]:
    """The networks of several checkpoints as one, and their variables.

    Each gets its images as its own training's evaluation did, except for fields of `evaluation` that `overrides` sets.

    Args:
      chosen: see `parse_checkpoint`.
      classes: their names, in the order of the scores.
      test: the section `config.test`, which says what is averaged.
      overrides: what the command line sets, by dotted field.
      network: the name of the network in each checkpoint; "": the one that `overrides` names, else as for `restore`.

    Raises:
      UserError: the checkpoints have other classes, the number of weights differs, or as for `restore`.
    """
    weights = tuple(test.weights) or (1.0,) * len(chosen)
    if len(weights) != len(chosen):
        raise UserError(f"config.test.weights has {len(weights)} weights, but --checkpoint names {len(chosen)}")
    by_class = tuple(test.get("class_weights", ()))
    if by_class and len(by_class) != len(classes):
        raise UserError(f"config.test.class_weights has {len(by_class)} weights, but there are {len(classes)} classes")
    network = network or overrides.get("evaluation.network", "")
    members, variables = [], []
    for (folder, which), weight in zip(chosen, weights, strict=True):
        model, arrays, trained = restore(folder, None, which, network, classes=classes)
        method = methods.load(trained.train, imported=True)
        members.append(Member(model, method, _with_asked(trained, overrides), weight))
        variables.append(arrays)
    return Ensemble(members, flip=test.flip, scales=tuple(test.scales), class_weights=by_class), variables


def _with_asked(trained: FrozenConfigDict, overrides: Mapping[str, Any]) -> FrozenConfigDict:
    """A stage's config in which the `overrides` of `evaluation` ("evaluation.size": ...) replace its own fields.

    Raises:
      UserError: the size is not a size.
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


def title(members: list[tuple[str, str]], every: bool, network: str = "") -> str:
    """The heading of a column for one checkpoint or an ensemble; with `every`, for one step of several.

    network: its name if the stage has several, else "".
    """
    beside = f" ({network})" if network else ""
    if every:
        return f"step {members[0][1]}{beside}"
    names = (Path(folder).name + ("" if which == "last" else f":{which}") for folder, which in members)
    return " + ".join(names) + beside
