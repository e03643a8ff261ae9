"""Convert reads and writes DeepLab of mmsegmentation's repositories: DACS, DAFormer, MIC and SePiCo."""

import functools
import importlib.util
from pathlib import Path

import flax
import jax
import numpy as np
import pytest
from golden_weights import golden_keys, random_variables, state_dict
from ml_collections import ConfigDict

from configs import source_only
from jaxuda import convert
from jaxuda.cli import MISTAKE
from jaxuda.errors import UserError
from jaxuda.inference import conversion
from jaxuda.inference.restore import restore
from jaxuda.interop import load_torch, read_tensors, save_torch
from jaxuda.interop.tensor_files import pth_bytes
from jaxuda.models.deeplab import DeepLabV2
from jaxuda.pipeline import stages
from jaxuda.training import checkpoints, weights

FIELDS = {"backbone": "resnet50", "variant": "v1c", "width": 16, "blocks": (1, 1, 2, 2)}
MODEL = DeepLabV2(19, **FIELDS)
PROJECTED = 32
STUDENT, TEACHER = "model.", "ema_model."


@functools.cache
def published() -> dict[str, np.ndarray]:
    """A small network and its projection head, by SePiCo's names."""
    return state_dict(golden_keys("train_sepico")["param_and_buffer_keys"])


def saved() -> dict[str, np.ndarray]:
    """What a file of ours has of it: torch fills in the counters of batches."""
    return {name: array for name, array in published().items() if not name.endswith("num_batches_tracked")}


def network_of(state: dict, branches: int = 4) -> dict[str, np.ndarray]:
    """Without the projection head, and with some of the classifier's branches."""
    left_out = ("auxiliary_head.", *(f"decode_head.aspp_modules.{index}." for index in range(branches, 4)))
    return {name: array for name, array in state.items() if not name.startswith(left_out)}


def write(path: Path, state: dict) -> Path:
    """As mmcv writes it, with torch if it is installed: its own facts beside the weights."""
    if importlib.util.find_spec("torch") is not None:
        import torch

        weights = {name: torch.from_numpy(np.array(array)) for name, array in state.items()}
        meta = {"mmcv_version": "1.3.7", "iter": 40000, "CLASSES": ("road", "sky"), "PALETTE": [[128, 64, 128]]}
        optimizer = {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 6e-5}]}
        torch.save({"meta": meta, "state_dict": weights, "optimizer": optimizer}, path)
    else:
        path.write_bytes(pth_bytes({"state_dict": state}))
    return path


def stage_of(**fields) -> ConfigDict:
    """The settings of a stage that could have trained the file, with fields that only some recipes have."""
    config = source_only.get_config("streets")
    config.label_space = "cityscapes19"
    config.model.update(FIELDS)
    stage = stages.resolve("source_only", config)
    with stage.unlocked():
        stage.model.update({"head_dilations": fields.pop("head_dilations", (6, 12, 18, 24))})
        stage.update(fields)
    return stage


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A file of a whole training: student, teacher (twice the student) and network with ImageNet's weights."""
    parts = {STUDENT: 1, TEACHER: 2, "imnet_model.": 3}
    state = {prefix + name: factor * array for prefix, factor in parts.items() for name, array in published().items()}
    return write(tmp_path_factory.mktemp("whole") / "w.pth", state)


@pytest.mark.parametrize(("part", "factor"), [("student", 1), ("ema_model", 2)])
def test_a_part_in_and_out_again(whole: Path, part: str, factor: int, tmp_path: Path, capsys) -> None:
    stage = stage_of(channels=PROJECTED, contrast_start=3000)
    conversion.import_checkpoint(whole, stage, 19, tmp_path / "in", part=part)
    told = capsys.readouterr().out
    assert "with a projection head" in told and f"taken:    {len(saved())} tensors" in told
    _, variables, _ = restore(str(tmp_path / "in"), 19)
    stem = variables["params"]["backbone"]["conv2"]["kernel"]
    np.testing.assert_array_equal(stem, factor * published()["backbone.stem.3.weight"].transpose(2, 3, 1, 0))

    assert convert.main([str(tmp_path / "in"), f"--export={tmp_path / 'out.safetensors'}"]) == 0
    again = read_tensors(tmp_path / "out.safetensors")
    assert again.keys() == saved().keys()
    for name, array in saved().items():
        np.testing.assert_array_equal(again[name], factor * array)


