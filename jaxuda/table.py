"""python -m jaxuda.table --configs configs/source_only.py,configs/minent.py [--benchmarks streets,camvid] [--seeds 0,1]

Runs or resumes every method on every benchmark with every seed, and prints mean and spread of the mIoU.
Stages that several methods share (source only, oracle) are trained once per benchmark and seed. The table is
also written to RUNS/table.md and RUNS/table.json. Further words (--config.FIELD=VALUE) go to every run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

from jaxuda import files, pipeline
from jaxuda.main import guarded, parse

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
    """One stage of one config on one benchmark: `scores` holds a value per seed for each of `SCORES`."""

    benchmark: str
    title: str
    scores: dict[str, list[float]]


def rows_of(runs: list[dict[str, Any]]) -> list[Row]:
    """The rows of a table over seeds.

    Args:
      runs: what `pipeline.run` returns, in any order.
    """
    rows: dict[tuple[str, str], Row] = {}
    baselines = set()
    for run in runs:
        for stage, result in run["stages"].items():
            if "mean_of_last" not in result:
                continue
            title = stage.replace("_", " ") if stage in ("source_only", "oracle") else f"{run['config']}: {stage}"
            if title == stage.replace("_", " ") and (run["benchmark"], run["seed"], stage) in baselines:
                continue  # the same baseline, seen in an earlier method's run
            baselines.add((run["benchmark"], run["seed"], stage))
            place = (run["benchmark"], title)
            row = rows.setdefault(place, Row(*place, {name: [] for name in SCORES}))
            for name, score in SCORES.items():
                row.scores[name].append(score(result))
    return list(rows.values())


def summary(runs: list[dict[str, Any]]) -> str:
    """A Markdown table: one row per benchmark, method and stage, with the scores over seeds.

    Args:
      runs: what `pipeline.run` returns, in any order.
    """
    lines = [f"| benchmark | stage | seeds | {' | '.join(SCORES)} |", "|---" * (3 + len(SCORES)) + "|"]
    for row in rows_of(runs):
        cells = " | ".join(spread(values) for values in row.scores.values())
        lines.append(f"| {row.benchmark} | {row.title} | {len(row.scores['last'])} | {cells} |")
    classes = ", ".join(sorted({f"{len(run['classes'])} on {run['benchmark']}" for run in runs}))
    return "\n".join(
        [
            *lines,
            "",
            f"mIoU in %, mean ± standard deviation over seeds; classes: {classes}. *Chosen with target labels.",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Parses, runs everything, prints the table."""
    parser = argparse.ArgumentParser(prog="python -m jaxuda.table", description=__doc__.partition("\n\n")[2])
    parser.add_argument("--configs", required=True, help="comma-separated config files")
    parser.add_argument("--benchmarks", default="streets", help="comma-separated")
    parser.add_argument("--seeds", default="0", help="comma-separated")
    parser.add_argument("--runs", default="runs", type=Path, help="the folder of work folders")
    args, overrides = parser.parse_known_args(argv)
    return guarded(lambda: run_all(args, overrides))


def run_all(args: argparse.Namespace, overrides: list[str]) -> None:
    """All runs of the table, then the table."""
    results = []
    for benchmark in args.benchmarks.split(","):
        for file in args.configs.split(","):
            for seed in args.seeds.split(","):
                words = [f"--config={file}:{benchmark}", f"--config.seed={seed}", *overrides]
                config = parse(["table", *words]).config
                results.append(pipeline.run(config, args.runs / f"{config.name}-{benchmark}-seed{seed}"))
    files.write_json(args.runs / "table.json", results)
    files.write_bytes(args.runs / "table.md", (summary(results) + "\n").encode())
    print(summary(results))


if __name__ == "__main__":
    sys.exit(main())
