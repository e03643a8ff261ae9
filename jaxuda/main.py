"""jaxuda --config minent[:BENCHMARK] [--config.FIELD=VALUE ...]   (the same: python -m jaxuda.main ...)

Runs a recipe, or continues it: the same command again continues a run that was stopped.

  --list                      the recipes, benchmarks, datasets and weights, and how to get what is missing
  --config NAME[:BENCHMARK]   the recipe, or a file of your own; set any field with --config.adapt.lr=0.01 and the like
  --workdir DIR               where results go (default runs/CONFIG-BENCHMARK-seedN)
  --seeds 0,1,2               one run per seed, then mean and spread
  --from_stage NAME           set this stage and all after it aside, and run from there
  --mode run|eval|predict     eval: score --checkpoint; predict: label --images with --checkpoint, also without --config
  --checkpoint DIR            a stage's folder, such as runs/minent-streets-seed0/adapt
  --images PATH               a folder, a file or a quoted pattern such as 'photos/*.jpg', for --mode predict
  --image_bits N              the bits that images of 16 bits use, such as 12, for --mode predict
  --dry_run                   train nothing; print what each stage costs (parameters, arithmetic, memory, time)
  --distributed               one of several processes, as srun or mpirun start them; elsewhere give each process
                              --coordinator HOST:PORT --processes N --process 0..N-1 (HOST runs process 0)

For a start, without any data of your own:

  jaxuda --config minent                         adapt a small network, in minutes
  jaxuda --config minent --seeds 0,1,2           three times, with mean and spread
  jaxuda --mode predict --checkpoint runs/minent-streets-seed0/adapt \\
      --images photos --workdir labelled         label your photos with the result

Other commands, each with its own --help: jaxuda.prepare (datasets, your own folders), jaxuda.report (pages and
comparisons), jaxuda.report.pictures, jaxuda.table (many runs in one table), jaxuda.convert (torch's checkpoints),
jaxuda.submit (predictions for test servers).

If a flag is given twice, the last one counts. Exit codes of all commands: 0 done, 75 interrupted (run the same command
to continue), 2 a mistake to correct, 1 anything else.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from jaxuda.cli import CONTINUES, guarded, parse, reader_left, seeds
from jaxuda.errors import Interrupted, UserError


def join_processes(args: flags.FlagValues) -> None:
    """Connects to the other processes of the run, if there are any."""
    if args.distributed or args.coordinator or args.processes or args.process is not None:
        if args.mode != "run":
            raise UserError(f"--mode {args.mode} runs in a single process, with all the devices that it sees")
        from jaxuda import parallel

        parallel.start_processes(args.coordinator, args.processes, args.process)


def default_workdir(config: ConfigDict, workdir: str) -> Path:
    """The work folder that the user names, else one named after the run."""
    return Path(workdir) if workdir else Path("runs") / run_name(config)


def run_name(config: ConfigDict) -> str:
    """The name of a run's work folder, from its recipe, benchmark and seed, and its labelled target images, if any."""
    labelled = config.get("target", {}).get("labelled")
    few = f"-labelled-{Path(str(labelled)).stem}" if labelled else ""
    return f"{config.name}-{config.benchmark.replace(',', '-')}{few}-seed{config.seed}"


def run_and_report(config: ConfigDict, workdir: Path, from_stage: str = "") -> dict[str, Any]:
    """Runs a recipe, then writes its page; returns its results. Raises Interrupted if the output is a closed pipe."""
    from jaxuda import parallel, report
    from jaxuda.pipeline import recipe

    try:
        results = recipe.run(config, workdir, from_stage)
    except BrokenPipeError as error:
        if reader_left(sys.stdout):
            raise Interrupted(f"nobody reads the output any more; {CONTINUES}") from error
        raise
    parallel.on_first(lambda: report.refresh(workdir))
    return results


def run_seeds(config: ConfigDict, chosen: list[int], workdir: str, from_stage: str) -> None:
    """One run per seed, and their mean and spread if there are several."""
    from jaxuda import parallel
    from jaxuda.pipeline import tables

    results = []
    for seed in chosen:
        seeded = copy.deepcopy(config)
        seeded.seed = seed
        folder = default_workdir(seeded, workdir)
        if workdir and len(chosen) > 1:
            folder = folder / f"seed{seed}"
        results.append(run_and_report(seeded, folder, from_stage))
    if len(chosen) > 1 and parallel.is_first():
        print(tables.summary(results))


def run_mode(argv: list[str]) -> None:
    """Runs what the command line asks for."""
    if "--help" in argv or "-h" in argv:
        print(__doc__)
        return
    if "--list" in argv:
        from jaxuda.pipeline.listing import listing

        print(listing())
        return
    args = parse(argv)
    join_processes(args)
    if args.seeds and args.mode != "run":
        raise UserError(f"--seeds belongs to --mode run; --mode {args.mode} uses the stage that --checkpoint names")
    from jaxuda.training.compile_cache import kept_programs

    with kept_programs():
        _run(args)


def _run(args: flags.FlagValues) -> None:
    """Does what the parsed command line asks for."""
    from jaxuda.pipeline import use

    overrides = config_flags.get_override_values(args["config"]) if args.config is not None else {}
    if args.dry_run:
        from jaxuda.pipeline import cost

        print(cost.dry_run(args.config, default_workdir(args.config, args.workdir)))
    elif args.mode == "run":
        chosen = seeds(args.seeds) if args.seeds else [args.config.seed]
        run_seeds(args.config, chosen, args.workdir, args.from_stage)
    elif args.mode == "eval":
        use.evaluate(args.config, args.checkpoint, overrides)
    else:
        use.predict(args.config, args.checkpoint, args.images, args.workdir, overrides, args.image_bits)


def main(argv: list[str] | None = None) -> int:
    """Parses, runs, and turns errors into exit codes."""
    return guarded(lambda: run_mode(sys.argv if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
