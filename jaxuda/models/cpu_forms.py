"""Equivalent forms of convolution, residual join and pooling that XLA compiles to far faster training code on a CPU.

`jaxuda.models.layers` decides where they are used; each computes the same as the plain form there, up to rounding. All
maps are NHWC; kernels are (height, width, in, out). `project_and_shift` is faster on a GPU, too.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Pads = Sequence[tuple[int, int]]  # before and after the rows, and before and after the columns


def library_conv(x: jax.Array, kernel: jax.Array, stride: int, dilation: int, pads: Pads) -> jax.Array:
    """XLA's own convolution of (N, H, W, A) with (kh, kw, A / groups, B), padded with zeros."""
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=pads,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1] // kernel.shape[2],
    )


def computed_once(x: jax.Array) -> jax.Array:
    """`x`, in memory before anything reads it.

    XLA would put its computation into each operation that reads it. Also, jaxlib 0.10.1 takes three times as long for a
    sum with a product in it as for the product and then the sum. Barriers hold only in what `parallel.jit_step` makes.
    """
    return lax.optimization_barrier(x)


@jax.custom_vjp
def biased(x: jax.Array, bias: jax.Array) -> jax.Array:
    """(..., A) + (A,)."""
    return x + bias


def _biased_backward(_, g):
    g = computed_once(g)
    return g, jnp.sum(g, axis=tuple(range(g.ndim - 1)))


biased.defvjp(lambda x, bias: (x + bias, None), _biased_backward)


