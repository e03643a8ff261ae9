"""After any fault, the same command ends with the parameters of an undisturbed run, or says what to do.

`pytest tests/faults --faults 200 -s` tries 200 faults instead of twenty, `--fault_seed 1` tries other faults.
"""

import os
import signal
import time
from pathlib import Path

import pytest
import tiny
from faults import harness


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    data = tiny.prepare_domains(tmp_path / "data")
    words = ["--config=tests/faults/recipe.py:folder", f"--config.data_dir={data['data_dir']}"]
    return words + [f"--config.{domain}.path={data[domain]}" for domain in ("source", "target")]


@pytest.mark.slow
def test_workers_end_with_a_killed_run(tmp_path: Path, words: list[str]) -> None:
    found = []

    def kill_with_worker(run: int) -> None:
        while not found:
            time.sleep(0.1)
            found.extend(harness.children(run))
        time.sleep(1)
        os.kill(run, signal.SIGKILL)

    with harness.Server(tmp_path) as server:
        words = [*words, f"--workdir={tmp_path / 'run'}", "--config.num_workers=1", "--config.source_only.steps=100000"]
        status, *_ = server.run(words, tmp_path / "run", during=kill_with_worker)
    assert status == -signal.SIGKILL
    for _ in range(600):
        if not any(Path(f"/proc/{worker}").exists() for worker in found):
            return
        time.sleep(0.1)
    raise AssertionError("a data worker outlives its run")


@pytest.mark.slow
def test_faults(
    tmp_path: Path, words: list[str], request: pytest.FixtureRequest, capsys: pytest.CaptureFixture
) -> None:
    faults, seed = request.config.getoption("--faults"), request.config.getoption("--fault_seed")
    with harness.Server(tmp_path) as server:
        campaign = harness.Campaign(server, words, tmp_path, seed)
        campaign.run(faults)
    with capsys.disabled():
        print(f"\n{campaign.report()}")
    assert campaign.counts["tried"] >= faults and campaign.counts["kill"]
