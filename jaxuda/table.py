"""python -m jaxuda.table --configs source_only,minent [--benchmarks streets,camvid] [--seeds 0,1]

Runs or resumes every method on every benchmark with every seed, and prints mean and spread of the mIoU.
Stages that several methods share (source only, oracle) are trained once per benchmark and seed; a method's own stages
have its name. With --labelled 0,4,16 each run is done without labels of the target, and with 4 and 16 of its images
labelled; the oracle has all labels. The table is also written to RUNS/table.md and RUNS/table.json. Further words
(--config.FIELD=VALUE) apply to every run.
"""

from __future__ import annotations

import argparse
import copy
import re
import sys

from jaxuda import files
from jaxuda.cli import Parser, guarded, parse, seeds
from jaxuda.errors import UserError
from jaxuda.files import user_path
from jaxuda.main import run_and_report, run_name


def run(argv: list[str] | None) -> None:
    """Parses the command line, and runs the table."""
    parser = Parser("jaxuda.table", __doc__)
    parser.add_argument(
        "--configs", required=True, type=lambda text: text.split(","), help="comma-separated names or files"
    )
    parser.add_argument("--benchmarks", default="streets", help="comma-separated, such as camvid,camvid,lite")
    parser.add_argument("--seeds", default="0", type=seeds, help="comma-separated")
    parser.add_argument(
        "--labelled", default="", help="comma-separated numbers of labelled target images (default: as in the config)"
    )
    parser.add_argument("--runs", default="runs", type=user_path, help="the folder of work folders")
    run_all(*parser.parse_with_fields(argv))


def run_all(args: argparse.Namespace, overrides: list[str]) -> None:
    """Does all runs, then prints the table; nothing runs if some of them cannot be compared."""
    from jaxuda.pipeline import tables  # here: --help must not wait for JAX
    from jaxuda.pipeline.results import check_comparable
    from jaxuda.training.compile_cache import kept_programs

    planned, numbers = [], _numbers(args.labelled) or [None]
    for benchmark in re.split(r",(?!(?:lite|mit|hrda)\b)", args.benchmarks):  # "streets,lite" is one
        configs = {file: parse(["table", f"--config={file}:{benchmark}", *overrides]).config for file in args.configs}
        check_comparable((f"{file}:{benchmark}", tables.facts(config)) for file, config in configs.items())
        planned += [(config, number, seed) for config in configs.values() for number in numbers for seed in args.seeds]
    results = []
    with kept_programs():
        for config, number, seed in planned:
            seeded = copy.deepcopy(config)
            seeded.seed = seed
            if number is not None:
                seeded.target.labelled = number
            results.append(run_and_report(seeded, args.runs / run_name(seeded)))
    tables.comparable(results)
    files.write_json(args.runs / "table.json", results)
    files.write_bytes(args.runs / "table.md", (tables.summary(results) + "\n").encode())
    print(tables.summary(results))


def _numbers(text: str) -> list[int]:
    """The numbers of --labelled."""
    words = [word for word in text.split(",") if word]
    if wrong := [word for word in words if not word.isdecimal()]:
        raise UserError(f"--labelled {text}: {wrong[0]!r} is no number of images; give numbers such as 0,4,16")
    return [int(word) for word in dict.fromkeys(words)]


def main(argv: list[str] | None = None) -> int:
    """Runs everything, prints the table; returns the exit code, as jaxuda.main does."""
    return guarded(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
