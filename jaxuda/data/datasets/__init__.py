"""One file per dataset, found by its name.

A dataset is a module with `DATASET`, a `Dataset`: the class that builds it from the published files, and the meaning
of the ids in its label files. `config.source.name` and `python -m jaxuda.prepare` take the name of a file here, or the
dotted path of a module of the user; "/CONFIG" behind it names one of its builder's configs.

Builders of files derive from `jaxuda.data.building.FilesBuilder`: they list the files, and it checks, counts and
stores them. Others (such as `streets`) yield encoded records and keep a `jaxuda.data.checking.Tally` of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import tensorflow_datasets as tfds

from jaxuda import plugins
from jaxuda.data.labels import LabelSpace, dataset


class Dataset(NamedTuple):
    """The description of a dataset.

    builder: a tfds builder. Its MANUAL_DOWNLOAD_INSTRUCTIONS say what the folder for `--manual_dir` holds; a builder
      without them needs no files, and `jaxuda.main` prepares it when it is first used.
    classes: raw id -> class name; ids that are missing here are ignored.
    space: name of the label space in which it is read by default.
    spaces: the label spaces that it defines.
    tables: name of a label space -> raw id -> class name, if these do not follow from `classes`.
    apart: whether each config comes from its own folder, which `FilesBuilder.has_config` looks for, and is therefore
      prepared by itself.
    """

    builder: type[tfds.core.GeneratorBasedBuilder]
    classes: Mapping[int, str] = {}
    space: str = ""
    spaces: tuple[LabelSpace, ...] = ()
    tables: Mapping[str, Mapping[int, str]] = {}
    apart: bool = False


def names() -> list[str]:
    """The datasets of jaxuda."""
    return plugins.names(__name__, "DATASET")


def config_names(name: str) -> list[str]:
    """Names of the configs of a dataset, such as ["day", "dusk"]; [] for "folder" and most other datasets."""
    return [config.name for config in dataset(name).builder.BUILDER_CONFIGS]


def is_drawn(name: str) -> bool:
    """Whether a dataset ("streets", "streets/game") is made without any files of the user."""
    return not dataset(name.partition("/")[0]).builder.MANUAL_DOWNLOAD_INSTRUCTIONS