@jax.custom_vjp
def shift_and_scale(x: jax.Array, mean: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """(x - mean) * scale + bias, for (N, H, W, A) and three (A,)."""
    return (x - mean) * scale + bias


def _shift_and_scale_forward(x, mean, scale, bias):
    return shift_and_scale(x, mean, scale, bias), (x, mean, scale)


def _shift_and_scale_backward(saved, g):
    x, mean, scale = saved
    g = computed_once(g)
    over = lambda x: jnp.sum(x, axis=(0, 1, 2))  # noqa: E731
    dbias = over(g)
    return g * scale, -dbias * scale, over(computed_once(g * (x - mean))), dbias


shift_and_scale.defvjp(_shift_and_scale_forward, _shift_and_scale_backward)


def _padded(x: jax.Array, pads: Pads, value: float = 0.0) -> jax.Array:
    """(N, H, W, A) with `value` around it; negative pads cut."""
    return lax.pad(x, jnp.asarray(value, x.dtype), ((0, 0, 0), *((*pad, 0) for pad in pads), (0, 0, 0)))


def _interleaved(remainder: Callable[[int, int], jax.Array], stride: int) -> jax.Array:
    """The map whose positions with the remainders (a, b) modulo `stride` are `remainder(a, b)`, (N, h, w, A) each."""
    # (N, h, stride, w, stride, A)
    maps = jnp.stack([jnp.stack([remainder(a, b) for b in range(stride)], 3) for a in range(stride)], 2)
    count, rows, _, columns, _, channels = maps.shape
    return maps.reshape(count, rows * stride, columns * stride, channels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def few_channels(x: jax.Array, kernel: jax.Array, padding: int) -> jax.Array:
    """Convolution of an image with stride 2: two neighbouring columns become one with twice the channels (this
    needs no copy), and likewise the kernel's columns."""
    size = kernel.shape[0]
    columns = (x.shape[2] + 2 * padding - size) // 2 + 1
    extra = size % 2  # a column of zeros makes the kernel's width even
    right = 2 * columns + size + extra - 2 - x.shape[2] - padding
    x = _padded(x, ((padding, padding), (padding, right)))
    x = x.reshape(*x.shape[:2], x.shape[2] // 2, -1)
    kernel = jnp.pad(kernel, ((0, 0), (0, extra), (0, 0), (0, 0)))
    kernel = kernel.reshape(size, kernel.shape[1] // 2, x.shape[-1], -1)
    return lax.conv_general_dilated(x, kernel, (2, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _few_channels_forward(x, kernel, padding):
    return few_channels(x, kernel, padding), (x, kernel)


def _few_channels_backward(padding, saved, g):
    # The library's gradients are faster than those of the form above.
    pads = ((padding, padding), (padding, padding))
    _, pullback = jax.vjp(lambda x, kernel: library_conv(x, kernel, 2, 1, pads), *saved)
    return pullback(g)


few_channels.defvjp(_few_channels_forward, _few_channels_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def tap_by_tap(x: jax.Array, kernel: jax.Array, dilation: int) -> jax.Array:
    """3x3 convolution as nine products, one per tap, each only on the part of the map that is not padding for the tap.

    At dilation 4 this is three quarters of the work on a map of 16x32, and nine tenths on one of 33x65.
    """
    y = pointwise(x, kernel[1, 1])
    for tap, offset in _outer_taps(x, dilation):
        y += _put_at(pointwise(_seen(x, offset), kernel[tap]), offset, -1)
    return y


def _outer_taps(x: jax.Array, dilation: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(index into the kernel, offset into the map) of all taps except the centre and those outside of the map."""
    taps = [((i, j), ((i - 1) * dilation, (j - 1) * dilation)) for i, j in np.ndindex(3, 3) if (i, j) != (1, 1)]
    return [(tap, offset) for tap, offset in taps if abs(offset[0]) < x.shape[1] and abs(offset[1]) < x.shape[2]]


def _seen(x: jax.Array, offset: tuple[int, int]) -> jax.Array:
    """The positions of `x` that stay inside the map when `offset` is subtracted."""
    rows, columns = (slice(max(o, 0), n + min(o, 0)) for o, n in zip(offset, x.shape[1:3], strict=True))
    return x[:, rows, columns]


def _put_at(part: jax.Array, offset: tuple[int, int], sign: int) -> jax.Array:
    """A map of the full size with `part` = `_seen(map, sign * offset)` and zeros elsewhere."""
    return _padded(part, [(max(sign * o, 0), max(-sign * o, 0)) for o in offset])


def _tap_by_tap_forward(x, kernel, dilation):
    return tap_by_tap(x, kernel, dilation), (x, kernel)


def _tap_by_tap_backward(dilation, saved, g):
    x, kernel = saved
    flat = lambda x: x.reshape(-1, x.shape[-1])  # noqa: E731
    dx, dweight = _matmul_backward((flat(x), kernel[1, 1]), flat(g))
    dx, dweights = dx.reshape(x.shape), {(1, 1): dweight}
    for tap, offset in _outer_taps(x, dilation):
        back = (-offset[0], -offset[1])
        part, g_part = _seen(x, offset), _seen(g, back)
        d_part, dweights[tap] = _matmul_backward((flat(part), kernel[tap]), flat(g_part))
        dx += _put_at(d_part.reshape(part.shape), offset, 1)
    outside = jnp.zeros_like(dweight)
    rows = [jnp.stack([dweights.get((i, j), outside) for j in range(3)]) for i in range(3)]
    return dx, jnp.stack(rows)


tap_by_tap.defvjp(_tap_by_tap_forward, _tap_by_tap_backward)


def pointwise(x: jax.Array, weight: jax.Array) -> jax.Array:
    """1x1 convolution of (N, H, W, A) with (A, B) as a product of two matrices."""
    return _matmul(x.reshape(-1, x.shape[-1]), weight).reshape(*x.shape[:-1], weight.shape[-1])


@jax.custom_vjp
def _matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
    return x @ weight


def _matmul_forward(x, weight):
    return x @ weight, (x, weight)


def _matmul_backward(saved, g):
    # Automatic differentiation would write the weight's gradient transposed and copy it afterwards.
    x, weight = saved
    dx = lax.dot_general(g, weight, (((1,), (1,)), ((), ())))
    dweight = lax.dot_general(x, g, (((0,), (0,)), ((), ())))
    return dx, dweight


_matmul.defvjp(_matmul_forward, _matmul_backward)


def by_cells(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolution whose stride is its size: each whole cell of (N, H, W, A) becomes one position."""
    size = kernel.shape[0]
    rows, columns = x.shape[1] // size, x.shape[2] // size
    x = x[:, : rows * size, : columns * size].reshape(-1, rows, size, columns, size, x.shape[-1])
    x = jnp.swapaxes(x, 2, 3).reshape(-1, rows, columns, size * size * x.shape[-1])
    return pointwise(x, kernel.reshape(-1, kernel.shape[-1]))


def _shifted(x: jax.Array, rows: int, columns: int) -> jax.Array:
    """y[:, i, j] = x[:, i + rows, j + columns], zero outside."""
    return _padded(x, ((-rows, rows), (-columns, columns)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def project_and_shift(x: jax.Array, weight: jax.Array, offsets: tuple[tuple[int, int], ...]) -> jax.Array:
    """Sum over all taps of x @ its part of `weight` (A, taps * B), shifted by its offset (rows, columns)."""
    projected = (x.reshape(-1, x.shape[-1]) @ weight).reshape(*x.shape[:-1], -1)
    parts = jnp.split(projected, len(offsets), axis=-1)
    return sum(_shifted(part, *offset) for part, offset in zip(parts, offsets, strict=True))


def _project_and_shift_forward(x, weight, offsets):
    return project_and_shift(x, weight, offsets), (x, weight)


def _project_and_shift_backward(offsets, saved, g):
    x, weight = saved
    spread = jnp.concatenate([_shifted(g, -rows, -columns) for rows, columns in offsets], axis=-1)
    dx, dweight = _matmul_backward((x.reshape(-1, x.shape[-1]), weight), spread.reshape(-1, spread.shape[-1]))
    return dx.reshape(x.shape), dweight


project_and_shift.defvjp(_project_and_shift_forward, _project_and_shift_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def depthwise_taps(x: jax.Array, kernel: jax.Array, stride: int, dilation: int, pads: Pads) -> jax.Array:
    """Depthwise convolution of (N, H, W, A) with (k, k, 1, A): the sum of shifted maps, one for each tap."""
    size, x = kernel.shape[0], _padded(x, pads)
    height, width = ((n - (size - 1) * dilation - 1) // stride + 1 for n in x.shape[1:3])

    def seen(i: int, j: int) -> jax.Array:
        rows, columns = i * dilation, j * dilation
        return x[:, rows : rows + stride * height : stride, columns : columns + stride * width : stride]

    return sum(seen(i, j) * kernel[i, j, 0] for i, j in np.ndindex(size, size))


def _depthwise_forward(x, kernel, stride, dilation, pads):
    return depthwise_taps(x, kernel, stride, dilation, pads), (x, kernel)


def _depthwise_backward(stride, dilation, pads, saved, g):
    x, kernel = saved
    # As many rows and columns as a whole number of strides, so that both can be split by their remainder.
    whole = [-(-(n + sum(pad)) // stride) * stride for n, pad in zip(x.shape[1:3], pads, strict=True)]
    pads = tuple((low, n - size - low) for (low, _), n, size in zip(pads, whole, x.shape[1:3], strict=True))
    dkernel = _depthwise_kernel_gradient(_padded(x, pads), kernel.shape[0], stride, dilation, g)
    dx = _depthwise_input_gradient(kernel, stride, dilation, whole, g)
    (top, _), (left, _) = pads
    return computed_once(dx[:, top : top + x.shape[1], left : left + x.shape[2]]), dkernel


def _depthwise_kernel_gradient(x: jax.Array, size: int, stride: int, dilation: int, g: jax.Array) -> jax.Array:
    # One row of the result at a time: it stays in the cache while it is multiplied with all taps. Sums over whole maps,
    # one per tap, take five times as long; XLA vectorises the sum of a row only if nothing but its addition follows.
    count, height, width, channels = g.shape
    x = computed_once(x)
    reach, starts = (size - 1) * dilation + 1, [divmod(j * dilation, stride) for j in range(size)]

    def add_row(index: jax.Array, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        image, row = index // height, index % height
        seen = lax.dynamic_slice(x, (image, row * stride, 0, 0), (1, reach, *x.shape[2:]))[0, ::dilation]
        seen = seen.reshape(size, -1, stride, channels)
        grads = lax.dynamic_slice(g, (image, row, 0, 0), (1, 1, width, channels))[0, 0]
        return tuple(
            total + jnp.sum(seen[:, start : start + width, rest] * grads, axis=1)
            for total, (start, rest) in zip(totals, starts, strict=True)
        )

    columns = lax.fori_loop(0, count * height, add_row, (jnp.zeros((size, channels), g.dtype),) * size)
    return jnp.stack(columns, axis=1)[:, :, None]


def _depthwise_input_gradient(
    kernel: jax.Array, stride: int, dilation: int, whole: list[int], g: jax.Array
) -> jax.Array:
    # Positions with the same remainder modulo the stride see the same taps.
    size = kernel.shape[0]
    grid = [n // stride for n in whole]
    most = (size - 1) * dilation // stride  # the farthest row of the result, counted back, that a position is seen by
    pads = tuple((most, n - length) for n, length in zip(grid, g.shape[1:3], strict=True))
    g = _padded(g, pads)

    def remainder(a: int, b: int) -> jax.Array:
        taps = [(i, j) for i, j in np.ndindex(size, size) if (i * dilation % stride, j * dilation % stride) == (a, b)]
        steps = [(most - i * dilation // stride, most - j * dilation // stride) for i, j in taps]
        parts = [
            g[:, row : row + grid[0], column : column + grid[1]] * kernel[i, j, 0]
            for (i, j), (row, column) in zip(taps, steps, strict=True)
        ]
        return sum(parts[1:], parts[0])

    return _interleaved(remainder, stride)


depthwise_taps.defvjp(_depthwise_forward, _depthwise_backward)


@jax.custom_vjp
def join(branch: jax.Array, shortcut: jax.Array) -> jax.Array:
    """relu(branch + shortcut); only the result is kept for the gradient."""
    return jnp.maximum(branch, -shortcut) + shortcut


def _join_forward(branch, shortcut):
    y = join(branch, shortcut)
    return y, y


def _join_backward(y, g):
    # Only the result is kept: XLA:CPU would recompute the whole chain of joins in each later gradient.
    g = jnp.where(y > 0, g, jnp.zeros((), g.dtype))
    return g, g


join.defvjp(_join_forward, _join_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def max_of_taps(x: jax.Array, size: int, stride: int, pads: tuple[tuple[int, int], ...], shape: tuple) -> jax.Array:
    """Maximum pooling, one tap of the window after the other; `shape` is (H, W) of `x`."""
    return _max_of_taps_forward(x, size, stride, pads, shape)[0]


def _max_of_taps_forward(x, size, stride, pads, shape):
    # One byte keeps which tap was the first maximum. XLA:CPU would keep four integers, and scatter the gradient.
    x = _padded(x, pads, -jnp.inf)
    rows, columns = (length - (length - size) % stride - size + 1 for length in x.shape[1:3])
    taps = [x[:, i : i + rows : stride, j : j + columns : stride] for i, j in np.ndindex(size, size)]
    best, choice = taps[0], jnp.zeros(taps[0].shape, jnp.int8)
    for tap, values in enumerate(taps[1:], start=1):
        choice = jnp.where(values > best, jnp.int8(tap), choice)
        best = jnp.maximum(values, best)
    return best, choice


def _max_of_taps_backward(size, stride, pads, shape, choice, g):
    # Positions with the same remainder modulo the stride belong to the same taps: one map for each remainder.
    grid = [-(-(length + sum(pad)) // stride) for length, pad in zip(shape, pads, strict=True)]

    def seen_by(i: int, j: int) -> jax.Array:
        shifts = ((i // stride, grid[0] - g.shape[1] - i // stride), (j // stride, grid[1] - g.shape[2] - j // stride))
        return _padded(jnp.where(choice == i * size + j, g, jnp.zeros((), g.dtype)), shifts)

    def remainder(a: int, b: int) -> jax.Array:
        parts = [seen_by(i, j) for i in range(a, size, stride) for j in range(b, size, stride)]
        return sum(parts[1:], parts[0]) if parts else jnp.zeros((len(g), *grid, g.shape[-1]), g.dtype)

    whole = _interleaved(remainder, stride)
    (top, _), (left, _) = pads
    return (whole[:, top : top + shape[0], left : left + shape[1]],)


max_of_taps.defvjp(_max_of_taps_forward, _max_of_taps_backward)
