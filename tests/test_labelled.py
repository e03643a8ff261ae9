"""A few labelled images of the target: which they are, how often they are drawn, where they are refused, tables."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from test_stages import fingerprints

from configs import minent, sdca, source_only
from jaxuda import table
from jaxuda.data.few import FewLabels
from jaxuda.data.input import Draws, make_input
from jaxuda.data.joined import FEW, domain_transform
from jaxuda.data.pseudo import write_pseudo_label
from jaxuda.errors import UserError
from jaxuda.main import main, run_name
from jaxuda.pipeline.domains import load_domains
from jaxuda.pipeline.stages import plan, resolve
from jaxuda.pipeline.tables import rows_of
from jaxuda.pipeline.tracing import check_steps
from jaxuda.report import comparison
from jaxuda.training.loop import training_records


def recipe(data: dict[str, Path], labelled=None, **fields):
    """MinEnt on the tiny images."""
    config = minent.get_config("folder")
    config.update({"data_dir": str(data["data_dir"]), **fields})
    for domain in ("source", "target"):
        config[domain].update({"path": str(data[domain]), "resize": (48, 32)})
    config.target.labelled = labelled
    return config


def few_ids(data: dict[str, Path], labelled, **fields) -> list[str]:
    return load_domains(recipe(data, labelled, **fields)).source.few.ids()


# Which images


def test_a_number_chooses_images_by_the_seed(data: dict[str, Path]) -> None:
    """Fewer are a part of more; all is all."""
    chosen = {number: few_ids(data, number) for number in (1, 3, 6)}
    assert chosen[3] == chosen[6][:3] and chosen[1] == chosen[3][:1]
    assert sorted(chosen[6]) == [f"{index}" for index in range(6)]
    assert any(few_ids(data, 3, seed=seed) != chosen[3] for seed in (1, 2, 3))


def test_a_list_chooses_images(data: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("4\n\n 1 \n")
    assert few_ids(data, str(tmp_path / "few.txt")) == ["4", "1"]
    assert run_name(recipe(data, "lists/few.txt")) == "minent-folder-labelled-few-seed0"
    assert (
        run_name(recipe(data, 4)) == "minent-folder-labelled-4-seed0"
        and run_name(recipe(data)) == "minent-folder-seed0"
    )


@pytest.mark.parametrize(
    ("labelled", "message"),
    [
        (7, "tiny|target train has 6 images; give a number from 1 to that"),
        (-1, "give a number from 1"),
        ("nowhere.txt", "cannot be read as a list of ids"),
        ("4\n9\n", "names '9', but .* has no such image, such as '0'"),
        ("4\n4\n", "names an image twice"),
        ("\n", "names no image"),
        (True, "must be a number of images, or a file"),
    ],
)
def test_wrong_numbers_and_lists(data: dict[str, Path], labelled, message: str, tmp_path: Path) -> None:
    if isinstance(labelled, str) and "\n" in labelled:
        (tmp_path / "few.txt").write_text(labelled)
        labelled = str(tmp_path / "few.txt")
    with pytest.raises(UserError, match=message):
        load_domains(recipe(data, labelled))


def test_no_image_is_learned_from_and_scored(data: dict[str, Path], tmp_path: Path) -> None:
    config = recipe(data, 2)
    config.evaluation.split = "train"
    with pytest.raises(UserError, match=r"scored on 2 of these images, such as '\d'"):
        load_domains(config)


def test_an_image_of_the_validation_split_is_named(tmp_path: Path) -> None:
    """With ids of their own in both splits."""
    folders = {name: tiny.draw_folder(tmp_path / name, f"tiny_{name}", 0) for name in ("source", "target")}
    for kind in ("images", "labels"):
        for file in (folders["target"] / kind / "val").iterdir():
            file.rename(file.with_name(f"val_{file.name}"))
    for folder in folders.values():
        tiny.prepare.prepare("folder", path=str(folder), data_dir=tmp_path / "tfds")
    (tmp_path / "few.txt").write_text("0\nval_3\n")
    data = {**folders, "data_dir": tmp_path / "tfds"}
    with pytest.raises(UserError, match=r"names 'val_3', but .* has no such image; it is an image of .* val"):
        load_domains(recipe(data, str(tmp_path / "few.txt")))


def test_targets_without_labels_and_shares_without_meaning(tmp_path: Path, data: dict[str, Path]) -> None:
    config = recipe(data, 2)
    config.target.labelled_share = 0.0
    with pytest.raises(UserError, match=r"labelled_share=0\.0 must be a share"):
        load_domains(config)
    bare = tiny.draw_folder(tmp_path / "bare", "bare", 0, labelled=False)
    tiny.prepare.prepare("folder", path=str(bare), data_dir=data["data_dir"])
    config = recipe({**data, "target": bare}, 2)
    with pytest.raises(UserError, match=r"labelled=2: .* has no labels"):
        load_domains(config)


# How they are drawn


def test_every_batch_has_its_share(data: dict[str, Path]) -> None:
    """Target images keep the target's transform, all come equally often, and the source keeps its order."""
    config = recipe(data, 3)
    config.target.labelled_share = 0.25
    config.target.jitter = None
    config.source.update({"flip": 0.0, "resize": (24, 16)})
    config.target.update({"flip": 0.0, "resize": (24, 16), "grey": 1.0})
    source = load_domains(config).source
    settings = resolve("source_only", config)
    order = source.order(None, 40, settings.source.few.labelled_share, 0)
    assert order.indices[:20].tolist() == source.order(None, 20, 0.25, 0).indices.tolist()
    given = {"batch": 4, "steps": 10, "source_transform": domain_transform(settings.source), "source_order": order}
    ids: list[str] = []
    with make_input(source, **given) as batches:
        for batch in batches:
            few = [name.startswith(FEW) for name in batch["source"]["id"]]
            assert sum(few) == 1
            grey = [bool(np.all(np.ptp(image, axis=-1) == 0)) for image in batch["source"]["image"]]
            assert grey == few
            ids += batch["source"]["id"]
    names, counts = np.unique([name for name in ids if name.startswith(FEW)], return_counts=True)
    assert len(names) == 3 and counts.min() >= 3
    assert {name.removeprefix(FEW) for name in names} == set(source.few.ids())


