import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import golden
from jax import lax

from jaxuda.errors import UserError
from jaxuda.models import layers
from jaxuda.pipeline.cost import operations

pytestmark = pytest.mark.usefixtures("all_optimizations")


def relative_error(actual, expected):
    return np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max()


# Golden numbers


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("case", ["up0", "up1", "up2"])
def test_resize_bilinear_and_its_gradient_match_golden(case, align_corners):
    arrays = golden("resize")
    x, cotangent = arrays[f"{case}_input"], arrays[f"{case}_cotangent"]
    y, pullback = jax.vjp(lambda x: layers.resize_bilinear(x, cotangent.shape[1:3], align_corners), x)
    key = f"{case}_ac{int(align_corners)}"
    assert relative_error(y, arrays[f"{key}_output"]) < 1e-5
    assert relative_error(pullback(jnp.asarray(cotangent))[0], arrays[f"{key}_grad_input"]) < 1e-5


def test_resize_labels_matches_golden_maps_and_indices():
    arrays = golden("resize")
    for case in range(4):
        expected = arrays[f"nearest{case}_output"]
        actual = layers.resize_labels(arrays[f"nearest{case}_input"], expected.shape[1:])
        np.testing.assert_array_equal(actual, expected)
    for key, expected in arrays.items():
        if key.startswith("nearest_index_"):
            source, target = (int(n) for n in key.removeprefix("nearest_index_").split("_to_"))
            ramp = np.broadcast_to(np.arange(source), (2, source))
            np.testing.assert_array_equal(layers.resize_labels(ramp, (2, target))[1], expected)


def batch_norm_variables(arrays):
    return {
        "params": {"scale": arrays["weight"], "bias": arrays["bias"]},
        "batch_stats": {"mean": arrays["running_mean"], "var": arrays["running_var"]},
    }


def test_batch_norm_matches_golden():
    arrays = golden("batchnorm")
    variables, x = batch_norm_variables(arrays), arrays["x"]
    frozen = layers.BatchNorm(mode="frozen", eps=0.0).apply(variables, x, True)
    assert relative_error(frozen, arrays["frozen_output"]) < 1e-5
    assert relative_error(layers.BatchNorm().apply(variables, x, False), arrays["bn_eval_output"]) < 1e-5
    y, moved = layers.BatchNorm().apply(variables, x, True, mutable=["batch_stats"])
    assert relative_error(y, arrays["bn_train_output"]) < 1e-5
    assert relative_error(moved["batch_stats"]["mean"], arrays["bn_train_running_mean"]) < 1e-5
    assert relative_error(moved["batch_stats"]["var"], arrays["bn_train_running_var"]) < 1e-5


# Global batch


def test_batch_norm_over_devices_equals_one_device():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x = rng.normal(3.0, 1.0, (4, 5, 3, 6))
        cotangent = rng.normal(size=x.shape)
        variables = layers.BatchNorm().init(jax.random.key(0), x, True)

        def loss(params, x, cotangent, axis_name):
            norm = layers.BatchNorm(axis_name=axis_name, dtype="float64")
            y, moved = norm.apply({**variables, "params": params}, x, True, mutable=["batch_stats"])
            total = jnp.sum(jnp.tanh(y) * cotangent)
            return total if axis_name is None else lax.psum(total, axis_name), moved

        grad = jax.value_and_grad(loss, has_aux=True)
        (value, moved), gradient = grad(variables["params"], x, cotangent, None)

        def step(x, cotangent):
            result, gradient = grad(variables["params"], x, cotangent, "device")
            return result, lax.pmean(gradient, "device")

        (values, moved_n), gradients = jax.pmap(step, axis_name="device")(
            x.reshape(4, 1, 5, 3, 6), cotangent.reshape(4, 1, 5, 3, 6)
        )
        np.testing.assert_allclose(values, np.full(4, value), rtol=1e-12)
        jax.tree.map(lambda n, one: np.testing.assert_allclose(n[3], one, rtol=1e-11), moved_n, moved)
        jax.tree.map(lambda n, one: np.testing.assert_allclose(n[3], one, rtol=1e-10, atol=1e-12), gradients, gradient)


def test_batch_norm_keeps_small_variance_beside_large_mean():
    x = np.random.default_rng(0).normal(1000.0, 0.1, (8, 9, 9, 4)).astype(np.float32)
    _, var, count = layers.batch_moments(jnp.asarray(x), None)
    assert count == 8 * 81
    np.testing.assert_allclose(var, x.astype(np.float64).var((0, 1, 2)), rtol=1e-3)


