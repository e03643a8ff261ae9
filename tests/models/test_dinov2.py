"""DINOv2 and VFM-UDA's decoder: golden values, published names, masked tokens, and bad input."""

from __future__ import annotations

import functools
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import golden, golden_keys, network_input, random_variables, state_dict
from ml_collections import ConfigDict

from jaxuda.errors import UserError
from jaxuda.interop import load_torch, save_torch
from jaxuda.interop.parts import clean
from jaxuda.interop.tensor_files import read_entries
from jaxuda.interop.torch_checkpoint import match_backbone, raise_problems, to_torch
from jaxuda.models import abstract_variables, make_model, output_shapes
from jaxuda.models.dinov2 import Block, Encoder, enlarged, positions
from jaxuda.models.layers import Conv, resize_bilinear
from jaxuda.models.transformer_layers import Enlarge, LayerNorm
from jaxuda.training import weights

TINY = {"name": "dinov2", "width": 48, "blocks": (4,), "heads": 3, "grid": 7}
SMALL = {"name": "dinov2", "width": 8, "blocks": (1, 1), "heads": 2, "grid": 3}
# Of an array's largest entry, in double precision; the stored arrays are rounded to single precision.
TOLERANCE = 1e-6


def doubled(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)


def check(actual, expected) -> None:
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


def part(arrays: dict, prefix: str) -> dict:
    return {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}


def check_gradients(ours: dict, keys, arrays: dict) -> None:
    """Norm and sum of every parameter's gradient, and the whole gradient of a few; `ours`: torch name -> array."""
    keys = [key for key, _ in keys]
    norms = np.array([np.linalg.norm(ours.get(key, 0.0)) for key in keys])
    sums = np.array([np.sum(ours.get(key, 0.0)) for key in keys])
    assert ours.keys() <= set(keys)
    np.testing.assert_allclose(norms, arrays["grad_l2_f64"], rtol=1e-7, atol=1e-10)
    np.testing.assert_allclose(sums, arrays["grad_sum_f64"], rtol=1e-7, atol=1e-7 * arrays["grad_l2_f64"].max())
    stored = part(arrays, "grad:")
    for key, expected in stored.items():
        check(ours[key], expected)
    assert stored


def by_torch_name(params, name) -> dict[str, np.ndarray]:
    flat = flax.traverse_util.flatten_dict(params)
    return {name(("params", *path)): to_torch(np.asarray(x)) for path, x in flat.items()}


def backbone(fields: dict, golden_name: str) -> tuple[Encoder, dict]:
    """A golden backbone in double precision, and its parameters."""
    model = make_model({**fields, "dtype": "float64"}, 2)
    match = match_backbone(clean(state_dict(golden_keys(golden_name))), model)
    raise_problems(match, model)
    leaves = flax.traverse_util.unflatten_dict({path[2:]: x for path, x in match.leaves.items()})
    return Encoder(*model._sizes(), model.grid, model.registers, 0.0, False, "float64"), doubled(leaves)


