"""Mix Transformers and the heads of DAFormer and SegFormer: golden values, published names, draws, and bad input."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import golden, golden_keys, network_input, random_variables, state_dict
from ml_collections import ConfigDict

from configs.source_only import get_config
from jaxuda.errors import UserError
from jaxuda.inference import conversion
from jaxuda.interop import load_torch, read_tensors, save_torch
from jaxuda.interop.parts import clean
from jaxuda.interop.tensor_files import safetensors_bytes
from jaxuda.interop.torch_checkpoint import match_backbone, to_torch
from jaxuda.models import abstract_variables, make_model, output_shapes
from jaxuda.models.layers import Dropout, DropPath
from jaxuda.models.mix_transformer import VARIANTS, Encoder
from jaxuda.pipeline import stages
from jaxuda.training import checkpoints, weights

SMALL = {"name": "mix_transformer", "variant": "b0", "width": 8, "blocks": (1, 1, 1, 1), "head_width": 8}
# Of an array's largest entry, in double precision; the stored arrays are rounded to single precision.
TOLERANCE = 1e-6


def network(name: str, **fields) -> object:
    """The golden network daformer_b0, daformer_b5 or segformer_b0, in double precision."""
    head, variant = name.split("_")
    width = 64 if variant == "b0" else 256
    own = {"name": "mix_transformer", "variant": variant, "head": head, "head_width": width}
    return make_model({**own, "dtype": "float64", "dropout": 0.0, "drop_path": 0.0, **fields}, 19)


def doubled(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)


def encoder(variant: str) -> tuple[Encoder, dict]:
    """The golden backbone and its variables, {"params": ...}."""
    model = make_model({"name": "mix_transformer", "variant": variant}, 2)
    match = match_backbone(clean(state_dict(golden_keys(f"model_mit_{variant}"))), model)
    assert not match.missing and not match.unused and not match.misshapen
    leaves = flax.traverse_util.unflatten_dict({path[2:]: x for path, x in match.leaves.items()})
    return Encoder(*VARIANTS[variant], 0.0, False, "float64"), {"params": doubled(leaves)}


def check(actual, expected, tolerance: float = TOLERANCE) -> None:
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def part(arrays: dict, prefix: str) -> dict:
    return {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}


def check_gradients(gradients, names, keys, arrays: dict) -> None:
    """Norm and sum of every parameter's gradient, and the whole gradient of a few.

    gradients: a tree like the parameters. names: path -> torch name. keys: those of the file, in its order.
    """
    flat = flax.traverse_util.flatten_dict(gradients)
    ours = {names(path): to_torch(np.asarray(x)) for path, x in flat.items()}
    keys = [key for key, _ in keys if "running_" not in key and "num_batches" not in key]
    assert ours.keys() <= set(keys)
    norms = np.array([np.linalg.norm(ours[key]) if key in ours else 0.0 for key in keys])
    sums = np.array([np.sum(ours[key]) if key in ours else 0.0 for key in keys])
    np.testing.assert_allclose(norms, arrays["grad_l2_f64"], rtol=1e-7, atol=1e-10)
    np.testing.assert_allclose(sums, arrays["grad_sum_f64"], rtol=1e-7, atol=1e-7 * arrays["grad_l2_f64"].max())
    stored = part(arrays, "grad:")
    for key, expected in stored.items():
        check(ours[key], expected)
    assert stored


@pytest.mark.slow
@pytest.mark.parametrize("case", ["a", "b", "faint"])
def test_backbone_matches_golden(case: str) -> None:
    arrays, keys = part(golden("model_mit_b0"), f"{case}_"), golden_keys("model_mit_b0")
    with jax.enable_x64(True):
        model, variables = encoder("b0")
        images = jnp.asarray(network_input(arrays), jnp.float64)
        cotangents = [arrays.get(f"out{n}_cotangent", 0.0) for n in range(1, 5)]

        def weighted(variables, images):
            maps = model.apply(variables, images, False, None)
            return sum(jnp.sum(w * x) for w, x in zip(cotangents, maps, strict=True)), maps

        if case != "b":
            maps = jax.jit(lambda *a: weighted(*a)[1])(variables, images)
        else:
            run = jax.jit(jax.value_and_grad(weighted, (0, 1), has_aux=True))
            (value, maps), (gradients, of_images) = run(variables, images)
            np.testing.assert_allclose(value, arrays["weighted_sum_f64"], rtol=1e-8)
            check(of_images, arrays["grad_input"])
            name = make_model({"name": "mix_transformer", "variant": "b0"}, 2).backbone_layouts()["mit"].name
            names = lambda path: name((path[0], "backbone", *path[1:]))  # noqa: E731
            check_gradients(gradients, names, keys, arrays)
        for number, found in enumerate(maps, start=1):
            check(found, arrays[f"out{number}_from_double"])


@pytest.mark.slow
def test_large_backbone_matches_golden() -> None:
    arrays = golden("model_mit_b5")
    with jax.enable_x64(True):
        model, variables = encoder("b5")
        maps = jax.jit(functools.partial(model.apply, train=False, index=None))(variables, network_input(arrays))
        for number, found in enumerate(maps, start=1):
            assert found.shape == tuple(arrays[f"out{number}_shape"])
            check(found[..., ::16], arrays[f"out{number}_every16_from_double"])
            check(found.mean((0, 1, 2)), arrays[f"out{number}_channel_mean"])
            check(found.mean(-1), arrays[f"out{number}_pixel_mean"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["daformer_b0", "segformer_b0"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_network_matches_golden(name: str, mode: str) -> None:
    """Logits, gradients and, in training mode, running statistics."""
    whole, keys = golden(f"model_{name}"), golden_keys(f"model_{name}")
    arrays = part(whole, f"{mode}_")
    with jax.enable_x64(True):
        model = network(name)
        variables = doubled(load_torch(state_dict(keys), model))
        train = mode == "train"

        def weighted(params, images):
            outputs, moved = model.apply(
                {**variables, "params": params}, images, train=train, index=jnp.arange(2), mutable=["batch_stats"]
            )
            return jnp.sum(outputs.main * arrays["logits_cotangent"]), (outputs.main, moved)

        images = jnp.asarray(network_input(whole), jnp.float64)
        run = jax.jit(jax.value_and_grad(weighted, (0, 1), has_aux=True))
        (value, (logits, moved)), (gradients, of_images) = run(variables["params"], images)
        check(logits, arrays["logits_from_double"])
        np.testing.assert_allclose(value, arrays["weighted_sum_f64"], rtol=1e-8)
        check(of_images, arrays["grad_input"])
        names = model.torch_layouts()["daformer"].name
        check_gradients(gradients, lambda path: names(("params", *path)), keys, arrays)
        after = {names(path): x for path, x in flax.traverse_util.flatten_dict(moved).items()}
        stored = {key.removesuffix("_from_double"): x for key, x in part(arrays, "after:").items() if "double" in key}
        for key, expected in stored.items():
            check(after[key], expected)
        assert stored.keys() == (after.keys() if train else set())


@pytest.mark.slow
def test_published_network_matches_golden() -> None:
    arrays = golden("model_daformer_b5")
    with jax.enable_x64(True):
        model = network("daformer_b5")
        variables = doubled(load_torch(state_dict(golden_keys("model_daformer_b5")), model))
        logits = jax.jit(lambda images: model.apply(variables, images).main)(network_input(arrays))
        check(logits, arrays["logits_from_double"])


def shapes_of_file(fields: dict, layout: str, classes: int = 19) -> dict[str, tuple[int, ...]]:
    """Torch name -> shape of a file of the network."""
    model = make_model({"name": "mix_transformer", **fields}, classes)
    flat = flax.traverse_util.flatten_dict(abstract_variables(model, (64, 64)))
    name = model.torch_layouts()[layout].name
    return {name(path): to_torch(np.empty(x.shape, bool)).shape for path, x in flat.items()}


@pytest.mark.parametrize("name", ["daformer_b0", "daformer_b5", "segformer_b0"])
def test_names_are_the_published_ones(name: str) -> None:
    head, variant = name.split("_")
    fields = {"variant": variant, "head": head, "head_width": 256 if variant == "b5" else 64}
    keys = {key: tuple(shape) for key, shape in golden_keys(f"model_{name}")}
    unused = {key for key in keys if "num_batches" in key or (head == "segformer" and "conv_seg" in key)}
    assert shapes_of_file(fields, "daformer") == {key: keys[key] for key in keys.keys() - unused}


@pytest.mark.parametrize("variant", ["b1", "b2", "b3", "b4"])
def test_the_other_sizes_have_other_numbers_of_the_same_blocks(variant: str) -> None:
    """As the table of the paper says; all blocks of a stage have the shapes of its first one in B5."""
    counts = {"b1": (2, 2, 2, 2), "b2": (3, 4, 6, 3), "b3": (3, 4, 18, 3), "b4": (3, 8, 27, 3)}[variant]
    expected = {}
    for key, shape in golden_keys("model_daformer_b5"):
        block = re.match(r"backbone\.block(\d)\.(\d+)\.(.*)", key)
        if block and block[2] == "0":
            stage = int(block[1])
            expected |= {f"backbone.block{stage}.{n}.{block[3]}": tuple(shape) for n in range(counts[stage - 1])}
        elif not block and "num_batches" not in key:
            expected[key] = tuple(shape)
    assert shapes_of_file({"variant": variant}, "daformer") == expected


def test_names_and_halves_of_hugging_face_files() -> None:
    """Their key and value layers are halves of ours; and back."""
    for variant in ("b0", "b5"):
        fields = {"variant": variant, "head": "segformer"}
        ours = shapes_of_file(fields, "hugging_face")
        expected = {name: tuple(shape) for name, shape, *_ in golden_keys(f"model_segformer_{variant}_hf")}
        expected = {name: shape for name, shape in expected.items() if "num_batches" not in name}
        split = {}
        for name, shape in ours.items():
            for each in ("key", "value") if "{key,value}" in name else ("",):
                new = name.replace("{key,value}", each)
                split[new] = (shape[0] // 2, *shape[1:]) if each else shape
        assert split == expected


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("layout", ["hugging_face", "nvlabs", "daformer"])
def test_files_there_and_back(layout: str, ending: str, tmp_path: Path) -> None:
    model = make_model({**SMALL, "head": "segformer"}, 3)
    variables = random_variables(model, np.zeros((1, 64, 64, 3), np.float32))
    save_torch(variables, model, tmp_path / f"file.{ending}", layout)
    jax.tree.map(np.testing.assert_array_equal, load_torch(tmp_path / f"file.{ending}", model), dict(variables))


def test_both_orders_of_the_fuse_layer_are_one_network() -> None:
    """The files of SegFormer's authors and of Hugging Face join the last stage first, those of DAFormer the first."""
    fields = {"name": "mix_transformer", "variant": "b0", "head": "segformer", "head_width": 64}
    model, keys = make_model(fields, 19), golden_keys("model_segformer_b0")
    ours = state_dict(keys)
    expected = load_torch(ours, model)
    fuse = "decode_head.linear_fuse.conv.weight"
    reverse = np.concatenate([ours[fuse][:, 64 * n : 64 * (n + 1)] for n in (3, 2, 1, 0)], axis=1)
    theirs = {name: x for name, x in ours.items() if "linear_c." not in name} | {fuse: reverse}
    for stage in range(4):
        for leaf in ("weight", "bias"):
            theirs[f"decode_head.linear_c{stage + 1}.proj.{leaf}"] = ours[f"decode_head.linear_c.{stage}.proj.{leaf}"]
    jax.tree.map(np.testing.assert_array_equal, load_torch(theirs, model), expected)

    renamed = {}
    for name, _, old, *rows in golden_keys("model_segformer_b0_hf"):
        array = theirs[old]
        renamed[name] = array[rows[0] : rows[1]] if rows else array
    jax.tree.map(np.testing.assert_array_equal, load_torch(renamed, model), expected)


