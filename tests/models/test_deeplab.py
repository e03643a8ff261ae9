import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import golden, golden_keys, network_input, random_variables, state_dict

from jaxuda.errors import UserError
from jaxuda.interop import load_torch
from jaxuda.models.deeplab import DeepLabV2
from jaxuda.models.layers import resize_bilinear
from jaxuda.models.resnet import ResNet

NETWORKS = {
    "model_advent_r101_multi": DeepLabV2(19, aux=True),
    "model_sdca_r101": DeepLabV2(19, variant="torchvision", norm="frozen", norm_eps=0.0),
    "model_sdca_vgg16": DeepLabV2(19, backbone="vgg16"),
    "model_fork_r18": DeepLabV2(16, backbone="resnet18", dilated=False),
    "model_plca_r101": DeepLabV2(19, head_bias=False),
    "model_dada_r101_depth": DeepLabV2(16, depth=True),
}


def check(actual, expected):
    assert actual.shape == expected.shape
    assert np.abs(np.asarray(actual) - expected).max() < 1e-4 * np.abs(expected).max()


def check_features(actual, arrays, prefix):
    assert actual.shape == tuple(arrays[f"{prefix}_shape"])
    check(actual[..., ::16], arrays[f"{prefix}_every16"])
    check(actual.mean((0, 1, 2)), arrays[f"{prefix}_channel_mean"])
    check(actual.mean(-1), arrays[f"{prefix}_pixel_mean"])


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_published_network_matches_golden(name):
    model = NETWORKS[name]
    variables = load_torch(state_dict(golden_keys(name)), model)

    @jax.jit
    def run(variables, x):
        seen = lambda module, _: isinstance(module, ResNet)  # noqa: E731
        outputs, inner = model.apply(variables, x, capture_intermediates=seen, mutable="intermediates")
        return outputs, inner.get("intermediates")

    # The depth network was evaluated twice, at two scales of its input.
    for case in (name, f"{name}_unit") if model.depth else (name,):
        arrays = golden(case)
        outputs, inner = run(variables, network_input(arrays))
        check(outputs.main, arrays.get("main_logits", arrays.get("logits")))
        if model.aux:
            check(outputs.aux, arrays["aux_logits"])
        if model.depth:
            check(outputs.depth, arrays["depth"])
        if "features_shape" in arrays:
            check_features(outputs.features, arrays, "features")
        if "features_aux_shape" in arrays:
            check_features(inner["backbone"]["__call__"][0][0], arrays, "features_aux")


def test_deep_stem_and_dilations_of_v1c_match_golden():
    """The source's cross-entropy of the first step, over all pixels, of a network in batch mode."""
    arrays, keys = golden("train_sepico"), golden_keys("train_sepico")["param_and_buffer_keys"]
    keys = [pair for pair in keys if not pair[0].startswith("auxiliary_head.")]
    with jax.enable_x64(True):
        model = DeepLabV2(19, "resnet50", "v1c", width=16, blocks=(1, 1, 2, 2), dtype="float64")
        variables = jax.tree.map(lambda x: x.astype(jnp.float64), load_torch(state_dict(keys), model))
        images, labels = arrays["src_images"].astype(np.float64), arrays["src_labels"]

        @jax.jit
        def loss(variables):
            outputs, _ = model.apply(variables, images, train=True, mutable=["batch_stats"])
            scores = jax.nn.log_softmax(resize_bilinear(outputs.main, labels.shape[1:], align_corners=False))
            chosen = jnp.take_along_axis(scores, jnp.where(labels == 255, 0, labels)[..., None], -1)[..., 0]
            return -jnp.mean(jnp.where(labels == 255, 0, chosen))

        np.testing.assert_allclose(loss(variables), arrays["dist_double_losses_f64"][0, 0], rtol=1e-12)


@pytest.mark.parametrize(("variant", "stem"), [("torchvision", (64,)), ("v1c", (32, 32, 64))])
def test_stem_and_branches_of_the_head(variant, stem):
    model = DeepLabV2(19, variant=variant, head_dilations=(6, 12))
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    backbone, head = variables["params"]["backbone"], variables["params"]["head"]
    widths = [backbone[name]["kernel"].shape[-1] for name in sorted(backbone) if name.startswith("conv")]
    assert tuple(widths) == stem
    assert sorted(head) == ["bias0", "bias1", "kernel0", "kernel1"]
    paths = [(name, leaf) for name, layer in backbone.items() if not name.startswith("layer") for leaf in layer]
    groups = {model.parameter_group(("backbone", *path)) for path in paths}
    assert groups == {"stem", "norm"}
    features = jnp.zeros((1, 8, 8, 2048))
    anew = jax.eval_shape(model.classifier(19).init, jax.random.key(0), features)["params"]
    assert jax.tree.map(jnp.shape, anew) == jax.tree.map(jnp.shape, head)


