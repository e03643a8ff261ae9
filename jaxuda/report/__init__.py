"""Reports for people: one HTML file that needs nothing else, for one run or several.

`python -m jaxuda.report` writes it from a work folder; `python -m jaxuda.report.pictures` draws single pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jaxuda import files
from jaxuda.errors import UserError

FILE = "report.html"
IMAGES = 4  # in a gallery


def refresh(workdir: Path) -> None:
    """Writes the page of a finished run, unless it has one that is newer than all of its stages.

    An error is only logged, since the run is finished and its results are written.
    """
    from jaxuda.training.logs import RunLog

    page, log = workdir / FILE, RunLog(workdir)
    finished = max((record.stat().st_mtime_ns for record in workdir.glob("*/stage.json")), default=0)
    if page.exists() and page.stat().st_mtime_ns >= finished:
        return
    try:
        log.say(f"report in {write([workdir])}")
    except Exception as error:
        again = f"python -m jaxuda.report --workdir {workdir}"
        log.say(f"the report could not be written ({type(error).__name__}: {error}); to try again: {again}")


def write(workdirs: Sequence[Path], out: Path | None = None) -> Path:
    """Writes the report of a work folder, or a page that compares several.

    Args:
      workdirs: one or more, finished or not.
      out: the file to write; default: `FILE` in the work folder.

    Returns:
      The file.

    Raises:
      UserError: a folder is not a work folder, there are several and no `out`, or they cannot be compared.
    """
    from jaxuda.report.comparison import check_comparable, comparison_page  # here: --help must not wait for JAX
    from jaxuda.report.gallery import make_gallery
    from jaxuda.report.page import run_page
    from jaxuda.report.runs import read_run

    if out is None and len(workdirs) > 1:
        raise UserError("several work folders make a comparison: set the file to write with --out comparison.html")
    runs = [read_run(Path(folder)) for folder in workdirs]
    check_comparable(runs)
    galleries, notes = {}, []
    for index, run in enumerate(runs):
        try:
            stages = None if len(runs) == 1 else [run.outcome] if run.outcome else []
            galleries[index] = make_gallery(run, IMAGES, stages)
        except Exception as error:  # out of memory, a missing file: tables and curves are still useful
            notes.append(f"There are no pictures of {run.title}: {error or type(error).__name__}")
    page = run_page(runs[0], galleries.get(0), notes) if len(runs) == 1 else comparison_page(runs, galleries, notes)
    out = out or runs[0].folder / FILE
    out.parent.mkdir(parents=True, exist_ok=True)
    files.write_bytes(out, page.encode())
    return out
