"""Shared by all commands: parses the command line, and turns errors into messages and exit codes.

Nothing here imports JAX before a recipe is read: `--help` and messages about mistyped flags come at once.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import importlib.machinery
import importlib.util
import os
import re
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from absl import flags
from ml_collections import ConfigDict, config_flags

from jaxuda.errors import Interrupted, UserError
from jaxuda.files import user_path
from jaxuda.plugins import RECIPES

INTERRUPTED, MISTAKE = 75, 2
CONTINUES = "the same command continues from what is saved"
# The type that a flag's parser names -> what its value must be.
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "True or False",
    "tuple": "a tuple such as '(256, 128)'",
}
# Errors of the file system that the user can correct.
_CORRECTABLE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENAMETOOLONG, errno.EEXIST, errno.EISDIR, errno.ENOTDIR),
}


def parse(argv: Sequence[str]) -> flags.FlagValues:
    """The flags of a run; `.config` is the recipe with every `--config.FIELD=VALUE` applied.

    It is None for `--mode predict` without a recipe: the checkpoint is enough.

    Args:
      argv: the name of the command, then its words. If a flag is given twice, the last one counts.

    Raises:
      UserError: the recipe cannot be read, or a flag, a field of the recipe or a value is not understood.
    """
    recipe, words = _take_recipe(argv)
    config = load_config(recipe) if recipe else None
    if config is not None:
        _add_networks(config, words)
        _check_fields(config, words)
        words = _last_of_each(config, words)
    args = flags.FlagValues()
    for name in ("workdir", "from_stage", "checkpoint", "images", "coordinator", "seeds"):
        flags.DEFINE_string(name, "", "", flag_values=args)
    for name in ("dry_run", "distributed"):
        flags.DEFINE_bool(name, False, "", flag_values=args)
    flags.DEFINE_integer("processes", 0, "", flag_values=args)
    flags.DEFINE_integer("process", None, "", flag_values=args)
    flags.DEFINE_integer("image_bits", 16, "", lower_bound=8, upper_bound=16, flag_values=args)
    flags.DEFINE_enum("mode", "run", ["run", "eval", "predict"], "", flag_values=args)
    try:
        if config is None:
            flags.DEFINE_string("config", None, "", flag_values=args)
        else:
            config_flags.DEFINE_config_dict("config", config, flag_values=args, sys_argv=words)
        rest = args(words)[1:]
    except flags.UnrecognizedFlagError as error:
        known = [f"--{name}" for name in (*args, "config", "list", "help")]
        raise unknown(f"--{error.flagname}", [*known, *(f"--config.{field}" for field in config or ())]) from error
    except flags.IllegalFlagValueError as error:
        raise UserError(_value_message(error, args)) from error
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(_text(error)) from error
    for word in rest:
        raise unknown(word, ())
    args["workdir"].value = os.path.expanduser(args["workdir"].value)
    if config is not None:
        from jaxuda.pipeline import settings  # here: it needs JAX

        settings.check(args.config)
    return args


def _take_recipe(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The value of --config, and the other words; the value is "" for `--mode predict` without a recipe."""
    recipes, words, rest = [], [argv[0]], iter(argv[1:])
    for word in rest:
        name, equals, value = word.partition("=")
        if name in ("--config", "-config"):
            recipes.append(value if equals else next(rest, ""))
        else:
            words.append(word)
    if not any(recipes):
        fields = [word for word in words if re.match(r"--?(no)?config\.", word)]
        if re.search(r" --?mode[= ]predict( |$)", " ".join(words)) and not recipes:
            if fields:
                raise UserError(f"{fields[0]} sets a field of a recipe: add the recipe, --config RECIPE")
            return "", words
        for word in words:
            if not word.startswith("--config") and _close(word.partition("=")[0], ["--config"]):
                raise unknown(word, ["--config"])
        raise UserError("which recipe? Add --config minent (--list shows all of them, --help explains)")
    if len(recipes) > 1:
        raise UserError(f"--config is given {len(recipes)} times: a run has one recipe (jaxuda.table runs several)")
    return recipes[0], words


def _last_of_each(config: ConfigDict, words: Sequence[str]) -> list[str]:
    """The words with each field of the config set only once, by the last of its words: absl would join tuples."""
    kept: dict[str, str] = {}
    rest = iter(enumerate(words))
    for place, word in rest:
        name, equals, _ = word.partition("=")
        field = re.fullmatch(r"--?config\.(.+)", name)
        if field and not equals and not isinstance(_value(config, field[1]), bool):
            value = next(rest, None)  # its value is the next word
            word += "" if value is None else f"={value[1]}"
        key = f"config.{field[1]}" if field else str(place)
        kept.pop(key, None)
        kept[key] = word
    return list(kept.values())


def _value(config: ConfigDict, field: str) -> Any:
    """The value of a field by its dotted path."""
    for name in field.split("."):
        config = config[name]
    return config