def test_batch_norm_statistics_do_not_move_at_initialisation():
    variables = layers.BatchNorm(axis_name="device").init(jax.random.key(0), jnp.ones((2, 3, 3, 4)), True)
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], 0)
    np.testing.assert_array_equal(variables["batch_stats"]["var"], 1)


# Small layers against their definitions


@pytest.mark.parametrize("ceil", [False, True])
@pytest.mark.parametrize("length", [7, 8, 9, 10])
@pytest.mark.parametrize(("size", "padding"), [(3, 1), (2, 0)])
def test_max_pool(size, padding, length, ceil):
    x = np.random.default_rng(0).normal(size=(1, length, 11, 2)).astype(np.float32)

    def windows(n):  # a window starts inside the map or its left padding
        last = n + 2 * padding - size
        count = -(-last // 2) + 1 if ceil else last // 2 + 1
        return [2 * i - padding for i in range(count) if 2 * i - padding < n]

    expected = np.array(
        [[x[0, max(i, 0) : i + size, max(j, 0) : j + size].max((0, 1)) for j in windows(11)] for i in windows(length)]
    )
    np.testing.assert_array_equal(layers.max_pool(jnp.asarray(x), size, 2, padding, ceil)[0], expected)


@pytest.mark.parametrize("kind", ["caffe", "vgg", "imagenet", "efficientnet"])
def test_denormalise_is_the_inverse(kind: str) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 3)).astype(np.uint8)
    back = layers.denormalise(layers.normalise(images, kind), kind)
    np.testing.assert_allclose(back, images, atol=1e-3)


def test_normalise():
    pixel = np.array([[[[255, 0, 51]]]], np.uint8)
    np.testing.assert_allclose(
        layers.normalise(pixel, "caffe")[0, 0, 0],
        [51 - 104.00698793, -116.66876762, 255 - 122.67891434],
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        layers.normalise(pixel, "vgg")[0, 0, 0], [51 - 103.939, -116.779, 255 - 123.68], rtol=1e-6
    )
    np.testing.assert_allclose(
        layers.normalise(pixel, "imagenet")[0, 0, 0],
        [(1 - 0.485) / 0.229, -0.456 / 0.224, (0.2 - 0.406) / 0.225],
        rtol=1e-5,
    )
    for function in (layers.normalise, layers.denormalise):
        with pytest.raises(UserError, match="caffe, vgg, imagenet"):
            function(pixel, "pytorch")


def test_gradient_reversal():
    x = jnp.arange(3.0)
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(layers.gradient_reversal(x, 0.5) ** 2))(x)
    assert value == 5
    np.testing.assert_allclose(gradient, -0.5 * 2 * x)
    scaled = jax.jit(jax.grad(lambda x, scale: jnp.sum(layers.gradient_reversal(x, scale))))(x, 0.25)
    np.testing.assert_allclose(scaled, -0.25)


# The forms chosen for a platform against the plain ones