def test_branches_have_their_dilations():
    """A head of two branches is one of four whose other branches are zero."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(1, 16, 20, 8)).astype(np.float32)
    two = {f"kernel{i}": rng.normal(size=(3, 3, 8, 5)).astype(np.float32) for i in range(2)}
    two |= {f"bias{i}": rng.normal(size=5).astype(np.float32) for i in range(2)}
    four = two | {f"kernel{i}": np.zeros((3, 3, 8, 5), np.float32) for i in (2, 3)}
    four |= {f"bias{i}": np.zeros(5, np.float32) for i in (2, 3)}
    whole = DeepLabV2(5).classifier(5).apply({"params": four}, features)
    check(DeepLabV2(5, head_dilations=(6, 12)).classifier(5).apply({"params": two}, features), whole)
    other = DeepLabV2(5, head_dilations=(6, 10)).classifier(5).apply({"params": two}, features)
    assert np.abs(np.asarray(other - whole)).max() > 0.1


SMALL = {
    "resnet18": {"backbone": "resnet18", "aux": True},
    "resnet50": {"backbone": "resnet50", "blocks": (1, 1, 1, 1), "variant": "torchvision", "aux": True},
    "resnet101": {"backbone": "resnet101", "blocks": (1, 1, 1, 1), "depth": True},
    "vgg16": {"backbone": "vgg16", "blocks": (1, 1, 1, 1, 1), "depth": True},
}
# Of a 32 x 48 image: the pool that rounds up makes the maps of the caffe networks one larger.
SHAPES = {
    "resnet18": (2, 5, 7, 64),
    "resnet50": (2, 4, 6, 256),
    "resnet101": (2, 5, 7, 256),
    "vgg16": (2, 4, 6, 128),
}


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "dtype"), [*((name, "float32") for name in SMALL), ("resnet101", "bfloat16")])
def test_small_network_trains_one_step(backbone, dtype):
    model = DeepLabV2(5, width=8, dtype=dtype, **SMALL[backbone])
    images = np.random.default_rng(1).normal(size=(2, 32, 48, 3)).astype(np.float32)
    variables = random_variables(model, images)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))  # as `init` makes them

    @jax.jit
    def step(params, rest, images):
        def loss(params):
            variables = {**rest, "params": params}
            outputs, moved = model.apply(variables, images, train=True, mutable=["batch_stats"])
            return sum(jnp.mean(x**2) for x in outputs if x is not None), (outputs, moved)

        return jax.grad(loss, has_aux=True)(params)

    rest = {k: v for k, v in variables.items() if k != "params"}
    gradients, (outputs, moved) = step(variables["params"], rest, images)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((gradients, outputs, moved)))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(gradients["backbone"]))
    assert outputs.main.shape == (*SHAPES[backbone][:3], 5) and outputs.main.dtype == jnp.float32
    assert outputs.features.shape == SHAPES[backbone] and outputs.features.dtype == jnp.float32
    assert (outputs.aux is not None) == model.aux and (outputs.depth is not None) == model.depth
    if rest:
        assert jax.tree.structure(moved) == jax.tree.structure(rest)
        assert not np.array_equal(moved["batch_stats"]["backbone"]["bn1"]["mean"], np.zeros(8))


def test_parameter_tree_and_count_of_the_published_network():
    model = DeepLabV2(19, aux=True)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    backbone = variables["params"]["backbone"]
    assert sorted(variables["params"]) == ["aux_head", "backbone", "head"]
    assert sorted(backbone["layer1_0"]) == [
        *("bn1", "bn2", "bn3", "conv1", "conv2", "conv3", "downsample_bn", "downsample_conv")
    ]
    assert sorted(backbone["bn1"]) == ["bias", "scale"]
    assert backbone["layer4_2"]["conv3"]["kernel"].shape == (1, 1, 512, 2048)
    # ResNet-101 without its classifier, and two heads of four 3x3 convolutions with bias.
    count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert count == 42_500_160 + 4 * 19 * (9 * (1024 + 2048) + 2)


@pytest.mark.slow
def test_forms_chosen_on_cpu_leave_the_network_unchanged(monkeypatch):
    with jax.enable_x64(True):
        model = DeepLabV2(4, width=8, blocks=(2, 1, 2, 1), dtype="float64")
        images = np.random.default_rng(0).normal(size=(2, 25, 33, 3))
        variables = random_variables(model, images)

        def loss(params):
            both = {**variables, "params": params}
            outputs, _ = model.apply(both, images, train=True, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(100 * outputs.main))

        results = []
        for cpu in (False, True):
            monkeypatch.setattr("jaxuda.models.layers.use_cpu_forms", lambda cpu=cpu: cpu)
            results.append(jax.jit(jax.value_and_grad(loss))(variables["params"]))
        for plain, cpu in zip(*map(jax.tree.leaves, results), strict=True):
            np.testing.assert_allclose(cpu, plain, rtol=1e-9, atol=1e-11 * np.abs(plain).max())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"backbone": "resnet34"}, "model.backbone = 'resnet34'.*resnet18"),
        ({"variant": "pytorch"}, "model.variant = 'pytorch'.*caffe, torchvision, v1c"),
        ({"norm": "sync"}, "model.norm = 'sync'.*batch, frozen"),
        ({"backbone": "vgg16", "aux": True}, "model.aux"),
        ({"backbone": "vgg16", "remat": True}, "model.remat"),
        ({"head_dilations": ()}, r"model.head_dilations = \(\).*\(6, 12\)"),
        ({"head_dilations": (6, 0)}, r"model.head_dilations = \(6, 0\)"),
        ({"blocks": (1, 1)}, r"model.blocks = \(1, 1\).*4 numbers"),
        ({"backbone": "vgg16", "blocks": (1, 1, 1, 1)}, "5 numbers"),
    ],
)
def test_impossible_fields_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(DeepLabV2(3, **fields).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
