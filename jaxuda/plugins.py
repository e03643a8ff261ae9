"""Loads modules that a config names: adaptation methods, networks, optimizers, datasets, orders of drawing, sweeps.

A plain name is a file in the package of its kind. A dotted path ("mypackage.mymethod") is a module of the user.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
import sys
from pathlib import Path
from types import ModuleType

from jaxuda import files
from jaxuda.errors import UserError

# The recipes that jaxuda brings: `configs/` of a checkout, to which this is a link there.
RECIPES = (Path(__file__).parent / "recipes" / "configs").resolve()


def names(package: str, function: str) -> list[str]:
    """The modules of `package` that define `function`, sorted; imports them all."""
    return [name for name in _files(package) if hasattr(_import(package, name), function)]


def load(package: str, function: str, name: str, field: str, *, imported: bool = False) -> ModuleType:
    """Imports the module called `name`, and no other, so that a run imports only what it needs.

    Args:
      package: dotted name of the package in which plain names are looked up.
      function: what the module must define.
      name: a file in `package`, or a dotted path.
      field: the field of the config that holds the name.
      imported: whether a dotted path must be imported already. True for names from a work folder: a folder that
        somebody else made must not run code that the user has not chosen.

    Raises:
      UserError: there is no such module (the known names are listed), importing it fails, or it lacks `function`.
    """
    if "." in name:
        return _own(function, name, field, imported)
    if name not in _files(package) or not hasattr(_import(package, name), function):
        known = ", ".join(names(package, function))
        raise UserError(
            f"unknown {field}={name!r}; choose one of: {known}; or give the dotted path of a module of your own"
        )
    return _import(package, name)


def _own(function: str, path: str, field: str, imported: bool) -> ModuleType:
    """A module of the user."""
    if imported and path not in sys.modules:
        raise UserError(
            f"{field}={path!r} is code outside jaxuda, and a work folder alone must not run it: give the config that "
            f"names it (--config), or import {path} first"
        )
    try:
        module = importlib.import_module(path)
    except Exception as error:  # the user's module may fail in any way
        problem = f"{field}={path!r} cannot be imported ({type(error).__name__}: {error})"
        raise UserError(problem + (_way_out(path) if isinstance(error, ModuleNotFoundError) else "")) from error
    if not hasattr(module, function):
        raise UserError(f"{field}={path!r} does not define `{function}`, which every module named there must")
    return module


def _way_out(path: str) -> str:
    """What to do about a module that does not exist."""
    package, _, name = path.rpartition(".")
    try:
        close = difflib.get_close_matches(name, _files(package), 1)
    except ImportError:  # the package does not exist either
        return f": run from the folder that holds {path.partition('.')[0]}, or install it"
    return f"; did you mean {package}.{close[0]}?" if close else ""


def code(name: str) -> str:
    """A checksum of the file of a user's module; "" for a plain name, or if there is no such module."""
    if "." not in name:
        return ""
    try:
        found = importlib.util.find_spec(name)
    except ImportError:
        return ""
    return files.sha256(Path(found.origin))[:12] if found and found.has_location else ""


def _files(package: str) -> list[str]:
    return [module.name for module in pkgutil.iter_modules(importlib.import_module(package).__path__)]


def _import(package: str, name: str) -> ModuleType:
    return importlib.import_module(f"{package}.{name}")
