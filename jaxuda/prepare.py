"""python -m jaxuda.prepare NAME: prepares a dataset, once."""

import argparse
import sys

from jaxuda.data import datasets
from jaxuda.data.preparing import prepare
from jaxuda.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code: 0 prepared, 2 the user must mend something, 130 interrupted."""
    parser = argparse.ArgumentParser("python -m jaxuda.prepare", description="Prepares a dataset for jaxuda.")
    known = ", ".join(datasets.names())
    parser.add_argument("name", help=f"{known}; one config such as camvid/day; or the dotted path of your own module")
    parser.add_argument("--manual_dir", help="folder with the dataset's published files")
    parser.add_argument("--path", default="", help="your own folder, for the dataset 'folder'")
    parser.add_argument(
        "--data_dir", help="where prepared data goes (default: $TFDS_DATA_DIR or ~/tensorflow_datasets)"
    )
    arguments = parser.parse_args(argv)
    try:
        prepare(**vars(arguments))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was left behind", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
