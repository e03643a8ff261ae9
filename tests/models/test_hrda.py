"""HRDA: golden values of both views, their windows and loss, the names of its files, and networks below it."""

from __future__ import annotations

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import golden, golden_keys, network_input, random_variables, state_dict
from ml_collections import ConfigDict
from models.test_mix_transformer import check, check_gradients, doubled, part

from jaxuda.errors import UserError
from jaxuda.interop import load_torch, save_torch
from jaxuda.interop.torch_checkpoint import to_torch
from jaxuda.losses.segmentation import weighted_cross_entropy
from jaxuda.methods.supervised import predicted_loss
from jaxuda.models import Detail, Outputs, abstract_variables, hrda, make_model, output_shapes

HALF_PIXELS = ConfigDict({"align_corners": False})
SMALL = {"name": "mix_transformer", "variant": "b0", "width": 8, "blocks": (1, 1, 1, 1), "head_width": 8}
VIEWS = {"crop": (64, 64), "window": (128, 128), "attention_width": 8}


def published(variant: str = "b0", **views) -> object:
    """The golden network (B0), or one of the published size."""
    own = {"name": "mix_transformer", "variant": variant, "dtype": "float64", "dropout": 0.0, "drop_path": 0.0}
    widths = (64, 32) if variant == "b0" else (256, 256)
    return make_model({**own, "head_width": widths[0], "hrda": {"attention_width": widths[1], **views}}, 19)


def weighted_mean(logits, maps):
    return weighted_cross_entropy(logits, maps["label"], maps.get("weight"))


@pytest.fixture
def drawn_box(monkeypatch: pytest.MonkeyPatch):
    """Lets the detail view begin at a given place."""
    return lambda box: monkeypatch.setattr(hrda, "draw_offset", lambda *_: jnp.asarray((box[0], box[2]), jnp.int32))


@pytest.mark.slow
def test_training_matches_golden(drawn_box) -> None:
    """Both predictions, the loss, gradients and running statistics."""
    whole, keys = golden("model_hrda_b0"), golden_keys("model_hrda_b0")
    arrays, (height, width) = part(whole, "train_"), whole["detail_crop_size"]
    drawn_box(arrays["crop_box"])
    with jax.enable_x64(True):
        model = published(crop=(int(width), int(height)))
        variables = doubled(load_torch(state_dict(keys), model))
        maps = {"label": jnp.asarray(arrays["labels"]), "weight": jnp.asarray(arrays["seg_weight"])}

        def loss(params, images):
            outputs, moved = model.apply(
                {**variables, "params": params},
                images,
                train=True,
                index=jnp.arange(2),
                rngs={"dropout": jax.random.key(0)},
                mutable=["batch_stats"],
            )
            return predicted_loss(weighted_mean, outputs, maps, HALF_PIXELS), (outputs, moved)

        images = jnp.asarray(network_input(arrays), jnp.float64)
        run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
        (value, (outputs, moved)), (gradients, of_images) = run(variables["params"], images)
        check(outputs.main, arrays["fused_logits_from_double"])
        check(outputs.detail.main, arrays["hr_logits_from_double"])
        np.testing.assert_allclose(value, arrays["loss_f64"], rtol=1e-8)
        check(of_images[:, ::2, ::2], arrays["grad_input_every2"])
        names = model.torch_layouts()["daformer"].name
        check_gradients(gradients, lambda path: names(("params", *path)), keys, arrays)
        after = {names(path): x for path, x in flax.traverse_util.flatten_dict(moved).items()}
        stored = {key.removesuffix("_from_double"): x for key, x in part(arrays, "after:").items() if "double" in key}
        assert len(stored) == 4
        for key, expected in stored.items():
            check(after[key], expected)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["eval", "slide"])
def test_inference_matches_golden(case: str) -> None:
    """One window, whose detail views overlap; and an image of several windows."""
    whole = golden("model_hrda_b0")
    (height, width), (rows, columns) = whole["detail_crop_size"], whole["slide_window"]
    with jax.enable_x64(True):
        model = published(crop=(int(width), int(height)), window=(int(columns), int(rows)))
        variables = doubled(load_torch(state_dict(golden_keys("model_hrda_b0")), model))
        arrays = part(whole, f"{case}_")
        images = jnp.asarray(network_input(arrays), jnp.float64)
        main = jax.jit(lambda images: model.apply(variables, images).main)(images)
        if case == "eval":
            check(main, arrays["fused_logits_from_double"])
            boxes = hrda.windows(images.shape[1:3], (int(height), int(width)))
            assert [(y, y + height, x, x + width) for y, x in boxes.offsets] == list(map(tuple, arrays["detail_boxes"]))
        main = hrda.resize_bilinear(main, images.shape[1:3], align_corners=False)
        check(main[:, ::4, ::4], arrays["image_logits_every4_from_double"])


@pytest.mark.parametrize("case", ["a", "b"])
def test_loss_matches_golden(case: str) -> None:
    arrays = part(golden("hrda_loss"), f"{case}_")
    y, _, x, _ = arrays["crop_box"]
    maps = {"label": arrays["label"]} | ({"weight": arrays["pixel_weight"]} if "pixel_weight" in arrays else {})
    with jax.enable_x64(True):

        def loss(fused, detail):
            outputs = Outputs(fused, fused, detail=Detail(detail, jnp.asarray((y, x)), jnp.asarray(0.1)))
            return predicted_loss(weighted_mean, outputs, maps, HALF_PIXELS)

        logits = [jnp.asarray(arrays[f"{name}_logits"], jnp.float64) for name in ("fused", "detail")]
        value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(*logits)
    np.testing.assert_allclose(value, arrays["loss_f64"], rtol=1e-7)
    for name, gradient in zip(("fused", "detail"), gradients, strict=True):
        check(gradient, arrays[f"grad_{name}_logits"])


