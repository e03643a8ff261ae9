"""The coverage-guided fuzzer of fuzz.py finds nothing, if it is installed: `pip install -e '.[dev,fuzz]'`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "fuzz.py"
READERS = ["pth", "safetensors", "npz", "image", "classes", "split"]


@pytest.mark.fuzz
@pytest.mark.parametrize("reader", READERS)
def test_fuzzer_finds_nothing(reader: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """One input takes at most ten seconds and 2 GiB, and raises only errors that are meant for users."""
    pytest.importorskip("atheris", reason="atheris is not installed: pip install -e '.[fuzz]'")
    limits = ["-timeout=10", "-rss_limit_mb=2048", f"-runs={100 * request.config.getoption('--examples')}"]
    command = [sys.executable, str(SCRIPT), reader, str(tmp_path / "corpus"), "-seed=1", *limits]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[1]), *sys.path])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "Done " in done.stderr