def test_orders_of_the_source_are_kept(data: dict[str, Path]) -> None:
    """Crops of target images are free; those of the source show their class."""
    source = load_domains(recipe(data, 2)).source
    own = Draws(np.arange(6).repeat(2), np.full(12, 1), np.full(12, 50.0))
    found = source.order(own, 12, 0.5, 0)
    few = found.indices >= len(source.source)
    assert few.tolist() == [False, True] * 6
    np.testing.assert_array_equal(found.indices[~few], own.indices[~few])
    assert set(found.pixels[few]) == {-1.0} and set(found.pixels[~few]) == {50.0}
    record = source[int(found.indices[1])]
    assert record["id"].startswith(FEW) and record["label"].shape == (32, 48)
    assert source.ids()[int(found.indices[1])] == record["id"]
    assert source.class_pixels().shape == (8, 4) and len(source) == 8
    assert np.all(source.order(None, 12, 1.0, 0).indices >= 6)


def test_depth_is_kept_if_both_have_it(data: dict[str, Path]) -> None:
    source = load_domains(recipe(data, 2)).source
    assert not source.has_depth and "depth" not in source[0] and isinstance(source.labels_only(), FewLabels)


# Stages and tables


def test_only_stages_that_learn_from_them_change() -> None:
    """And unset fields change nothing."""

    def found(labelled, share: float = 0.5) -> dict[str, str]:
        config = minent.get_config()
        config.target.update({"labelled": labelled, "labelled_share": share})
        return fingerprints(config)

    plain = found(None)
    assert plain == found(0) == found(None, 0.3)
    few = found(4)
    assert {name for name in plain if few[name] != plain[name]} == {"source_only", "adapt"}
    assert found(4, 0.3)["adapt"] != few["adapt"]
    config = minent.get_config()
    with config.unlocked():
        del config.target.labelled, config.target.labelled_share
    assert fingerprints(config) == plain