def test_parts_have_names_and_are_never_guessed() -> None:
    network = network_of(published())
    state = {"model.": network, "ema_model.": {name: 2 * array for name, array in network.items()}}
    state = {prefix + name: array for prefix, part in state.items() for name, array in part.items()}
    with pytest.raises(UserError, match="holds 2 networks, in the parts 'model', 'ema_model'"):
        load_torch(state, MODEL)
    bias = "decode_head.aspp_modules.3.conv.bias"
    for part, factor in {"student": 1, "model": 1, "teacher": 2, "ema_model.": 2}.items():
        np.testing.assert_array_equal(load_torch(state, MODEL, part)["params"]["head"]["bias3"], factor * network[bias])
    alone = {name: array for name, array in state.items() if name.startswith(STUDENT)}
    for part in ("", "student"):  # published files have the student alone
        np.testing.assert_array_equal(load_torch(alone, MODEL, part)["params"]["head"]["bias3"], network[bias])
    with pytest.raises(UserError, match="no part 'teacher'"):
        load_torch(alone, MODEL, "teacher")


def test_the_command_without_a_projection_head(tmp_path: Path, capsys, monkeypatch) -> None:
    """A method without the head leaves it out, and says so."""
    monkeypatch.chdir(Path(__file__).parents[2])
    file = write(tmp_path / "w.pth", {STUDENT + name: array for name, array in published().items()})
    words = [f"--config.model.{field}={value}" for field, value in FIELDS.items()]
    words = ["--config=configs/source_only.py", "--config.label_space=cityscapes19", *words]
    assert convert.main([str(file), *words, f"--out={tmp_path / 'in'}"]) == 0
    assert "model.auxiliary_head.convs.0.conv.weight" in capsys.readouterr().out.partition("not used")[2]
    assert convert.main([str(tmp_path / "in"), f"--export={tmp_path / 'out.pth'}"]) == 0
    assert read_tensors(tmp_path / "out.pth").keys() == network_of(saved()).keys()


@pytest.mark.parametrize(("branches", "ours"), [(4, (6, 12)), (2, (6, 12, 18, 24)), (4, (6,))])
def test_a_head_of_other_branches_is_refused_by_name(branches: int, ours: tuple, tmp_path: Path) -> None:
    state = {f"{STUDENT}{name}": array for name, array in network_of(published(), branches).items()}
    file, right = write(tmp_path / "w.pth", state), (6, 12, 18, 24)[:branches]
    with pytest.raises(UserError) as error:
        conversion.import_checkpoint(file, stage_of(head_dilations=ours), 19, tmp_path / "in")
    message = str(error.value)
    assert f"a sum of {branches} dilated convolutions" in message and "\n" not in message
    assert f"config.model.head_dilations = {ours} of {len(ours)}: set it to {right}" in message
    assert not (tmp_path / "in").exists()
    with pytest.raises(UserError, match=f"sum of {branches} dilated"):
        load_torch(state, MODEL.clone(head_dilations=ours))
    conversion.import_checkpoint(file, stage_of(head_dilations=right), 19, tmp_path / "in")
    assert convert.main([str(tmp_path / "in"), f"--export={tmp_path / 'out.pth'}"]) == 0
    assert read_tensors(tmp_path / "out.pth").keys() == network_of(saved(), branches).keys()


def test_a_start_of_other_branches_has_a_new_head() -> None:
    """Two of four branches are no classifier: the network's own head is kept."""
    four = random_variables(MODEL, np.zeros((1, 32, 32, 3), np.float32))
    arrays = flax.traverse_util.flatten_dict(four, sep=".")
    model = MODEL.clone(head_dilations=(6, 12))
    network = jax.tree.map(np.zeros_like, random_variables(model, np.zeros((1, 32, 32, 3), np.float32)))
    fitted, notes = weights.fit(arrays, network, model, "start")
    assert notes == ["head starts anew: the checkpoint has none that fits"]
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(fitted["params"]["head"]))
    jax.tree.map(np.testing.assert_array_equal, fitted["params"]["backbone"], four["params"]["backbone"])


