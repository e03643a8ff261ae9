"""Exported programs label images as jaxuda does: ONNX in onnxruntime, StableHLO by jax.export."""

import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import random_variables
from ml_collections import FrozenConfigDict

from jaxuda import convert
from jaxuda.data.transforms import fitted_size, resize_image
from jaxuda.errors import UserError
from jaxuda.inference import deployment, onnx_graph
from jaxuda.inference.predictor import Predictor
from jaxuda.interop import save_torch
from jaxuda.models import make_model
from jaxuda.sweeps import scores

NETWORKS = {
    "deeplab": {"name": "deeplab", "backbone": "resnet18", "variant": "torchvision", "width": 8, "aux": True},
    "tiny": {"name": "deeplab", "backbone": "resnet18", "variant": "torchvision", "width": 8, "blocks": (1,) * 4},
    "bottlenecks": {"name": "deeplab", "backbone": "resnet50", "variant": "caffe", "width": 8, "blocks": (1, 1, 2, 1)},
    "vgg": {"name": "deeplab", "backbone": "vgg16", "width": 4},
    "mit": {"name": "mix_transformer", "variant": "b0", "width": 8, "blocks": (1, 1, 1, 1), "head_width": 8},
    "hrda": {
        "name": "mix_transformer",
        **{"variant": "b0", "width": 8, "blocks": (1, 1, 1, 1), "head_width": 8},
        "hrda": {"attention_width": 8, "crop": (64, 64), "window": (64, 64)},
    },
    "dinov2": {"name": "dinov2", "width": 32, "blocks": (1, 1), "heads": 2, "grid": 3, "registers": True},
    "dinov2 in windows": {"name": "dinov2", "width": 32, "blocks": (1,), "grid": 3, "window": (40, 32)},
    "lite": {"name": "efficientnet_lite", "width": 8, "decoder_width": 16},
}
CLASSES = ("ground", "box", "sky", "tree", "road")


def predictor(network: str, train: str = "minent", **evaluation) -> Predictor:
    model = make_model(NETWORKS[network], 19 if network == "tiny" else len(CLASSES))
    size = (128, 64) if network == "hrda" else (64, 32)
    variables = random_variables(model, np.zeros((1, *size[::-1], 3), np.float32))
    config = {"train": train, "preprocess": "imagenet", "align_corners": network == "deeplab", "test_aggregation": 0.0}
    config["evaluation"] = {"size": size, "batch": 1, **evaluation}
    return Predictor(CLASSES, model, jax.device_get(variables), FrozenConfigDict(config))


def images(count: int = 10) -> list[np.ndarray]:
    """Of several sizes, smaller and larger than the network's input."""
    rng, sizes = np.random.default_rng(1), [(32, 64), (50, 80), (20, 40), (60, 70)]
    found = []
    for index in range(count):
        height, width = sizes[index % len(sizes)]
        coarse = rng.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3)).astype(np.uint8)
        found.append(np.repeat(np.repeat(coarse, 4, 0), 4, 1)[:height, :width])
    return found


def assert_equal_labels(ours: Predictor, run) -> None:
    """But for ties; `run(images)` gives labels and probabilities of a batch."""
    seen = set()
    for image in images():
        labels, probabilities = ours.predict(image)
        (theirs,), (other,) = run(image[None])
        first, second = -np.partition(-probabilities, 1, -1)[..., :2].transpose(2, 0, 1)
        assert theirs.shape == labels.shape and theirs.dtype == np.uint8
        np.testing.assert_array_equal(theirs[first - second > 1e-3], labels[first - second > 1e-3])
        assert (theirs != labels).mean() < 0.01
        np.testing.assert_allclose(other, probabilities, atol=2e-3)
        seen |= set(np.unique(labels))
    assert len(seen) > 1


@pytest.fixture
def onnx_session(tmp_path: Path):
    onnxruntime = pytest.importorskip("onnxruntime")

    def made(ours: Predictor):
        deployment.write(ours, tmp_path / "net.onnx", lambda line: None)
        return onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])

    return made


@pytest.mark.slow
@pytest.mark.parametrize("network", [name for name in NETWORKS if name != "tiny"])
def test_onnx_labels_are_ours(network: str, onnx_session) -> None:
    ours = predictor(network)
    session = onnx_session(ours)
    assert_equal_labels(ours, lambda batch: session.run(["labels", "probabilities"], {"images": batch}))
    known = session.get_modelmeta().custom_metadata_map
    assert json.loads(known["classes"]) == list(CLASSES)


def test_onnx_takes_batches_of_any_number(onnx_session) -> None:
    session = onnx_session(predictor("lite"))
    batch = np.stack([image for image in images(9) if image.shape[:2] == (32, 64)])
    together = session.run(["labels"], {"images": batch})[0]
    apart = [session.run(["labels"], {"images": image[None]})[0][0] for image in batch]
    np.testing.assert_array_equal(together, apart)
    assert len(batch) == 3


