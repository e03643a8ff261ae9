"""The page that compares several runs."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxuda.pipeline import results
from jaxuda.pipeline import tables as seeds
from jaxuda.report import charts, page, tables
from jaxuda.report.gallery import Gallery
from jaxuda.report.markup import Markup, join, tag
from jaxuda.report.runs import ADAPTED, CONTROL, ORACLE, SOURCE_ONLY, Run, StageRun


class Column(NamedTuple):
    """A stage of a run under the name that it has on the page."""

    name: str
    run: Run
    stage: StageRun


def comparison_page(runs: Sequence[Run], galleries: Mapping[int, Gallery], notes: Sequence[str] = ()) -> str:
    """Several runs on one page, as HTML.

    Args:
      runs: in the order in which they are shown.
      galleries: index of the run -> its pictures, if there are any.
      notes: further lines for the reader.
    """
    names = run_names(runs)
    notes = [*(f"{name}: {note}" for name, run in zip(names, runs, strict=True) for note in run.notes), *notes]
    finals = _finals(runs, names)
    sections: list[page.Section] = [
        ("results", "Results", join(_scores(runs, names), _over_seeds(runs), _over_labels(runs))),
        ("pictures", "Pictures", _gallery(runs, names, galleries)),
        ("curves", "Curves", _curves(runs, names)),
        ("classes", "Classes", _classes(finals)),
        ("ran", "What differs", _differences(runs, names)),
    ]
    head = tag("p", f"{len(runs)} runs. Scores are those of last checkpoints, in %.", class_="headline")
    return page.document(f"Comparison of {len(runs)} runs", head, notes, sections)


def check_comparable(runs: Sequence[Run]) -> None:
    """Raises a UserError if the runs were scored on other classes, images or evaluation sizes."""
    results.check_comparable((name, _facts(run)) for name, run in zip(run_names(runs), runs, strict=True))


def _facts(run: Run) -> dict[str, Any]:
    """What the scores of a run depend on, as far as its work folder has it."""
    size = run.config.get("evaluation", {}).get("size")
    numbered = run.classes[:1] == ("class 0",)  # their names are not known
    return {
        "numbers of classes": len(run.classes) or None,
        "classes": None if numbered else run.classes or None,
        "evaluation sizes": tuple(size) if size else None,
        "evaluated images": run.evaluated or None,
    }


def run_names(runs: Sequence[Run]) -> list[str]:
    """A unique name for each run."""
    titles = Counter(run.title for run in runs)
    names = [run.title if titles[run.title] == 1 else f"{run.title} ({run.folder.name})" for run in runs]
    return names if len(set(names)) == len(names) else [f"{name} [{i}]" for i, name in enumerate(names, 1)]


def _finals(runs: Sequence[Run], names: Sequence[str]) -> list[Column]:
    """The final stage of each run: its last adapted stage, else its last stage with a score."""
    pairs = zip(names, runs, strict=True)
    return [Column(f"{name}: {run.result.title}", run, run.result) for name, run in pairs if run.result is not None]


def _scores(runs: Sequence[Run], names: Sequence[str]) -> Markup:
    baselines = [role for role in (SOURCE_ONLY, CONTROL) if role == SOURCE_ONLY or any(run.final(role) for run in runs)]
    rows = []
    for name, run in zip(names, runs, strict=True):
        after, best = run.final(ADAPTED), run.final(ORACLE)
        before = [stage.last["miou"] if (stage := run.final(role)) else None for role in baselines]
        adapted = after.last["miou"] if after else None
        mean = after.results.get("mean_of_last", {}) if after else {}
        chosen = after.results.get("best_on_val_using_target_labels", {}) if after else {}
        rows.append(
            [
                name,
                run.validation,
                len(run.classes) or tables.NONE,
                after.title if after else tables.NONE,
                *map(tables.percent, [*before, adapted, best.last["miou"] if best else None]),
                *(tables.gain(adapted, score) for score in before),
                tables.percent(mean.get("miou")),
                tables.percent(chosen.get("miou")),
            ]
        )
    head = ["run", "measured on", "classes", "adapted stage", *baselines, ADAPTED, ORACLE]
    head += [f"gain over {role}" for role in baselines]
    head += ["adapted, mean of the last few", "adapted, best on val (uses target labels) *"]
    chosen = "* This checkpoint was chosen with target labels, which an unlabelled target does not have."
    caption = "mIoU in %, last checkpoint of each stage, except in the column marked *"
    return join(tables.table(caption, head, rows), tag("p", chosen, class_="faint"))


def _rows(runs: Sequence[Run]) -> list[seeds.Row]:
    """The rows of a table over seeds."""
    return seeds.rows_of(
        [
            {
                "config": run.config["name"],
                "benchmark": run.config["benchmark"],
                "seed": run.config["seed"],
                "target_labels": _target_labels(run),
                "fingerprints": {stage.name: stage.fingerprint for stage in run.scored},
                "stages": {stage.name: stage.results for stage in run.scored},
            }
            for run in runs
            if run.scored and "name" in run.config
        ]
    )


def _target_labels(run: Run) -> int:
    """The number of target images whose labels a run learned from, beside the oracle; a list of them counts as -1."""
    labelled = run.config.get("target", {}).get("labelled") or 0
    return labelled if isinstance(labelled, int) else -1


def _over_labels(runs: Sequence[Run]) -> Markup | None:
    """The mIoU, mean over seeds, against the number of labelled target images, if runs differ in it."""
    numbers = sorted({number for run in runs if (number := _target_labels(run)) >= 0})
    if len(numbers) < 2 or len({run.config.get("benchmark") for run in runs}) > 1:
        return None
    found: dict[str, dict[int, float]] = {}
    for number in numbers:
        for row in _rows([run for run in runs if _target_labels(run) == number]):
            name = row.title.partition(",")[0]
            found.setdefault(name, {})[number] = 100 * statistics.mean(row.scores["last"])
    if (oracle := found.get(ORACLE)) and len(oracle) < len(numbers):
        found[ORACLE] = dict.fromkeys(numbers, statistics.mean(oracle.values()))
    series = [charts.Series(name, index, sorted(at.items())) for index, (name, at) in enumerate(found.items())]
    title, x_label = "mIoU in %, mean over seeds", "labelled images of the target"
    chart = charts.fitted(lambda width: charts.line_chart(series, title, x_label, width=width))
    return tag("figure", chart, tag("figcaption", charts.legend(series)))


def _over_seeds(runs: Sequence[Run]) -> Markup | None:
    """Mean and spread of runs that differ in their seed, if there are any."""
    rows = _rows(runs)
    several = [row for row in rows if len(row.scores["last"]) > 1]
    if not several:
        return None
    head = ["stage", "benchmark", "seeds", *several[0].scores]
    cells = [[r.title, r.benchmark, len(r.scores["last"]), *map(seeds.spread, r.scores.values())] for r in several]
    return tables.table("mIoU in %, mean ± standard deviation over seeds. best*: uses target labels", head, cells)


def _classes(finals: Sequence[Column]) -> Markup | None:
    """A table and bars per list of classes: runs on different classes cannot be compared."""
    groups: dict[tuple[str, ...], list[Column]] = {}
    for column in finals:
        groups.setdefault(column.run.classes, []).append(column)
    parts = []
    for classes, columns in groups.items():
        scores = [np.array([np.nan if v is None else v for v in c.stage.last["iou"]]) for c in columns]
        rows = [[name, *(tables.percent(float(iou[i])) for iou in scores)] for i, name in enumerate(classes)]
        means = [f"mIoU ({len(classes)} classes)", *(tables.percent(c.stage.last["miou"]) for c in columns)]
        head = ["class", *(c.name for c in columns)]
        bars = page.iou_bars(classes, {c.name: (i, c.stage) for i, c in enumerate(columns)})
        parts += [tables.table("IoU in %, last checkpoint of each run's adapted stage", head, rows, [means]), bars]
    return join(parts) if parts else None


def _curves(runs: Sequence[Run], names: Sequence[str]) -> Markup | None:
    """The curves of each run, next to each other."""
    parts = []
    for name, run in zip(names, runs, strict=True):
        pair = [
            page.stage_curves(run, "loss", "Loss, as each stage defines it"),
            page.stage_curves(run, "val/miou", f"mIoU in % on {run.validation}", 100),
        ]
        if any(pair):
            parts.append(join(tag("h3", name), tag("div", pair, class_="charts")))
    merged = _adapted_curves(runs, names)
    return join(merged, tag("details", tag("summary", "Run by run"), parts)) if parts else None


def _adapted_curves(runs: Sequence[Run], names: Sequence[str]) -> Markup | None:
    """mIoU over the steps of adaptation: the adapted stages of each run, one after the other."""
    series = []
    for index, (name, run) in enumerate(zip(names, runs, strict=True)):
        offset, points = 0, []
        for stage in run.trainings:
            if stage.role == ADAPTED:
                points += [(offset + step, 100 * value) for step, value in stage.curve("val/miou")]
                offset += stage.steps
        if points:
            series.append(charts.Series(name, index, points))
    if not series:
        return None
    title, x_label = "mIoU in % while adapting", "steps of the adapted stages, one after the other"
    chart = charts.fitted(lambda width: charts.line_chart(series, title, x_label, width=width))
    return tag("figure", chart, tag("figcaption", charts.legend(series)))


def _gallery(runs: Sequence[Run], names: Sequence[str], galleries: Mapping[int, Gallery]) -> Markup | None:
    """The pictures of the first run, with the predictions of the final stages of all runs on the same data."""
    shown = {i: g for i, g in galleries.items() if g.data == next(iter(galleries.values())).data}
    if not shown:
        return None
    first = next(iter(shown.values()))
    layers = []
    for place, picture in enumerate(first.pictures):
        predicted: dict[str, Any] = {}
        for index, gallery in shown.items():
            stage = runs[index].outcome
            if stage is not None and stage.name in gallery.pictures[place].labels:
                predicted[f"{names[index]}: {stage.title}"] = gallery.pictures[place].labels[stage.name]
        layers.append(page.picture_layers(picture, predicted, first.space))
    return page.slider(first, layers)


def _differences(runs: Sequence[Run], names: Sequence[str]) -> Markup:
    configs = [tables.flat(run.config) | {f"version of {k}": v for k, v in run.versions.items()} for run in runs]
    fields = sorted(set().union(*configs))
    rows = []
    for field in fields:
        values = [str(config.get(field, tables.NONE)) for config in configs]
        if len(set(values)) > 1:
            rows.append([field, *(tag("code", value) for value in values)])
    return tables.table("Settings and versions that are not the same in all runs", ["field", *names], rows, kind="text")
