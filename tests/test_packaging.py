"""The recipes and the packages that the wheel brings, and names of recipes on the command line."""

import importlib.metadata
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import pytest

import jaxuda
from jaxuda import cli, plugins

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_recipes_of_the_wheel_are_those_of_the_repository() -> None:
    assert plugins.RECIPES == ROOT / "configs"


@pytest.mark.parametrize("recipe", ["sdca", "sdca:camvid", "intrada:folder,lite"])
def test_a_name_finds_the_recipe_that_a_path_finds(recipe: str, monkeypatch, tmp_path: Path) -> None:
    name, colon, benchmark = recipe.partition(":")
    by_path = cli.load_config(f"{ROOT / 'configs' / name}.py{colon}{benchmark}")
    monkeypatch.chdir(tmp_path)
    assert cli.load_config(recipe).to_dict() == by_path.to_dict()


def test_a_file_of_the_user_wins_over_a_name(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    text = "from configs import common\ndef get_config(benchmark='streets'): return common.base('mine', benchmark)\n"
    (tmp_path / "minent").write_text(text)
    assert cli.load_config("minent:camvid").name == "mine"


def test_a_recipe_anywhere_imports_the_common_parts() -> None:
    """In a new process, from a folder that has no configs."""
    code = "from jaxuda.cli import load_config; print(load_config('here.py:camvid').benchmark)"
    text = "from configs import common\ndef get_config(benchmark): return common.base('mine', benchmark)\n"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "here.py").write_text(text)
        command = [sys.executable, "-c", f"import sys; sys.path.append({str(ROOT)!r}); {code}"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout == "camvid\n"


def test_the_version_is_that_of_the_package() -> None:
    assert jaxuda.__version__ == importlib.metadata.version("jaxuda")


def test_releases_that_compute_wrongly_are_excluded_everywhere() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    asked = [text for text in (*PROJECT["project"]["dependencies"], *extras["cuda"]) if re.match(r"jax(lib)?\W", text)]
    assert len(asked) == 3
    for text in asked:
        assert "!=0.10.2" in text and "!=0.11.0" in text and "<" not in text