def test_self_training_keeps_the_labels(data: dict[str, Path], tmp_path: Path) -> None:
    """Among pseudo-labels the few labelled images have their own labels; the oracle has all anyway."""
    config = sdca.get_config("folder")
    config.update({"data_dir": str(data["data_dir"])})
    for domain in ("source", "target"):
        config[domain].path = str(data[domain])
    config.target.labelled = 2
    domains = load_domains(config)
    stages = {stage.name: stage.config for stage in plan(config, tmp_path, domains)}
    assert stages["self_train"].source.few.labelled_share == 0.5 and "few" not in stages["oracle"].source
    for name in domains.target.ids():
        (tmp_path / "labels").mkdir(exist_ok=True)
        write_pseudo_label(tmp_path, name, np.full((32, 48), 1, np.uint8), domains.label_space)
    labelled, unlabelled = training_records(stages["self_train"], domains, {"pseudo_labels": tmp_path})
    assert unlabelled is None and len(labelled) == 8
    assert {int(x) for index in range(6) for x in np.unique(labelled[index]["label"])} == {1}
    assert all(len(np.unique(labelled[index]["label"])) == 3 for index in (6, 7))


def test_images_of_two_sizes_are_refused_before_training(data: dict[str, Path]) -> None:
    config = recipe(data, 2)
    config.target.resize = (24, 16)
    stages = plan(config, Path("runs/x"), load_domains(config))
    with pytest.raises(UserError, match="source images are 48x32 and labelled target images 24x16"):
        check_steps(stages, 3, False)


@pytest.fixture(scope="module")
def finished(data: dict[str, Path], tmp_path_factory) -> Path:
    """A table of source only with 0 and 2 labels: the folder of its runs."""
    folder = tmp_path_factory.mktemp("runs")
    words = tiny.arguments("source_only", workdir=folder, **data)
    words = [word for word in words if not word.startswith(("--config=", "--workdir="))]
    argv = ["--configs=configs/source_only.py", "--benchmarks=folder", "--labelled=0,2", f"--runs={folder}", *words]
    assert table.main(argv) == 0
    return folder


@pytest.mark.slow
def test_a_table_with_few_labels(finished: Path) -> None:
    """Rows for 0 and 2 labels and for all; the oracle is trained once."""
    runs = json.loads((finished / "table.json").read_text())
    assert [run.get("target_labels", 0) for run in runs] == [0, 2]
    assert runs[0]["fingerprints"]["oracle"] == runs[1]["fingerprints"]["oracle"]
    assert "+ 2 of folder target train" in runs[1]["data"]["source"]["name"]
    rows = {row.title: row.scores["last"] for row in rows_of(runs)}
    assert list(rows) == ["source only", "oracle", "source only, 2 target labels"]
    assert all(len(scores) == 1 for scores in rows.values())
    text = (finished / "table.md").read_text()
    assert "| folder | source only, 2 target labels |" in text
    assert "reused from there" in (finished / "source_only-folder-labelled-2-seed0" / "log.txt").read_text()


def test_the_report_draws_scores_against_labels(finished: Path) -> None:
    from jaxuda.report.runs import read_run

    runs = [read_run(finished / f"source_only-folder{part}-seed0") for part in ("", "-labelled-2")]
    page = comparison.comparison_page(runs, {})
    assert "labelled images of the target" in page and "mIoU in %, mean over seeds" in page
    assert "labelled images of the target" not in comparison.comparison_page(runs[:1] * 2, {})


def test_numbers_of_labels_on_the_command_line(capsys) -> None:
    assert table.main(["--configs=configs/source_only.py", "--labelled=4,many"]) != 0
    assert "'many' is no number of images" in capsys.readouterr().err
    assert source_only.get_config().target.labelled is None


def test_the_field_on_the_command_line(data: dict[str, Path], tmp_path: Path, capsys) -> None:
    words = tiny.arguments("source_only", workdir=tmp_path / "run", **data)
    assert main(["jaxuda", *words, "--config.target.labelled=70"]) != 0
    assert "config.target.labelled=70" in capsys.readouterr().err