def test_the_detail_view_is_drawn_in_whole_cells_and_never_last() -> None:
    arrays = golden("hrda_loss")
    keys = jax.random.split(jax.random.key(0), 20_000)
    for (size, crop, unit), largest in zip(arrays["crop_size_stride"], arrays["crop_largest_offset"], strict=True):
        draw = functools.partial(hrda.draw_offset, size=(size, size), crop=(crop, crop), unit=int(unit))
        offsets = np.asarray(jax.jit(jax.vmap(draw))(keys))
        assert set(np.unique(offsets)) == set(range(0, largest + 1, unit))
        if largest:
            assert np.any(offsets[:, 0] != offsets[:, 1])


@pytest.mark.parametrize("variant", ["b0", "b5"])
def test_names_are_the_published_ones(variant: str) -> None:
    model = published(variant)
    flat = flax.traverse_util.flatten_dict(abstract_variables(model, (64, 64)))
    name = model.torch_layouts()["daformer"].name
    keys = {key: tuple(shape) for key, shape in golden_keys(f"model_hrda_{variant}") if "num_batches" not in key}
    assert {name(path): to_torch(np.empty(x.shape, bool)).shape for path, x in flat.items()} == keys


# On small networks


@pytest.fixture(scope="module")
def small() -> tuple:
    """A small network, images of several of its windows, and its variables."""
    model = make_model({**SMALL, "hrda": VIEWS}, 3)
    images = np.random.default_rng(1).normal(size=(2, 128, 192, 3)).astype(np.float32)
    return model, images, random_variables(model, images[:1, :64, :64])


def test_files_there_and_back(small: tuple, tmp_path) -> None:
    model, _, variables = small
    save_torch(variables, model, tmp_path / "file.pth")
    jax.tree.map(np.testing.assert_array_equal, load_torch(tmp_path / "file.pth", model), dict(variables))


@pytest.mark.slow
def test_a_teacher_sees_all_of_the_image_and_a_student_one_part(small: tuple) -> None:
    """Without a key the running statistics move too, and nothing is drawn."""
    model, images, variables = small
    images = images[:, :, :128]
    run = functools.partial(model.apply, variables, images, train=True, mutable=["batch_stats"])
    teacher, moved = jax.jit(run)()
    assert teacher.detail is None and teacher.main.shape == (2, 32, 32, 3)
    assert np.any(moved["batch_stats"]["decoder"]["bottleneck"]["bn"]["mean"])
    student = jax.jit(lambda key: run(index=jnp.arange(2), rngs={"dropout": key})[0])
    outputs = [student(jax.random.key(seed)) for seed in range(6)]
    assert len({tuple(np.asarray(each.detail.offset)) for each in outputs}) > 2
    assert outputs[0].detail.main.shape == (2, 16, 16, 3) and outputs[0].main.shape == (2, 32, 32, 3)
    # Outside of the detail view only the context counts: in a corner away from it, it is the same for every offset.
    assert outputs[0].features.shape == (2, 32, 32, 8)


def test_the_clone_is_of_other_classes_devices_and_types(small: tuple) -> None:
    model, _, _ = small
    other = model.clone(num_classes=7, axis_name="devices")
    assert (other.num_classes, other.axis_name, model.num_classes, model.axis_name) == (7, "devices", 3, None)
    assert hash(model.clone()) == hash(model) and model.clone() == model
    assert output_shapes(other, (64, 64)).main.shape == (1, 16, 16, 7)
    assert other.parameter_group(("scale_attention", "head", "kernel")) == "head"
    assert other.parameter_group(("backbone", "norm1", "scale")) == "norm"
    assert "HRDA" in model.describe()


def test_deeplab_below_it() -> None:
    deeplab = {"name": "deeplab", "backbone": "resnet18", "width": 4, "blocks": (1, 1, 1, 1)}
    views = {"crop": (64, 64), "window": (128, 128), "attention_width": 8}
    model = make_model({**deeplab, "variant": "torchvision", "hrda": views}, 3)
    assert output_shapes(model, (128, 128)).main.shape == (1, 16, 16, 3)
    assert output_shapes(model, (128, 192)).main.shape == (1, 128, 192, 3)
    with pytest.raises(UserError, match=r"model\.variant=caffe"):
        output_shapes(make_model({**deeplab, "variant": "caffe", "hrda": views}, 3), (128, 128))


@pytest.mark.parametrize(
    ("views", "size", "message"),
    [
        ({"crop": (60, 64)}, (128, 128), "a detail view of 60x64 must have sides that 8 divides"),
        ({"crop": (64, 64)}, (100, 128), "an image of 128x100 .* must have sides that 8 divides"),
        ({"crop": (64, 64)}, (56, 128), "too small for a Mix Transformer"),
        ({"crops": (64, 64)}, (128, 128), r"config\.model\.hrda has other fields"),
    ],
)
def test_wrong_sizes_and_fields_are_named(views: dict, size: tuple[int, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        output_shapes(make_model({**SMALL, "hrda": views}, 2), size)
