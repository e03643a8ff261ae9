"""Layers that every network shares: convolution, batch normalisation, pooling, resizing, gradient reversal.

This is the only file that knows how a convolution is lowered. On GPU (and wherever it runs best) a
convolution is the library's; on CPU some shapes have an equal form that XLA compiles to far faster training
code. The choice is made while tracing, from `jax.default_backend()`; both forms agree in float64 to rounding.

All maps are NHWC; kernels are (height, width, in, out).
"""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxuda.errors import UserError

# What published ImageNet weights expect, in the channel order of their input.
_BGR_MEANS = {
    "caffe": (104.00698793, 116.66876762, 122.67891434),
    "vgg": (103.939, 116.779, 123.68),
}
_RGB_MEAN = (0.485, 0.456, 0.406)
_RGB_STD = (0.229, 0.224, 0.225)

head_init = nn.initializers.normal(0.01)
backbone_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def use_cpu_forms() -> bool:
    """Whether the forms below that only pay on CPU are chosen (decided while tracing)."""
    return jax.default_backend() == "cpu"


def normalise(images: jax.Array, kind: str) -> jax.Array:
    """Prepares RGB images 0..255 for a backbone.

    Args:
      images: (N, H, W, 3), uint8 or float, RGB in 0..255.
      kind: "caffe" or "vgg" (BGR in 0..255 minus the mean), or "imagenet" (RGB in 0..1, mean and
        deviation removed).

    Returns:
      (N, H, W, 3) float32.

    Raises:
      UserError: unknown `kind`.
    """
    images = jnp.asarray(images, jnp.float32)
    if kind in _BGR_MEANS:
        return images[..., ::-1] - jnp.asarray(_BGR_MEANS[kind], jnp.float32)
    if kind == "imagenet":
        return (images / 255.0 - jnp.asarray(_RGB_MEAN)) / jnp.asarray(_RGB_STD)
    raise UserError(f"unknown normalisation {kind!r}; known: {', '.join((*_BGR_MEANS, 'imagenet'))}")


# Convolution ------------------------------------------------------------------------------------------------


def conv2d(x: jax.Array, kernel: jax.Array, stride: int = 1, dilation: int = 1, padding: int = 0) -> jax.Array:
    """Convolution of (N, H, W, A) with (kh, kw, A, B), zero `padding` on all four sides."""
    if use_cpu_forms():
        if kernel.shape[:2] == (1, 1) and padding == 0:
            return pointwise(x[:, ::stride, ::stride], kernel[0, 0])
        if x.shape[-1] < 4 and stride == 2 and dilation == 1:
            return _few_channels(x, kernel, padding)
        if kernel.shape[:2] == (3, 3) and stride == 1 and dilation == padding >= 4:
            return _tap_by_tap(x, kernel, dilation)
    return _library_conv(x, kernel, stride, dilation, padding)


