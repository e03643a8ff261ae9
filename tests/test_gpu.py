"""On a machine with an NVIDIA GPU: a whole recipe, its resume, and its losses beside the CPU's; skipped elsewhere.

JAXUDA_GPU=cpu runs the tests with a CPU in place of the GPU, which tries the tests themselves.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

PLATFORM = os.environ.get("JAXUDA_GPU", "gpu")
ROOT = Path(__file__).parents[1]
OURS = ("JAX_PLATFORMS", "XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")  # of conftest.py
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(PLATFORM == "gpu" and not any(Path("/dev").glob("nvidia[0-9]*")), reason="there is no GPU"),
]


def environment() -> dict[str, str]:
    """That of a user, but products in whole float32 and sums in a fixed order."""
    found = {name: value for name, value in os.environ.items() if name not in OURS}
    exact = {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    return found | exact | ({"XLA_FLAGS": "--xla_gpu_deterministic_ops=true"} if PLATFORM == "gpu" else {})


def words(workdir: Path, data: dict[str, Path], platform: str) -> list[str]:
    arguments = tiny.arguments("minent", workdir=workdir, **data)
    return [sys.executable, "-m", "jaxuda.main", *arguments, f"--config.platform={platform}", "--config.devices=1"]


def run(workdir: Path, data: dict[str, Path], platform: str = PLATFORM) -> dict:
    """Runs or continues the recipe; returns its results."""
    done = subprocess.run(words(workdir, data, platform), cwd=ROOT, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert f"devices     1 of 1 {platform} " in done.stdout
    return json.loads((workdir / "results.json").read_text())


def test_killed_and_resumed(data: dict[str, Path], tmp_path: Path) -> None:
    expected = run(tmp_path / "whole", data)
    command = words(tmp_path / "apart" / "killed", data, PLATFORM)  # beside "whole" it would reuse its stages
    tiny.kill_at("adapt 3/6", command, environment())
    assert run(tmp_path / "apart" / "killed", data) == expected


def test_losses_as_on_the_cpu(data: dict[str, Path], tmp_path: Path) -> None:
    losses = {}
    for platform in (PLATFORM, "cpu"):
        workdir = tmp_path / f"on-{platform}" / "run"
        run(workdir, data, platform)
        rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        losses[platform] = [row["loss"] for row in rows if "loss" in row]
    assert len(losses["cpu"]) >= 6
    np.testing.assert_allclose(losses[PLATFORM][0], losses["cpu"][0], rtol=1e-4)
    np.testing.assert_allclose(losses[PLATFORM], losses["cpu"], rtol=2e-2)
