"""Layers of vision transformers, on maps (N, H, W, A): linear, layer normalisation, convolutions, attention.

Attention keeps no map of queries x keys for the gradient: it keeps its inputs, its result and one number per query, and
computes the map again, one block of queries after another (Dao et al., FlashAttention, NeurIPS 2022, but with all keys
at once, since these networks have few).
"""

from __future__ import annotations

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxuda.models.cpu_forms import computed_once, pointwise
from jaxuda.models.layers import add_bias, backbone_init, conv2d, depthwise_conv2d, use_cpu_forms

linear_init = nn.initializers.normal(0.02)
# Entries of the map of queries x keys of one image that are computed at a time. On CPUs a block stays in the cache.
_BLOCK = {True: 2**18, False: 2**24}


class Linear(nn.Module):
    """A linear layer on the last axis, with a bias."""

    features: int
    dtype: str = "float32"
    kernel_init: nn.initializers.Initializer = linear_init
    bias_init: nn.initializers.Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features)).astype(self.dtype)
        bias = self.param("bias", self.bias_init, (self.features,)).astype(self.dtype)
        x = x.astype(self.dtype)
        return add_bias(pointwise(x, kernel) if use_cpu_forms() else x @ kernel, bias)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, with the biased variance; statistics are at least float32."""

    eps: float = 1e-6
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return _norm(x, scale, bias, self.eps).astype(self.dtype)


# Its own gradient keeps the input and two numbers per position; automatic differentiation would keep three more maps.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    return _norm_forward(x, scale, bias, eps)[0]


def _norm_forward(x, scale, bias, eps):
    wide = _wide(x)
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    deviation = lax.rsqrt(jnp.mean(jnp.square(wide - mean), axis=-1, keepdims=True) + eps)
    return (wide - mean) * deviation * scale + bias, (x, scale, mean, deviation)


def _norm_backward(eps, saved, g):
    x, scale, mean, deviation = saved
    normed = (_wide(x) - mean) * deviation
    product = g * normed
    if use_cpu_forms():
        g, product = computed_once(g), computed_once(product)
    dx = deviation * (g * scale - _channel_mean(g, scale) - normed * _channel_mean(product, scale))
    others = tuple(range(x.ndim - 1))
    return dx.astype(x.dtype), jnp.sum(product, axis=others), jnp.sum(g, axis=others)


_norm.defvjp(_norm_forward, _norm_backward)


def _channel_mean(x: jax.Array, scale: jax.Array) -> jax.Array:
    """(..., A) -> (..., 1): the mean of x times scale (A,)."""
    if use_cpu_forms():
        return pointwise(x, scale[:, None] / len(scale))
    return jnp.mean(x * scale, axis=-1, keepdims=True)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def linear_of_gelu(linear: Linear, x: jax.Array) -> jax.Array:
    """`linear` of the GELU of x (..., A); only x is kept for the gradient, the GELU is computed again."""
    return nn.remat(lambda linear, x: linear(gelu(x)))(linear, x)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """x times the share of the standard normal distribution that is below x (Hendrycks and Gimpel, arXiv 1606.08415).

    Computed as PyTorch does, in at least float32; its gradient keeps x alone, which saves two maps.
    """
    return (_wide(x) * _normal_below(x)).astype(x.dtype)


def _gelu_backward(x, g):
    density = jnp.exp(-jnp.square(_wide(x)) / 2) / math.sqrt(2 * math.pi)
    return (((_normal_below(x) + _wide(x) * density) * _wide(g)).astype(x.dtype),)


def _normal_below(x: jax.Array) -> jax.Array:
    return (1 + lax.erf(_wide(x) * math.sqrt(0.5))) / 2


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


class Depthwise(nn.Module):
    """3x3 convolution of each channel with its own kernel; keeps the size."""

    dilation: int = 1
    use_bias: bool = False
    dtype: str = "float32"
    kernel_init: nn.initializers.Initializer = backbone_init

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", self.kernel_init, (3, 3, 1, x.shape[-1])).astype(self.dtype)
        pads = ((self.dilation, self.dilation),) * 2
        y = depthwise_conv2d(x.astype(self.dtype), kernel, 1, self.dilation, pads)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],)).astype(self.dtype)
            y = add_bias(y, bias)
        return y


class Enlarge(nn.Module):
    """Transposed convolution 2x2 with stride 2, without bias: every position becomes a cell of 2x2.

    The kernel is (2, 2, features, A).
    """

    features: int
    dtype: str = "float32"
    kernel_init: nn.initializers.Initializer = backbone_init

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, h, w, A) -> (N, 2 h, 2 w, features)."""
        (height, width, channels), features = x.shape[1:], self.features
        kernel = self.param("kernel", self.kernel_init, (2, 2, features, channels)).astype(self.dtype)
        flat = kernel.reshape(4 * features, channels).T
        y = conv2d(x.astype(self.dtype), flat[None, None]).reshape(-1, height, width, 2, 2, features)
        return jnp.swapaxes(y, 2, 3).reshape(-1, 2 * height, 2 * width, features)