def _library_conv(x: jax.Array, kernel: jax.Array, stride: int, dilation: int, padding: int) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((padding, padding), (padding, padding)),
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _few_channels(x: jax.Array, kernel: jax.Array, padding: int) -> jax.Array:
    """Convolution of an image with stride 2: two neighbouring columns become one with twice the channels, which
    costs no copy, and the kernel's columns likewise."""
    size = kernel.shape[0]
    columns = (x.shape[2] + 2 * padding - size) // 2 + 1
    extra = size % 2  # a column of zeros makes the kernel's width even
    right = 2 * columns + size + extra - 2 - x.shape[2] - padding
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (padding, padding, 0), (padding, right, 0), (0, 0, 0)))
    x = x.reshape(*x.shape[:2], x.shape[2] // 2, -1)
    kernel = jnp.pad(kernel, ((0, 0), (0, extra), (0, 0), (0, 0)))
    kernel = kernel.reshape(size, kernel.shape[1] // 2, x.shape[-1], -1)
    return lax.conv_general_dilated(x, kernel, (2, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _few_channels_forward(x, kernel, padding):
    return _few_channels(x, kernel, padding), (x, kernel)


def _few_channels_backward(padding, saved, g):
    # The library's gradients are faster than those of the form above.
    _, pullback = jax.vjp(lambda x, kernel: _library_conv(x, kernel, 2, 1, padding), *saved)
    return pullback(g)


_few_channels.defvjp(_few_channels_forward, _few_channels_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _tap_by_tap(x: jax.Array, kernel: jax.Array, dilation: int) -> jax.Array:
    """3x3 convolution as nine products, each of that part of the map alone which its tap does not see as padding.

    At dilation 4 that is three quarters of the work on a map of 16x32, and nine tenths on one of 33x65.
    """
    y = pointwise(x, kernel[1, 1])
    for tap, offset in _outer_taps(x, dilation):
        y += _put_at(pointwise(_seen(x, offset), kernel[tap]), offset, -1)
    return y


def _outer_taps(x: jax.Array, dilation: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(index into the kernel, offset into the map) of all taps but the centre and those wholly outside."""
    taps = [((i, j), ((i - 1) * dilation, (j - 1) * dilation)) for i, j in np.ndindex(3, 3) if (i, j) != (1, 1)]
    return [(tap, offset) for tap, offset in taps if abs(offset[0]) < x.shape[1] and abs(offset[1]) < x.shape[2]]


def _seen(x: jax.Array, offset: tuple[int, int]) -> jax.Array:
    """The positions of `x` that stay inside when `offset` is taken off."""
    rows, columns = (slice(max(o, 0), n + min(o, 0)) for o, n in zip(offset, x.shape[1:3], strict=True))
    return x[:, rows, columns]


def _put_at(part: jax.Array, offset: tuple[int, int], sign: int) -> jax.Array:
    """A map of the full size with `part` = `_seen(map, sign * offset)` and zeros elsewhere."""
    shifts = [(max(sign * o, 0), max(-sign * o, 0), 0) for o in offset]
    return lax.pad(part, jnp.zeros((), part.dtype), ((0, 0, 0), *shifts, (0, 0, 0)))


def _tap_by_tap_forward(x, kernel, dilation):
    return _tap_by_tap(x, kernel, dilation), (x, kernel)


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


_tap_by_tap.defvjp(_tap_by_tap_forward, _tap_by_tap_backward)


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


def conv2d_sum(x: jax.Array, kernels: Sequence[jax.Array], dilations: Sequence[int]) -> jax.Array:
    """Sum of 3x3 convolutions of one map with different dilations, each padded to keep the size.

    Args:
      x: (N, H, W, A).
      kernels: one (3, 3, A, B) per dilation.
      dilations: as many integers.

    Returns:
      (N, H, W, B).
    """
    if not use_cpu_forms():
        return sum(conv2d(x, k, dilation=d, padding=d) for k, d in zip(kernels, dilations, strict=True))
    # Few outputs and far taps: project to all taps at once, then add the shifted projections. Taps that
    # coincide (the centres) are added before the product; taps that fall outside the map everywhere are left
    # out.
    taps: dict[tuple[int, int], jax.Array] = {}
    for kernel, dilation in zip(kernels, dilations, strict=True):
        for i, j in np.ndindex(3, 3):
            offset = ((i - 1) * dilation, (j - 1) * dilation)
            if abs(offset[0]) < x.shape[1] and abs(offset[1]) < x.shape[2]:
                taps[offset] = taps[offset] + kernel[i, j] if offset in taps else kernel[i, j]
    weight = jnp.concatenate(list(taps.values()), axis=1)
    return _project_and_shift(x, weight, tuple(taps))


def _shifted(x: jax.Array, rows: int, columns: int) -> jax.Array:
    """y[:, i, j] = x[:, i + rows, j + columns], zero outside."""
    zero = jnp.zeros((), x.dtype)
    return lax.pad(x, zero, ((0, 0, 0), (-rows, rows, 0), (-columns, columns, 0), (0, 0, 0)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _project_and_shift(x: jax.Array, weight: jax.Array, offsets: tuple[tuple[int, int], ...]) -> jax.Array:
    projected = (x.reshape(-1, x.shape[-1]) @ weight).reshape(*x.shape[:-1], -1)
    parts = jnp.split(projected, len(offsets), axis=-1)
    return sum(_shifted(part, *offset) for part, offset in zip(parts, offsets, strict=True))


def _project_and_shift_forward(x, weight, offsets):
    return _project_and_shift(x, weight, offsets), (x, weight)


def _project_and_shift_backward(offsets, saved, g):
    x, weight = saved
    spread = jnp.concatenate([_shifted(g, -rows, -columns) for rows, columns in offsets], axis=-1)
    dx, dweight = _matmul_backward((x.reshape(-1, x.shape[-1]), weight), spread.reshape(-1, spread.shape[-1]))
    return dx.reshape(x.shape), dweight


_project_and_shift.defvjp(_project_and_shift_forward, _project_and_shift_backward)


class Conv(nn.Module):
    """Square convolution; `padding=None` keeps the size at stride 1 (odd kernels)."""

    features: int
    size: int
    stride: int = 1
    dilation: int = 1
    padding: int | None = None
    use_bias: bool = False
    dtype: str = "float32"
    kernel_init: nn.initializers.Initializer = backbone_init
    bias_init: nn.initializers.Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", self.kernel_init, (self.size, self.size, x.shape[-1], self.features))
        padding = self.dilation * (self.size // 2) if self.padding is None else self.padding
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        y = conv2d(x, kernel, self.stride, self.dilation, padding)
        if self.use_bias:
            y = y + self.param("bias", self.bias_init, (self.features,)).astype(self.dtype)
        return y


# Normalisation, join, pooling -------------------------------------------------------------------------------


class BatchNorm(nn.Module):
    """Batch normalisation as torch defines it, over the global batch.

    mode="frozen" always uses the running statistics. mode="batch" uses those of the batch while training,
    over all devices of `axis_name` (sums and counts first, then centred squares: sums of squares would cancel
    in float32), and moves the running ones by 0.1 towards them, the variance unbiased. Statistics are float32
    whatever the `dtype`. `eps` may be 0 (SDCA's frozen layers).
    """

    mode: str = "batch"
    eps: float = 1e-5
    axis_name: str | None = None
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,))

        x = x.astype(jnp.promote_types(self.dtype, jnp.float32))
        # Initialisation happens outside any device axis and must not depend on the image it is given.
        if self.mode == "batch" and train and not self.is_initializing():
            mean, var, count = batch_moments(x, self.axis_name)
            unbiased = var * (count / jnp.maximum(count - 1, 1))
            running_mean.value = 0.9 * running_mean.value + 0.1 * lax.stop_gradient(mean)
            running_var.value = 0.9 * running_var.value + 0.1 * lax.stop_gradient(unbiased)
        else:
            mean, var = running_mean.value, running_var.value
        y = (x - mean) * (scale * lax.rsqrt(var + self.eps)) + bias
        return y.astype(self.dtype)


def batch_moments(x: jax.Array, axis_name: str | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean (A,), biased variance (A,) and count of positions of (N, H, W, A) over all devices."""
    total = jnp.sum(x, axis=(0, 1, 2))
    count = jnp.asarray(x.size // x.shape[-1], x.dtype)
    if axis_name is not None:
        total, count = lax.psum((total, count), axis_name)
    mean = total / count
    # To first order the variance does not change with the mean: the stop saves a pass over the gradients.
    squares = jnp.sum(jnp.square(x - lax.stop_gradient(mean)), axis=(0, 1, 2))
    if axis_name is not None:
        squares = lax.psum(squares, axis_name)
    return mean, squares / count, count


def residual_join(branch: jax.Array, shortcut: jax.Array) -> jax.Array:
    """relu(branch + shortcut)."""
    return _join(branch, shortcut) if use_cpu_forms() else nn.relu(branch + shortcut)


@jax.custom_vjp
def _join(branch: jax.Array, shortcut: jax.Array) -> jax.Array:
    return jnp.maximum(branch, -shortcut) + shortcut


def _join_forward(branch, shortcut):
    y = _join(branch, shortcut)
    return y, y


def _join_backward(y, g):
    # Only the result is kept: XLA:CPU would recompute the whole chain of joins in each later gradient.
    g = jnp.where(y > 0, g, jnp.zeros((), g.dtype))
    return g, g


_join.defvjp(_join_forward, _join_backward)


def max_pool(x: jax.Array, size: int, stride: int, padding: int = 0, ceil: bool = False) -> jax.Array:
    """Maximum pooling of (N, H, W, A); `ceil` keeps a last window that starts inside the map."""
    pads = []
    for length in x.shape[1:3]:
        steps, rest = divmod(length + 2 * padding - size, stride)
        extra = ceil and rest > 0 and (steps + 1) * stride < length + padding
        pads.append((padding, padding + (stride - rest if extra else 0)))
    if use_cpu_forms():
        return _max_of_taps(x, size, stride, tuple(pads), x.shape[1:3])
    # The start must be a constant while tracing, else JAX does not see a maximum that it can differentiate.
    pads = ((0, 0), *pads, (0, 0))
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, size, size, 1), (1, stride, stride, 1), pads)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _max_of_taps(x: jax.Array, size: int, stride: int, pads: tuple[tuple[int, int], ...], shape: tuple) -> jax.Array:
    """Maximum pooling, one tap of the window after the other; `shape` is (H, W) of `x`."""
    return _max_of_taps_forward(x, size, stride, pads, shape)[0]


def _max_of_taps_forward(x, size, stride, pads, shape):
    # Which tap was the first largest is kept in a byte. XLA:CPU would keep four integers, and scatter the gradient.
    x = lax.pad(x, jnp.asarray(-jnp.inf, x.dtype), ((0, 0, 0), *((*pad, 0) for pad in pads), (0, 0, 0)))
    rows, columns = (length - (length - size) % stride - size + 1 for length in x.shape[1:3])
    taps = [x[:, i : i + rows : stride, j : j + columns : stride] for i, j in np.ndindex(size, size)]
    best, choice = taps[0], jnp.zeros(taps[0].shape, jnp.int8)
    for tap, values in enumerate(taps[1:], start=1):
        choice = jnp.where(values > best, jnp.int8(tap), choice)
        best = jnp.maximum(values, best)
    return best, choice


def _max_of_taps_backward(size, stride, pads, shape, choice, g):
    # Positions with the same remainder modulo the stride are seen by the same taps: one map for each remainder.
    grid = [-(-(length + sum(pad)) // stride) for length, pad in zip(shape, pads, strict=True)]
    zero = jnp.zeros((), g.dtype)

    def seen_by(i: int, j: int) -> jax.Array:
        shifts = ((i // stride, grid[0] - g.shape[1] - i // stride), (j // stride, grid[1] - g.shape[2] - j // stride))
        chosen = jnp.where(choice == i * size + j, g, zero)
        return lax.pad(chosen, zero, ((0, 0, 0), *((*shift, 0) for shift in shifts), (0, 0, 0)))

    def remainder(a: int, b: int) -> jax.Array:
        parts = [seen_by(i, j) for i in range(a, size, stride) for j in range(b, size, stride)]
        return sum(parts[1:], parts[0]) if parts else jnp.zeros((len(g), *grid, g.shape[-1]), g.dtype)

    # (N, rows, stride, columns, stride, A): the remainders take their places between each other.
    maps = jnp.stack([jnp.stack([remainder(a, b) for b in range(stride)], 3) for a in range(stride)], 2)
    whole = maps.reshape(len(g), grid[0] * stride, grid[1] * stride, g.shape[-1])
    (top, _), (left, _) = pads
    return (whole[:, top : top + shape[0], left : left + shape[1]],)


_max_of_taps.defvjp(_max_of_taps_forward, _max_of_taps_backward)


# Resizing ---------------------------------------------------------------------------------------------------


def resize_bilinear(x: jax.Array, size: tuple[int, int], align_corners: bool) -> jax.Array:
    """Bilinear resize without antialiasing, as torch's `interpolate`.

    Two small interpolation matrices multiply the map, so that value and gradient are plain matrix products.

    Args:
      x: (N, h, w, A) float.
      size: (height, width) of the result, in the order of the array's axes.
      align_corners: whether the corner centres of both grids coincide; otherwise pixel areas do.

    Returns:
      (N, height, width, A), the dtype of `x`.
    """
    height, width = size
    if x.shape[1:3] == (height, width):
        return x
    rows = jnp.asarray(interpolation_matrix(x.shape[1], height, align_corners), x.dtype)
    columns = jnp.asarray(interpolation_matrix(x.shape[2], width, align_corners), x.dtype)
    x = jnp.einsum("Ww,nhwc->nhWc", columns, x, precision=lax.Precision.HIGHEST)
    # One product per image: with the images inside it XLA:CPU transposes large maps, ten times slower.
    merged = x.reshape(*x.shape[:2], -1)
    resized = jax.vmap(lambda image: jnp.matmul(rows, image, precision=lax.Precision.HIGHEST))(merged)
    return resized.reshape(-1, height, width, x.shape[-1])


@functools.lru_cache(maxsize=64)
def interpolation_matrix(source: int, target: int, align_corners: bool) -> np.ndarray:
    """(target, source) float64 matrix whose rows hold the one or two weights of each result."""
    index = np.arange(target, dtype=np.float64)
    if align_corners:
        position = index * ((source - 1) / (target - 1) if target > 1 else 0.0)
    else:
        position = np.maximum((index + 0.5) * (source / target) - 0.5, 0.0)
    low = np.minimum(position.astype(np.int64), source - 1)
    high = np.minimum(low + 1, source - 1)
    weight = np.clip(position - low, 0.0, 1.0)
    matrix = np.zeros((target, source))
    np.add.at(matrix, (np.arange(target), low), 1.0 - weight)
    np.add.at(matrix, (np.arange(target), high), weight)
    return matrix


def resize_labels(labels: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Nearest-neighbour resize of labels (or depth) by torch's rule: result i takes source floor(i * in /
    out).

    The quotient and the product are rounded to single precision as torch does; for a few sizes this differs
    from the exact floor.

    Args:
      labels: (..., H, W), any dtype; a NumPy array gives a NumPy array.
      size: (height, width) of the result.

    Returns:
      (..., height, width), the dtype of `labels`.
    """
    rows = _nearest_indices(labels.shape[-2], size[0])
    columns = _nearest_indices(labels.shape[-1], size[1])
    return labels[..., rows, :][..., columns]


def _nearest_indices(source: int, target: int) -> np.ndarray:
    scale = np.float32(source) / np.float32(target)
    index = np.floor(np.arange(target, dtype=np.float32) * scale).astype(np.int32)
    return np.minimum(index, source - 1)


# Gradient reversal ------------------------------------------------------------------------------------------


@jax.custom_vjp
def gradient_reversal(x: jax.Array, scale: float | jax.Array) -> jax.Array:
    """Identity whose gradient is multiplied by -`scale` (Ganin and Lempitsky, ICML 2015)."""
    return x


def _reversal_forward(x, scale):
    return x, scale


def _reversal_backward(scale, g):
    return (-scale * g).astype(g.dtype), jnp.zeros_like(scale)


gradient_reversal.defvjp(_reversal_forward, _reversal_backward)
