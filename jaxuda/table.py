"""python -m jaxuda.table --configs configs/source_only.py,configs/minent.py [--benchmarks streets,camvid] [--seeds 0,1]

Runs or resumes every method on every benchmark with every seed, and prints mean and spread of the mIoU.
Stages that several methods share (source only, oracle) are trained once per benchmark and seed; where a method has
its own, they have its name. The table is also written to RUNS/table.md and RUNS/table.json. Further words
(--config.FIELD=VALUE) go to every run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jaxuda import comparing, files, pipeline
from jaxuda.main import guarded, parse

BASELINES = ("source_only", "oracle")
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
      runs: what `pipeline.run` returns, those of one config and benchmark in the order of their seeds.
    """
    rows: dict[tuple[str, str], Row] = {}
    seen: dict[tuple[str, int, str], list[str]] = {}
    for run in runs:
        for stage, result in run["stages"].items():
            if "mean_of_last" not in result:
                continue
            title = stage.replace("_", " ")
            fingerprint = run["fingerprints"][stage]
            others = seen.setdefault((run["benchmark"], run["seed"], stage), [])
            if stage in BASELINES and fingerprint in others:
                continue  # an earlier method's run has the same
            if stage not in BASELINES or others:
                title = f"{run['config']}: {title}"
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
    """What the scores of a run depend on, as far as it is known before it runs."""
    size = tuple(config.evaluation.size)
    return {"label spaces": config.label_space, "evaluation sizes": size, "evaluated splits": config.evaluation.split}


def comparable(results: list[dict[str, Any]]) -> None:
    """Raises a UserError if two runs of one benchmark were not scored on the same classes and images."""
    for benchmark in {result["benchmark"] for result in results}:
        runs = [result for result in results if result["benchmark"] == benchmark]
        comparing.check(
            (
                f"{run['config']} with seed {run['seed']} on {benchmark}",
                {
                    "classes": tuple(run["classes"]),
                    "evaluated images": run["data"]["evaluation"] and run["data"]["evaluation"]["fingerprint"],
                },
            )
            for run in runs
        )


def main(argv: list[str] | None = None) -> int:
    """Parses, runs everything, prints the table."""
    parser = argparse.ArgumentParser(prog="python -m jaxuda.table", description=__doc__.partition("\n\n")[2])
    parser.add_argument("--configs", required=True, type=_listed, help="comma-separated config files")
    parser.add_argument("--benchmarks", default="streets", help="comma-separated")
    parser.add_argument("--seeds", default="0", type=_seeds, help="comma-separated")
    parser.add_argument("--runs", default="runs", type=Path, help="the folder of work folders")
    args, overrides = parser.parse_known_args(argv)
    return guarded(lambda: run_all(args, overrides))


def _listed(text: str) -> list[str]:
    return text.split(",")


def _seeds(text: str) -> list[int]:
    return [int(seed) for seed in text.split(",")]


def run_all(args: argparse.Namespace, overrides: list[str]) -> None:
    """All runs of the table, then the table; nothing runs if some of them cannot be compared."""
    planned = []
    for benchmark in args.benchmarks.split(","):
        configs = {file: parse(["table", f"--config={file}:{benchmark}", *overrides]).config for file in args.configs}
        comparing.check((f"{file}:{benchmark}", facts(config)) for file, config in configs.items())
        planned += [(config, seed) for config in configs.values() for seed in args.seeds]
    results = []
    for config, seed in planned:
        seeded = ConfigDict(config)
        seeded.seed = seed
        results.append(pipeline.run(seeded, args.runs / f"{config.name}-{config.benchmark}-seed{seed}"))
    comparable(results)
    files.write_json(args.runs / "table.json", results)
    files.write_bytes(args.runs / "table.md", (summary(results) + "\n").encode())
    print(summary(results))


if __name__ == "__main__":
    sys.exit(main())