def maps_of_blocks(encoder: Encoder, params, images) -> list[jax.Array]:
    """The normalised tokens after every block, (N, T, A)."""
    seen = lambda module, _: isinstance(module, Block)  # noqa: E731
    last, kept = encoder.apply(
        {"params": params}, images, False, None, capture_intermediates=seen, mutable=["intermediates"]
    )
    norm = LayerNorm(dtype="float64")
    blocks = [kept["intermediates"][f"block{place}"]["__call__"][0] for place in range(encoder.blocks)]
    tokens = [norm.apply({"params": params["norm"]}, x) for x in blocks]
    assert last.shape[1] * last.shape[2] + 1 + 4 * encoder.registers == tokens[-1].shape[1]
    return tokens


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_backbone_matches_golden(case: str, registers: bool) -> None:
    """All blocks, positions as they are and resampled, and gradients."""
    name = "model_dinov2_tiny_reg" if registers else "model_dinov2_tiny"
    arrays, keys = part(golden(name), f"{case}_"), golden_keys(name)
    with jax.enable_x64(True):
        encoder, params = backbone({**TINY, "registers": registers}, name)
        images = jnp.asarray(network_input(arrays), jnp.float64)
        size = tuple(side // 14 for side in images.shape[1:3])
        check(positions(params["pos_embed"], size, registers), arrays["position_from_double"])

        def weighted(params, images):
            found, total = {}, 0.0
            for place, tokens in enumerate(maps_of_blocks(encoder, params, images)):
                found[f"block{place}_cls"] = tokens[:, 0]
                patches = tokens[:, 1 + 4 * registers :]
                found[f"block{place}"] = patches.reshape(-1, *size, patches.shape[-1])
            for key, x in found.items():
                total += jnp.sum(x * arrays[f"{key}_cotangent"])
            return total, found

        (value, found), (gradients, of_images) = jax.jit(jax.value_and_grad(weighted, (0, 1), has_aux=True))(
            params, images
        )
        for key, x in found.items():
            check(x, arrays[f"{key}_from_double"])
        np.testing.assert_allclose(value, arrays["weighted_sum_f64"], rtol=1e-8)
        check(of_images, arrays["grad_input"])
        name = make_model({**TINY, "registers": registers}, 2).backbone_layouts()["dinov2"].name
        check_gradients(by_torch_name({"backbone": gradients}, name), keys, arrays)


def test_published_size_matches_golden() -> None:
    arrays = golden("model_dinov2_vits14")
    with jax.enable_x64(True):
        encoder, params = backbone({"name": "dinov2", "variant": "vits14"}, "model_dinov2_vits14")
        blocks = jax.jit(functools.partial(maps_of_blocks, encoder))(params, network_input(arrays))
    for place in (2, 5, 8, 11):
        found = np.asarray(blocks[place])[:, 1:].reshape(arrays[f"block{place}_shape"])
        check(found[..., ::16], arrays[f"block{place}_every16_from_double"])
        check(found.mean((0, 1, 2)), arrays[f"block{place}_channel_mean"])
        check(found.mean(-1), arrays[f"block{place}_pixel_mean"])


def test_decoder_matches_golden() -> None:
    """VFM-UDA: enlarged images, features, logits, logits at image size, gradients."""
    arrays, keys = golden("model_vfmuda_tiny"), golden_keys("model_vfmuda_tiny")
    with jax.enable_x64(True):
        model = make_model({**TINY, "dtype": "float64"}, 19)
        variables = doubled(load_torch(state_dict(keys), model))
        images = jnp.asarray(network_input(arrays), jnp.float64)
        side = int(arrays["encoder_image_size"])
        assert enlarged(images.shape[1:3]) == (side, side)

        def weighted(params, images):
            outputs = model.apply({"params": params}, images)
            large = resize_bilinear(outputs.main, images.shape[1:3], align_corners=False)
            found = {
                "logits": outputs.main,
                "features": outputs.levels[-1],
                "image_logits_every4": large[:, ::4, ::4],
            }
            return sum(jnp.sum(x * arrays[f"{key}_cotangent"]) for key, x in found.items()), found

        run = jax.jit(jax.value_and_grad(weighted, (0, 1), has_aux=True))
        (value, found), (gradients, of_images) = run(variables["params"], images)
        for key, x in found.items():
            check(x, arrays[f"{key}_from_double"])
        np.testing.assert_allclose(value, arrays["weighted_sum_f64"], rtol=1e-8)
        check(of_images, arrays["grad_input"])
        check_gradients(by_torch_name(gradients, model.torch_layouts()["vfmuda"].name), keys, arrays)


# Names


@pytest.mark.parametrize(
    ("variant", "layout"),
    [("vits14", "dinov2"), ("vitl14", "dinov2"), ("vits14", "hugging_face")],
)
def test_names_of_backbone_files(variant: str, layout: str) -> None:
    """Every entry of the published table is taken, and both layouts give the same variables."""
    table = f"model_dinov2_{variant}"
    model = make_model({"name": "dinov2", "variant": variant, "head": "linear"}, 2)
    keys = golden_keys(table if layout == "dinov2" else f"{table}_hf")
    entries = {key: np.zeros(shape, np.float32) for key, shape, *_ in keys}
    match = match_backbone(clean(entries), model)
    assert not (match.missing or match.unused or match.misshapen)
    backbone = flax.traverse_util.flatten_dict(abstract_variables(model, (14, 14))["params"]["backbone"])
    assert {path[2:]: x.shape for path, x in match.leaves.items()} == {path: x.shape for path, x in backbone.items()}


def test_hugging_face_files_hold_the_same_numbers() -> None:
    ours = state_dict(golden_keys("model_dinov2_vits14"))
    theirs = {}
    for name, _, old, *rows in golden_keys("model_dinov2_vits14_hf"):
        theirs[name] = ours[old][rows[0] : rows[1]] if rows else ours[old]
    model = make_model({"name": "dinov2", "variant": "vits14"}, 2)
    expected, found = (match_backbone(clean(entries), model).leaves for entries in (ours, theirs))
    assert found.keys() == expected.keys()
    for path, array in found.items():
        np.testing.assert_array_equal(array, expected[path])


def test_registers_are_files_of_their_own() -> None:
    entries = clean({key: np.zeros(shape, np.float32) for key, shape in golden_keys("model_dinov2_vits14_reg")})
    fields = {"name": "dinov2", "variant": "vits14"}
    match = match_backbone(entries, make_model({**fields, "registers": True}, 2))
    assert not (match.missing or match.unused or match.misshapen or match.kind)
    assert match_backbone(entries, make_model(fields, 2)).kind == "a DINOv2 ViT-S/14 with registers"


def test_names_of_vfmuda_files() -> None:
    """The mask token is there twice."""
    keys = golden_keys("model_vfmuda_vitb14")
    model = make_model({"name": "dinov2", "variant": "vitb14"}, 19)
    flat = flax.traverse_util.flatten_dict(abstract_variables(model, (14, 14)))
    layout = model.torch_layouts()["vfmuda"]
    found = {layout.name(path): to_torch(np.empty(x.shape, bool)).shape for path, x in flat.items()}
    found |= {copy: found[name] for copy, name in layout.copies.items()}
    assert found == {key: tuple(shape) for key, shape in keys}


@pytest.mark.parametrize("head", ["vfmuda", "linear"])
def test_files_there_and_back(head: str, tmp_path: Path) -> None:
    model = make_model({**SMALL, "head": head, "registers": True}, 3)
    variables = random_variables(model, np.zeros((1, 64, 64, 3), np.float32))
    file = tmp_path / "file.pth"
    save_torch(variables, model, file)
    jax.tree.map(np.testing.assert_array_equal, load_torch(file, model), dict(variables))
    names = read_entries(file)
    assert ("token_masking.mask_token" in names) == (head == "vfmuda")
    both = {f"{prefix}.{name}": x for prefix in ("network", "network_ema") for name, x in names.items()}
    both["network_ema.encoder.norm.weight"] = 2 * both["network_ema.encoder.norm.weight"]
    with pytest.raises(UserError, match="network_ema"):
        load_torch(both, model)
    taken = load_torch(both, model, part="network")
    jax.tree.map(np.testing.assert_array_equal, taken, dict(variables))


def test_another_size_is_named() -> None:
    entries = {key: np.zeros(shape, np.float32) for key, shape in golden_keys("model_vfmuda_vitb14")}
    with pytest.raises(UserError, match=r"its backbone is a DINOv2 ViT-B/14.*variant"):
        load_torch(entries, make_model({"name": "dinov2", "variant": "vits14"}, 19))
    with pytest.raises(UserError, match=r"out.weight: \(19, 192, 1, 1\) in the checkpoint, \(16, 192, 1, 1\)"):
        load_torch(entries, make_model({"name": "dinov2"}, 16))


def test_weights_have_a_name_and_their_images_a_normalisation() -> None:
    entry = weights.published("dinov2-vitl14-reg4")
    assert entry.file == "dinov2_vitl14_reg4_pretrain.pth" and entry.family == "dinov2"
    fields = {"name": "dinov2", "variant": "vitl14", "registers": True}
    config = ConfigDict({"model": fields, "preprocess": "imagenet"})
    assert weights.network_name(config) == "dinov2-vitl14-reg4"
    config.preprocess = "caffe"
    with pytest.raises(UserError, match="preprocess=imagenet, not caffe"):
        weights.network_name(config)


# Training


@pytest.fixture(scope="module")
def small() -> tuple:
    """A small network whose branches count, images, and its variables."""
    model = make_model({**SMALL, "registers": True}, 3)
    images = np.random.default_rng(3).normal(size=(16, 52, 64, 3)).astype(np.float32)
    variables = random_variables(model, images[:1])
    tokens = lambda path, x: x + 1 if path[-1].key in ("gamma", "mask_token") else x  # noqa: E731
    return model, images, jax.tree_util.tree_map_with_path(tokens, variables)


def trained(model, variables, images, index, **given):
    run = functools.partial(model.apply, train=True, rngs={"dropout": jax.random.key(0)}, **given)
    return jax.jit(run)(variables, images, index=index)


def test_masked_tokens(small: tuple) -> None:
    """A share of the patches of each image loses its content, by the image's place; only in training."""
    model, images, variables = small
    masked = model.clone(mask_ratio=0.7)
    # With the weights of the patches at 0, all tokens are alike but for their positions and for the mask token.
    params = flax.traverse_util.flatten_dict(variables["params"])
    blind = {path: x * (path[1] not in ("patch_embed", "pos_embed")) for path, x in params.items()}
    blind = {"params": flax.traverse_util.unflatten_dict(blind)}
    seen = lambda module, name: isinstance(module, Block)  # noqa: E731
    _, kept = jax.jit(
        lambda v: masked.apply(
            v,
            images,
            train=True,
            index=jnp.arange(16),
            rngs={"dropout": jax.random.key(0)},
            capture_intermediates=seen,
            mutable=["intermediates"],
        )
    )(blind)
    tokens = np.asarray(kept["intermediates"]["backbone"]["block0"]["__call__"][0])[:, 5:]
    assert tokens.shape[1] == 4 * 5
    hidden = np.zeros(tokens.shape[:2], bool)
    for place, image in enumerate(tokens):
        kinds = np.unique(image.round(4), axis=0)
        assert len(kinds) == 2
        hidden[place] = np.all(np.isclose(image, kinds[0], atol=1e-3), axis=-1)
    # One of the two kinds is the masked one, the same for all images or not: shares of 0.7 and 0.3.
    shares = np.minimum(hidden.mean(1), 1 - hidden.mean(1))
    assert abs(shares.mean() - 0.3) < 0.08
    assert len(np.unique(hidden, axis=0)) > 8

    plain = jax.jit(model.apply)(variables, images).main
    np.testing.assert_array_equal(jax.jit(masked.apply)(variables, images).main, plain)
    with jax.enable_x64(True):  # normalising tokens that are all alike amplifies rounding
        wide, exact = masked.clone(dtype="float64"), jax.tree.map(jnp.float64, (variables, images))
        found = trained(wide, *exact, jnp.arange(16)).main
        moved = trained(wide, exact[0], exact[1][4:8], jnp.arange(4, 8)).main
    assert not np.allclose(found, plain, atol=1e-3)
    np.testing.assert_allclose(moved, found[4:8], rtol=1e-6, atol=1e-6)


def test_the_mask_token_learns_from_masked_images_alone(small: tuple) -> None:
    model, images, variables = small

    model = model.clone(blocks=(1,))

    def loss(params, ratio):
        outputs = trained(model.clone(mask_ratio=ratio), {"params": params}, images[:2], jnp.arange(2))
        return jnp.mean(jnp.square(outputs.main))

    for ratio, learns in ((0.0, False), (0.5, True)):
        gradient = jax.grad(loss)(variables["params"], ratio)["backbone"]["mask_token"]
        assert bool(np.any(gradient)) == learns


def gradient(model, variables, images, **fields):
    def loss(params):
        outputs = model.clone(head="linear", **fields).apply({"params": params}, images, train=True)
        assert all(leaf.dtype == images.dtype for leaf in jax.tree.leaves(outputs))
        return jnp.mean(jnp.square(outputs.main))

    params = {"backbone": variables["params"]["backbone"]}
    head = {"kernel": np.eye(8, 3)[None, None].astype(images.dtype), "bias": np.zeros(3, images.dtype)}
    return jax.jit(jax.grad(loss))({**params, "head": head})


def test_remat_changes_nothing(small: tuple) -> None:
    model, images, variables = small
    with jax.enable_x64(True):
        given = (model.clone(dtype="float64"), doubled(variables), doubled(images[:2]))
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9 * np.abs(b).max() + 1e-15)  # noqa: E731
        jax.tree.map(close, gradient(*given, remat=True), gradient(*given))


