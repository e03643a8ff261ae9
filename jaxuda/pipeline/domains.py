"""Opening the datasets that a config names."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from jaxuda import data, parallel
from jaxuda.data.datasets import is_drawn
from jaxuda.data.joined import part_names, parts_of
from jaxuda.data.labels import LabelSpace, label_space, own_space
from jaxuda.data.prepared import prepare_command, prepared_folder, read_summary, root
from jaxuda.data.preparing import prepare
from jaxuda.data.records import Domains
from jaxuda.errors import UserError
from jaxuda.pipeline.labelled import with_few_labels


def load_domains(config: ConfigDict) -> Domains:
    """Opens the datasets of a config; first draws those that need no files, if they are missing.

    A domain without a name (`--config.source.name=`) is None.

    Raises:
      UserError: a dataset is not prepared (the command is named), or the classes of the domains differ.
    """
    _make_ready(config, ("source", "target"))
    source, target = (
        open_records(config, domain, config[domain].split) if config[domain].name else None
        for domain in ("source", "target")
    )
    if target is not None and config.target.get("reference", False):
        target = target.with_reference()
    if source is not None and not source.labelled:
        raise UserError(f"the source {source.name} has no labels: adaptation needs a labelled source")
    opened = Domains(source, target, _open_validation(config, (source or target).label_space))
    space = opened.label_space
    if space is None:
        raise UserError(f"{target.name} has no labels, and there are no classes to label it with")
    if space.num_classes == 1:
        raise UserError(
            f"{(source or target).name} has one class, {space.classes[0]}: a network learns nothing if it is the only "
            'answer. Name a second one in classes.json for the rest of the image, such as "background"'
        )
    _check_weights(config.get("class_weights", ()), space.classes)
    for records in filter(None, (target, *opened.validation)):
        if records.label_space is not None and records.label_space.classes != space.classes:
            raise UserError(
                f"{(source or target).name} and {records.name} have different classes: {', '.join(space.classes)} "
                f"against {', '.join(records.label_space.classes)}; give both the same classes.json"
            )
    return with_few_labels(config, opened)


def load_validation(config: ConfigDict) -> tuple[tuple[data.Records, ...], LabelSpace]:
    """The datasets that networks are scored on, and their classes; opens the source only if it defines the classes."""
    if config.label_space:
        _make_ready(config, ("target",))
        space = label_space(config.label_space)
        return _open_validation(config, space), space
    opened = load_domains(config)
    return opened.validation, opened.label_space


def _open_validation(config: ConfigDict, space: LabelSpace | None) -> tuple[data.Records, ...]:
    """The target's evaluation split, and the further sets of `config.evaluation.also`."""
    found = []
    if config.target.name:
        try:
            found.append(open_records(config, "target", config.evaluation.split))
        except UserError:
            # A folder without a validation split can still be adapted to; there is nothing to score then.
            if config.target.name != "folder" or config.evaluation.split != "val":
                raise
    for name, split in _also(config):
        found.append(data.load(name, split, label_space=space, data_dir=config.data_dir or None))
    # The datasets that are joined are scored by themselves, too.
    names = [
        name for records in found for name in dict.fromkeys([records.name, *(part.name for part in parts_of(records))])
    ]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"config.evaluation.also names {twice[0]}, but the run is evaluated on it already")
    return tuple(found)


def _also(config: ConfigDict) -> list[tuple[str, str]]:
    """(name, split) of the further sets that a run is scored on."""
    found = [entry.rpartition(":") for entry in config.evaluation.get("also", ())]
    for name, colon, split in found:
        if not (name and split) or "folder" in part_names(name):
            raise UserError(
                f"config.evaluation.also: {name + colon + split!r} must be DATASET:SPLIT, such as 'camvid/day:val' "
                "(a folder of your own can only be the target)"
            )
    return [(name, split) for name, _, split in found]


def _make_ready(config: ConfigDict, domains: Sequence[str]) -> None:
    """Draws the missing datasets that need no files: those of these domains and of `config.evaluation.also`.

    Raises:
      UserError: other datasets are missing; the message has the commands that prepare them.
    """
    places = [(part, _place(config, domain).path) for domain in domains for part in _parts(config[domain].name)]
    places += [(part, "") for name, _ in _also(config) for part in _parts(name)]
    if not places:
        raise UserError("config.source.name and config.target.name are both empty: name a dataset")
    data_dir, missing = config.data_dir or None, {}
    if drawn := [part for part, _ in places if is_drawn(part)]:
        parallel.on_first(lambda: sum(len(prepare(part, data_dir=data_dir)) for part in drawn))
    for part, path in places:
        path = path if part == "folder" else ""
        if read_summary(prepared_folder(part, data_dir, path)) is None:
            missing[prepare_command(part, data_dir, path)] = part
    if missing:
        names, verb = " and ".join(missing.values()), "is" if len(missing) == 1 else "are"
        elsewhere = "or, if prepared elsewhere, add --config.data_dir=DIR (the --data_dir of jaxuda.prepare)"
        commands = "\n  ".join(missing)
        raise UserError(f"{names} {verb} not prepared in {root(data_dir)}; run\n  {commands}\n{elsewhere}")


def _parts(name: str) -> list[str]:
    """The datasets of a domain; [] if it has no name."""
    return part_names(name) if name else []


def _check_weights(weights: Sequence[float], classes: Sequence[str]) -> None:
    if weights and (len(weights) != len(classes) or not all(0 < weight < float("inf") for weight in weights)):
        raise UserError(
            f"config.class_weights={tuple(weights)}: give one positive number for each of the {len(classes)} classes, "
            f"in their order ({', '.join(classes)})"
        )


def _place(config: ConfigDict, domain: str) -> ConfigDict:
    place = config[domain]
    if "folder" in _parts(place.name) and not place.path:
        raise UserError(f"name the folder of the {domain} images: --config.{domain}.path=DIR")
    return place


def open_records(config: ConfigDict, domain: str, split: str) -> data.Records:
    """One split of the "source" or the "target" of a config, in the label space of the run."""
    place = _place(config, domain)
    if not place.name:
        raise UserError(f"there is no {domain}: config.{domain}.name is empty")
    return data.load(
        place.name, split, label_space=_label_space(config), data_dir=config.data_dir or None, path=place.path
    )


def defined_classes(config: ConfigDict) -> tuple[LabelSpace, np.ndarray | None]:
    """The classes of a recipe; opens the source only if it defines them (without a source, the target).

    Returns:
      The classes, and the train id of each id in the files that were opened for them, (256,); else None.
    """
    if config.label_space:
        return label_space(config.label_space), None
    domain = "source" if config.source.name else "target"
    records = open_records(config, domain, config[domain].split)
    return records.label_space, getattr(records, "table", None)  # joined datasets have several tables


def _label_space(config: ConfigDict) -> LabelSpace | None:
    """The one that the config names, else that of the source's dataset; None: each folder brings its own classes."""
    if config.label_space:
        return label_space(config.label_space)
    named = [config[domain].name for domain in ("source", "target") if domain in config and config[domain].name]
    return own_space(part_names(named[0])[0].partition("/")[0]) if named else None