@pytest.mark.parametrize("layout", ["mit", "hugging_face"])
def test_files_of_the_classifier_start_the_backbone(layout: str) -> None:
    """With the classifier's own layer, which is left out."""
    keys = golden_keys("model_mit_b0")
    entries = state_dict(keys) | {"head.weight": np.zeros((1000, 256)), "head.bias": np.zeros(1000)}
    if layout == "hugging_face":
        found = {"classifier.weight": entries["head.weight"], "classifier.bias": entries["head.bias"]}
        for name, _, old, *rows in golden_keys("model_segformer_b0_hf"):
            if old.startswith("backbone."):
                array = entries[old.removeprefix("backbone.")]
                found[name] = array[rows[0] : rows[1]] if rows else array
        entries = found
    model = make_model({"name": "mix_transformer", "variant": "b0"}, 19)
    match = match_backbone(clean(entries), model)
    expected = match_backbone(clean(state_dict(keys)), model)
    assert not match.missing and not match.deeper and not match.misshapen
    assert match.leaves.keys() == expected.leaves.keys()
    for path, array in match.leaves.items():
        np.testing.assert_array_equal(array, expected.leaves[path])


def test_converting_says_which_licence_the_weights_have(tmp_path: Path) -> None:
    """Of ImageNet weights, and of one network of several in a file like those of DAFormer's authors."""
    model, said = make_model(SMALL, 3), []
    variables = random_variables(model, np.zeros((1, 64, 64, 3), np.float32))
    save_torch(variables, model, tmp_path / "whole.safetensors")
    student = read_tensors(tmp_path / "whole.safetensors")
    classifier = {name.removeprefix("backbone."): x for name, x in student.items() if name.startswith("backbone.")}
    (tmp_path / "mit_b0.safetensors").write_bytes(safetensors_bytes(classifier))
    conversion.import_imagenet(tmp_path / "mit_b0.safetensors", "mit-b0", str(tmp_path), model, said.append)
    assert any("licence:" in line and "non-commercial" in line for line in said)

    prefixes = {"model.": student, "ema_model.": {name: x + 1 for name, x in student.items()}, "imnet_model.": student}
    whole = {f"state_dict.{prefix}{name}": x for prefix, entries in prefixes.items() for name, x in entries.items()}
    (tmp_path / "uda.safetensors").write_bytes(safetensors_bytes(whole))
    config = get_config("streets")
    config.source_only.model = config.model = ConfigDict(SMALL)
    stage = stages.resolve("source_only", config)
    with pytest.raises(UserError, match=r"2 networks, in the parts 'model', 'ema_model'"):
        conversion.import_checkpoint(tmp_path / "uda.safetensors", stage, 3, tmp_path / "out", said.append)
    del said[:]
    conversion.import_checkpoint(
        tmp_path / "uda.safetensors", stage, 3, tmp_path / "out", said.append, part="ema_model"
    )
    assert any("non-commercial" in line for line in said)
    found = checkpoints.read_variables(tmp_path / "out" / "checkpoints")[0]
    np.testing.assert_allclose(found["params.head.bias"], variables["params"]["head"]["bias"] + 1)