def plain_and(platform, function, *arguments):
    """Outputs and gradients of the library's form and of that for a platform, in float64, computed here."""
    results = []
    for name in ("any", platform):

        def both(*arguments):  # a new function each time: the form is chosen while tracing
            y, pullback = jax.vjp(function, *arguments)
            return y, pullback(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

        with layers.compile_for(name):
            results.append(jax.jit(both)(*arguments))
    return results


def check_equal(results):
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        assert relative_error(b, np.asarray(a)) < 1e-12


@pytest.mark.parametrize("stride", [1, 2])
def test_pointwise_convolution_on_cpu_equals_library(stride):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, kernel = rng.normal(size=(2, 7, 8, 5)), rng.normal(size=(1, 1, 5, 3))
        check_equal(plain_and("cpu", lambda x, k: layers.conv2d(x, k, stride), x, kernel))


@pytest.mark.parametrize("size", [(11, 6), (4, 9)], ids=str)
def test_dilated_convolution_on_cpu_equals_library(size):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, kernel = rng.normal(size=(2, *size, 5)), rng.normal(size=(3, 3, 5, 4))
        conv = lambda x, k: layers.conv2d(x, k, dilation=4, padding=4)  # noqa: E731
        check_equal(plain_and("cpu", conv, x, kernel))


@pytest.mark.parametrize("width", [9, 10])
@pytest.mark.parametrize(("size", "padding"), [(7, 3), (3, 1), (4, 1), (3, 0)])
def test_convolution_of_images_on_cpu_equals_library(size, padding, width):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, kernel = rng.normal(size=(2, 11, width, 3)), rng.normal(size=(size, size, 3, 5))
        check_equal(plain_and("cpu", lambda x, k: layers.conv2d(x, k, 2, padding=padding), x, kernel))


@pytest.mark.parametrize("ceil", [False, True])
@pytest.mark.parametrize(("size", "stride", "padding"), [(3, 2, 1), (2, 2, 0), (3, 1, 1), (2, 3, 0)])
def test_max_pool_on_cpu_equals_library(size, stride, padding, ceil):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        # Steps of a half: the first of equal entries must win in both.
        for x in (rng.normal(size=(2, 8, 11, 3)), np.round(2 * rng.normal(size=(2, 9, 12, 3))) / 2):
            pool = lambda x: layers.max_pool(x, size, stride, padding, ceil)  # noqa: E731
            check_equal(plain_and("cpu", pool, x))


@pytest.mark.parametrize("dilation", [2, 4, 12])
@pytest.mark.parametrize("size", [(8, 12), (11, 7), (1, 3)], ids=str)
def test_dilated_convolution_on_gpu_equals_library(size, dilation):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, kernel = rng.normal(size=(2, *size, 5)), rng.normal(size=(3, 3, 5, 4))
        conv = lambda x, k: layers.conv2d(x, k, dilation=dilation, padding=dilation)  # noqa: E731
        check_equal(plain_and("gpu", conv, x, kernel))


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_dilated_depthwise_convolution_on_gpu_equals_library(kernel_size):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, kernel = rng.normal(size=(2, 11, 7, 6)), rng.normal(size=(kernel_size, kernel_size, 1, 6))
        pads = ((kernel_size - 1, kernel_size - 1),) * 2
        check_equal(plain_and("gpu", lambda x, k: layers.depthwise_conv2d(x, k, 1, 2, pads), x, kernel))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernel_gradient_of_dilated_convolution_on_gpu_has_no_dilation(dtype):
    """And no more operations than the library's, on a map whose sides the dilation divides."""
    x, kernel = jax.ShapeDtypeStruct((2, 12, 16, 5), dtype), jax.ShapeDtypeStruct((3, 3, 5, 4), dtype)

    def gradients(x, kernel):
        y, pullback = jax.vjp(lambda x, k: layers.conv2d(x, k, dilation=4, padding=4), x, kernel)
        return pullback(y)

    counts = []
    for platform in ("any", "gpu"):
        with layers.compile_for(platform):
            jaxpr = jax.make_jaxpr(lambda *given: gradients(*given))(x, kernel)
        assert [part.dtype for part in jaxpr.out_avals] == [dtype, dtype]
        counts.append(operations(jaxpr.jaxpr))
    assert counts[0] == counts[1]
    text = str(jaxpr)
    assert (text.count("conv_general_dilated["), text.count("rhs_dilation=(4, 4)")) == (3, 2)
    assert "window_strides=(4, 4)" not in text


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("size", [(30, 9), (5, 26)], ids=str)
def test_sum_of_dilated_convolutions_equals_library(size, platform):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(2, *size, 5))
        kernels = [rng.normal(size=(3, 3, 5, 4)) for _ in range(4)]
        check_equal(plain_and(platform, lambda x, *k: layers.conv2d_sum(x, k, (6, 12, 18, 24)), x, *kernels))


def test_residual_join_on_cpu_equals_sum_and_relu():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        check_equal(plain_and("cpu", layers.residual_join, *rng.normal(size=(2, 2, 5, 5, 3))))


@pytest.mark.parametrize("train", [False, True])
def test_batch_norm_on_cpu_equals_the_plain_form(train):
    with jax.enable_x64(True):
        rng, layer = np.random.default_rng(0), layers.BatchNorm(dtype="float64")
        (scale, bias, mean), var = rng.normal(size=(3, 5)), rng.uniform(0.5, 2, 5)
        statistics = {"mean": mean, "var": var}

        def normed(x, scale, bias):
            variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": statistics}
            return layer.apply(variables, x, train, mutable=["batch_stats"])[0]

        check_equal(plain_and("cpu", normed, rng.normal(size=(2, 4, 3, 5)), scale, bias))


def test_bias_on_cpu_equals_the_sum():
    with jax.enable_x64(True):
        rng, layer = np.random.default_rng(0), layers.Conv(4, 1, use_bias=True, dtype="float64")

        def biased(x, kernel, bias):
            return layer.apply({"params": {"kernel": kernel, "bias": bias}}, x)

        sizes = ((2, 3, 4, 5), (1, 1, 5, 4), (4,))
        check_equal(plain_and("cpu", biased, *(rng.normal(size=size) for size in sizes)))


