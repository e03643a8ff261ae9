"""Several processes compute the same as one, and only the first writes; a run continues on any number of devices."""

import contextlib
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxuda import files
from jaxuda.cli import INTERRUPTED, MISTAKE
from jaxuda.main import main
from jaxuda.training.checkpoints import Checkpoints

ROOT = Path(__file__).parents[1]


def words(workdir: Path, data: dict, *more: str, recipe: str = "small_recipe") -> list[str]:
    return [
        f"--config=tests/{recipe}.py",
        f"--workdir={workdir}",
        f"--config.source.path={data['source']}",
        f"--config.target.path={data['target']}",
        f"--config.data_dir={data['data_dir']}",
        *more,
    ]


def start(arguments: list[str], processes: int = 2, devices: int = 2) -> list[subprocess.Popen]:
    """The processes of one run, each with its own fake devices."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_ENABLE_X64": "1", "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = str(ROOT / "tests")  # of the plugins
    command = [sys.executable, "-m", "jaxuda.main", *arguments, f"--coordinator=localhost:{port}"]
    return [
        subprocess.Popen(
            [*command, f"--processes={processes}", f"--process={k}"],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for k in range(processes)
    ]


def end(started: list[subprocess.Popen], expected: int) -> list[tuple[str, str]]:
    """Standard output and error of each process; all must have ended with the same exit code."""
    told = [process.communicate(timeout=900) for process in started]
    assert [process.returncode for process in started] == [expected] * len(started), told
    return told


def run_here(*arguments: str) -> str:
    """Runs a command in this process, in double precision; returns what it printed."""
    with jax.enable_x64(True), contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["jaxuda", *arguments]) == 0
    return printed.getvalue()


def state(folder: Path, step: int = 3) -> dict[str, np.ndarray]:
    saved = Checkpoints(folder / "checkpoints", read_only=True)
    try:
        return saved.read(step)
    finally:
        saved.close()


def assert_same(ours: Path, theirs: Path) -> None:
    actual, expected = state(ours), state(theirs)
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(
            actual[name], array, rtol=0, atol=1e-10 * max(1e-6, np.abs(array).max()), err_msg=name
        )


@pytest.fixture(scope="module")
def one(data, tmp_path_factory) -> Path:
    """A run with one process and four devices."""
    os.chdir(ROOT)
    workdir = tmp_path_factory.mktemp("one") / "run"
    assert "devices     4 of 8" in run_here(*words(workdir, data, "--config.devices=4"))
    return workdir


@pytest.fixture(scope="module")
def two(data, tmp_path_factory) -> Path:
    """The same run with two processes of two devices each; their output is saved beside it."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    for index, texts in enumerate(end(start(words(workdir, data)), expected=0)):
        (workdir.parent / f"out{index}").write_text(texts[0])
    return workdir


@pytest.mark.slow
def test_two_processes_train_what_one_does(one: Path, two: Path) -> None:
    assert state(two / "source_only")["params.model.head.kernel0"].dtype == np.float64
    assert_same(two / "source_only", one / "source_only")
    ours, theirs = (files.read_json(folder / "source_only" / "results.json")["last"] for folder in (two, one))
    assert ours["confusion"] == theirs["confusion"]  # each scored half of the images
    assert ours["entropy"] == pytest.approx(theirs["entropy"], abs=1e-12)
    ours, theirs = (next((folder / "statistics" / "artifacts").glob("*.npz")) for folder in (two, one))
    with np.load(ours) as a, np.load(theirs) as b:
        assert a.files == b.files
        for name in (name for name in a.files if a[name].dtype.kind == "f"):
            np.testing.assert_allclose(a[name], b[name], atol=1e-10)


def test_only_the_first_process_writes(two: Path) -> None:
    first, second = ((two.parent / f"out{index}").read_text() for index in range(2))
    assert "2 of 2 cpu (cpu) in each of 2 processes" in first
    assert "mIoU" not in second and "source_only" not in second
    rows = [row for row in files.read_json_lines(two / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert len(files.read_json_lines(two / "source_only" / "evaluations.jsonl")) == 1
    assert len(list((two / "tensorboard" / "source_only").iterdir())) == 1


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_a_checkpoint_of_four_devices_continues_on(devices: int, two: Path, data: dict, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(two / "source_only", workdir / "source_only")
    # As a kill after step 2 would have left it.
    shutil.rmtree(workdir / "source_only" / "checkpoints" / "3")
    record = files.read_json(workdir / "source_only" / "stage.json")
    files.write_json(workdir / "source_only" / "stage.json", record | {"status": "started"})
    alone = ("--config.pipeline=('source_only',)", f"--config.devices={devices}")
    printed = run_here(*words(workdir, data, *alone))
    assert f"{devices} of 8" in printed and "continues from step 2" in printed
    assert_same(workdir / "source_only", two / "source_only")


@pytest.mark.slow
def test_a_method_with_constants_starts_from_a_checkpoint(data: dict, tmp_path: Path) -> None:
    """Only the first process may read it; the state and the constants are then the same everywhere."""
    ours, alone = (
        words(tmp_path / name, data, "--config.model.dtype=float64", recipe="plugins/network_recipe")
        for name in ("run", "alone")
    )
    end(start(ours, devices=1), expected=0)
    run_here(*alone, "--config.devices=1")
    assert_same(tmp_path / "run" / "adapt", tmp_path / "alone" / "adapt")


@pytest.mark.slow
def test_processes_stop_together_and_go_on(two: Path, data: dict, tmp_path: Path) -> None:
    """SIGTERM to one of them: both stop after the same step, which is saved; the same command continues."""
    workdir = tmp_path / "run"
    long = ["--config.pipeline=('source_only',)", "--config.source_only.steps=1000000", "--config.eval_every=1000000"]
    arguments = words(workdir, data, *long, "--config.checkpoint_every=1000000")
    for _ in range(2):
        started = start(arguments)
        for line in started[0].stdout:
            if re.match(r"source_only \d+/", line):  # so that both are in the loop
                break
        started[1].send_signal(signal.SIGTERM)
        # The other pipe must be read, or its process waits because it is full.
        (_, error), _ = end(started, expected=INTERRUPTED)
        assert "SIGTERM: saved step" in error
    assert "continues from step" in (workdir / "log.txt").read_text()


def test_a_mistake_ends_all_processes(data: dict, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    with files.lock(workdir):
        for _, error in end(start(words(workdir, data)), expected=MISTAKE):
            assert f"in use by pid {os.getpid()}" in error


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--processes=2"], "--coordinator HOST:PORT, --processes N and --process K belong together"),
        (["--distributed", "--mode=eval"], "--mode eval runs in a single process"),
    ],
)
def test_mistakes_are_named(data: dict, tmp_path: Path, capsys, arguments: list[str], expected: str) -> None:
    assert main(["jaxuda", *words(tmp_path / "run", data, *arguments)]) == MISTAKE
    assert expected in capsys.readouterr().err
