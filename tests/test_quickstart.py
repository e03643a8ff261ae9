"""Runs the quickstart notebook with a few steps of a tiny network; its install cell; and its committed outputs."""

import json
import re
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest
import towns
from IPython.core.inputtransformer2 import TransformerManager

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


class Shell:
    """Stands for IPython in the install cell. pip: the arguments of `%pip`. `git clone` makes a copy with egg-info."""

    def __init__(self, packages: Path, works: bool = True):
        self.names: dict = {}
        self.pip: list[str] = []
        self._packages, self._works = packages, works

    def system(self, command: str) -> None:
        """`!command`"""
        assert command.format(**self.names) == 'git clone --depth 1 "address" jaxuda'
        for folder, file in (("configs", "common.py"), ("jaxuda", "__init__.py"), ("jaxuda.egg-info", "PKG-INFO")):
            (Path("jaxuda") / folder).mkdir(parents=True)
            (Path("jaxuda") / folder / file).write_text("")

    def run_line_magic(self, name: str, line: str) -> None:
        """`%name line`"""
        assert name == "pip"
        self.pip.append(line.format(**self.names))
        if self._works:
            (self._packages / "jaxuda-0.1.0.dist-info").mkdir()


@pytest.fixture
def bare(tmp_path, monkeypatch) -> Path:
    """An empty current folder, and a Python with pip alone; returns its site-packages. PATH is `bin` beside it."""
    packages = tmp_path / "site-packages"
    for folder in (packages / "pip", tmp_path / "elsewhere", tmp_path / "bin"):
        folder.mkdir(parents=True)
    (packages / "pip" / "__init__.py").write_text("")
    # As in Colab: the folder of the copy is on sys.path as well as the current one.
    monkeypatch.setattr(sys, "path", ["", str(tmp_path / "elsewhere"), str(packages)])
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    return packages


def install(shell: Shell, address: str = "address") -> None:
    """Runs the install cell."""
    cell = nbformat.read(NOTEBOOK, as_version=4).cells[2].source.replace('REPOSITORY = ""', f'REPOSITORY = "{address}"')
    shell.names["get_ipython"] = lambda: shell
    exec(TransformerManager().transform_cell(cell), shell.names)


@pytest.mark.parametrize(
    ("nvidia_smi", "wanted"),
    [
        (None, "."),
        ("echo 'GPU 0: NVIDIA T4 (UUID: GPU-1)'", ".[cuda]"),
        ("echo 'NVIDIA-SMI has failed: no driver for a GPU'; exit 9", "."),
    ],
)
def test_a_copy_on_the_path_is_not_an_installation(bare: Path, tmp_path, nvidia_smi: str | None, wanted: str) -> None:
    if nvidia_smi:
        program = tmp_path / "bin" / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{nvidia_smi}\n")
        program.chmod(0o755)
    shell = Shell(bare)
    install(shell)
    assert shell.pip == [f'install --quiet -e "{wanted}"']
    assert Path.cwd() == tmp_path / "elsewhere" / "jaxuda" and sys.path[0] == str(Path.cwd())
    install(shell)  # now it is installed, and the copy is found from inside
    assert len(shell.pip) == 1 and Path.cwd() == tmp_path / "elsewhere" / "jaxuda"


def test_the_install_cell_says_what_failed(bare: Path) -> None:
    with pytest.raises(ValueError, match="set REPOSITORY"):
        install(Shell(bare), address="")
    with pytest.raises(RuntimeError, match="could not be installed"):
        install(Shell(bare, works=False))
