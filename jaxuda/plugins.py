"""Loads modules that a config names: adaptation methods, networks, optimizers, datasets, orders of drawing, sweeps.

A plain name is a file in the package of its kind. A dotted path ("mypackage.mymethod") is a module of the user.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from types import ModuleType

from jaxuda.errors import UserError


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
        raise UserError(f"{field}={path!r} cannot be imported ({type(error).__name__}: {error})") from error
    if not hasattr(module, function):
        raise UserError(f"{field}={path!r} does not define `{function}`")
    return module


def _files(package: str) -> list[str]:
    return [module.name for module in pkgutil.iter_modules(importlib.import_module(package).__path__)]


def _import(package: str, name: str) -> ModuleType:
    return importlib.import_module(f"{package}.{name}")
