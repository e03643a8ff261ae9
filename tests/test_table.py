"""Several seeds and several recipes in one command, on tiny data."""

import re
from pathlib import Path

import pytest
import tiny

from jaxuda import table
from jaxuda.cli import MISTAKE
from jaxuda.errors import UserError
from jaxuda.main import main
from jaxuda.pipeline import tables

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_several_seeds_end_with_mean_and_spread(data: dict, tmp_path, capsys) -> None:
    words = tiny.arguments("minent", workdir=tmp_path / "run", **data)
    assert main(["jaxuda", *words, "--seeds=0,1"]) == 0
    assert re.search(r"\| folder \| minent: adapt \| 2 \| [\d.]+ [\d.]+ \| [\d.]+ ± [\d.]+", capsys.readouterr().out)
    assert (tmp_path / "run" / "seed1" / "results.json").exists()


def test_each_seed_has_a_config_of_its_own(monkeypatch, tmp_path) -> None:
    """What one run changes in a section of its config is not changed in the next one's."""
    seen = []

    def run(config, workdir: Path, from_stage: str = "") -> dict:
        seen.append((config.seed, config.adapt.steps))
        config.adapt.steps = 1
        return {}

    monkeypatch.setattr("jaxuda.main.run_and_report", run)
    monkeypatch.setattr(table, "run_and_report", run)
    monkeypatch.setattr(tables, "summary", lambda results: "")
    monkeypatch.setattr(tables, "comparable", lambda results: None)
    assert main(["jaxuda", "--config=minent", "--seeds=0,1", "--config.adapt.steps=5"]) == 0
    words = ["--configs=minent", "--seeds=2,3", "--config.adapt.steps=5", f"--runs={tmp_path}"]
    assert table.main(words) == 0
    assert seen == [(0, 5), (1, 5), (2, 5), (3, 5)]


def test_table_refuses_what_cannot_be_compared(data: dict, tmp_path, capsys) -> None:
    words = ["--configs=configs/minent.py,configs/plca.py", "--benchmarks=gta5", f"--runs={tmp_path}"]
    assert table.main(words) == MISTAKE
    message = capsys.readouterr().err
    assert "their evaluation sizes differ: (1024, 512) against (1460, 730)" in message and not list(tmp_path.iterdir())
    run = {"config": "minent", "benchmark": "folder", "seed": 0, "classes": ["a"], "data": {"evaluation": None}}
    with pytest.raises(UserError, match="their classes differ"):
        tables.comparable([run, run | {"seed": 1, "classes": ["b"]}])
    with pytest.raises(UserError, match="their evaluated images differ"):
        tables.comparable([run | {"data": {"evaluation": {"fingerprint": text}}} for text in "xy"])
    tables.comparable([run, run | {"benchmark": "streets", "classes": ["b"]}])


def test_benchmarks_with_a_variant_are_one_word(tmp_path, monkeypatch) -> None:
    ran = []

    def run(config, workdir: Path) -> dict:
        ran.append((config.benchmark, config.model.name, workdir.name))
        facts = {"config": config.name, "benchmark": config.benchmark, "seed": config.seed, "classes": []}
        return facts | {"data": {"evaluation": None}, "fingerprints": {}, "stages": {}}

    monkeypatch.setattr(table, "run_and_report", run)
    words = ["--configs=configs/source_only.py", "--benchmarks=camvid,camvid,lite,streets", f"--runs={tmp_path}"]
    assert table.main(words) == 0
    assert ran == [
        ("camvid", "deeplab", "source_only-camvid-seed0"),
        ("camvid,lite", "efficientnet_lite", "source_only-camvid-lite-seed0"),
        ("streets", "deeplab", "source_only-streets-seed0"),
    ]


def test_a_baseline_of_other_settings_has_its_own_row() -> None:
    def run(config: str, seed: int, settings: str, **scores: float) -> dict:
        kinds = ("last", "mean_of_last", "best_on_val_using_target_labels")
        return {
            "config": config,
            "benchmark": "streets",
            "seed": seed,
            "classes": ["a"],
            "fingerprints": {stage: f"{stage}, {settings}, {seed}" for stage in scores},
            "stages": {stage: {kind: {"miou": miou} for kind in kinds} for stage, miou in scores.items()},
        }

    runs = [
        run("minent", 0, "plain", source_only=0.10, adapt=0.20),
        run("minent", 1, "plain", source_only=0.12, adapt=0.22),
        run("plca", 0, "Lovasz", source_only=0.11, adapt=0.21),
        run("plca", 1, "Lovasz", source_only=0.13, adapt=0.24),
        run("lfass", 0, "Lovasz", source_only=0.11),
        run("lfass", 1, "Lovasz", source_only=0.13),
        run("crcda", 0, "plain", source_only=0.10),
    ]
    lines = tables.summary(runs).splitlines()[2:6]
    assert [line.split(" | ")[1:5] for line in lines] == [
        ["source only", "2", "10.0 12.0", "11.0 ± 1.4"],
        ["minent: adapt", "2", "20.0 22.0", "21.0 ± 1.4"],
        ["plca: source only", "2", "11.0 13.0", "12.0 ± 1.4"],
        ["plca: adapt", "2", "21.0 24.0", "22.5 ± 2.1"],
    ]
    assert tables.summary(runs).splitlines()[6] == ""
    runs = [run(name, 0, "plain", source_only=0.1, control=0.15, adapt=0.2, oracle=0.3) for name in ("minent", "plca")]
    lines = tables.summary(runs).splitlines()[2:]
    titles = ["source only", "minent: control", "minent: adapt", "oracle", "plca: control", "plca: adapt"]
    assert [line.split(" | ")[1] for line in lines[:6]] == titles


@pytest.mark.slow
def test_table_runs_what_is_missing(data: dict, tmp_path, capsys) -> None:
    words = [
        w for w in tiny.arguments("source_only", workdir=tmp_path, **data) if "config=" not in w and "workdir" not in w
    ]
    words += ["--configs=configs/source_only.py", "--benchmarks=folder", "--seeds=0,1", f"--runs={tmp_path}"]
    assert table.main(words) == 0
    first = capsys.readouterr().out
    assert re.search(r"\| folder \| source only \| 2 \|.*\n\| folder \| oracle \| 2 \|", first)
    assert (tmp_path / "table.md").read_text() in first
    assert table.main(words) == 0
    again = capsys.readouterr().out
    assert "source_only (done) -> oracle (done)" in again and "report in" not in again
    assert (tmp_path / "table.md").read_text() in again
    assert table.main([*words, "--config.nothing=1"]) == MISTAKE
