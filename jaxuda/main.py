"""python -m jaxuda.main --config configs/minent.py[:BENCHMARK] [--config.FIELD=VALUE ...]

Runs a recipe, or continues it: the same command again goes on where it stopped.

  --list                      the recipes, benchmarks, datasets and weights, and how to get what is missing
  --config FILE[:BENCHMARK]   the recipe; any field is set by --config.adapt.lr=0.01 and the like
  --workdir DIR               where results go (default runs/CONFIG-BENCHMARK-seedN)
  --seeds 0,1,2               one run per seed, then mean and spread
  --from_stage NAME           set this stage and all after it aside, and run from there
  --mode run|eval|predict     eval: score --checkpoint; predict: label --images 'GLOB' with --checkpoint
  --checkpoint DIR            a stage's folder, such as runs/minent-streets-seed0/adapt
  --dry_run                   trains nothing: says what each stage takes (parameters, arithmetic, memory, time)
  --distributed               one of several processes, as srun or mpirun start them; elsewhere give each
                              --coordinator HOST:PORT --processes N --process 0..N-1 (HOST is that of process 0)

For a start, without any data of your own:

  python -m jaxuda.main --config configs/minent.py                        adapt a small network, in minutes
  python -m jaxuda.main --config configs/minent.py --seeds 0,1,2          three times, with mean and spread
  python -m jaxuda.main --config configs/minent.py --mode predict \\
      --checkpoint runs/minent-streets-seed0/adapt --images photos        label your photos with the result

Other commands, each with its own --help: jaxuda.prepare (datasets, your own folders), jaxuda.report (pages and
comparisons), jaxuda.report.pictures, jaxuda.table (many runs in one table), jaxuda.convert (torch's checkpoints).

Exit codes: 0 done, 75 interrupted (run the same command to continue), 2 a mistake to mend, 1 anything else.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from absl import flags
from ml_collections import ConfigDict, config_flags

from jaxuda import settings
from jaxuda.errors import Interrupted, UserError

INTERRUPTED, MISTAKE = 75, 2


def parse(argv: list[str]) -> flags.FlagValues:
    """The command line; raises UserError for what it does not understand."""
    # Configs import their neighbours as `configs.NAME`, from wherever the command is run.
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        if word.startswith("--config"):
            file = (word.partition("=")[2] or following).partition(":")[0]
            sys.path.insert(0, str(Path(file).absolute().parent.parent))
            break
    else:
        raise UserError("which recipe? Add --config configs/minent.py (--list shows all of them, --help explains)")
    args = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", lock_config=True, flag_values=args, sys_argv=argv)
    for name in ("workdir", "from_stage", "checkpoint", "images"):
        flags.DEFINE_string(name, "", "", flag_values=args)
    flags.DEFINE_list("seeds", [], "", flag_values=args)
    for name in ("dry_run", "distributed"):
        flags.DEFINE_bool(name, False, "", flag_values=args)
    flags.DEFINE_string("coordinator", "", "", flag_values=args)
    flags.DEFINE_integer("processes", 0, "", flag_values=args)
    flags.DEFINE_integer("process", None, "", flag_values=args)
    flags.DEFINE_enum("mode", "run", ["run", "eval", "predict"], "", flag_values=args)
    try:
        rest = args(argv)[1:]
        _ = args.config.name  # a config that could not be loaded says so only when it is used
    except Exception as error:  # a config file is a program: it may fail in any way
        raise UserError(_reason(error)) from error
    if rest:
        raise UserError(f"not understood: {' '.join(rest)} (flags start with --)")
    settings.check(args.config)
    return args


def _reason(error: Exception) -> str:
    """What went wrong with the command line or a config file; a mistake in the file's code tells its line."""
    text = str(error).strip("'\"")
    if "Traceback (most recent call last)" in text:  # ml_collections puts the whole of it there
        places = [line.strip() for line in text.splitlines() if line.strip().startswith('File "')]
        kind, _, text = text.strip().splitlines()[-1].partition(": ")
        return text if kind == "ValueError" else f"{kind}: {text} ({places[-1]})"
    if isinstance(error, flags.Error | AttributeError | LookupError | TypeError | ValueError | OSError):
        return text
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text} ({place.filename}, line {place.lineno})"


def join_processes(args: flags.FlagValues) -> None:
    """Meets the other processes of the run, if there are any."""
    if args.distributed or args.coordinator or args.processes or args.process is not None:
        if args.mode != "run":
            raise UserError(f"--mode {args.mode} runs in a single process, with all the devices that it sees")
        from jaxuda import parallel

        parallel.start_processes(args.coordinator, args.processes, args.process)


def default_workdir(config: ConfigDict, workdir: str) -> Path:
    """The work folder that the user names, or one named after the run."""
    return Path(workdir) if workdir else Path("runs") / f"{config.name}-{config.benchmark}-seed{config.seed}"


def run_seeds(config: ConfigDict, seeds: list[int], workdir: str, from_stage: str) -> None:
    """One run per seed, and their mean and spread if there are several."""
    from jaxuda import parallel, pipeline, table

    results = []
    for seed in seeds:
        seeded = ConfigDict(config)
        seeded.seed = seed
        folder = default_workdir(seeded, workdir)
        results.append(
            pipeline.run(seeded, folder / f"seed{seed}" if workdir and len(seeds) > 1 else folder, from_stage)
        )
    if len(seeds) > 1 and parallel.is_first():
        print(table.summary(results))


def run_mode(argv: list[str]) -> None:
    """What the command line asks for."""
    if "--list" in argv:
        from jaxuda.listing import listing

        print(listing())
        return
    args = parse(argv)
    join_processes(args)
    from jaxuda import use

    overrides = config_flags.get_override_values(args["config"])

    if args.dry_run:
        from jaxuda import cost

        print(cost.dry_run(args.config, default_workdir(args.config, args.workdir)))
    elif args.mode == "run":
        if not all(seed.isdecimal() for seed in args.seeds):
            raise UserError(f"--seeds {','.join(args.seeds)}: must be whole numbers with commas between them")
        seeds = [int(seed) for seed in args.seeds] or [args.config.seed]
        run_seeds(args.config, seeds, args.workdir, args.from_stage)
    elif args.mode == "eval":
        use.evaluate(args.config, args.checkpoint, overrides)
    else:
        use.predict(args.config, args.checkpoint, args.images, args.workdir, overrides)


def guarded(work: Callable[[], None]) -> int:
    """Runs a command; what users can mend, and interruptions, become one message and an exit code."""
    try:
        with _exit_on_termination():
            work()
    except Interrupted as reason:
        print(reason, file=sys.stderr)
        return INTERRUPTED
    except KeyboardInterrupt:
        print("interrupted; the same command continues from what is saved", file=sys.stderr)
        return INTERRUPTED
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG):
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(
            f"error: {error.strerror}{where}: mend that, then run the same command again; it continues", file=sys.stderr
        )
        return MISTAKE
    return 0


@contextlib.contextmanager
def _exit_on_termination() -> Iterator[None]:
    """SIGTERM ends the process at once, wherever no training loop takes it more gently, as a requeue expects it.

    Nothing is lost, as nothing is when it is killed; an exception instead could come where Python swallows it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        os.write(2, b"terminated; the same command continues from what is saved\n")
        os._exit(INTERRUPTED)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(argv: list[str] | None = None) -> int:
    """Parses, dispatches, and turns errors into exit codes."""
    argv = sys.argv if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(__doc__)
        return 0
    return guarded(lambda: run_mode(argv))


if __name__ == "__main__":
    sys.exit(main())