def attend(queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
    """softmax(queries keys^T / sqrt(D)) values, for each head.

    Args:
      queries: (N, Q, heads, D).
      keys, values: (N, K, heads, D), of the same dtype.

    Returns:
      (N, Q, heads, D), the dtype of the queries; products are summed, and softmax is taken, in at least float32.
    """
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (queries, keys, values))
    return jnp.swapaxes(_attend(q, k, v), 1, 2)


@jax.custom_vjp
def _attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """As `attend`, for (N, heads, Q, D) and (N, heads, K, D)."""
    return _attend_forward(q, k, v)[0]


def _attend_forward(q, k, v):
    count = q.shape[2]

    def rows(q: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores = _scores(q, k)
        top = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out = _product("nhqk,nhkd->nhqd", weights.astype(v.dtype), v) / total
        return out.astype(q.dtype), top + jnp.log(total)  # the logarithm of the sum under each softmax

    # Results replace the queries: XLA would make the zeros that `lax.map` fills, for all layers, at the very start.
    def step(parts: jax.Array, place: jax.Array) -> tuple[jax.Array, jax.Array]:
        out, log_total = rows(_part(parts, place))
        return lax.dynamic_update_index_in_dim(parts, out, place, 0), log_total

    size = _block(q, k)
    if size >= count:
        out, log_total = rows(q)
    else:
        parts = _cut(q, size)
        out, log_total = (_joined(x, count) for x in lax.scan(step, parts, jnp.arange(len(parts))))
    return out, (q, k, v, out, log_total)


def _attend_backward(saved, g):
    q, k, v, out, log_total = saved
    scale = q.shape[-1] ** -0.5
    inner = jnp.sum(_wide(g) * _wide(out), axis=-1, keepdims=True)

    def rows(q, g, inner, log_total):
        # The map of keys x queries, not of queries x keys: CPUs are a fifth faster with the products that it goes into.
        weights = jnp.exp(_scores(k, q) - jnp.swapaxes(log_total, 2, 3))
        dscores = weights * (_product("nhkd,nhqd->nhkq", v, g) - jnp.swapaxes(inner, 2, 3))
        dscores, weights = dscores.astype(q.dtype), weights.astype(q.dtype)
        dq = _product("nhkq,nhkd->nhqd", dscores, k) * scale
        dk = _product("nhkq,nhqd->nhkd", dscores, q) * scale
        return dq.astype(q.dtype), dk, _product("nhkq,nhqd->nhkd", weights, g)

    size = _block(q, k)
    if size >= q.shape[2]:
        dq, dk, dv = rows(q, g, inner, log_total)
        return dq, dk.astype(k.dtype), dv.astype(v.dtype)

    def step(done: tuple[jax.Array, ...], block: tuple[jax.Array, ...]) -> tuple[tuple[jax.Array, ...], None]:
        place, *given = block
        parts, *totals = done
        dq, *more = rows(_part(parts, place), *given)
        return (lax.dynamic_update_index_in_dim(parts, dq, place, 0), *map(jnp.add, totals, more)), None

    zeros = 0 * _wide(k)  # not a constant, which XLA would copy for all layers at the start
    parts, *others = (_cut(x, size) for x in (q, g, inner, log_total))
    (dq, dk, dv), _ = lax.scan(step, (parts, zeros, zeros), (jnp.arange(len(parts)), *others))
    return _joined(dq, q.shape[2]), dk.astype(k.dtype), dv.astype(v.dtype)


_attend.defvjp(_attend_forward, _attend_backward)


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    return _product("nhqd,nhkd->nhqk", q, k) * q.shape[-1] ** -0.5


def _product(axes: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(axes, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def _block(q: jax.Array, k: jax.Array) -> int:
    """How many queries are computed at a time: a multiple of 8, to which GPUs' products would be padded."""
    blocks = -(-q.shape[1] * q.shape[2] * k.shape[2] // _BLOCK[use_cpu_forms()])
    return 8 * -(-q.shape[2] // (8 * blocks))


def _cut(x: jax.Array, size: int) -> jax.Array:
    """(N, heads, Q, D) -> (blocks, N, heads, size, D); zeros fill up the last block."""
    blocks = -(-x.shape[2] // size)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, blocks * size - x.shape[2]), (0, 0)))
    return jnp.moveaxis(x.reshape(*x.shape[:2], blocks, size, x.shape[3]), 2, 0)


def _part(parts: jax.Array, place: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(parts, place, keepdims=False)


def _joined(x: jax.Array, count: int) -> jax.Array:
    """The inverse of `_cut`, for that many queries."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3], x.shape[4])[:, :, :count]
