"""Layers that every network shares: convolution, batch normalisation, pooling, dropout, resizing, gradient reversal.

Only this file decides how a convolution is lowered. Where that is fastest it is XLA's own convolution; some shapes
have equivalent forms that XLA compiles to far better training code on CPU (`cpu_forms.py`) or on GPU (`gpu_forms.py`).
The choice is made while tracing, from the platform that the program is compiled for (`compile_for`); all forms agree
in float64 up to rounding.

All maps are NHWC; kernels are (height, width, in, out).
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterator, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxuda.errors import UserError
from jaxuda.models.cpu_forms import (
    Pads,
    biased,
    by_cells,
    computed_once,
    depthwise_taps,
    few_channels,
    join,
    library_conv,
    max_of_taps,
    pointwise,
    project_and_shift,
    shift_and_scale,
    tap_by_tap,
)
from jaxuda.models.gpu_forms import dilated_conv, is_dilated

# The constants that published ImageNet weights expect, in the channel order of their input.
_BGR_MEANS = {
    "caffe": (104.00698793, 116.66876762, 122.67891434),
    "vgg": (103.939, 116.779, 123.68),
}
_RGB_MEAN = (0.485, 0.456, 0.406)
_RGB_STD = (0.229, 0.224, 0.225)

NORMS = ("batch", "frozen")  # modes of `BatchNorm`
head_init = nn.initializers.normal(0.01)
backbone_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


_platform = contextvars.ContextVar("platform", default="")


@contextlib.contextmanager
def compile_for(platform: str) -> Iterator[None]:
    """What is traced inside has the forms of a platform, whatever devices this process has.

    Args:
      platform: "cpu" or "gpu"; "any": XLA's own convolutions, for programs that leave this process.
    """
    before = _platform.set(platform)
    try:
        yield
    finally:
        _platform.reset(before)


def use_cpu_forms() -> bool:
    """Whether to use the forms that are only faster on CPU (decided while tracing)."""
    return (_platform.get() or jax.default_backend()) == "cpu"


def use_gpu_forms() -> bool:
    """Whether to use the forms that are only faster on GPU (decided while tracing)."""
    return (_platform.get() or jax.default_backend()) == "gpu"


def normalise(images: jax.Array, kind: str) -> jax.Array:
    """Prepares RGB images 0..255 for a backbone.

    Args:
      images: (N, H, W, 3), uint8 or float, RGB in 0..255.
      kind: "caffe" or "vgg" (BGR in 0..255 minus the mean), "imagenet" (RGB in 0..1, mean and deviation removed), or
        "efficientnet" (RGB, -1..1).

    Returns:
      (N, H, W, 3) float32, or float64 if `images` are.

    Raises:
      UserError: unknown `kind`.
    """
    images = jnp.asarray(images)
    images = images.astype(jnp.promote_types(images.dtype, jnp.float32))
    if kind in _BGR_MEANS:
        return images[..., ::-1] - jnp.asarray(_BGR_MEANS[kind], jnp.float32)
    if kind == "imagenet":
        return (images / 255.0 - jnp.asarray(_RGB_MEAN)) / jnp.asarray(_RGB_STD)
    if kind == "efficientnet":
        return (images - 127.0) / 128.0
    raise _unknown_kind(kind)


def denormalise(images: jax.Array, kind: str) -> jax.Array:
    """The inverse of `normalise`: float images of a `kind`, (N, H, W, 3), as RGB in 0..255.

    Raises:
      UserError: unknown `kind`.
    """
    if kind in _BGR_MEANS:
        return (images + jnp.asarray(_BGR_MEANS[kind], images.dtype))[..., ::-1]
    if kind == "imagenet":
        return 255.0 * (images * jnp.asarray(_RGB_STD, images.dtype) + jnp.asarray(_RGB_MEAN, images.dtype))
    if kind == "efficientnet":
        return images * 128.0 + 127.0
    raise _unknown_kind(kind)


def _unknown_kind(kind: str) -> UserError:
    known = ", ".join((*_BGR_MEANS, "imagenet", "efficientnet"))
    return UserError(f"unknown normalisation {kind!r}; known: {known}")


# Convolution ------------------------------------------------------------------------------------------------


def conv2d(x: jax.Array, kernel: jax.Array, stride: int = 1, dilation: int = 1, padding: int = 0) -> jax.Array:
    """Convolution of (N, H, W, A) with (kh, kw, A, B), zero `padding` on all four sides."""
    if use_cpu_forms():
        if kernel.shape[:2] == (1, 1) and padding == 0:
            return pointwise(x[:, ::stride, ::stride], kernel[0, 0])
        if x.shape[-1] < 4 and stride == 2 and dilation == 1:
            return few_channels(x, kernel, padding)
        if kernel.shape[:2] == (3, 3) and stride == 1 and dilation == padding >= 4:
            return tap_by_tap(x, kernel, dilation)
        if kernel.shape[:2] == (stride, stride) and dilation == 1 and padding == 0:
            return by_cells(x, kernel)
    return _library_conv(x, kernel, stride, dilation, ((padding, padding), (padding, padding)))


def _library_conv(x: jax.Array, kernel: jax.Array, stride: int, dilation: int, pads: Pads) -> jax.Array:
    if use_gpu_forms() and is_dilated(kernel, stride, dilation, pads):
        return dilated_conv(x, kernel, dilation)
    return library_conv(x, kernel, stride, dilation, pads)


def conv2d_sum(x: jax.Array, kernels: Sequence[jax.Array], dilations: Sequence[int]) -> jax.Array:
    """Sum of 3x3 convolutions of one map with different dilations, each padded to keep the size.

    Args:
      x: (N, H, W, A).
      kernels: one (3, 3, A, B) per dilation.
      dilations: as many integers.

    Returns:
      (N, H, W, B).
    """
    if not (use_cpu_forms() or use_gpu_forms()):
        return sum(conv2d(x, k, dilation=d, padding=d) for k, d in zip(kernels, dilations, strict=True))
    # Few outputs and distant taps: project to all taps at once, then add the shifted projections. Taps that
    # coincide (the centres) are added before the product; taps that are outside of the map everywhere are
    # omitted.
    taps: dict[tuple[int, int], jax.Array] = {}
    for kernel, dilation in zip(kernels, dilations, strict=True):
        for i, j in np.ndindex(3, 3):
            offset = ((i - 1) * dilation, (j - 1) * dilation)
            if abs(offset[0]) < x.shape[1] and abs(offset[1]) < x.shape[2]:
                taps[offset] = taps[offset] + kernel[i, j] if offset in taps else kernel[i, j]
    weight = jnp.concatenate(list(taps.values()), axis=1)
    return project_and_shift(x, weight, tuple(taps))


def depthwise_conv2d(
    x: jax.Array, kernel: jax.Array, stride: int, dilation: int, pads: tuple[tuple[int, int], tuple[int, int]]
) -> jax.Array:
    """Convolution of each channel of (N, H, W, A) with its own kernel, (k, k, 1, A).

    pads: zeros before and after the rows, and before and after the columns.
    """
    if use_cpu_forms():
        return depthwise_taps(x, kernel, stride, dilation, pads)
    return _library_conv(x, kernel, stride, dilation, pads)


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
            bias = self.param("bias", self.bias_init, (self.features,)).astype(self.dtype)
            y = add_bias(y, bias)
        return y


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """(..., A) + (A,)."""
    return biased(x, bias) if use_cpu_forms() else x + bias


# Normalisation, join, pooling -------------------------------------------------------------------------------


class BatchNorm(nn.Module):
    """Batch normalisation as torch defines it, over the global batch.

    mode="frozen" always uses the running statistics. mode="batch" uses those of the batch in training, over
    all devices of `axis_name` (sums and counts first, then centred squares: sums of squares would cancel in
    float32), and moves the running statistics by 0.1 towards them, with the unbiased variance. Statistics are
    float32 for any `dtype`. `eps` may be 0 (SDCA's frozen layers).
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
        # Initialisation runs outside of any device axis and must not depend on its image.
        if self.mode == "batch" and train and not self.is_initializing():
            mean, var, count = batch_moments(x, self.axis_name)
            unbiased = var * (count / jnp.maximum(count - 1, 1))
            running_mean.value = 0.9 * running_mean.value + 0.1 * lax.stop_gradient(mean)
            running_var.value = 0.9 * running_var.value + 0.1 * lax.stop_gradient(unbiased)
        else:
            mean, var = running_mean.value, running_var.value
        factor = scale * lax.rsqrt(var + self.eps)
        y = shift_and_scale(x, mean, factor, bias) if use_cpu_forms() else (x - mean) * factor + bias
        return y.astype(self.dtype)


def batch_moments(x: jax.Array, axis_name: str | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean (A,), biased variance (A,) and count of positions of (N, H, W, A) over all devices."""
    total = jnp.sum(x, axis=(0, 1, 2))
    count = jnp.asarray(x.size // x.shape[-1], x.dtype)
    if axis_name is not None:
        total, count = lax.psum((total, count), axis_name)
    mean = total / count
    # The variance has no gradient with respect to the mean: `stop_gradient` saves a pass over the gradients.
    squares = jnp.square(x - lax.stop_gradient(mean))
    squares = jnp.sum(computed_once(squares) if use_cpu_forms() else squares, axis=(0, 1, 2))
    if axis_name is not None:
        squares = lax.psum(squares, axis_name)
    return mean, squares / count, count


def residual_join(branch: jax.Array, shortcut: jax.Array) -> jax.Array:
    """relu(branch + shortcut)."""
    return join(branch, shortcut) if use_cpu_forms() else nn.relu(branch + shortcut)


def max_pool(x: jax.Array, size: int, stride: int, padding: int = 0, ceil: bool = False) -> jax.Array:
    """Maximum pooling of (N, H, W, A); `ceil` keeps a last window that starts inside the map."""
    pads = []
    for length in x.shape[1:3]:
        steps, rest = divmod(length + 2 * padding - size, stride)
        extra = ceil and rest > 0 and (steps + 1) * stride < length + padding
        pads.append((padding, padding + (stride - rest if extra else 0)))
    if use_cpu_forms():
        return max_of_taps(x, size, stride, tuple(pads), x.shape[1:3])
    # The initial value must be a constant while tracing, else JAX cannot differentiate the maximum.
    pads = ((0, 0), *pads, (0, 0))
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, size, size, 1), (1, stride, stride, 1), pads)


# Drawing at random ------------------------------------------------------------------------------------------


class Dropout(nn.Module):
    """In training, sets each entry to zero with probability `rate` (0 <= rate < 1), and divides the others by 1 - rate.

    Every example draws by its place in the global batch, so that neither devices nor accumulation matter; Flax's own
    layer would give two devices the same mask. The key is that of "dropout", see `jaxuda.methods.supervised.forward`;
    a forward pass without this key drops nothing (a teacher's, whose batch normalisation is in training mode).

    channels: draw once for each channel (the last axis) of an example: whole maps are dropped.
    """

    rate: float
    channels: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, index: jax.Array | None) -> jax.Array:
        """(N, ...) -> (N, ...); `index`: (N,) int32, the places of the examples in the global batch."""
        shape = (*(1,) * (x.ndim - 2), x.shape[-1]) if self.channels else x.shape[1:]
        return _drop(self, x, train, index, shape)


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., ECCV 2016): as `Dropout`, but drops whole examples."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, index: jax.Array | None) -> jax.Array:
        """(N, ...), a residual branch -> (N, ...); `index` as for `Dropout`."""
        return _drop(self, x, train, index, (1,) * (x.ndim - 1))


def _drop(layer: nn.Module, x: jax.Array, train: bool, index: jax.Array | None, shape: tuple[int, ...]) -> jax.Array:
    """`x` times a mask; the mask of each example has `shape`, which broadcasts to the example."""
    if not train or not layer.rate or not layer.has_rng("dropout"):
        return x
    return jnp.where(drawn(layer, 1 - layer.rate, index, shape), x / (1 - layer.rate), 0).astype(x.dtype)


def drawn(layer: nn.Module, share: float, index: jax.Array | None, shape: tuple[int, ...]) -> jax.Array:
    """(N, *shape) bool, true with probability `share`; each example draws by its place, see `Dropout`.

    Raises:
      UserError: `index`, (N,) int32, is None.
    """
    if index is None:
        raise UserError("a network that draws at random needs `index` in training: the examples' global places")
    keys = jax.vmap(jax.random.fold_in, (None, 0))(layer.make_rng("dropout"), index)
    return jax.vmap(lambda key: jax.random.bernoulli(key, share, shape))(keys)


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
    # One product per image: in a product over all images XLA:CPU transposes large maps, which is ten times slower.
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


def cut(x: jax.Array, offset: jax.Array, size: tuple[int, int]) -> jax.Array:
    """The part of (N, H, W, ...) that begins at `offset` (row, column) and has a size (height, width)."""
    for axis, side in enumerate(size):
        x = lax.dynamic_slice_in_dim(x, offset[axis], side, axis + 1)
    return x


def resize_labels(labels: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Nearest-neighbour resize of labels (or depth) by torch's rule: result i takes source floor(i * in /
    out).

    The quotient and the product are rounded to single precision, as in torch; for a few sizes the result
    differs from the exact floor.

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
