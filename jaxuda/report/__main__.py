"""python -m jaxuda.report --workdir runs/minent-streets-seed0 [MORE ...] [--out FILE]

Writes report.html in the work folder: settings, tables, curves and pictures in one file that needs no network.
Several work folders make one page that compares them, at --out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jaxuda import report
from jaxuda.cli import MISTAKE
from jaxuda.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Parses, writes the page, says where."""
    parser = argparse.ArgumentParser(prog="python -m jaxuda.report", description=__doc__.partition("\n\n")[2])
    parser.add_argument("--workdir", required=True, nargs="+", type=Path, help="one or more work folders")
    parser.add_argument("--out", type=Path, help="the HTML file (default: report.html in the work folder)")
    args = parser.parse_args(argv)
    try:
        print(report.write(args.workdir, args.out))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    return 0


if __name__ == "__main__":
    sys.exit(main())
