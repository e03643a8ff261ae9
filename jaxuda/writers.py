"""What a run tells: lines on the terminal and in log.txt, numbers in metrics.jsonl and for TensorBoard."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from tensorboardX import SummaryWriter
from tqdm import tqdm

from jaxuda import files


class RunLog:
    """Writers of one work folder.

    Args:
      workdir: where `log.txt`, `metrics.jsonl` and `tensorboard/` are kept; each stage is a TensorBoard run.
    """

    def __init__(self, workdir: Path):
        self._workdir = workdir
        self._boards: dict[str, SummaryWriter] = {}

    def say(self, text: str) -> None:
        """Prints `text` without breaking a progress bar, and keeps it in log.txt."""
        tqdm.write(text)
        sys.stdout.flush()
        with open(self._workdir / "log.txt", "a") as file:
            file.write("".join(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n" for line in text.splitlines()))

    def scalars(self, stage: str, step: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl, and one point per curve."""
        row = {"stage": stage, "step": step, "time": round(time.time(), 3), **values}
        files.append_json_line(self._workdir / "metrics.jsonl", row)
        if stage not in self._boards:
            # Points of a killed run beyond the step it continues from are dropped.
            folder = self._workdir / "tensorboard" / stage
            self._boards[stage] = SummaryWriter(str(folder), purge_step=step, flush_secs=30)
        for name, value in values.items():
            self._boards[stage].add_scalar(name, value, step)

    def rewind(self, stage: str, step: int) -> None:
        """Forgets what a killed run logged for `stage` after `step`, since those steps come again."""
        path = self._workdir / "metrics.jsonl"
        if path.exists():
            rows = files.read_json_lines(path)
            files.write_json_lines(path, [row for row in rows if row["stage"] != stage or row["step"] <= step])

    def close(self) -> None:
        """Flushes the curves."""
        for board in self._boards.values():
            board.close()


def is_interactive() -> bool:
    """Whether somebody watches the terminal, so that a progress bar makes sense."""
    return sys.stderr.isatty()


def progress_bar(total: int, title: str, unit: str, initial: int = 0) -> tqdm:
    """A progress bar on the terminal, gone when it is done; silent when nobody watches (the log's lines then tell)."""
    return tqdm(
        total=total,
        initial=initial,
        desc=title,
        unit=unit,
        disable=not is_interactive(),
        leave=False,
        dynamic_ncols=True,
    )