def test_another_mix_transformer_is_named() -> None:
    shapes = {"variant": "b2", "head": "daformer"}
    entries = {name: np.zeros(shape, np.float32) for name, shape in shapes_of_file(shapes, "daformer").items()}
    with pytest.raises(UserError, match=r"its backbone is a MiT-B2.*variant"):
        load_torch(entries, make_model({"name": "mix_transformer", "variant": "b3"}, 19))
    with pytest.raises(UserError, match=r"conv_seg.weight: \(19, 256, 1, 1\) in the checkpoint, \(16, 256, 1, 1\)"):
        load_torch(entries, make_model({"name": "mix_transformer", "variant": "b2"}, 16))


def test_imagenet_weights_have_a_name_and_their_images_a_normalisation() -> None:
    entry = weights.published("mit-b3")
    assert entry.file == "mit_b3.pth" and entry.family == "mix_transformer"
    fields = {"name": "mix_transformer", "variant": "b3"}
    config = ConfigDict({"model": fields, "preprocess": "imagenet"})
    assert weights.network_name(config) == "mit-b3"
    config.preprocess = "caffe"
    with pytest.raises(UserError, match="preprocess=imagenet, not caffe"):
        weights.network_name(config)


# Training


@pytest.fixture(scope="module")
def small() -> tuple:
    """A small network, images, and its variables."""
    model = make_model({**SMALL, "blocks": (2, 1, 2, 1), "drop_path": 0.4, "dropout": 0.3}, 3)
    images = np.random.default_rng(3).normal(size=(64, 32, 32, 3)).astype(np.float32)
    return model, images, random_variables(model, images[:1])


