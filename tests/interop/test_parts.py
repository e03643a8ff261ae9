"""Which network of a torch file is taken: one of several, never a deeper one, never one of other images."""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest
from golden_weights import random_variables

from jaxuda import convert
from jaxuda.cli import MISTAKE
from jaxuda.data.labels import make_label_space
from jaxuda.errors import UserError
from jaxuda.inference import conversion
from jaxuda.interop import load_torch, read_tensors, save_torch
from jaxuda.interop.tensor_files import pth_bytes, safetensors_bytes
from jaxuda.models.deeplab import DeepLabV2
from jaxuda.pipeline import domains
from jaxuda.training import checkpoints

RESNETS = {14: (True, (1, 1, 1, 1)), 18: (False, (2, 2, 2, 2)), 34: (False, (3, 4, 6, 3)), 50: (True, (3, 4, 6, 3))}
RESNETS |= {101: (True, (3, 4, 23, 3)), 152: (True, (3, 8, 36, 3))}
WIDTH = 2
IMAGE = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
TINY = DeepLabV2(3, backbone="resnet18", variant="torchvision", width=WIDTH, blocks=(1, 1, 1, 1))
NOTHING = {"epoch": np.zeros(1, np.int64)}


def network(depth: int, variant: str = "torchvision", classes: int = 3) -> DeepLabV2:
    bottleneck, blocks = RESNETS[depth]
    return DeepLabV2(classes, "resnet50" if bottleneck else "resnet18", variant, WIDTH, blocks)


@functools.cache
def classifier(depth: int) -> dict[str, np.ndarray]:
    """The state dict of an image classifier with torchvision's names."""
    layout, rng = network(depth).backbone_layouts()["resnet"], np.random.default_rng(depth)
    shapes = jax.tree_util.tree_leaves_with_path(jax.eval_shape(network(depth).init, jax.random.key(0), IMAGE))
    paths = [(tuple(part.key for part in path), leaf.shape) for path, leaf in shapes]
    state = {}
    for path, shape in paths:
        if path[1] == "backbone":
            shape = shape if len(shape) < 4 else (shape[3], shape[2], *shape[:2])
            state[layout.name(path)] = rng.normal(size=shape).astype(np.float32)
    state |= {name: np.abs(array) + 1 for name, array in state.items() if name.endswith("running_var")}
    return state | {"fc.weight": np.zeros((10, 8 * WIDTH), np.float32)}


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[dict, dict]:
    """Two state dicts of `TINY`."""
    file, states = tmp_path_factory.mktemp("two") / "w.pth", []
    variables = random_variables(TINY, np.zeros((1, 32, 32, 3), np.float32))
    for factor in (1, 2):
        save_torch(jax.tree.map(lambda x, factor=factor: factor * x, variables), TINY, file, "one_level")
        states.append({name: np.array(array) for name, array in read_tensors(file).items()})
    return tuple(states)


def joined(parts: dict[str, dict]) -> dict[str, np.ndarray]:
    return {prefix + name: array for prefix, state in parts.items() for name, array in state.items()}


@pytest.mark.parametrize(
    ("prefixes", "labels"),
    [
        (("student.", "teacher."), ("student", "teacher")),
        (("model.", "ema."), ("model", "ema")),
        (("state_dict.model.backbone_net.", "state_dict.ema_model.backbone_net."), ("model", "ema_model")),
        (("student.module.", "teacher.module."), ("student", "teacher")),
        (("", "ema."), (".", "ema")),
        (("", "module."), (".", "module")),
        (("state_dict.net.", "state_dict.net.teacher."), (".", "teacher")),
        (("0.", "1."), ("0", "1")),
    ],
)
@pytest.mark.parametrize("student_first", [True, False])
def test_two_networks_are_never_guessed(two: tuple, prefixes: tuple, labels: tuple, student_first: bool, tmp_path):
    parts = dict(zip(prefixes, two, strict=True))
    if not student_first and prefixes != ("0.", "1."):
        parts = dict(reversed(parts.items()))
    (tmp_path / "w.pth").write_bytes(pth_bytes(joined(parts) | NOTHING))
    with pytest.raises(UserError) as error:
        load_torch(tmp_path / "w.pth", TINY)
    text = f"w.pth: the torch checkpoint holds 2 networks, in the parts '{labels[0]}', '{labels[1]}': choose one"
    assert text in str(error.value) and f"--part={labels[0]}" in str(error.value)
    for label, state in zip(labels, two, strict=True):
        found = load_torch(tmp_path / "w.pth", TINY, label)
        jax.tree.map(np.testing.assert_array_equal, found, load_torch(state, TINY))
    with pytest.raises(UserError, match=rf"no part 'x' with this network; its parts are: '{labels[0]}', '{labels[1]}'"):
        load_torch(tmp_path / "w.pth", TINY, "x")


