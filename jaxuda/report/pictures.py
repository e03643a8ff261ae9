"""python -m jaxuda.report.pictures KIND --workdir DIR --out FILE [--stages adapt,oracle] [--count 6]

KIND is one of
  curves       loss and mIoU over the steps of all stages (SVG)
  predictions  target images next to their truth and the predictions of the stages (PNG)
  entropy      target images next to the entropy of the stages' predictions, dark: sure, bright: unsure (PNG)
  features     features of both domains in two dimensions, by class and by stage (SVG): their main axes, or with
               --projection tsne an embedding that keeps neighbours together, whose distances mean little
  statistics   similarity of the classes in the class statistics that a sweep collected: cosine of their means (SVG)
  prototypes   similarity of the prototypes of both domains: cosine, source against target (SVG)
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from jaxuda import files
from jaxuda.cli import Parser, guarded
from jaxuda.errors import UserError
from jaxuda.files import user_path


def draw(
    kind: str, workdir: Path, out: Path, stages: Sequence[str] = (), count: int = 6, projection: str = "pca"
) -> None:
    """Draws one picture; the arguments are those of the command.

    Raises:
      UserError: the kind is unknown, the file has the wrong suffix, a stage does not exist, or the run lacks what the
        picture needs.
    """
    from jaxuda.report import figures  # here: --help must not wait for JAX
    from jaxuda.report.runs import read_run

    if kind not in figures.KINDS:
        raise UserError(f"there is no picture '{kind}'; choose one of: {', '.join(figures.KINDS)}")
    function, suffix = figures.KINDS[kind]
    if out.suffix != suffix:
        raise UserError(f"--out {out}: this picture is written as {suffix}; give the file this suffix")
    run = read_run(workdir)
    known = [stage for stage in run.trainings if stage.status != "missing"]
    unknown = sorted(set(stages) - {stage.name for stage in known})
    if unknown:
        raise UserError(f"--stages {unknown[0]}: the trainings in {workdir} are {', '.join(s.name for s in known)}")
    chosen = [stage for stage in known if stage.name in stages] if stages else known
    out.parent.mkdir(parents=True, exist_ok=True)
    files.write_bytes(out, function(figures.Request(run, chosen, count, projection)))


def run(argv: list[str] | None) -> None:
    """Parses the arguments, draws the picture and prints its path."""
    parser = Parser("jaxuda.report.pictures", __doc__)
    parser.add_argument("kind", metavar="KIND")
    parser.add_argument("--workdir", required=True, type=user_path, help="the work folder")
    parser.add_argument("--out", required=True, type=user_path, help="the file to write")
    parser.add_argument("--stages", default="", help="comma-separated (default: all that train)")
    parser.add_argument("--count", default=6, type=int, help="number of images (default 6)")
    parser.add_argument("--projection", default="pca", choices=["pca", "tsne"], help="of features (default pca)")
    args = parser.parse_args(argv)
    stages = [name for name in args.stages.split(",") if name]
    draw(args.kind, args.workdir, args.out, stages, args.count, args.projection)
    print(args.out)


def main(argv: list[str] | None = None) -> int:
    """Draws a picture; returns the exit code, as jaxuda.main does."""
    return guarded(lambda: run(argv), interrupted="run the same command again")


if __name__ == "__main__":
    sys.exit(main())
