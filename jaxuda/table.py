"""python -m jaxuda.table --configs configs/source_only.py,configs/minent.py [--benchmarks streets,camvid] [--seeds 0,1]

Runs or resumes every method on every benchmark with every seed, and prints mean and spread of the mIoU.
Stages that several methods share (source only, oracle) are trained once per benchmark and seed; where a method has
its own, they have its name. The table is also written to RUNS/table.md and RUNS/table.json. Further words
(--config.FIELD=VALUE) go to every run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ml_collections import ConfigDict

from jaxuda import files
from jaxuda.cli import guarded, parse
from jaxuda.main import run_and_report
from jaxuda.pipeline.results import check_comparable
from jaxuda.pipeline.tables import comparable, facts, summary


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
        check_comparable((f"{file}:{benchmark}", facts(config)) for file, config in configs.items())
        planned += [(config, seed) for config in configs.values() for seed in args.seeds]
    results = []
    for config, seed in planned:
        seeded = ConfigDict(config)
        seeded.seed = seed
        results.append(run_and_report(seeded, args.runs / f"{config.name}-{config.benchmark}-seed{seed}"))
    comparable(results)
    files.write_json(args.runs / "table.json", results)
    files.write_bytes(args.runs / "table.md", (summary(results) + "\n").encode())
    print(summary(results))


if __name__ == "__main__":
    sys.exit(main())