def test_three_networks_and_the_command(two: tuple, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    student, teacher = two
    state = joined({"imnet_model.": teacher, "ema_model.": student, "model.": student})
    state["model.layer5.conv2d_list.0.bias"] = state["model.layer5.conv2d_list.0.bias"] + 3
    (tmp_path / "w.safetensors").write_bytes(safetensors_bytes(state))
    words = ["--config=configs/source_only.py", f"--config.model.width={WIDTH}", "--config.model.blocks=(1, 1, 1, 1)"]
    words = [str(tmp_path / "w.safetensors"), *words, "--config.label_space=cityscapes19", f"--out={tmp_path / 'out'}"]
    space = make_label_space("three", {"ground": (0, 0, 0), "box": (1, 1, 1), "sky": (2, 2, 2)})
    monkeypatch.setattr(domains, "defined_classes", lambda config: (space, None))
    assert convert.main(words) == MISTAKE
    assert "holds 3 networks, in the parts 'model', 'imnet_model', 'ema_model'" in capsys.readouterr().err
    assert convert.main([*words, "--part=model"]) == 0
    assert "below 'model.'" in capsys.readouterr().out
    arrays, _ = checkpoints.read_variables(tmp_path / "out" / "checkpoints")
    np.testing.assert_array_equal(arrays["params.head.bias0"], student["layer5.conv2d_list.0.bias"] + 3)
    assert convert.main([str(tmp_path / "out"), "--export=x.pth", "--part=model"]) == MISTAKE
    assert "leave it out with --export" in capsys.readouterr().err


def test_one_network_beside_others_stays_automatic(two: tuple) -> None:
    student, _ = two
    other = {name: array[:1] for name, array in student.items()}
    for state in (joined({"net.": student, "copy.": student}), joined({"net.": student, "ema.": other})):
        jax.tree.map(np.testing.assert_array_equal, load_torch(state, TINY), load_torch(student, TINY))
    adapted = {name: array + 1 if "running" in name else array for name, array in student.items()}
    with pytest.raises(UserError, match="holds 2 networks, in the parts 'source', 'adapted'"):  # only in statistics
        load_torch(joined({"source.": student, "adapted.": adapted}), TINY)
    with pytest.raises(UserError, match="it holds one network: leave out --part"):
        load_torch(student, TINY, "teacher")
    jax.tree.map(
        np.testing.assert_array_equal,
        load_torch(joined({"state_dict.student.": student}), TINY, "student"),
        load_torch(student, TINY),
    )


@pytest.mark.parametrize(("theirs", "ours"), [(34, 18), (18, 34), (50, 18), (101, 50), (152, 101)])
def test_other_depths_are_refused_by_name(theirs: int, ours: int, tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(pth_bytes({f"module.{n}": a for n, a in classifier(theirs).items()}))
    name = "resnet18" if ours < 50 else "resnet50-torchvision"
    with pytest.raises(UserError, match=rf"its backbone is a ResNet-{theirs}\); {name} is resnet.*from torchvision"):
        conversion.import_imagenet(tmp_path / "w.pth", name, str(tmp_path), network(ours))
    assert not (tmp_path / "weights").exists()


def test_the_right_depth_and_what_lies_beside_the_backbone(tmp_path: Path) -> None:
    state = classifier(34)
    beside = {"layer5.0.weight": np.ones(2, np.float32), "aux.layer1.0.bn9.weight": np.ones(2, np.float32)}
    (tmp_path / "w.pth").write_bytes(pth_bytes(state | beside))
    folder = conversion.import_imagenet(tmp_path / "w.pth", "resnet18", str(tmp_path), network(34))
    arrays, _ = checkpoints.read_variables(folder / "checkpoints")
    kernel = state["layer3.5.conv2.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(arrays["params.backbone.layer3_5.conv2.kernel"], kernel)
    inside = {"layer1.0.se.fc.weight": np.ones((2, 2), np.float32)}
    (tmp_path / "w.pth").write_bytes(pth_bytes(state | inside))
    with pytest.raises(UserError, match=r"not part of the network: layer1\.0\.se\.fc\.weight"):
        conversion.import_imagenet(tmp_path / "w.pth", "resnet18", str(tmp_path / "other"), network(34))


@pytest.mark.parametrize("layout", ["one_level", "split", "plca"])
def test_a_deeper_network_for_segmentation_is_refused(layout: str, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    deep = network(101, classes=19).clone(head_bias=layout != "plca")
    save_torch(random_variables(deep, np.zeros((1, 32, 32, 3), np.float32)), deep, tmp_path / "w.pth", layout)
    words = [
        "--config=configs/advent.py:gta5",
        "--config.model.backbone=resnet50",
        f"--config.model.width={WIDTH}",
    ]
    words += [f"--config.model.head_bias={layout != 'plca'}", f"--out={tmp_path / 'out'}"]
    assert convert.main([str(tmp_path / "w.pth"), *words, "--config.model.aux=False"]) == MISTAKE
    assert "its backbone is a ResNet-101" in capsys.readouterr().err and not (tmp_path / "out").exists()


def photo(rng: np.random.Generator) -> np.ndarray:
    """A drawn image in 0..255: smooth areas, edges and some noise."""
    y, x = np.mgrid[:64, :64]
    image = np.full((64, 64, 3), rng.uniform(60, 180, 3))
    for _ in range(12):
        centre, radius = rng.uniform(0, 64, 2), rng.uniform(4, 24)
        image[(y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2] = rng.uniform(0, 255, 3)
    return (image + rng.normal(0, 6, image.shape)).clip(0, 255)


def trained_stem(seed: int, caffe: bool, filters: str) -> dict[str, np.ndarray]:
    """The state dict of a ResNet of bottlenecks whose first layers have seen images of one kind or the other."""
    rng, mean = np.random.default_rng(seed), np.array([123.7, 116.3, 103.5])
    state = dict(classifier(14))
    images = [(photo(rng) - mean) / (1 if caffe else 58.0) for _ in range(8)]
    kernel = rng.normal(size=(WIDTH * 8, 3, 7, 7)) * rng.uniform(0.01, 0.3)
    if filters == "edges":  # filters that do not see the mean of an image
        kernel -= kernel.mean((2, 3), keepdims=True)
    elif filters == "colours":
        kernel = np.broadcast_to(kernel.mean((2, 3), keepdims=True), kernel.shape)
    windows = [np.lib.stride_tricks.sliding_window_view(each, (7, 7), (0, 1))[::4, ::4] for each in images]
    seen = np.concatenate([np.einsum("hwcij,ocij->hwo", each, kernel).reshape(-1, len(kernel)) for each in windows])
    state["conv1.weight"] = kernel[:WIDTH].astype(np.float32)
    state["bn1.running_var"] = seen.var(0)[:WIDTH].astype(np.float32)
    state["bn1.running_mean"] = seen.mean(0)[:WIDTH].astype(np.float32)
    return state


@pytest.mark.parametrize("filters", ["any", "edges", "colours"])
@pytest.mark.parametrize("caffe", [True, False])
def test_the_numbers_tell_networks_of_caffe(caffe: bool, filters: str, tmp_path: Path) -> None:
    right, wrong = ("resnet101-caffe", "resnet101-torchvision")[:: 1 if caffe else -1]
    message = "comes from Caffe" if caffe else "is like torchvision's resnet101, of normalised images"
    for seed in range(2):
        (tmp_path / "w.pth").write_bytes(pth_bytes(trained_stem(seed, caffe, filters)))
        model = network(14, right.split("-")[1])
        conversion.import_imagenet(tmp_path / "w.pth", right, str(tmp_path / str(seed)), model)
        with pytest.raises(UserError, match=message):
            conversion.import_imagenet(tmp_path / "w.pth", wrong, str(tmp_path), model)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("layer1.0.conv1.weight", np.nan, "has 1 of 36 numbers that are not finite"),
        ("bn1.running_mean", -np.inf, "has 1 of 2 numbers that are not finite"),
        ("layer2.0.bn1.running_var", -1e-3, "has 1 of 4 numbers that are negative, but is a variance"),
        ("layer1.0.bn2.bias", 1e39, "has 1 of 2 numbers that are not finite"),  # beyond float32
    ],
)
def test_numbers_that_are_no_weights_are_refused(two: tuple, name: str, value: float, message: str, tmp_path) -> None:
    state = dict(two[0])
    state[name] = state[name].astype(np.float64)
    state[name].flat[-1] = value
    (tmp_path / "w.pth").write_bytes(pth_bytes(state))
    with pytest.raises(UserError, match=f"w.pth: the torch checkpoint cannot be used:\n  {name} {message}"):
        load_torch(tmp_path / "w.pth", TINY)
    with pytest.raises(UserError, match=f"{name} {message}"):
        conversion.import_imagenet(tmp_path / "w.pth", "resnet18", str(tmp_path), TINY)
