"""Modules of a package that are looked up by their file's name: adaptation methods and sweeps."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from jaxuda.errors import UserError


def names(package: str, function: str) -> list[str]:
    """The modules of `package` that define `function`, sorted; imports them all."""
    return [name for name in _files(package) if hasattr(_import(package, name), function)]


def load(package: str, function: str, name: str, field: str) -> ModuleType:
    """The module called `name`, and no other, so that a run imports only what it needs.

    Args:
      package: dotted name of the package.
      function: what a module must define to be found.
      name: of the module.
      field: of a stage, where the name stands.

    Raises:
      UserError: there is none; it names those that there are.
    """
    if name not in _files(package) or not hasattr(_import(package, name), function):
        known = ", ".join(names(package, function))
        raise UserError(f"a stage has {field}='{name}', which there is not; choose one of: {known}")
    return _import(package, name)


def _files(package: str) -> list[str]:
    return [module.name for module in pkgutil.iter_modules(importlib.import_module(package).__path__)]


def _import(package: str, name: str) -> ModuleType:
    return importlib.import_module(f"{package}.{name}")