def load_config(recipe: str) -> ConfigDict:
    """The config of "RECIPE" or "RECIPE:BENCHMARK"; the recipe is a file, or the name of one that jaxuda brings.

    Raises:
      UserError: there is no such recipe, or it does not return a config. A config is a program and may fail in any way:
        the message has the line of the failure.
    """
    name, *benchmark = recipe.split(":", 1)
    file = _recipe_file(name)
    # Configs import their neighbours as `configs.NAME`, from any current folder, and then those of jaxuda.
    if str(file.parent.parent) not in sys.path:
        sys.path.insert(0, str(file.parent.parent))
    if str(RECIPES.parent) not in sys.path:
        sys.path.append(str(RECIPES.parent))
    loader = importlib.machinery.SourceFileLoader("config_of_the_run", str(file))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    try:
        loader.exec_module(module)
        config = module.get_config(*benchmark) if hasattr(module, "get_config") else None
    except Exception as error:
        raise UserError(_config_message(error, file)) from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"{name} is no recipe: it must define get_config(benchmark), which returns a ConfigDict")
    return config


def _recipe_file(name: str) -> Path:
    """The file of a recipe, from the value of --config without its benchmark."""
    file, known = user_path(name).absolute(), {file.stem: file for file in RECIPES.glob("*.py")}
    if file.is_file() or name in known:
        return file if file.is_file() else known[name]
    others = {other.stem: os.path.relpath(other) for other in file.parent.glob("*.py")}
    others = {stem: stem for stem in known} | others
    close = _close(file.stem, others)
    hint = f"did you mean {others[close[0]]}?" if close else "--list shows the recipes"
    raise UserError(f"--config {name}: there is no such recipe; {hint}")


def _config_message(error: Exception, file: Path) -> str:
    """What went wrong in a config file, and where."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).parent == file.parent]
    if isinstance(error, ValueError) and frames and str(frames[-1].line).startswith("raise "):
        return _text(error)  # the config's own message, such as the list of its benchmarks
    where = f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else str(file)
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg} ({error.filename}, line {error.lineno})"
    return f"{type(error).__name__}: {_text(error)} ({where})"


def _text(error: BaseException) -> str:
    """The message of an exception in one line; for a KeyError without the quotes that str() adds."""
    while isinstance(error, LookupError | AttributeError) and error.args and isinstance(error.args[0], BaseException):
        error = error.args[0]
    sentence = isinstance(error, KeyError) and error.args and " " in str(error.args[0])
    return "; ".join((str(error.args[0]) if sentence else str(error)).splitlines())


def _close(name: str, known: Iterable[str]) -> list[str]:
    """[the name in `known` that is most similar to `name`], or [] if none is similar."""
    return difflib.get_close_matches(name, list(known), 1, cutoff=0.75)


def _add_networks(config: ConfigDict, words: Sequence[str]) -> None:
    """Adds `evaluation.network` to each training stage for which a word sets it: methods differ in their networks."""
    for word in words[1:]:
        found = re.match(r"--?config\.(\w+)\.evaluation\.network(=|$)", word)
        stage = config.get(found[1]) if found else None
        if isinstance(stage, ConfigDict) and "train" in stage and "network" in config.get("evaluation", ()):
            with stage.unlocked():
                stage.evaluation = {"network": config.evaluation.network, **stage.get("evaluation", {})}


def _check_fields(config: ConfigDict, words: Sequence[str]) -> None:
    """Raises UserError if a word --config.FIELD sets a field that the config lacks, or a whole section."""
    for word in words[1:]:
        field = re.match(r"--?(?:no)?config\.([^=]*)", word)
        section, place = config, "config"
        for name in field[1].split(".") if field else ():
            if not isinstance(section, ConfigDict):
                raise UserError(f"{place} is a value, not a section: it has no field '{name}'")
            if name not in section:
                raise UserError(f"{place} has no field '{name}'; {_near_field(config, place, section, name)}")
            section, place = section[name], f"{place}.{name}"
        if field and isinstance(section, ConfigDict):
            raise UserError(
                f"{place} is a section: set its fields ({', '.join(section)}), each as --{place}.FIELD=VALUE"
            )


def _near_field(config: ConfigDict, place: str, section: ConfigDict, name: str) -> str:
    """A hint: a similar name, or the same name in another section; else all names of the section."""
    others = [f"config.{n}.{name}" for n, part in config.items() if isinstance(part, ConfigDict) and name in part]
    found = [f"'{close}'" for close in _close(name, section)] or others
    found += [f"config.{name}"] if place != "config" and name in config else []
    return f"did you mean {' or '.join(found)}?" if found else f"it has {', '.join(section)}"


def _value_message(error: flags.IllegalFlagValueError, args: flags.FlagValues) -> str:
    """The word with the wrong value, and what it must be."""
    cause = str(error.__context__)
    word = str(error).removeprefix("flag ").removesuffix(f": {cause}")
    name = word.removeprefix("--").partition("=")[0]
    if " is not " in cause:  # a number outside of the flag's limits
        return f"{word}: {cause}"
    kind = args[name].flag_type().removeprefix("multi ") if name in args else ""
    return f"{word} must be {_KINDS[kind]}" if kind in _KINDS else f"{word}: {cause}"


def seeds(text: str) -> list[int]:
    """The numbers in "0,1,2"; raises UserError if the text is anything else."""
    if not all(seed.isdecimal() for seed in text.split(",")):
        raise UserError(f"--seeds {text}: must be whole numbers with commas between them")
    return [int(seed) for seed in text.split(",")]


def unknown(word: str, known: Iterable[str]) -> UserError:
    """The error for a word that a command does not understand; it names a similar flag.

    Args:
      word: as the user wrote it, such as "--sedes=1".
      known: the command's flags; those of `jaxuda.main` include "--config.FIELD" for the first level of fields.
    """
    if not word.startswith("-"):
        return UserError(f"not understood: {word} (flags start with --)")
    name, known = word.partition("=")[0], list(known)
    # --data_dir of one command is --config.data_dir of another.
    twins = [name.replace("--", "--config.", 1), name.replace("--config.", "--", 1)]
    found = [twin for twin in twins if twin in known and twin != name] or _close(name, known)
    return UserError(f"unknown flag {name}; {f'did you mean {found[0]}?' if found else '--help lists all flags'}")


class Parser(argparse.ArgumentParser):
    """The parser of a command with few flags: mistakes raise UserError, and the help keeps its line breaks."""

    def __init__(self, command: str, about: str):
        """command: its module, such as "jaxuda.prepare". about: the text of --help under the usage."""
        super().__init__(
            f"python -m {command}",
            description=about,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def parse_args(self, argv: Sequence[str] | None = None) -> argparse.Namespace:  # type: ignore[override]
        """The flags of a command that reads no recipe."""
        args, rest = self.parse_with_fields(argv)
        for word in rest:
            raise unknown(word, self._option_string_actions)
        return args

    def parse_with_fields(self, argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
        """The command's own flags, and the words --config.FIELD=VALUE for `parse`."""
        words = sys.argv[1:] if argv is None else argv
        # argparse would take a word with a space, such as --config.evaluation.size="(8, 4)", for a file.
        fields = [word for word in words if re.match(r"--config\.\S+=", word)]
        args, rest = self.parse_known_args([word for word in words if word not in fields])
        for word in rest:
            if word.startswith("-") and not word.startswith("--config."):
                raise unknown(word, self._option_string_actions)
        return args, fields + rest

    def error(self, message: str) -> Any:
        """Raises the message as a UserError."""
        raise UserError(f"{message} (--help explains)")


