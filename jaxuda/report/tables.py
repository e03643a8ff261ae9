"""The tables of a report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxuda.report.markup import Markup, join, tag
from jaxuda.report.runs import ADAPTED, CONTROL, ORACLE, SOURCE_ONLY, SWEEP, Run, StageRun

NONE = "-"  # as in the tables on the terminal
ROLES = {
    SOURCE_ONLY: "labels of the source alone",
    CONTROL: "trained as the adaptation, without its loss on the target",
    ADAPTED: "adapted to the target without its labels",
    ORACLE: "trained with target labels",
    SWEEP: "a pass over the data",
}
FIGURES = {
    "entropy": "mean entropy of the predictions, 0 to 1",
    "diversity": "entropy of the mean prediction, 0 to 1; low: collapsed to few classes",
    "snd": "soft neighbourhood density",
}


def percent(share: Any) -> str:
    """A share in percent with one digit; a dash for None and NaN."""
    return NONE if share is None or not math.isfinite(share) else f"{100 * share:.1f}"


def gain(after: Any, before: Any) -> str:
    """The difference of two shares in points, with its sign."""
    known = all(value is not None and math.isfinite(value) for value in (after, before))
    return f"{100 * (after - before):+.1f}" if known else NONE


def table(
    caption: str, head: Sequence[Any], rows: Sequence[Sequence[Any]], foot: Sequence[Sequence[Any]] = (), kind: str = ""
) -> Markup:
    """A table whose first column names the rows; a wide table can be scrolled with the keyboard."""

    def row(cells: Sequence[Any]) -> Markup:
        return tag("tr", tag("th", cells[0], scope="row"), [tag("td", cell) for cell in cells[1:]])

    parts = [
        tag("thead", tag("tr", [tag("th", cell, scope="col") for cell in head])),
        tag("tbody", map(row, rows)),
        tag("tfoot", map(row, foot)) if foot else None,
    ]
    return _scrolled(caption, parts, kind)


def _scrolled(caption: str, parts: Sequence[Markup | None], kind: str, style: str | None = None) -> Markup:
    """A table in a box that scrolls; its caption stays outside. page.js shows the hint if the table is too wide."""
    hint = tag("span", " (scroll sideways \N{RIGHTWARDS ARROW})", class_="hint", aria_hidden="true")
    body = tag("table", parts, class_=kind or None, style=style, aria_label=caption)
    box = tag("div", body, class_="scroll", tabindex=0, role="group", aria_label=caption)
    return tag("div", tag("p", caption, hint, class_="caption"), box)


def results(run: Run) -> Markup:
    """IoU per class and mean IoU of every stage with a score, and its other scores."""
    stages = run.scored
    columns = [(stage, network, found) for stage in stages for network, found in stage.networks.items()]
    last = run.final(ADAPTED)
    baselines = [stage for stage in map(run.final, (SOURCE_ONLY, CONTROL)) if stage and last]
    head = [
        "class",
        *(tag("span", s.titled(network), tag("small", _when(s), ROLES[s.role])) for s, network, _ in columns),
    ]
    head += [join("gain", tag("small", f"{last.title} over {stage.title}")) for stage in baselines]

    def line(name: str, score: Callable[[StageRun, Mapping[str, Any]], Any]) -> list[Any]:
        """`score` takes a stage and the last evaluation of one of its networks."""
        gains = (gain(score(last, last.last), score(stage, stage.last)) for stage in baselines)
        return [name, *(percent(score(stage, found)) for stage, _, found in columns), *gains]

    def reported(result: str) -> Callable[[StageRun, Mapping[str, Any]], Any]:
        """A score in the results of a stage, which only the network has that the stage is scored with."""
        return lambda stage, found: stage.results.get(result, {}).get("miou") if found is stage.last else None

    rows = [line(name, lambda _, found, i=index: found["iou"][i]) for index, name in enumerate(run.classes)]
    means = [stage.results.get("mean_of_last", {}) for stage in stages]
    count = "/".join(str(n) for n in sorted({m["count"] for m in means if m})) or "few"
    beside = dict.fromkeys(name for stage in stages for name in stage.last.get("beside", {}))
    foot = [
        line(f"mIoU ({len(run.classes)} classes)", lambda _, found: found["miou"]),
        line("pixel accuracy", lambda _, found: found["pixel_accuracy"]),
        *(line(f"mIoU, {n}", lambda _, found, n=n: found.get("beside", {}).get(n, {}).get("miou")) for n in beside),
        line(f"mIoU, mean of the last {count} evaluations", reported("mean_of_last")),
        line("mIoU, best on val (uses target labels) *", reported("best_on_val_using_target_labels")),
    ]
    caption = f"IoU in % on {run.validation}. Checkpoint: the last of each stage, except in the row marked *."
    chosen = "* This checkpoint was chosen with target labels, which an unlabelled target does not have."
    return join(table(caption, head, rows, foot), tag("p", chosen, class_="faint"))


def _when(stage: StageRun) -> str | None:
    step = stage.last.get("step", 0)
    return None if stage.status == "done" else f"so far: step {step} of {stage.steps}; "


def label_free(run: Run) -> Markup | None:
    """The figures that need no labels, from the last evaluation of each stage; None if nothing was evaluated."""
    stages = [stage for stage in run.trainings if stage.last]
    if not stages:
        return None
    rows = [
        [join(name, tag("small", f" {meaning}")), *(_figure(stage.last.get(name)) for stage in stages)]
        for name, meaning in FIGURES.items()
    ]
    return table("Label-free figures, last checkpoint", ["figure", *(stage.title for stage in stages)], rows)


def _figure(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) and math.isfinite(value) else NONE


def confusion(run: Run, stage: StageRun) -> Markup:
    """How the pixels of each class were predicted, in % of the class."""
    counts = np.asarray(stage.last["confusion"], float)
    total = counts.sum(1, keepdims=True)
    shares = np.divide(100 * counts, total, out=np.zeros_like(counts), where=total > 0)
    rows = []
    for name, row, there in zip(run.classes, shares, total[:, 0], strict=True):
        cells = (tag("td", f"{v:.0f}" if there else NONE, style=f"--share:{v:.0f}") for v in row)
        rows.append(tag("tr", tag("th", name, scope="row"), cells))
    head = tag("tr", tag("td"), [tag("th", name, scope="col") for name in run.classes])
    caption = f"{stage.title}: rows are the true class, columns the predicted one, in % of the row's pixels"
    return _scrolled(caption, [tag("thead", head), tag("tbody", rows)], "confusion", f"--columns:{len(rows)}")


def stages(run: Run) -> Markup:
    """What ran, stage by stage."""
    rows = []
    for stage in run.stages:
        start = str(stage.settings.get("init", ""))
        if start.endswith(":best"):
            start += " (that checkpoint was chosen with target labels)"
        what = stage.settings.get("train") or stage.settings.get("sweep") or NONE
        rows.append([stage.title, ROLES[stage.role], what, start or NONE, stage.steps or NONE, stage.status])
    head = ["stage", "kind", "method or sweep", "starts from", "steps", "status"]
    return table("Stages, in the order in which they run", head, rows, kind="text")


def data(run: Run) -> Markup:
    """Source, target and evaluation data."""
    rows = []
    for domain in ("source", "target"):
        place = run.config.get(domain, {})
        rows.append([domain, place.get("name") or NONE, place.get("split", NONE), place.get("path") or NONE])
    place = run.config.get("target", {})
    if place.get("name"):
        split = run.config.get("evaluation", {}).get("split", NONE)
        rows.append(["evaluation", place["name"], split, place.get("path") or NONE])
    for entry in run.config.get("evaluation", {}).get("also", ()):
        name, _, split = entry.rpartition(":")
        rows.append(["evaluation", name, split, NONE])
    return table("Data", ["domain", "dataset", "split", "folder"], rows, kind="text")


def versions(run: Run) -> Markup:
    """Packages and the code's revision."""
    rows = [*run.versions.items(), ("git revision", run.revision or NONE)]
    return table("Versions", ["package", "version"], rows, kind="text")


def settings(config: Mapping[str, Any]) -> Markup:
    """Every field of a config."""
    rows = [(field, tag("code", str(value))) for field, value in sorted(flat(config).items())]
    return table("Settings, as they were used", ["field", "value"], rows, kind="text")


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted field -> value."""
    found = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found