def trained(model, variables, images, index, key: int = 0, **capture):
    run = functools.partial(model.apply, train=True, mutable=["batch_stats", "intermediates"], **capture)
    return jax.jit(run)(variables, images, index=index, rngs={"dropout": jax.random.key(key)})


def test_rates_of_dropping_grow_with_depth(small: tuple) -> None:
    """From 0 to `drop_path`, whole branches of an example; survivors are divided by 1 - rate."""
    model, images, variables = small
    seen = lambda module, _: isinstance(module, DropPath)  # noqa: E731
    _, kept = trained(model, variables, images, jnp.arange(64), capture_intermediates=seen)
    blocks = kept["intermediates"]["backbone"]
    names = ["block1_0", "block1_1", "block2_0", "block3_0", "block3_1", "block4_0"]
    assert list(blocks) == names
    shares, masks = [], []
    for name in names:
        for layer in ("DropPath_0", "DropPath_1"):
            branch = np.asarray(blocks[name][layer]["__call__"][0]).reshape(64, -1)
            zero = branch == 0
            assert (zero.all(1) | ~zero.any(1)).all()
            masks.append(zero.all(1))
        shares.append(np.mean(masks[-2:]))
    expected = 0.4 * np.arange(6) / 5
    assert np.abs(np.array(shares) - expected).max() < 4 * np.sqrt(0.24 / 128) and shares[0] == 0
    assert len({mask.tobytes() for mask in masks[2:]}) == 10  # every layer draws by itself


