"""Reads the run in a work folder: finished, half-finished, or with parts missing."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jaxuda import data, files
from jaxuda.data.joined import part_names
from jaxuda.data.labels import LabelSpace
from jaxuda.errors import UserError
from jaxuda.pipeline import domains

SOURCE_ONLY, CONTROL, ADAPTED, ORACLE, SWEEP = "source only", "control", "adapted", "oracle", "sweep"


class StageRun(NamedTuple):
    """One stage.

    name: that of the stage and its folder.
    role: `SOURCE_ONLY`, `CONTROL`, `ADAPTED`, `ORACLE` or `SWEEP`.
    settings: the stage's own section of the config.
    status: "done", "started" or "missing".
    fingerprint: that of the stage, "" if it has not begun.
    rows: its lines of metrics.jsonl, by step; for a stage that was taken over, those of the run that trained it.
    evaluations: the measurements on the validation images, by step.
    results: its results when it is done, else {}.
    """

    name: str
    role: str
    settings: Mapping[str, Any]
    status: str
    fingerprint: str
    rows: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    results: Mapping[str, Any]

    @property
    def title(self) -> str:
        """The name for people."""
        return self.name.replace("_", " ")

    @property
    def steps(self) -> int:
        """Training steps that the config asks for."""
        return int(self.settings.get("steps", 0))

    @property
    def last(self) -> Mapping[str, Any]:
        """The last evaluation (so far, if the stage is not done); {} if there was none."""
        return self.results.get("last") or (self.evaluations[-1] if self.evaluations else {})

    @property
    def scored(self) -> bool:
        """Whether it has a score, that is, was evaluated on labelled images."""
        return "confusion" in self.last

    @property
    def networks(self) -> dict[str, Mapping[str, Any]]:
        """Network -> its last evaluation, first the one that the stage is scored with; {"": `last`} if there is one."""
        others = self.last.get("other_networks", {})
        return {self.last["network"]: self.last, **others} if others else {"": self.last}

    def titled(self, network: str) -> str:
        """The name for people of one of `networks`."""
        return f"{self.title} ({network})" if network else self.title

    def curve(self, metric: str, network: str = "") -> list[tuple[float, float]]:
        """(step, value) wherever the metric was logged and is finite; "val/..." is a metric of the evaluations.

        network: one of `networks`, of whose evaluations it is; "": the one that the stage is scored with.
        """
        # A stage that was taken over always has its evaluations, but not always the lines of its training.
        own = metric.removeprefix("val/")
        rows = self.evaluations if own != metric else self.rows
        if network and network != self.last.get("network"):
            rows = [{"step": row["step"], **row.get("other_networks", {}).get(network, {})} for row in rows]
        points = ((row["step"], row.get(own)) for row in rows)
        return [(step, value) for step, value in points if isinstance(value, int | float) and math.isfinite(value)]


class Run(NamedTuple):
    """One work folder.

    folder: the work folder.
    config: the resolved config, {} if config.json is missing.
    versions: package -> version.
    revision: the code's git revision, or "".
    stages: in the order of the pipeline.
    classes: the names of the classes, () if unknown.
    validation: what the scores were measured on, or "".
    evaluated: a checksum of these images and their labels, or "".
    notes: sentences about what is missing.
    """

    folder: Path
    config: Mapping[str, Any]
    versions: Mapping[str, str]
    revision: str
    stages: tuple[StageRun, ...]
    classes: tuple[str, ...]
    validation: str
    evaluated: str
    notes: tuple[str, ...]

    @property
    def title(self) -> str:
        """Config, benchmark and seed, or the folder's name."""
        if "name" not in self.config:
            return self.folder.name
        return f"{self.config['name']} on {self.config.get('benchmark', '?')}, seed {self.config.get('seed', '?')}"

    @property
    def trainings(self) -> list[StageRun]:
        """The stages that train a network."""
        return [stage for stage in self.stages if stage.role != SWEEP]

    @property
    def scored(self) -> list[StageRun]:
        """The stages with a score."""
        return [stage for stage in self.trainings if stage.scored]

    @property
    def outcome(self) -> StageRun | None:
        """The final stage so far: the last adapted stage that has begun, else the last training that has begun."""
        return _last_adapted([stage for stage in self.trainings if stage.status != "missing"])

    @property
    def result(self) -> StageRun | None:
        """As `outcome`, of the stages with a score."""
        return _last_adapted(self.scored)

    @property
    def compared(self) -> list[StageRun]:
        """The last stage with a score of each role, from the baselines to the upper bound."""
        return [stage for stage in map(self.final, (SOURCE_ONLY, CONTROL, ADAPTED, ORACLE)) if stage is not None]

    def final(self, role: str) -> StageRun | None:
        """The last stage of a role that has a score; None if there is none."""
        return next((stage for stage in reversed(self.scored) if stage.role == role), None)


def _last_adapted(stages: list[StageRun]) -> StageRun | None:
    """The last stage that adapts, else the last one that is not a control."""
    others = [stage for stage in stages if stage.role != CONTROL]
    return next((s for s in reversed(others) if s.role == ADAPTED), others[-1] if others else None)


