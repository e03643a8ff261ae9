"""Builds a dataset once from the user's files, checks it, and counts its classes.

A dataset is built in `DATA_DIR/NAME/.preparing-CONFIG`, which is renamed when it is complete. If a run is
killed, the next one removes what it left there and starts again.
"""

import contextlib
import fcntl
import io
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from tqdm import tqdm

from jaxuda import files
from jaxuda.data import prepared, records, review
from jaxuda.data.building import FilesBuilder
from jaxuda.data.datasets import config_names
from jaxuda.data.labels import IGNORE, dataset
from jaxuda.errors import UserError

# Space for the embedded datasets and for the file system itself.
_SPARE_BYTES = 200 * 2**20


def prepare(
    name: str,
    *,
    manual_dir: str | os.PathLike | None = None,
    path: str = "",
    data_dir: str | os.PathLike | None = None,
    image_bits: int | None = None,
) -> list[Path]:
    """Prepares a dataset unless it is prepared already.

    Args:
      name: "camvid" for all its configs or "camvid/day" for one; "folder" together with `path`.
      manual_dir: the user's folder of the dataset's published files, if it has any.
      path: the user's own folder, for "folder".
      data_dir: the folder of prepared datasets; default: $TFDS_DATA_DIR, else ~/tensorflow_datasets.
      image_bits: the bits, 8 to 16, that images of 16 bits use; with fewer than 16 they are stored with 8 bits. A
        dataset that was prepared with other bits is prepared again. Default: as it was prepared, or 16.

    Returns:
      The folders of the prepared datasets, one for each config.

    Raises:
      UserError: files are missing or wrong, the disk is too full, or the name is unknown. Nothing is left
        behind.
    """
    if image_bits is not None and not 8 <= image_bits <= 16:
        raise UserError(f"--image_bits {image_bits}: must be 8 to 16")
    top, _, config = name.partition("/")
    names = [name]
    if top != "folder" and not config:
        names = _all_configs(top, manual_dir) or [top]
    return [_prepare_config(name, manual_dir, path, data_dir, image_bits) for name in names]


def _all_configs(top: str, manual_dir: str | os.PathLike | None) -> list[str]:
    """The configs of a dataset; of those from their own folders only what is there, if anything is."""
    configs, about = config_names(top), dataset(top)
    if about.apart and manual_dir and files.user_path(manual_dir).is_dir():
        there = [config for config in configs if about.builder.has_config(files.user_path(manual_dir), config)]
        for config in configs if there else ():
            if config not in there:
                print(f"{top}/{config}: is not in {manual_dir}; nothing is prepared for it")
        configs = there or configs
    return [f"{top}/{config}" for config in configs]


def _prepare_config(
    name: str,
    manual_dir: str | os.PathLike | None,
    path: str,
    data_dir: str | os.PathLike | None,
    image_bits: int | None,
) -> Path:
    final = prepared.prepared_folder(name, data_dir, path)
    top = prepared.root(data_dir) / name.partition("/")[0]  # the folder of all configs of the dataset
    with _writable(top), _locked(top):
        summary = prepared.read_summary(final)
        if summary is not None and image_bits in (None, summary.get("image_bits", 16)):
            print(f"{name}: already prepared in {final}")
            if name == "folder":
                _show_folder(summary, final, data_dir, path)
            return final
        if final.exists() and summary is None:
            raise UserError(f"{final} exists but was not made by jaxuda.prepare; move it away and try again")
        # Only a killed run can have left these, since we hold the lock.
        for leftover in top.glob(".preparing-*"):
            shutil.rmtree(leftover)
        staging = top / f".preparing-{final.parent.name}"
        try:
            with _quiet_tfds():
                built, summary = _build(name, manual_dir, path, staging, image_bits or 16)
            final.parent.mkdir(parents=True, exist_ok=True)
            files.write_bytes(built / prepared.SUMMARY, json.dumps(summary).encode())
            if final.exists():
                final.rename(staging / "replaced")  # never half of it: a killed run leaves all or nothing there
            built.rename(final)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    print(f"{name}: prepared in {final}")
    if name == "folder":
        _show_folder(summary, final, data_dir, path)
    else:
        _print_summary(summary, name, data_dir, path)
    return final


def _build(
    name: str, manual_dir: str | os.PathLike | None, path: str, staging: Path, image_bits: int
) -> tuple[Path, dict[str, Any]]:
    """Builds one config below `staging`, and makes its summary."""
    top, _, config = name.partition("/")
    cls = dataset(top).builder
    if top == "folder":
        config, manual_dir = cls.config_of(path), path
    builder = cls(data_dir=staging, config=config or None)
    builder.image_bits = image_bits
    needed = _SPARE_BYTES
    if cls.MANUAL_DOWNLOAD_INSTRUCTIONS:
        items = builder.items(_existing_dir(manual_dir, name, cls.MANUAL_DOWNLOAD_INSTRUCTIONS))
        counts = {split: len(found) for split, found in items.items()}
        expected = builder.PUBLISHED.get(builder.config_name(), counts)
        if counts != expected:
            print(f"warning: {name} has {_numbers(counts)} images; published are {_numbers(expected)}")
        # Files are stored unchanged, except for some labels.
        needed += int(1.1 * sum(f.stat().st_size for found in items.values() for item in found for f in item.files()))
    _check_disk(staging.parent, needed)
    generators = _generate(builder, name, manual_dir)
    built = Path(builder.data_path)
    splits = {split: _summarise(built, split, examples) for split, examples in generators.items()}
    for split, examples in generators.items():
        if splits[split]["labelled"]:
            prepared.write_pixel_counts(built, split, splits[split]["sha256"], examples.tally.pixels())
        for remark in examples.remarks:
            print(f"warning: {name} {split}: {remark}")
    summary = {"splits": splits} | ({"image_bits": image_bits} if image_bits < 16 else {})
    warnings = builder.findings.warnings() if isinstance(builder, FilesBuilder) else []
    if top != "folder":
        for text in warnings:
            print(f"warning: {name}: {text}")
    else:
        classes = builder.builder_config.classes
        summary |= {"classes": classes} if classes else {}
        counts = {split: generators[split].tally.pixels() for split in splits if splits[split]["labelled"]}
        summary["warnings"] = warnings + review.warnings(items, counts, classes)
    return built, summary


