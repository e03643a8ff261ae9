"""python -m jaxuda.report --workdir runs/minent-streets-seed0 [MORE ...] [--out FILE]

Writes report.html in the work folder: settings, tables, curves and pictures in one file that needs no network.
For several work folders, writes one page that compares them to --out.
"""

from __future__ import annotations

import sys

from jaxuda import report
from jaxuda.cli import Parser, guarded
from jaxuda.files import user_path


def run(argv: list[str] | None) -> None:
    """Parses the arguments, writes the page and prints its path."""
    parser = Parser("jaxuda.report", __doc__)
    parser.add_argument("--workdir", required=True, nargs="+", type=user_path, help="one or more work folders")
    parser.add_argument("--out", type=user_path, help="the HTML file (default: report.html in the work folder)")
    args = parser.parse_args(argv)
    print(report.write(args.workdir, args.out))


def main(argv: list[str] | None = None) -> int:
    """Writes a page; returns the exit code, as jaxuda.main does."""
    return guarded(lambda: run(argv), interrupted="run the same command again")


if __name__ == "__main__":
    sys.exit(main())
