"""Whole runs on tiny folders: a joined source, and a target of several conditions that are scored one by one."""

import json

import layouts
import pytest

from jaxuda.main import main
from jaxuda.prepare import prepare

TINY = {
    **{"model.backbone": "resnet18", "model.variant": "torchvision", "model.width": 8, "model.blocks": (1, 1, 1, 1)},
    **{"source.resize": (48, 32), "target.resize": (48, 32), "evaluation.size": (48, 32), "num_workers": 0},
    **{"source_only.init": "scratch", "source_only.steps": 3, "source_only.schedule_steps": 3},
    **{"source_only.batch": 4, "eval_every": 3, "checkpoint_every": 3, "pipeline": ("source_only",)},
}


def run(benchmark: str, tmp_path, **fields) -> dict:
    """The results of the first stage of a published recipe on a tiny network."""
    words = [f"--config.{name}={value}" for name, value in (TINY | fields).items()]
    words += [
        f"--config=configs/minent.py:{benchmark}",
        f"--config.data_dir={tmp_path}",
        f"--workdir={tmp_path / 'run'}",
    ]
    assert main(["jaxuda", *words]) == 0
    return json.loads((tmp_path / "run" / "results.json").read_text())


@pytest.mark.slow
def test_joined_source_trains(tmp_path, capsys):
    prepare("gta5", manual_dir=layouts.gta5(tmp_path / "g"), data_dir=tmp_path)
    prepare("synthia", manual_dir=layouts.synthia(tmp_path / "s"), data_dir=tmp_path)
    prepare("cityscapes", manual_dir=layouts.cityscapes(tmp_path / "c"), data_dir=tmp_path)
    results = run("gta5+synthia-19", tmp_path)
    assert results["data"]["source"]["name"] == "gta5 train + synthia train" and len(results["classes"]) == 19
    assert results["stages"]["source_only"]["last"]["miou"] >= 0
    assert "source      gta5 train + synthia train (6 images)" in capsys.readouterr().out


def test_conditions_have_rows_of_their_own(tmp_path, capsys):
    prepare("cityscapes", manual_dir=layouts.cityscapes(tmp_path / "c"), data_dir=tmp_path)
    prepare("acdc", manual_dir=layouts.acdc(tmp_path / "a"), data_dir=tmp_path)
    results = run("acdc", tmp_path)
    last = results["stages"]["source_only"]["last"]
    names = [f"acdc/{condition} val" for condition in layouts.ACDC]
    assert list(last["beside"]) == names
    parts = [last["beside"][name]["confusion"] for name in names]
    added = [[sum(cells) for cells in zip(*rows, strict=True)] for rows in zip(*parts, strict=True)]
    assert added == last["confusion"] and results["validation"] == " + ".join(names)
    output = capsys.readouterr().out
    page = (tmp_path / "run" / "report.html").read_text()
    for name in names:
        assert f"mIoU, {name}: source only " in output and name in page