def test_dropout_drops_whole_channels_of_each_image(small: tuple) -> None:
    model, images, variables = small
    seen = lambda module, _: isinstance(module, Dropout)  # noqa: E731
    outputs, kept = trained(model, variables, images, jnp.arange(64), capture_intermediates=seen)
    dropped = np.asarray(kept["intermediates"]["Dropout_0"]["__call__"][0])
    features = np.asarray(outputs.features)
    live = np.any(features != 0, axis=(1, 2))
    zero = np.all(dropped == 0, axis=(1, 2)) & live
    assert abs(zero[live].mean() - 0.3) < 4 * np.sqrt(0.21 / live.sum())
    np.testing.assert_allclose(dropped, np.where(zero[:, None, None], 0, features / 0.7), rtol=1e-6)
    assert len(np.unique(zero, axis=0)) > 32


@pytest.mark.slow
def test_examples_draw_by_their_place_and_evaluation_draws_nothing(small: tuple) -> None:
    model, images, variables = small
    images = np.repeat(images[:1], 8, axis=0)
    outputs, _ = trained(model, variables, images, jnp.arange(8))
    assert len(np.unique(np.asarray(outputs.levels[3]).reshape(8, -1).round(4), axis=0)) > 2
    moved, _ = trained(model, variables, images[:4], jnp.arange(4, 8))
    # The backbone has no batch normalisation: an example of the batch alone decides its map.
    np.testing.assert_allclose(moved.levels[3], outputs.levels[3][4:], rtol=1e-4, atol=1e-4)
    quiet = jax.jit(model.apply)(variables, images)
    np.testing.assert_allclose(quiet.main, np.repeat(quiet.main[:1], 8, axis=0), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["daformer", "segformer"])