def test_bfloat16_changes_little(small: tuple) -> None:
    plain, narrow = (
        gradient(small[0], small[2], small[1][:2]),
        gradient(small[0], small[2], small[1][:2], dtype="bfloat16"),
    )
    norm = lambda tree: np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree)))  # noqa: E731
    assert 0 < norm(jax.tree.map(lambda a, b: a - b, narrow, plain)) < 0.1 * norm(plain)


@pytest.mark.parametrize("head", ["vfmuda", "linear"])
def test_the_classifier_maps_the_features_to_the_logits(head: str) -> None:
    model = make_model({**SMALL, "head": head}, 3)
    images = np.random.default_rng(3).normal(size=(1, 52, 64, 3)).astype(np.float32)
    variables = random_variables(model, images)
    outputs = jax.jit(model.apply)(variables, images)
    scale = 4 if head == "vfmuda" else 1
    assert outputs.main.shape == (1, 4 * scale, 5 * scale, 3)
    main = model.classifier(3).apply({"params": variables["params"]["head"]}, outputs.features)
    np.testing.assert_allclose(main, outputs.main, rtol=1e-5, atol=1e-5)


def test_groups_of_the_optimizer() -> None:
    flat = flax.traverse_util.flatten_dict(abstract_variables(make_model(SMALL, 3), (64, 64))["params"])
    groups = {".".join(path): make_model(SMALL, 3).parameter_group(path) for path in flat}
    expected = {
        "backbone.pos_embed": "stem",
        "backbone.patch_embed.kernel": "stem",
        "backbone.mask_token": "stem",
        "backbone.block1.attn.qkv.kernel": "block",
        "backbone.block1.ls2.gamma": "block",
        "backbone.block0.norm1.scale": "norm",
        "backbone.norm.bias": "norm",
        "decoder.up1.kernel": "head",
        "decoder.norm1.scale": "head",
        "head.kernel": "head",
    }
    assert expected.items() <= groups.items()