def test_projection_heads_that_do_not_fit(tmp_path: Path) -> None:
    state, stage = dict(published()), stage_of(channels=PROJECTED, contrast_start=3000)
    state["auxiliary_head.convs.1.bn.running_var"] = -state["auxiliary_head.convs.1.bn.running_var"]
    del state["auxiliary_head.convs.0.bn.bias"]
    with pytest.raises(UserError) as error:
        conversion.import_checkpoint(write(tmp_path / "w.pth", state), stage, 19, tmp_path / "in")
    assert "missing: state_dict.auxiliary_head.convs.0.bn.bias" in str(error.value)
    assert "auxiliary_head.convs.1.bn.running_var has 32 of 32 numbers that are negative" in str(error.value)
    stage.channels = 16
    with pytest.raises(UserError, match=r"convs.1.conv.weight: \(32, 512, 1, 1\) in the checkpoint, \(16, 512, 1, 1\)"):
        conversion.import_checkpoint(write(tmp_path / "w.pth", dict(published())), stage, 19, tmp_path / "in")


# ImageNet weights -------------------------------------------------------------------------------------------


def classifier(variant: str) -> tuple[dict[str, np.ndarray], DeepLabV2]:
    """The state dict of a small image classifier, and the network whose backbone it has."""
    model = MODEL.clone(variant=variant)
    variables, name = random_variables(model, np.zeros((1, 32, 32, 3), np.float32)), model.backbone_layouts()["resnet"]
    flat = flax.traverse_util.flatten_dict(variables)
    state = {
        name.name(path): np.asarray(leaf).transpose(3, 2, 0, 1) if np.ndim(leaf) == 4 else np.asarray(leaf)
        for path, leaf in flat.items()
        if path[1] == "backbone"
    }
    return state | {"fc.weight": np.zeros((10, 512), np.float32), "fc.bias": np.zeros(10, np.float32)}, model


def test_imagenet_weights_of_v1c(tmp_path: Path, capsys) -> None:
    state, model = classifier("v1c")
    assert {"stem.0.weight", "stem.4.running_mean", "stem.7.bias", "layer1.0.downsample.0.weight"} <= state.keys()
    folder = conversion.import_imagenet(
        write(tmp_path / "w.pth", state), "resnet101-v1c", str(tmp_path), model=model.clone(head_dilations=(6, 12))
    )
    assert "fc.bias" in capsys.readouterr().out.partition("not used")[2]
    arrays, _ = checkpoints.read_variables(folder / "checkpoints")
    for place, layer in ((0, 1), (3, 2), (6, 3)):
        kernel = state[f"stem.{place}.weight"].transpose(2, 3, 1, 0)
        np.testing.assert_array_equal(arrays[f"params.backbone.conv{layer}.kernel"], kernel)

    config = source_only.get_config("streets")
    config.model.update({"backbone": "resnet101", "variant": "v1c"})
    assert weights.network_name(config) == "resnet101-v1c"
    assert "get resnet101_v1c-e67eebb6.pth from OpenMMLab" in weights.missing("resnet101-v1c", str(tmp_path / "none"))
    for backbone in ("resnet18", "resnet50"):
        config.model.backbone = backbone
        with pytest.raises(UserError, match=f"config.model.backbone={backbone} of the variant v1c"):
            weights.network_name(config)


@pytest.mark.parametrize(
    ("theirs", "name", "kind"),
    [
        ("torchvision", "resnet101-v1c", r"\(its backbone is a ResNet of 1-1-2-2 bottleneck blocks\)"),
        ("v1c", "resnet101-torchvision", r"1-1-2-2 bottleneck blocks with a deep stem \(v1c\)\)"),
    ],
)
def test_another_stem_is_refused_by_name(theirs: str, name: str, kind: str, tmp_path: Path) -> None:
    file = write(tmp_path / "w.pth", classifier(theirs)[0])
    with pytest.raises(UserError, match=rf"{kind}; {name} is resnet101"):
        conversion.import_imagenet(file, name, str(tmp_path), model=MODEL.clone(variant=name.split("-")[1]))


def test_mistakes_of_the_command(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    model = DeepLabV2(19, "resnet18", "torchvision", width=4, blocks=(1, 1, 1, 1), head_dilations=(6, 12))
    save_torch(random_variables(model, np.zeros((1, 32, 32, 3), np.float32)), model, tmp_path / "w.pth", "mmseg")
    words = ["--config=configs/source_only.py", "--config.model.width=4", "--config.model.blocks=(1, 1, 1, 1)"]
    assert convert.main([str(tmp_path / "w.pth"), *words, f"--out={tmp_path / 'in'}"]) == MISTAKE
    assert "w.pth: the head in the torch checkpoint is a sum of 2 dilated" in capsys.readouterr().err
