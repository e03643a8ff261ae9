"""Attention in blocks, layer normalisation and depthwise convolution against plain forms, with their gradients."""

import functools
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxuda.models import dinov2, mix_transformer
from jaxuda.models import transformer_layers as layers
from jaxuda.models.layers import compile_for, library_conv


def both(function, *inputs):
    """Value of a weighted sum of the results, and its gradients."""

    def total(*inputs):
        result = function(*inputs)
        weights = np.random.default_rng(9).normal(size=result.shape)
        return jnp.sum(jnp.asarray(weights, result.dtype) * result)

    return jax.jit(jax.value_and_grad(total, tuple(range(len(inputs)))))(*inputs)


def compare(ours, plain, *inputs, tolerance: float = 1e-11) -> None:
    for a, b in zip(jax.tree.leaves(both(ours, *inputs)), jax.tree.leaves(both(plain, *inputs)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def drawn(*shape: int, scale: float = 1.0) -> np.ndarray:
    return scale * np.random.default_rng(sum(shape)).normal(size=shape)


def plain_attention(q, k, v):
    """Not JAX's own, whose softmax is in single precision."""
    weights = jax.nn.softmax(jnp.einsum("nqhd,nkhd->nhqk", q, k) / np.sqrt(q.shape[-1]))
    return jnp.einsum("nhqk,nkhd->nqhd", weights, v)


@pytest.mark.parametrize(("count", "block"), [(29, 10**6), (16, 48), (29, 12)])
def test_attention_in_blocks_is_attention(count: int, block: int, monkeypatch) -> None:
    """One block, two of equal size, and four of which the last is not full; large scores do not overflow."""
    monkeypatch.setattr(layers, "_BLOCK", {True: block, False: block})
    with jax.enable_x64(True):
        q, k, v = drawn(2, count, 2, 4, scale=30.0), drawn(2, 3, 2, 4, scale=30.0), drawn(2, 3, 2, 4)
        compare(layers.attend, plain_attention, q, k, v)


def test_attention_keeps_no_map_for_the_gradient() -> None:
    q, k = jax.ShapeDtypeStruct((1, 512, 2, 8), jnp.float32), jax.ShapeDtypeStruct((1, 64, 2, 8), jnp.float32)
    largest = {}
    for function in (layers.attend, jax.nn.dot_product_attention):
        pullback = jax.eval_shape(lambda q, k, f=function: jax.vjp(f, q, k, k)[1], q, k)
        largest[function] = max(leaf.size for leaf in jax.tree.leaves(pullback))
    assert largest[layers.attend] == 512 * 2 * 8
    assert largest[jax.nn.dot_product_attention] >= 512 * 64 * 2


@pytest.mark.usefixtures("all_optimizations")
@pytest.mark.parametrize("differentiate", [False, True])
def test_memory_of_attention_in_blocks_does_not_add_up(differentiate: bool, monkeypatch) -> None:
    """Six more layers, computed twice: the gradient keeps their inputs, and nothing else is there from the start."""
    monkeypatch.setattr(layers, "_BLOCK", {True: 2**16, False: 2**16})
    x = jax.ShapeDtypeStruct((1, 1024, 2, 64), jnp.float32)

    def planned(count: int) -> float:
        def total(x: jax.Array) -> jax.Array:
            for _ in range(count):
                x = x + jax.checkpoint(lambda x: layers.attend(x, x, x))(x)
            return jnp.sum(jnp.square(x))

        # Otherwise the compiler of 0.10.1 keeps all that is to be computed twice.
        options = {"xla_disable_hlo_passes": "cse_barrier_expander"}
        compiled = jax.jit(jax.grad(total) if differentiate else total, compiler_options=options).lower(x).compile()
        return compiled.memory_analysis().temp_size_in_bytes / (4 * x.size)

    assert planned(8) - planned(2) < (6 if differentiate else 0) + 0.6


def test_gelu_is_the_plain_one() -> None:
    """Far below 0 as well, where it differs from the library's by rounding, relative to x."""
    plain = functools.partial(jax.nn.gelu, approximate=False)
    with jax.enable_x64(True):
        compare(layers.gelu, plain, np.linspace(-12, 12, 481), tolerance=1e-14)
    wide = drawn(64).astype(jnp.bfloat16)
    assert layers.gelu(wide).dtype == jnp.bfloat16
    np.testing.assert_allclose(*(np.float32(form(wide)) for form in (layers.gelu, plain)), atol=0.02)


@pytest.mark.parametrize("network", [mix_transformer, dinov2])
def test_a_feed_forward_network_keeps_two_maps_for_the_gradient(network: ModuleType) -> None:
    """Of four times the channels; DINOv2's, without a convolution, one."""
    forward, x = network.FeedForward("float32"), jax.ShapeDtypeStruct((1, 8, 8, 16), jnp.float32)
    variables = jax.eval_shape(forward.init, jax.random.key(0), x)
    pullback = jax.eval_shape(lambda *inputs: jax.vjp(forward.apply, *inputs)[1], variables, x)
    kept = [leaf.size for leaf in jax.tree.leaves(pullback)].count(4 * 8 * 8 * 16)
    assert kept == (2 if network is mix_transformer else 1)


def test_attention_in_bfloat16_sums_in_float32() -> None:
    wide = [drawn(1, 64, 2, 16).astype(jnp.bfloat16) for _ in range(3)]
    found = layers.attend(*wide)
    assert found.dtype == jnp.bfloat16
    exact = jax.nn.dot_product_attention(*(jnp.asarray(x, jnp.float32) for x in wide))
    np.testing.assert_allclose(np.asarray(found, np.float32), exact, rtol=0, atol=0.01 * np.abs(exact).max())


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_layer_norm_is_its_formula(platform: str) -> None:
    """With few channels and faint input, where its epsilon matters."""
    with jax.enable_x64(True), compile_for(platform):
        x, scale, bias = drawn(2, 3, 4, 5, scale=1e-3), drawn(5), drawn(5)

        def ours(x, scale, bias):
            return layers.LayerNorm(1e-6, "float64").apply({"params": {"scale": scale, "bias": bias}}, x)

        def plain(x, scale, bias):
            mean, var = jnp.mean(x, -1, keepdims=True), jnp.var(x, -1, keepdims=True)
            return (x - mean) / jnp.sqrt(var + 1e-6) * scale + bias

        compare(ours, plain, x, scale, bias)


@pytest.mark.parametrize("dilation", [1, 6])
def test_depthwise_convolution_keeps_the_size(dilation: int) -> None:
    with jax.enable_x64(True):
        x, kernel, bias = drawn(2, 8, 9, 3), drawn(3, 3, 1, 3), drawn(3)
        layer = layers.Depthwise(dilation, use_bias=True, dtype="float64")
        pads = ((dilation, dilation),) * 2
        compare(
            lambda x, kernel, bias: layer.apply({"params": {"kernel": kernel, "bias": bias}}, x),
            lambda x, kernel, bias: library_conv(x, kernel, 1, dilation, pads) + bias,
            *(x, kernel, bias),
        )


def test_linear_layer() -> None:
    with jax.enable_x64(True):
        x, kernel, bias = drawn(2, 4, 5, 3), drawn(3, 7), drawn(7)
        compare(
            lambda x, kernel, bias: layers.Linear(7, "float64").apply({"params": {"kernel": kernel, "bias": bias}}, x),
            lambda x, kernel, bias: x @ kernel + bias,
            *(x, kernel, bias),
        )
