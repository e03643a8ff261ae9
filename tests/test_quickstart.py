"""Runs the quickstart notebook with a few steps of a tiny network; and checks its committed outputs."""

import json
import re
from pathlib import Path

import nbclient
import nbformat
import pytest
import towns

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "experiments" / "quickstart.ipynb"


def text_of(cell: nbformat.NotebookNode) -> str:
    """The text that a cell has printed."""
    return "".join(output.get("text", "") for output in cell.outputs)


@pytest.mark.slow
def test_it_runs_top_to_bottom(tmp_path, monkeypatch) -> None:
    small = {"STEPS": "2", "WIDTH": "8", "SIZE": "64,32", "MORE": "--config.model.blocks=(1,1,1,1)"}
    small |= {"RUNS": str(tmp_path / "runs"), "CAMVID": str(towns.camvid(tmp_path / "camvid"))}
    for name, value in small.items():
        monkeypatch.setenv(f"QUICKSTART_{name}", value)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")  # one device; compiled fast, not well
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    where = {"metadata": {"path": NOTEBOOK.parent}}
    nbclient.NotebookClient(notebook, timeout=1200, kernel_name="python3", resources=where).execute()

    told = "\n".join(text_of(cell) for cell in notebook.cells if cell.cell_type == "code")
    assert re.search(r"source only +adapt +oracle", told) and re.search(r"mIoU \(5\) +[\d.]+ +[\d.]+", told)
    assert re.search(r"mIoU \(11\) +[\d.]+ +[\d.]+", told) and "camvid/dusk" in told
    alone, together = map(float, re.search(r"one device ([\d.]+), on two ([\d.]+)", told).groups())
    assert alone == pytest.approx(together, rel=1e-4)
    kinds = [kind for cell in notebook.cells for output in cell.get("outputs", ()) for kind in output.get("data", ())]
    assert kinds.count("image/svg+xml") == 4 and kinds.count("image/jpeg") == 5


def test_what_was_committed() -> None:
    content = NOTEBOOK.read_text()
    assert len(content) < 600_000
    notebook = nbformat.reads(content, as_version=4)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))  # run once, in order
    outputs = json.dumps([cell.outputs for cell in notebook.cells if cell.cell_type == "code"])
    assert "Traceback" not in outputs and not re.search(r"(?<![\w.])/(home|root|tmp|work|Users)/", outputs)