def test_bfloat16_keeps_parameters_statistics_and_outputs(head: str) -> None:
    images = np.random.default_rng(1).normal(size=(2, 32, 48, 3)).astype(np.float32)
    fields = {**SMALL, "head": head, "dropout": 0.0, "drop_path": 0.0}
    wide, narrow = (make_model({**fields, "dtype": dtype}, 3) for dtype in ("float32", "bfloat16"))
    variables = random_variables(wide, images)
    assert jax.tree.map(lambda x: x.dtype, abstract_variables(narrow, (48, 32))) == jax.tree.map(
        lambda x: x.dtype, variables
    )
    expected, _ = trained(wide, variables, images, jnp.arange(2))
    found, kept = trained(narrow, variables, images, jnp.arange(2))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((found, kept["batch_stats"])))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(a - b) < 0.05 * np.linalg.norm(b)


@pytest.mark.slow
def test_remat_changes_nothing(small: tuple) -> None:
    model, images, variables = small
    ends = []
    for remat in (False, True):

        def loss(params, remat=remat):
            outputs, _ = model.clone(remat=remat).apply(
                {**variables, "params": params},
                images[:2],
                train=True,
                index=jnp.arange(2),
                rngs={"dropout": jax.random.key(0)},
                mutable=["batch_stats"],
            )
            return jnp.mean(jnp.square(outputs.main))

        ends.append(jax.jit(jax.grad(loss))(variables["params"]))
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(ends))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * largest), *ends)


def test_the_classifier_maps_the_features_to_the_logits(small: tuple) -> None:
    model, images, variables = small
    outputs = jax.jit(model.apply)(variables, images[:1])
    main = model.classifier(3).apply({"params": variables["params"]["head"]}, outputs.features)
    np.testing.assert_allclose(main, outputs.main, rtol=1e-5, atol=1e-5)


def test_groups_of_the_optimizer() -> None:
    model = make_model(SMALL, 3)
    flat = flax.traverse_util.flatten_dict(abstract_variables(model, (64, 64))["params"])
    groups = {".".join(path): model.parameter_group(path) for path in flat}
    for name, group in groups.items():
        norm = name.startswith("backbone") and "norm" in name
        assert group == ("norm" if norm else group) and (group == "norm") == norm, name
        assert (group == "head") == (not name.startswith("backbone"))
    assert groups["backbone.patch_embed1.proj.kernel"] == "stem"
    assert groups["backbone.block2_0.attn.sr.bias"] == "block"


@pytest.mark.slow
def test_initial_weights() -> None:
    """Spreads of the published initialisation, and a bias that starts at random."""
    model = make_model({"name": "mix_transformer", "variant": "b0", "blocks": (1, 1, 1, 1)}, 19)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    spread = lambda *path: float(np.std(functools.reduce(lambda tree, key: tree[key], path, params)))  # noqa: E731
    expected = {
        ("backbone", "block4_0", "attn", "kv", "kernel"): 0.02,
        ("backbone", "block3_0", "mlp", "dwconv", "kernel"): 0.471,
        ("backbone", "patch_embed4", "proj", "kernel"): np.sqrt(2 / (9 * 256)),
        ("decoder", "branch2", "depthwise", "conv", "kernel"): 0.0147,
        ("decoder", "embed3", "kernel"): 1 / np.sqrt(3 * 256),
        ("decoder", "embed0", "bias"): 1 / np.sqrt(3 * 32),
        ("head", "kernel"): 0.01,
    }
    for path, value in expected.items():
        assert spread(*path) == pytest.approx(value, rel=0.1), path
    assert not np.any(params["head"]["bias"]) and not np.any(params["backbone"]["block1_0"]["attn"]["q"]["bias"])


@pytest.mark.parametrize(
    ("fields", "size", "message"),
    [
        ({"variant": "b6"}, (64, 64), "choose one of: b0, b1"),
        ({"head": "heavy"}, (64, 64), "choose one of: daformer, segformer"),
        ({"blocks": (1, 1)}, (64, 64), "4 numbers"),
        ({}, (28, 64), "an image of 64x28 is too small for a Mix Transformer: its sides must have at least 29"),
    ],
)
def test_wrong_fields_and_small_images_are_named(fields: dict, size: tuple[int, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        output_shapes(make_model({**SMALL, **fields}, 2), size)


def test_the_smallest_image() -> None:
    assert output_shapes(make_model(SMALL, 2), (29, 29)).main.shape == (1, 8, 8, 2)
