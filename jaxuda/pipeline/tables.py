"""Tables over methods, benchmarks and seeds."""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jaxuda.pipeline.results import check_comparable

ORACLE = "oracle"
BASELINES = ("source_only", ORACLE)
SCORES = {
    "last": lambda result: result["last"]["miou"],
    "mean of last": lambda result: result["mean_of_last"]["miou"],
    "best*": lambda result: result["best_on_val_using_target_labels"]["miou"],
}


def spread(values: list[float]) -> str:
    """Mean and sample standard deviation, in percent."""
    mean = f"{100 * statistics.mean(values):.1f}"
    return mean if len(values) < 2 else f"{mean} ± {100 * statistics.stdev(values):.1f}"


class Row(NamedTuple):
    """One stage of one config on one benchmark: `scores` holds a value per run for each of `SCORES`."""

    benchmark: str
    title: str
    scores: dict[str, list[float]]


def rows_of(runs: list[dict[str, Any]]) -> list[Row]:
    """The rows of a table over seeds.

    Args:
      runs: what `pipeline.run` returns; the runs of one config and benchmark in the order of their seeds. Stages that
        learned from a few labels of the target say from how many.
    """
    rows: dict[tuple[str, str], Row] = {}
    seen: dict[tuple[str, int, str, int], list[str]] = {}
    for run in runs:
        for stage, result in run["stages"].items():
            if "mean_of_last" not in result:
                continue
            title = stage.replace("_", " ")
            fingerprint = run["fingerprints"][stage]
            few = run.get("target_labels", 0) * (stage != ORACLE)
            others = seen.setdefault((run["benchmark"], run["seed"], stage, few), [])
            if stage in BASELINES and fingerprint in others:
                continue  # an earlier method's run has the same stage
            if stage not in BASELINES or others:
                title = f"{run['config']}: {title}"
            title += f", {few if few > 0 else 'listed'} target labels" if few else ""
            others.append(fingerprint)
            place = (run["benchmark"], title)
            row = rows.setdefault(place, Row(*place, {name: [] for name in SCORES}))
            for name, score in SCORES.items():
                row.scores[name].append(score(result))
    return list(rows.values())


def summary(runs: list[dict[str, Any]]) -> str:
    """A Markdown table: one row per benchmark, method and stage, with the scores of each seed and over all.

    Args:
      runs: as for `rows_of`.
    """
    lines = [f"| benchmark | stage | seeds | last, by seed | {' | '.join(SCORES)} |", "|---" * (4 + len(SCORES)) + "|"]
    for row in rows_of(runs):
        last = row.scores["last"]
        cells = [len(last), " ".join(f"{100 * miou:.1f}" for miou in last), *map(spread, row.scores.values())]
        lines.append(f"| {' | '.join([row.benchmark, row.title, *map(str, cells)])} |")
    classes = ", ".join(sorted({f"{len(run['classes'])} on {run['benchmark']}" for run in runs}))
    return "\n".join(
        [
            *lines,
            "",
            f"mIoU in %, mean ± standard deviation over seeds; classes: {classes}. *Chosen with target labels.",
        ]
    )


def facts(config: ConfigDict) -> dict[str, Any]:
    """What the scores of a run depend on, as far as known before it runs."""
    size = tuple(config.evaluation.size)
    return {"label spaces": config.label_space, "evaluation sizes": size, "evaluated splits": config.evaluation.split}


def comparable(results: list[dict[str, Any]]) -> None:
    """Raises a UserError if two runs of one benchmark were not scored on the same classes and images."""
    for benchmark in {result["benchmark"] for result in results}:
        runs = [result for result in results if result["benchmark"] == benchmark]
        check_comparable(
            (
                f"{run['config']} with seed {run['seed']} on {benchmark}",
                {
                    "classes": tuple(run["classes"]),
                    "evaluated images": run["data"]["evaluation"] and run["data"]["evaluation"]["fingerprint"],
                },
            )
            for run in runs
        )
