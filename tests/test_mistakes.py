"""What the command line says to commands that cannot run."""

from pathlib import Path

import pytest
import tiny

from jaxuda.cli import MISTAKE
from jaxuda.main import main

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict:
    return tiny.prepare_domains(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def at_root(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--config.adapt.lambda_entrpy=1"], "lambda_entropy"),
        (["--config.devices=3", "--config.source_only.batch=4"], "use one of [1, 2, 4]"),
        (["--config.platform=gpu"], "JAX only found cpu"),
        (["--config.adapt.init=nowhere"], "which is no stage before it"),
        (["--config.adapt.train=nothing"], "train='nothing', which there is not"),
        (["--from_stage=nothing"], "this recipe's stages are"),
        (["--mode=predict", "--checkpoint=nowhere", "--images=*.nothing"], "matches no file"),
        (["--mode=eval", "--checkpoint=nowhere"], "is not the folder of a training stage"),
        (["--config.source.path="], "--config.source.path=DIR"),
        (
            ["--config.class_weights=(1.0, 2.0)"],
            "number for each of the 3 classes, in their order (ground",
        ),
        (["--config.class_weights=(1.0, 2.0, 0.0)"], "one positive number for each of the 3 classes"),
        (["stray"], "not understood: stray"),
    ],
)
def test_mistakes_are_named(data: dict, tmp_path, capsys, words: list[str], expected: str) -> None:
    assert main(["jaxuda", *tiny.arguments("minent", workdir=tmp_path / "run", **data), *words]) == MISTAKE
    message = capsys.readouterr().err
    assert expected in message and message.startswith("error: ") and "Traceback" not in message


def test_missing_dataset_names_the_command(tmp_path, capsys) -> None:
    words = [
        "--config=configs/minent.py:camvid",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data_dir={tmp_path}",
    ]
    assert main(["jaxuda", *words]) == MISTAKE
    expected = f"python -m jaxuda.prepare camvid --manual_dir DIR --data_dir {tmp_path}"
    assert expected in capsys.readouterr().err


def test_all_missing_datasets_are_named_at_once(tmp_path, capsys) -> None:
    words = ["--config=configs/sdca.py:gta5", f"--workdir={tmp_path / 'run'}", f"--config.data_dir={tmp_path}"]
    assert main(["jaxuda", *words]) == MISTAKE
    message = capsys.readouterr().err
    assert f"gta5 and cityscapes are not prepared in {tmp_path}; run" in message
    for name in ("gta5", "cityscapes"):
        assert f"\n  python -m jaxuda.prepare {name} --manual_dir DIR --data_dir {tmp_path}\n" in message
    file, network = "resnet101-63fe2227.pth", "resnet101-torchvision"
    assert f"get {file} from torchvision, then run" in message
    assert f"\n  python -m jaxuda.convert {file} --imagenet {network} --data_dir {tmp_path}\n" in message


def test_unknown_benchmark_and_missing_config(capsys) -> None:
    assert main(["jaxuda", "--config=configs/minent.py:mars"]) == MISTAKE
    assert "no benchmark 'mars'" in capsys.readouterr().err
    assert main(["jaxuda", "--config=configs/missing.py"]) == MISTAKE
    assert "missing.py" in capsys.readouterr().err
    assert main(["jaxuda"]) == MISTAKE
    assert "--config" in capsys.readouterr().err