def test_initial_weights() -> None:
    params = jax.jit(make_model({**TINY, "heads": 4}, 19).init)(jax.random.key(0), jnp.zeros((1, 28, 28, 3)))["params"]
    spread = lambda *path: float(np.std(functools.reduce(lambda tree, key: tree[key], path, params)))  # noqa: E731
    expected = {
        ("backbone", "block3", "attn", "qkv", "kernel"): 0.02,
        ("backbone", "patch_embed", "kernel"): 1 / np.sqrt(3 * 588),
        ("decoder", "up1", "kernel"): 1 / np.sqrt(3 * 4 * 24),
        ("head", "kernel"): 0.1,
    }
    for path, value in expected.items():
        assert spread(*path) == pytest.approx(value, rel=0.15), path
    assert np.all(params["backbone"]["block0"]["ls1"]["gamma"] == np.float32(1e-5))


@pytest.mark.parametrize(
    ("fields", "size", "message"),
    [
        ({"variant": "vitg14"}, (64, 64), "choose one of: vits14, vitb14"),
        ({"head": "heavy"}, (64, 64), "choose one of: vfmuda, linear"),
        ({"heads": 3}, (64, 64), "width=8 must be a multiple"),
        ({}, (12, 64), "an image of 64x12 is too small for DINOv2.*at least 13"),
    ],
)
def test_wrong_fields_and_small_images_are_named(fields: dict, size: tuple[int, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        output_shapes(make_model({**SMALL, **fields}, 2), size)


def test_any_size_becomes_whole_patches() -> None:
    assert enlarged((1024, 13)) == (1120, 14)
    assert output_shapes(make_model(SMALL, 2), (13, 30)).main.shape == (1, 4, 8, 2)
    encoder = Encoder(8, 1, 2, 3, False, 0.0, False, "float32")
    with pytest.raises(UserError, match="whole patches of 14"):
        jax.eval_shape(lambda x: encoder.init(jax.random.key(0), x, False, None), jnp.zeros((1, 15, 14, 3)))


@pytest.mark.slow
def test_windows() -> None:
    """Images up to the window are computed as a whole; larger ones in overlapping windows."""
    model = make_model({**SMALL, "window": (48, 40)}, 3)
    images = np.random.default_rng(3).normal(size=(2, 40, 60, 3)).astype(np.float32)
    variables = random_variables(model, images)
    whole = model.clone(window=None)
    run = lambda model, images: jax.jit(model.apply)(variables, images)  # noqa: E731
    found, left, right = run(model, images), run(whole, images[:, :, :48]), run(whole, images[:, :, 12:])
    np.testing.assert_array_equal(run(model, images[:, :, :48]).main, left.main)
    assert found.main.shape == (2, 40, 60, 3) and found.features.shape[:3] == (2, 40, 60)
    parts = [jax.nn.softmax(resize_bilinear(x.main, (40, 48), align_corners=False)) for x in (left, right)]
    expected = np.zeros((2, 40, 60, 3))
    expected[:, :, :48] += parts[0]
    expected[:, :, 12:] += parts[1]
    expected[:, :, 12:48] /= 2
    np.testing.assert_allclose(jax.nn.softmax(found.main), expected, atol=1e-5)
    trained = jax.eval_shape(lambda: model.apply(variables, images, train=True)).main.shape
    assert trained == whole.apply(variables, images).main.shape


def test_forms_of_the_convolutions_agree(monkeypatch) -> None:
    """Those for CPUs and those of the library; sides that the stride does not divide lose the rest."""
    x = np.random.default_rng(0).normal(size=(2, 9, 14, 3)).astype(np.float32)
    for layer in (Conv(5, 4, 4, padding=0), Enlarge(5)):
        variables = layer.init(jax.random.key(0), x)
        found = []
        for forms in (True, False):
            monkeypatch.setattr("jaxuda.models.layers.use_cpu_forms", lambda forms=forms: forms)
            found.append(layer.apply(variables, x))
        np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-5)
