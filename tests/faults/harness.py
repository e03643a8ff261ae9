"""Injects faults into runs of a tiny recipe, and counts how the runs end.

Several faults follow each other on one work folder: a run is hit by a fault, its files may be corrupted, and the same
command continues it and is hit again. In the end it must have the parameters, artifacts and scores of an undisturbed
run. A run may also stop with one message; then the harness does what it asks for (`--from_stage`, or just run again).
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

from jaxuda import files
from jaxuda.training import checkpoints

ROOT = Path(__file__).parents[2]
STAGES = {"source_only": 6, "self_train": 6}
STRIKES = ("kill", "terminate", "full", "readonly")
DAMAGES = ("flip", "truncate", "remove")
# The kinds of every twenty faults. A killed worker costs the start of another process.
DECK = ("kill",) * 5 + ("terminate",) * 3 + ("full",) * 3 + ("readonly",) * 2 + DAMAGES * 2 + ("worker",)
PER_FOLDER = 5
LONGEST = 600  # seconds that a run may take on a busy machine before it counts as hung


class Server:
    """The process of server.py; a context manager."""

    def __init__(self, folder: Path):
        self._folder, self._runs = folder, 0

    def __enter__(self) -> "Server":
        environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        command = [sys.executable, str(Path(__file__).with_name("server.py"))]
        with open(self._folder / "server.err", "w") as errors:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
            self._process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()

    def run(self, words: list[str], folder: Path, during=lambda pid: None, **fault) -> tuple[int, str, str, int]:
        """Exit code (negative: the signal), stdout, stderr, and how often files were used."""
        self._runs += 1
        output = self._folder / f"run{self._runs}"
        order = {"words": words, "output": str(output), "longest": LONGEST, "fault": {"folder": str(folder), **fault}}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        pid = int(self._process.stdout.readline())
        during(pid)
        status = self._process.stdout.readline().strip()
        assert status.lstrip("-").isdecimal(), (status, fault, (self._folder / "server.err").read_text()[-2000:])
        status = os.waitstatus_to_exitcode(int(status))
        uses = Path(f"{output}.uses")
        out, err = (Path(f"{output}.{kind}").read_text() for kind in ("out", "err"))
        return status, out, err, int(uses.read_text()) if uses.exists() else -1


class SmallDisk:
    """A separate file system for a work folder, if this process may mount one."""

    def __init__(self, folder: Path):
        self._folder = folder
        folder.mkdir(parents=True)
        self.real = os.geteuid() == 0 and self._mount("-t", "tmpfs", "-o", "size=256M", "none")

    def _mount(self, *words: str) -> bool:
        with contextlib.suppress(OSError):
            return not subprocess.run(["mount", *words, str(self._folder)], capture_output=True).returncode
        return False

    def fill(self, spare: int) -> None:
        """Leaves `spare` bytes free."""
        usage = os.statvfs(self._folder)
        used = (usage.f_blocks - usage.f_bfree) * usage.f_frsize
        assert self._mount("-o", f"remount,size={used + spare}")

    def protect(self) -> None:
        """Makes it read-only."""
        assert self._mount("-o", "remount,ro")

    def mend(self) -> None:
        """Makes it large and writable again."""
        if self.real:
            assert self._mount("-o", "remount,rw,size=256M")

    def close(self) -> None:
        """Unmounts it."""
        if self.real:
            subprocess.run(["umount", "-l", str(self._folder)], check=True)


class Campaign:
    """Tries faults one after the other; `counts` has the results.

    Args:
      server: starts the runs.
      words: the command line without --workdir.
      folder: the parent of the work folders.
      seed: seed of all random choices.
    """

    def __init__(self, server: Server, words: list[str], folder: Path, seed: int):
        self._server, self._words, self._folder = server, words, folder
        self._rng = np.random.default_rng(seed)
        self._deck: list[str] = []
        self._folders = 0
        self.counts: Counter = Counter()
        workdir = folder / "undisturbed" / "run"
        status, out, err, self._uses = server.run([*words, f"--workdir={workdir}"], workdir)
        assert status == 0, err
        self._expected, self._steps = outcome(workdir), steps(out)
        assert self._steps == sum(STAGES.values())

    def run(self, faults: int) -> None:
        """Tries this many more faults."""
        goal = self.counts["tried"] + faults
        while self.counts["tried"] < goal:
            self._one_folder(min(PER_FOLDER, goal - self.counts["tried"]))

    def _one_folder(self, faults: int) -> None:
        self._folders += 1
        disk = SmallDisk(self._folder / f"disk{self._folders}")
        workdir, story, taken = disk._folder / "run", [], 0
        try:
            more: list[str] = []
            goal = self.counts["tried"] + faults
            while True:
                fault = self._draw() if self.counts["tried"] < goal else ""
                if fault in DAMAGES:
                    if damaged := damage(workdir, fault, self._rng):
                        self._count(fault)
                        story.append(f"{fault} {damaged}")
                    continue
                status, out, err, detail = self._strike(fault, workdir, disk, more)
                story.append(f"{fault} {detail} {more} -> {status} {err.strip()}")
                taken += steps(out)
                self._check(status, err, story)
                more = [found[0]] if status == 2 and (found := re.findall(r"--from_stage \w+", err)) else []
                more = [word.replace(" ", "=") for word in more]
                if status == 0:
                    break
            found = outcome(workdir)
            assert found.keys() == self._expected.keys(), story
            for name, value in self._expected.items():
                assert found[name] == value, (name, story)
            self.counts["steps repeated"] += taken - self._steps
            self.counts["folders"] += 1
        except Exception as error:
            error.add_note("\n".join(map(str, story)))
            raise
        finally:
            disk.close()

    def _draw(self) -> str:
        if not self._deck:
            self._deck = list(self._rng.permutation(DECK))
        return str(self._deck.pop())

    def _count(self, fault: str) -> None:
        self.counts["tried"] += 1
        self.counts[fault] += 1

    def _strike(self, fault: str, workdir: Path, disk: SmallDisk, more: list[str]) -> tuple[int, str, str, str]:
        """One run with one fault."""
        words = [*self._words, f"--workdir={workdir}", *more]
        at = int(self._rng.integers(1, self._uses * 2 // 3))
        delay = float(self._rng.choice([0, self._rng.uniform(0, 0.3)]))
        really = disk.real and self._rng.random() < 0.5
        if fault == "worker":
            worker = WorkerKiller(self._rng.uniform(0, 1))
            result = self._server.run([*words, "--config.num_workers=1"], workdir, during=worker)
            if worker.killed:
                self._count(fault)
            return *result[:3], f"after {worker.wait:.2f}s" if worker.killed else "missed"
        if fault in ("full", "readonly") and really:
            spare = int(self._rng.integers(0, 2**20))
            disk.fill(spare) if fault == "full" else disk.protect()
            result = self._server.run(words, workdir)
            disk.mend()
            if result[0] == 2:
                self._count(fault)
                self.counts[f"{fault}, real"] += 1
            return *result[:3], f"really, spare {spare}"
        result = self._server.run(words, workdir, do=fault, at=at, delay=delay)
        if fault and result[0] != 0:
            self._count(fault)
        return *result[:3], f"at use {at}" + (f" + {delay:.2f}s" if delay else "")

    def _check(self, status: int, err: str, story: list[str]) -> None:
        """The run must have ended in one of the allowed ways."""
        assert "Traceback" not in err, err
        assert status in (0, 2, 75, -signal.SIGKILL), story
        if status == 2:
            assert err.startswith("error: ") and err.count("error: ") == 1, err
            self.counts["stopped with a message"] += 1
        if status == 75:
            assert "the same command continues" in err, err

    def report(self) -> str:
        """One line."""
        kinds = ", ".join(f"{name} {self.counts[name]}" for name in (*STRIKES, "worker", *DAMAGES))
        return (
            f"faults tried: {self.counts['tried']} ({kinds}; really full {self.counts['full, real']}, really read-only "
            f"{self.counts['readonly, real']}); survived: {self.counts['tried']}; stopped with a message: "
            f"{self.counts['stopped with a message']}; work folders: {self.counts['folders']}; steps repeated: "
            f"{self.counts['steps repeated']}, of {self.counts['folders'] * self._steps} needed"
        )


class WorkerKiller:
    """Kills the first data worker of a run a moment after it has begun."""

    def __init__(self, wait: float):
        self.wait, self.killed = wait, False

    def __call__(self, run: int) -> None:
        while Path(f"/proc/{run}").exists() and not self.killed:
            for worker in children(run):
                time.sleep(self.wait)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)
                    self.killed = True
            time.sleep(0.05)
            with contextlib.suppress(OSError):
                if Path(f"/proc/{run}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                    return


def children(run: int) -> list[int]:
    """The processes that multiprocessing has started for the process `run`."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == run and b"spawn_main" in (place / "cmdline").read_bytes():
                found.append(int(place.name))
    return found