def _silence_cache() -> None:
    """On some processors XLA logs kilobytes for every program in its cache, and uses it all the same (jax issue 38445).

    It looks at the variable when JAX is imported. With GPUs its errors are worth reading, and there are none of these.
    """
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def guarded(work: Callable[[], None], interrupted: str = CONTINUES) -> int:
    """Runs a command; mistakes, interruptions and a closed pipe become one message and an exit code.

    Args:
      work: the command, including its parsing.
      interrupted: what the message after Ctrl-C or SIGTERM says of the next try.

    Returns:
      0 for success, `INTERRUPTED`, or `MISTAKE`. Other exceptions are bugs and are not caught.
    """
    _silence_cache()
    code = 0
    try:
        with _exit_on_termination(interrupted):
            try:
                work()
            except SystemExit as leaving:  # argparse has printed its help
                code = int(leaving.code or 0)
        sys.stdout.flush()
    except Interrupted as reason:
        return _leave(INTERRUPTED, str(reason))
    except KeyboardInterrupt:
        return _leave(INTERRUPTED, f"interrupted; {interrupted}")
    except UserError as error:
        return _leave(MISTAKE, f"error: {error}")
    except BrokenPipeError:
        if not reader_left(sys.stdout):
            raise
    except OSError as error:
        if error.errno not in _CORRECTABLE:
            raise
        where = f" ({error.filename})" if error.filename else ""
        return _leave(MISTAKE, f"error: {error.strerror}{where}: correct this, then run the same command again")
    return code


def _leave(code: int, message: str) -> int:
    try:
        print(message, file=sys.stderr)
    except BrokenPipeError:
        reader_left(sys.stderr)
    return code


def reader_left(stream: TextIO) -> bool:
    """Whether nobody reads our output any more, as after `| head`; then the rest of it is dropped.

    Otherwise Python would report the closed pipe once more when it exits.
    """
    poll = select.poll()
    poll.register(stream, select.POLLOUT)
    left = any(event & select.POLLERR for _, event in poll.poll(0))
    if left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return left


@contextlib.contextmanager
def _exit_on_termination(interrupted: str) -> Iterator[None]:
    """SIGTERM ends the process at once, as a requeue expects, except where a training loop saves first.

    Nothing is lost, as after a kill. An exception instead could be raised where Python ignores it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        os.write(2, f"terminated; {interrupted}\n".encode())
        os._exit(INTERRUPTED)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
