"""Prepares a dataset, once: checks the published files, or a folder of your own, and stores what training reads.

  python -m jaxuda.prepare camvid --manual_dir DIR     all configs of a dataset; camvid/day prepares one
  python -m jaxuda.prepare folder --path DIR           your own images, with or without labels

python -m jaxuda.main --list shows all datasets. To use data prepared with --data_dir DIR, give jaxuda.main and
jaxuda.table --config.data_dir=DIR, and jaxuda.convert --data_dir DIR.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from jaxuda.cli import Parser, guarded


def prepare(
    name: str,
    *,
    manual_dir: str | os.PathLike | None = None,
    path: str = "",
    data_dir: str | os.PathLike | None = None,
    image_bits: int | None = None,
) -> list[Path]:
    """Prepares a dataset unless it is prepared already; see `jaxuda.data.preparing.prepare`."""
    from jaxuda.data import preparing  # here: --help must not wait for JAX

    return preparing.prepare(name, manual_dir=manual_dir, path=path, data_dir=data_dir, image_bits=image_bits)


def run(argv: list[str] | None) -> None:
    """Parses and prepares."""
    parser = Parser("jaxuda.prepare", __doc__)
    parser.add_argument("name", help="a dataset, one of its configs (camvid/day), or the dotted path of your own")
    parser.add_argument("--manual_dir", help="folder with the dataset's published files")
    parser.add_argument("--path", default="", help="your own folder, for the dataset 'folder'")
    where = "the folder of prepared data (default: $TFDS_DATA_DIR or ~/tensorflow_datasets)"
    parser.add_argument("--data_dir", help=where)
    bits = "the bits, 8 to 16, that your images of 16 bits use, such as 12: 2**BITS - 1 becomes white"
    parser.add_argument("--image_bits", type=int, metavar="BITS", help=bits)
    prepare(**vars(parser.parse_args(argv)))


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code, as jaxuda.main does."""
    return guarded(lambda: run(argv), interrupted="run the same command again")


if __name__ == "__main__":
    sys.exit(main())
