"""What all commands share: parsing the command line, and turning errors into messages and exit codes."""

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
from ml_collections import config_flags

from jaxuda.errors import Interrupted, UserError
from jaxuda.pipeline import settings

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