def test_initial_weights_of_backbone_and_head():
    keys = jax.random.split(jax.random.key(0))
    backbone = layers.backbone_init(keys[0], (3, 3, 64, 128))
    np.testing.assert_allclose(np.std(backbone), np.sqrt(2 / (9 * 128)), rtol=0.02)  # He, fan-out
    np.testing.assert_allclose(np.std(layers.head_init(keys[1], (3, 3, 64, 128))), 0.01, rtol=0.02)


def test_conv_keeps_size_and_adds_bias():
    conv = layers.Conv(4, 3, dilation=2, use_bias=True, bias_init=nn.initializers.ones)
    y, variables = conv.init_with_output(jax.random.key(0), jnp.zeros((1, 6, 7, 3)))
    assert variables["params"]["kernel"].shape == (3, 3, 3, 4)
    np.testing.assert_array_equal(y, np.ones((1, 6, 7, 4)))


# Drawing at random


def drop(kind, x, index, rate=0.3, train=True, key=0):
    return kind(rate).apply({}, x, train, index, rngs={"dropout": jax.random.key(key)})


@pytest.mark.parametrize("kind", [layers.Dropout, layers.DropPath])
def test_share_and_scale_of_what_is_dropped(kind):
    count = 64 if kind is layers.Dropout else 4096
    x = np.random.default_rng(0).uniform(1, 2, (count, 8, 4, 3)).astype(np.float32)
    y = np.asarray(drop(kind, x, jnp.arange(count)))
    kept = y != 0
    np.testing.assert_allclose(y[kept], x[kept] / 0.7, rtol=1e-6)
    whole = kept.reshape(count, -1)
    drawn = whole if kind is layers.Dropout else whole[:, 0]
    assert abs(drawn.mean() - 0.7) < 5 * np.sqrt(0.21 / drawn.size)
    if kind is layers.DropPath:
        assert (whole == whole[:, :1]).all()


@pytest.mark.parametrize("kind", [layers.Dropout, layers.DropPath])
def test_nothing_is_dropped_in_evaluation_or_at_rate_0_or_without_a_key(kind):
    x = jnp.ones((4, 3, 2, 5))
    for y in (
        drop(kind, x, None, train=False),
        drop(kind, x, jnp.arange(4), rate=0.0),
        kind(0.3).apply({}, x, False, None),
        kind(0.3).apply({}, x, True, None),  # without a key
    ):
        np.testing.assert_array_equal(y, x)
    with pytest.raises(UserError, match="needs `index`"):
        drop(kind, x, None)


@pytest.mark.parametrize("kind", [layers.Dropout, layers.DropPath])
def test_examples_draw_alone_by_their_place_in_the_global_batch(kind):
    x = jnp.ones((64, 2, 3, 4))
    whole = np.asarray(drop(kind, x, jnp.arange(64)))
    for places in (np.arange(32, 64), np.arange(1, 64, 2)):  # a device's share, and a part of an accumulated batch
        np.testing.assert_array_equal(drop(kind, x[places], jnp.asarray(places)), whole[places])
    assert len(np.unique(whole.reshape(64, -1), axis=0)) > (1 if kind is layers.DropPath else 60)
    assert np.any(drop(kind, x, jnp.arange(64), key=1) != whole)
    # The masks of neighbours agree as often as independent ones.
    kept = whole.reshape(64, -1)[:, 0] != 0
    assert 0.3 < np.mean(kept[1:] == kept[:-1]) < 0.9

    class Two(nn.Module):
        @nn.compact
        def __call__(self, x, index):
            return kind(0.3)(x, True, index), kind(0.3)(x, True, index)

    first, second = Two().apply({}, x, jnp.arange(64), rngs={"dropout": jax.random.key(0)})
    assert np.any(first != second)


def test_dropout_keeps_the_dtype_and_its_gradient_is_its_mask():
    x = jnp.ones((8, 16), jnp.bfloat16)
    assert drop(layers.Dropout, x, jnp.arange(8)).dtype == jnp.bfloat16
    x = x.astype(jnp.float32)
    gradient = jax.grad(lambda x: jnp.sum(drop(layers.Dropout, x, jnp.arange(8))))(x)
    np.testing.assert_allclose(gradient, drop(layers.Dropout, x, jnp.arange(8)))