def _generate(
    builder: tfds.core.GeneratorBasedBuilder, name: str, manual_dir: str | os.PathLike | None
) -> dict[str, Any]:
    """Lets tfds write the records, with our progress bars instead of its own messages.

    Returns:
      The builder's examples of each split, after they were read: their `tally` and `remarks` are complete.
    """
    split_generators, generators = builder._split_generators, {}

    def with_progress(dl_manager: Any) -> dict[str, Iterable]:
        generators.update(split_generators(dl_manager))
        return {split: _Progress(examples, f"{name} {split}") for split, examples in generators.items()}

    builder._split_generators = with_progress
    config = tfds.download.DownloadConfig(
        manual_dir=manual_dir, try_download_gcs=False, compute_stats=tfds.download.ComputeStatsMode.SKIP
    )
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(
            download_config=config, download_dir=builder._data_dir_root, file_format="array_record"
        )
    return generators


def _summarise(built: Path, split: str, examples: Any) -> dict[str, Any]:
    """The counts of a split from when it was written; reads some of its records again to check that they are there."""
    summary = examples.tally.summary()
    reader = prepared.open_split(built, split)
    few = np.unique(np.linspace(0, len(summary["ids"]) - 1, 16, dtype=int))
    if len(reader) != len(summary["ids"]) or any(reader[int(i)]["id"].decode() != summary["ids"][i] for i in few):
        raise UserError(f"{built}: the records of split '{split}' differ from those that were written; try again")
    return summary


def _print_summary(summary: dict[str, Any], name: str, data_dir: Any, path: str) -> None:
    """Prints the number of images of each split, and the share of the pixels of each class."""
    for split, content in summary["splits"].items():
        data = records.load(name, split, data_dir=data_dir, path=path)
        print(f"  {split}: {len(data)} images{'' if data.labelled else ', unlabelled'}")
        if data.labelled:
            print(f"    {_frequencies(content['pixels'], data)}")


def _show_folder(summary: dict[str, Any], final: Path, data_dir: Any, path: str) -> None:
    """Prints what the user's own folder holds and, if it has labels, writes a sheet of overlays."""
    labelled = {}
    for split in summary["splits"]:
        data = records.load("folder", split, data_dir=data_dir, path=path)
        print(f"  {split}: {len(data)} images{'' if data.labelled else ', unlabelled'}")
        if data.labelled:
            labelled[split] = data
    if labelled:
        print(f"\n{review.table(labelled, summary['classes'])}\n")
        sheet = final / review.PREVIEW
        if not sheet.exists():
            files.write_bytes(sheet, review.preview(labelled))
        print(f"look at {sheet}: the labels over their images")
    for text in summary.get("warnings", ()):
        print(f"warning: {text}")


def _frequencies(pixels: dict[int, int], data: records.Records) -> str:
    counts = np.zeros(256, np.int64)
    for raw, count in pixels.items():
        counts[data.table[int(raw)]] += count
    shares = [(counts[i] / counts.sum(), name) for i, name in enumerate(data.label_space.classes)]
    text = ", ".join(f"{name} {share:.1%}" for share, name in sorted(shares, reverse=True))
    return f"{text}; ignored {counts[IGNORE] / counts.sum():.1%}"


def _existing_dir(manual_dir: str | os.PathLike | None, name: str, instructions: str) -> Path:
    if not manual_dir:
        raise UserError(f"{name} needs --manual_dir DIR: {instructions}")
    folder = files.user_path(manual_dir)
    if not folder.is_dir():
        raise UserError(f"--manual_dir {manual_dir}: there is no such folder; it must be {instructions}")
    return folder


def _check_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(f"{folder}: {needed / 2**30:.1f} GiB are needed, {free / 2**30:.1f} GiB are free")


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
    """Inside this context tfds logs only errors, and shows no progress bars."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        tfds.enable_progress_bar()


@contextlib.contextmanager
def _writable(folder: Path) -> Iterator[None]:
    """Makes a folder; errors of the file system become a UserError, since the user can fix them."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(f"cannot write the dataset below {folder}: {error}") from error


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds a lock on a folder; the system frees it when the process ends in any way."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process is preparing {folder.name}; waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class _Progress:
    """Iterates over a split with a progress bar on a terminal, or a line at the end elsewhere."""

    def __init__(self, items: Any, text: str):
        self._items, self._text = items, text
        self.file_bytes = getattr(items, "file_bytes", 0)

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator:
        count = 0
        for item in tqdm(self._items, self._text, len(self), unit="image", disable=not sys.stderr.isatty()):
            count += 1
            yield item
        if not sys.stderr.isatty():
            print(f"{self._text}: {count} images", file=sys.stderr)


def _numbers(counts: dict[str, int]) -> str:
    return ", ".join(f"{split} {count}" for split, count in counts.items())