def steps(out: str) -> int:
    """The number of training steps, counted in the lines of the log."""
    return len(re.findall(r"^\w+ \d+/\d+  ", out, re.MULTILINE))


def damage(workdir: Path, how: str, rng: np.random.Generator) -> str:
    """Changes one file of a checkpoint or an artifact; returns its path, "" if there is none."""
    found = sorted(p for kind in ("checkpoints", "artifacts") for p in workdir.glob(f"*/{kind}/**/*") if p.is_file())
    found = [path for path in found if path.stat().st_size]
    if not found:
        return ""
    path = found[rng.integers(len(found))]
    content = bytearray(path.read_bytes())
    if how == "flip":
        for place in rng.integers(0, len(content), 3):
            content[place] ^= 1 << int(rng.integers(8))
    if how == "remove":
        path.unlink()
    else:
        path.write_bytes(content[: rng.integers(len(content))] if how == "truncate" else content)
    return str(path.relative_to(workdir))


def outcome(workdir: Path) -> dict:
    """What must be the same: parameters and the rest of the state, bit for bit, artifacts, scores."""
    found = {}
    for stage in STAGES:
        saved = checkpoints.Checkpoints(workdir / stage / "checkpoints", read_only=True)
        step = saved.newest()
        found[f"{stage} step"] = step
        for name, array in saved.read(step).items():
            found[f"{stage} {name}"] = (array.shape, array.tobytes())
        saved.close()
    found["artifacts"] = files.checksums(workdir / "pseudo_labels" / "artifacts")
    found["scores"] = json.dumps(files.read_json(workdir / "results.json")["stages"], sort_keys=True)
    rows = files.read_json_lines(workdir / "metrics.jsonl")
    found["metrics"] = [(row["stage"], row["step"], row["loss"]) for row in rows if "loss" in row]
    return found