def test_onnx_of_images_that_keep_their_aspect_and_of_a_method_that_predicts(onnx_session) -> None:
    ours = predictor("deeplab", train="plca", keep_aspect=True)
    session = onnx_session(ours)
    assert_equal_labels(ours, lambda batch: session.run(["labels", "probabilities"], {"images": batch}))


def test_the_command_exports_and_checks(tmp_path: Path, capsys) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    ours, file, stage = predictor("tiny"), tmp_path / "published.pth", tmp_path / "stage"
    save_torch(ours.variables, ours.model, file)
    words = ["--config=source_only", "--config.model.width=8", "--config.evaluation.size=(64, 32)"]
    assert convert.main([str(file), *words, "--config.model.blocks=(1, 1, 1, 1)", f"--out={stage}"]) == 0
    capsys.readouterr()
    assert convert.main([str(stage), f"--export={tmp_path / 'net.onnx'}"]) == 0
    said = capsys.readouterr().out
    assert "classes road, sidewalk, building" in said and "onnxruntime's labels of two images are jaxuda's" in said
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    labels, probabilities = session.run(["labels", "probabilities"], {"images": images(1)[0][None]})
    assert labels.shape == (1, 32, 64) and probabilities.shape == (1, 32, 64, 19)


def test_a_wrong_file_is_found(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    ours = predictor("tiny")
    deployment.write(ours, tmp_path / "net.onnx", lambda line: None)
    shifted = jax.tree.map(lambda x: x, ours.variables)
    for name in ("kernel0", "kernel1", "kernel2", "kernel3"):
        shifted["params"]["head"][name] = np.roll(ours.variables["params"]["head"][name], 1, -1)
    with pytest.raises(
        UserError, match=r"net\.onnx is not what jaxuda computes: onnxruntime labels \d+ of 2048 pixels"
    ):
        deployment.check(tmp_path / "net.onnx", ours._replace(variables=shifted))


def test_stablehlo_labels_are_ours(tmp_path: Path) -> None:
    ours = predictor("lite")
    deployment.write(ours, tmp_path / "net.stablehlo", lambda line: None)
    program = jax.export.deserialize(bytearray((tmp_path / "net.stablehlo").read_bytes()))
    assert program.platforms == ("cpu", "cuda")
    assert_equal_labels(ours, lambda batch: jax.device_get(program.call(batch)))


def test_a_layer_without_a_form_in_onnx_is_named() -> None:
    pytest.importorskip("onnx")

    class Sorted(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.sort(nn.Dense(3, name="first")(x))

    class Whole(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Sorted(name="odd")(x)

    x = jnp.ones((2, 3))
    variables = Whole().init(jax.random.key(0), x)
    traced = jax.jit(Whole().apply).trace(variables, x)
    with pytest.raises(UserError, match=r"the layer Whole/odd needs an operation that is not supported \(sort"):
        onnx_graph.write(traced.jaxpr, jax.tree.leaves(variables), ("x",), ("y",))


@pytest.mark.parametrize("kind", ["bicubic", "bilinear", "opencv"])
@pytest.mark.parametrize("size", [(33, 61), (32, 64), (7, 200), (150, 90)])
def test_images_are_resized_as_in_training(size: tuple[int, int], kind: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    expected = resize_image(image, (40, 24), kind).astype(np.int32)
    x = image.astype(np.float32)
    for axis, places in ((1, 40), (0, 24)):
        matrix = deployment.resampling(kind, size[axis], jnp.int32(size[axis]), places, jnp.int32(places))
        x = np.moveaxis(np.tensordot(matrix, x, (1, axis)), 0, axis)
        if kind != "opencv" or axis == 0:
            x = np.clip(np.floor(x + 0.5), 0, 255)
    difference = np.abs(x - expected)
    # Both compute with integers: Pillow's ties may fall the other way, and OpenCV cuts off fractions on its way.
    assert difference.max() <= 1 and (difference > 0).mean() <= {"bicubic": 1e-3, "bilinear": 0.01, "opencv": 0.2}[kind]


def test_sizes_that_keep_the_aspect() -> None:
    for height, width in np.random.default_rng(0).integers(1, 300, (200, 2)).tolist():
        size = jnp.int32(height), jnp.int32(width)
        across, down = fitted_size((width, height), (64, 32))
        ours = tuple(map(int, deployment.fitted(size, (32, 64))))
        assert ours == (down, across), (height, width)
        assert tuple(map(int, deployment.canvas(size, (32, 64)))) == scores.canvas((height, width), 2.0)


@pytest.mark.parametrize("align", [True, False])
def test_the_resize_of_scores(align: bool) -> None:
    from jaxuda.models.layers import interpolation_matrix

    for count in (1, 5, 9, 40):
        ours = deployment.bilinear(9, count, jnp.int32(count), align)
        np.testing.assert_allclose(ours, interpolation_matrix(9, count, align), atol=1e-5)
