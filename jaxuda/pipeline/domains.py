"""Opening the datasets that a config names."""

from __future__ import annotations

from collections.abc import Sequence

from ml_collections import ConfigDict

from jaxuda import data, parallel
from jaxuda.data.datasets import is_drawn
from jaxuda.data.joined import part_names
from jaxuda.data.labels import LabelSpace, label_space, own_space
from jaxuda.data.prepared import prepare_command, prepared_folder, read_summary, root
from jaxuda.data.preparing import prepare
from jaxuda.data.records import Domains
from jaxuda.errors import UserError


def load_domains(config: ConfigDict) -> Domains:
    """Opens the datasets of a config; draws `streets` if it is not there yet.

    Raises:
      UserError: a dataset is not prepared (the command is named), or the classes of the domains differ.
    """
    for domain in (config.source, config.target):
        draw_if_missing(domain.name, config)
    _check_prepared(config)
    source = open_records(config, "source", config.source.split)
    if not source.labelled:
        raise UserError(f"the source {source.name} has no labels: adaptation needs a labelled source")
    _check_weights(config.get("class_weights", ()), source.label_space.classes)
    target = open_records(config, "target", config.target.split)
    try:
        target_val = open_records(config, "target", config.evaluation.split)
    except UserError:
        # Images without a validation split are adapted to all the same; there is nothing to score then.
        if config.target.name != "folder":
            raise
        target_val = None
    for records in filter(None, (target, target_val)):
        if records.label_space is not None and records.label_space.classes != source.label_space.classes:
            raise UserError(
                f"{source.name} and {records.name} have different classes: {', '.join(source.label_space.classes)} "
                f"against {', '.join(records.label_space.classes)}; give both the same classes.json"
            )
    return Domains(source, target, (target_val,) if target_val else ())


def draw_if_missing(name: str, config: ConfigDict) -> None:
    """Prepares what needs no files, such as `streets`, of the datasets of a domain."""
    if drawn := [part for part in part_names(name) if is_drawn(part)]:
        parallel.on_first(lambda: sum(len(prepare(part, data_dir=config.data_dir or None)) for part in drawn))


def _check_prepared(config: ConfigDict) -> None:
    """Raises a UserError with the commands that prepare the datasets of a config, if any are missing."""
    data_dir, missing = config.data_dir or None, {}
    for domain in ("source", "target"):
        place = _place(config, domain)
        for name in part_names(place.name):
            path = place.path if name == "folder" else ""
            if read_summary(prepared_folder(name, data_dir, path)) is None:
                missing[prepare_command(name, data_dir, path)] = name
    if missing:
        names, verb = " and ".join(missing.values()), "is" if len(missing) == 1 else "are"
        raise UserError(f"{names} {verb} not prepared in {root(data_dir)}; run\n  " + "\n  ".join(missing))


def _check_weights(weights: Sequence[float], classes: Sequence[str]) -> None:
    if weights and (len(weights) != len(classes) or not all(0 < weight < float("inf") for weight in weights)):
        raise UserError(
            f"config.class_weights={tuple(weights)}: give one positive number for each of the {len(classes)} classes, "
            f"in their order ({', '.join(classes)})"
        )


def _place(config: ConfigDict, domain: str) -> ConfigDict:
    place = config[domain]
    if "folder" in part_names(place.name) and not place.path:
        raise UserError(f"say where the {domain} images lie: --config.{domain}.path=DIR")
    return place


def open_records(config: ConfigDict, domain: str, split: str) -> data.Records:
    """One split of the "source" or the "target" of a config, in the label space of the run."""
    place = _place(config, domain)
    return data.load(
        place.name, split, label_space=_label_space(config), data_dir=config.data_dir or None, path=place.path
    )


def _label_space(config: ConfigDict) -> LabelSpace | None:
    """The one that the config names, else that of the source's dataset; None: each folder brings its own classes."""
    if config.label_space:
        return label_space(config.label_space)
    return own_space(part_names(config.source.name)[0].partition("/")[0]) if "source" in config else None
