"""What `python -m jaxuda.main --list` prints: recipes, benchmarks, datasets, weights, how to get what is missing."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from jaxuda import plugins
from jaxuda.data import datasets, prepared
from jaxuda.data.joined import PLUS
from jaxuda.data.labels import dataset
from jaxuda.errors import UserError
from jaxuda.training import weights


class Recipe(NamedTuple):
    """A config file. about: the first line of its docstring. configs: what it gives, by benchmark."""

    name: str
    about: str
    configs: dict[str, ConfigDict]


def listing(data_dir: str | None = None) -> str:
    """All sections, as text for a terminal.

    Args:
      data_dir: where prepared datasets are; None: $TFDS_DATA_DIR, else ~/tensorflow_datasets.
    """
    recipes = read_recipes(plugins.RECIPES)
    benchmarks = {name: config for recipe in recipes for name, config in recipe.configs.items()}
    absent = {name: _what_to_do(name, data_dir) for known in datasets.names() for name in _names(known)}
    sections = {
        "Recipes (python -m jaxuda.main --config NAME:BENCHMARK)": _recipes(recipes, benchmarks),
        "Benchmarks (source -> target)": _benchmarks(benchmarks, data_dir),
        f"Datasets (in {prepared.root(data_dir)})": _datasets(absent, data_dir),
        "ImageNet weights (for stages with init=imagenet)": _weights(data_dir or ""),
    }
    return "\n\n".join("\n  ".join([title, *lines]) for title, lines in sections.items())


def read_recipes(folder: Path) -> list[Recipe]:
    """Every config in a folder that has `get_config`, with the benchmarks of `common.BENCHMARKS` that it supports."""
    sys.path.insert(0, str(folder.parent))  # configs import their neighbours
    known = importlib.import_module(f"{folder.name}.common").BENCHMARKS
    recipes = []
    for file in sorted(folder.glob("*.py")):
        module = importlib.import_module(f"{folder.name}.{file.stem}")
        if not hasattr(module, "get_config"):
            continue
        configs = {}
        for benchmark in known:
            try:
                configs[benchmark] = module.get_config(benchmark)
            except ValueError:
                continue  # the recipe does not support this benchmark
        recipes.append(Recipe(file.stem, (module.__doc__ or "").partition("\n")[0].rstrip("."), configs))
    return recipes


def _names(known: str) -> list[str]:
    """The full names of a dataset's configs; its own name if it has none."""
    return [f"{known}/{name}" for name in datasets.config_names(known)] or [known]


def _what_to_do(name: str, data_dir: str | None) -> str:
    """What is wrong with a dataset and which command fixes it; "" if it is prepared, or needs no files of the user."""
    if datasets.is_drawn(name):
        return ""
    if name == "folder":
        return f"yours: {prepared.prepare_command(name, data_dir, 'DIR')}"
    folder, command = prepared.prepared_folder(name, data_dir), prepared.prepare_command(name, data_dir)
    try:
        return "" if prepared.read_summary(folder) is not None else f"missing: {command}"
    except UserError:
        return f"corrupt: delete {folder}, then {command}"


def _recipes(recipes: Iterable[Recipe], benchmarks: Mapping[str, ConfigDict]) -> list[str]:
    lines = []
    for recipe in recipes:
        lines.append(f"{recipe.name:<13}{recipe.about}")
        if recipe.configs.keys() != benchmarks.keys():
            lines.append(f"{'':<13}only {', '.join(recipe.configs)}")
    return lines


def _benchmarks(benchmarks: Mapping[str, ConfigDict], data_dir: str | None) -> list[str]:
    lines = []
    for name, config in benchmarks.items():
        ends = [config.source.name, config.target.name]
        needed = [part for part in dict.fromkeys(PLUS.join(ends).split(PLUS)) if _what_to_do(part, data_dir)]
        state = f"needs {' and '.join(needed)}" if needed else "ready"
        if name == "folder":
            ends, state = ["a folder of yours", "another"], "see below"
        lines.append(f"{name:<18}{' -> '.join(ends):<34}{state}")
    return lines


def _datasets(absent: Mapping[str, str], data_dir: str | None) -> list[str]:
    lines = []
    for name, what_to_do in absent.items():
        state = what_to_do or ("ready (drawn when it is first needed)" if datasets.is_drawn(name) else "ready")
        if name == "folder":
            found = (prepared.root(data_dir) / name).glob(f"*/*/{prepared.SUMMARY}")
            own = sorted(file.parents[1].name for file in found)
            state += f" (prepared: {', '.join(own)})" if own else ""
        lines.append(f"{name:<18}{state}")
        if what_to_do:
            lines.append(f"{'':<18}DIR: {dataset(name.partition('/')[0]).builder.MANUAL_DOWNLOAD_INSTRUCTIONS}")
    return lines


def _weights(data_dir: str) -> list[str]:
    lines = []
    for name in weights.IMAGENET:
        state = f"missing: {weights.how_to_get(name)}, then" if weights.missing(name, data_dir) else "ready"
        lines.append(f"{name:<24}{state}")
        if state != "ready":
            lines.append(f"{'':<24}{weights.convert_command(name, data_dir)}")
    return lines
