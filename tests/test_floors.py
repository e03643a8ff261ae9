"""The floors of pyproject.toml: imports point down only, and every module stands on one of them."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def lint(folder: Path) -> subprocess.CompletedProcess:
    command = "from importlinter.cli import lint_imports_command as lint; lint(['--no-cache'])"
    return subprocess.run([sys.executable, "-c", command], cwd=folder, capture_output=True, text=True)


@pytest.fixture
def copied(tmp_path) -> Path:
    """A copy of the package, to break."""
    shutil.copytree(ROOT / "jaxuda", tmp_path / "jaxuda", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_imports_point_down_the_floors(copied: Path) -> None:
    done = lint(copied)
    assert done.returncode == 0, done.stdout


def test_a_low_floor_that_imports_a_high_one_is_found(copied: Path) -> None:
    """Also inside a function."""
    with open(copied / "jaxuda" / "losses" / "entropy.py", "a") as file:
        file.write("\n\ndef broken():\n    from jaxuda.pipeline import recipe\n\n    return recipe\n")
    done = lint(copied)
    assert done.returncode != 0
    assert "jaxuda.losses.entropy -> jaxuda.pipeline.recipe" in re.sub(r"\s+", " ", done.stdout)


def test_every_module_stands_on_a_floor(copied: Path) -> None:
    (copied / "jaxuda" / "attic.py").write_text("")
    done = lint(copied)
    assert done.returncode != 0 and "attic" in done.stdout


def test_private_parts_of_jax_are_used_in_one_place() -> None:
    users = [file.name for file in (ROOT / "jaxuda").rglob("*.py") if "jax._src" in file.read_text()]
    assert users == ["parallel.py"]