def read_run(folder: Path) -> Run:
    """Reads a work folder.

    Raises:
      UserError: it is not a work folder, or one of its files is corrupt.
    """
    saved = files.read_json(folder / "config.json") or {}
    results = files.read_json(folder / "results.json") or {}
    config = saved.get("config", {})
    known = config.get("pipeline") or [record.parent.name for record in sorted(folder.glob("*/stage.json"))]
    if not known and not results:
        raise UserError(
            f"{folder} is not a work folder: it has neither config.json nor stages; runs are in runs/ by default"
        )
    rows = files.read_json_lines(folder / "metrics.jsonl")
    stages = [_read_stage(folder, name, config, rows, results) for name in known or results["stages"]]
    stages = [stage for stage in stages if stage is not None]
    confusion = next((stage.last["confusion"] for stage in stages if stage.scored), [])
    space = label_space(config)
    classes = tuple(results.get("classes") or (space.classes if space else ()))
    if len(classes) != len(confusion) and confusion:
        classes = tuple(f"class {index}" for index in range(len(confusion)))
    target, split = config.get("target", {}).get("name", ""), config.get("evaluation", {}).get("split", "")
    return Run(
        folder,
        config,
        saved.get("versions", {}),
        saved.get("git") or "",
        tuple(stages),
        classes,
        results.get("validation") or f"{target} {split}".strip(),
        ((results.get("data") or {}).get("evaluation") or {}).get("fingerprint", ""),
        tuple(_notes(saved, stages)),
    )


def open_split(config: Mapping[str, Any], domain: str, split: str | None = None) -> data.Records:
    """The records of a run's "source" or "target": its own split, or another.

    Raises:
      UserError: config.json does not name them, or the data are missing.
    """
    place = config.get(domain, {})
    if not {"name", "split", "path"} <= place.keys():
        raise UserError(f"config.json does not name the data of the {domain}")
    wanted = {each: config[each] for each in ("source", "target") if config.get(each, {}).get("name") or each == domain}
    for named in wanted.values():
        for part in part_names(named["name"]) if named["name"] else ():
            data.labels.dataset(part.partition("/")[0], imported=True)
    wanted |= {"label_space": config.get("label_space", ""), "data_dir": config.get("data_dir", "")}
    return domains.open_records(ConfigDict(wanted), domain, split or place["split"])


def label_space(config: Mapping[str, Any]) -> LabelSpace | None:
    """The classes and colours of a run, from its config, its source or its target; None if all are missing."""
    with contextlib.suppress(UserError):
        if config.get("label_space"):
            return data.labels.label_space(config["label_space"])
        return open_split(config, "source").label_space
    with contextlib.suppress(UserError):  # a run without a source has the classes of its target
        return open_split(config, "target").label_space
    return None


def _read_stage(
    folder: Path, name: str, config: Mapping[str, Any], rows: list[dict], results: Mapping[str, Any]
) -> StageRun | None:
    """One stage of a run; None if its name is not that of a folder in the work folder, or if it was skipped."""
    if Path(name).name != name:
        return None
    record = files.read_json(folder / name / "stage.json") or {}
    settings = config.get(name) or record.get("identity") or {}
    role = _role(settings)
    reported = files.read_json(folder / name / "results.json") or results.get("stages", {}).get(name) or {}
    if role == ORACLE and not record and results and not reported:
        return None  # the target has no labels to train it on
    status = record.get("status") or ("done" if reported else "missing")
    own = _of_stage(rows, name)
    if not own and role != SWEEP and status == "done":
        own = _rows_elsewhere(folder, record.get("fingerprint"))
    return StageRun(
        name,
        role,
        settings,
        status,
        record.get("fingerprint", ""),
        own,
        [row for row in files.read_json_lines(folder / name / "evaluations.jsonl") if "step" in row],
        reported,
    )


def _of_stage(rows: list[dict], name: str) -> list[dict]:
    return [row for row in rows if row.get("stage") == name and "step" in row]


def _rows_elsewhere(folder: Path, fingerprint: str | None) -> list[dict]:
    """The lines that the training of a stage logged in the neighbour of `folder` from which it was taken over."""
    for record in sorted(folder.absolute().parent.glob("*/*/stage.json")) if fingerprint else ():
        with contextlib.suppress(UserError, OSError):  # a neighbour that cannot be read does not matter here
            if (files.read_json(record) or {}).get("fingerprint") == fingerprint:
                stage = record.parent
                rows = _of_stage(files.read_json_lines(stage.parent / "metrics.jsonl"), stage.name)
                if rows:
                    return rows
    return []


def _role(settings: Mapping[str, Any]) -> str:
    if "sweep" in settings:
        return SWEEP
    if settings.get("train") == CONTROL:
        return CONTROL
    if len(settings.get("domains", ())) != 1 or settings.get("labels"):
        return ADAPTED
    return SOURCE_ONLY if settings["domains"][0] == "source" else ORACLE


def _notes(saved: Mapping[str, Any], stages: list[StageRun]) -> list[str]:
    notes = []
    if not saved:
        notes.append("config.json is missing: settings and versions are unknown.")
    waiting = [stage.title for stage in stages if stage.status == "missing"]
    running = [stage.title for stage in stages if stage.status == "started"]
    if waiting or running:
        parts = [f"not finished: {', '.join(running)}"] if running else []
        parts += [f"not begun: {', '.join(waiting)}"] if waiting else []
        notes.append(f"This run is not complete ({'; '.join(parts)}). The same command continues it.")
    trained = [stage for stage in stages if stage.role != SWEEP and stage.status == "done"]
    if trained and not any(stage.scored for stage in stages):
        free = "; see the label-free figures" if any(stage.last for stage in stages) else ""
        notes.append(f"There were no labelled validation images, so there are no scores{free}.")
    adopted = [stage.title for stage in trained if not stage.rows]
    if adopted:
        notes.append(f"Taken over from another work folder, where their losses were logged: {', '.join(adopted)}.")
    return notes
