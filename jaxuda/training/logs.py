"""What a run reports: lines on the terminal and in log.txt, numbers in metrics.jsonl and for TensorBoard."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.summary import scalar
from tqdm import tqdm

from jaxuda import files, parallel

# Metrics that have a longer name in TensorBoard and in reports.
TITLES = {"share": "share of confident pixels"}


class RunLog:
    """The logs of one work folder. If there are several processes, only the first one writes and prints.

    Args:
      workdir: where `log.txt`, `metrics.jsonl` and `tensorboard/` are kept; each stage is a TensorBoard run.
    """

    def __init__(self, workdir: Path):
        self._workdir, self._silent = workdir, not parallel.is_first()
        self._boards: dict[str, _Curves] = {}

    def say(self, text: str) -> None:
        """Prints `text` without breaking a progress bar, and keeps it in log.txt."""
        if self._silent:
            return
        tqdm.write(text)
        sys.stdout.flush()
        with open(self._workdir / "log.txt", "a") as file:
            file.write("".join(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n" for line in text.splitlines()))

    def scalars(self, stage: str, step: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl, and one point per curve."""
        if self._silent:
            return
        row = {"stage": stage, "step": step, "time": round(time.time(), 3), **values}
        files.append_json_line(self._workdir / "metrics.jsonl", row)
        self._board(stage, step).add(step, values)

    def picture(self, stage: str, step: int, name: str, content: bytes, size: tuple[int, int]) -> None:
        """A picture for TensorBoard. content: a PNG of RGB colours. size: its (height, width)."""
        if not self._silent:
            self._board(stage, step).add_picture(step, name, content, size)

    def _board(self, stage: str, step: int) -> _Curves:
        if stage not in self._boards:
            self._boards[stage] = _Curves(self._workdir / "tensorboard" / stage, step)
        return self._boards[stage]

    def rewind(self, stage: str, step: int) -> None:
        """Removes what a killed run logged for `stage` after `step`, since those steps run again."""
        path = self._workdir / "metrics.jsonl"
        if path.exists() and not self._silent:
            rows = files.read_json_lines(path)
            files.write_json_lines(path, [row for row in rows if row["stage"] != stage or row["step"] <= step])

    def close(self) -> None:
        """Flushes the curves."""
        for board in self._boards.values():
            board.close()


class _Curves:
    """The TensorBoard file of one stage.

    The calling thread writes it: tensorboardX's writer thread dies if the disk is full, and the run would wait for it.
    """

    def __init__(self, folder: Path, step: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._file, self._flushed = EventsWriter(str(folder / "events")), time.monotonic()
        # TensorBoard then drops the points that a killed run logged after this step.
        self._write(Event(step=step, session_log=SessionLog(status=SessionLog.START)))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._file.write_event(event)

    def add(self, step: int, values: dict[str, float]) -> None:
        """One point per curve."""
        for name, value in values.items():
            title = TITLES.get(name, "")
            self._write(Event(step=step, summary=scalar(title.replace(" ", "_") or name, value, title)))
        if time.monotonic() - self._flushed > 30:
            self._file.flush()
            self._flushed = time.monotonic()

    def add_picture(self, step: int, name: str, content: bytes, size: tuple[int, int]) -> None:
        """One picture, see `RunLog.picture`."""
        image = Summary.Image(height=size[0], width=size[1], colorspace=3, encoded_image_string=content)
        self._write(Event(step=step, summary=Summary(value=[Summary.Value(tag=name, image=image)])))

    def close(self) -> None:
        """Flushes. An error is ignored, since metrics.jsonl has the curves too."""
        with contextlib.suppress(OSError):
            self._file.close()


def is_interactive() -> bool:
    """Whether somebody watches the terminal, so that a progress bar makes sense."""
    return sys.stderr.isatty() and parallel.is_first()


def progress_bar(total: int, title: str, unit: str, initial: int = 0) -> tqdm:
    """A progress bar that disappears at the end; disabled if nobody watches (then the log shows the progress)."""
    return tqdm(
        total=total,
        initial=initial,
        desc=title,
        unit=unit,
        disable=not is_interactive(),
        leave=False,
        dynamic_ncols=True,
    )
