"""Equivalent forms of convolution for which XLA calls better kernels on a GPU.

`jaxuda.models.layers` decides where they are used; each computes the same as the plain form there, up to rounding. All
maps are NHWC; kernels are (height, width, in, out). `experiments/gpu/compile_steps.py` shows which kernels are called.
"""

import functools

import jax
from jax import lax

from jaxuda.models.cpu_forms import Pads, library_conv


def is_dilated(kernel: jax.Array, stride: int, dilation: int, pads: Pads) -> bool:
    """Whether `dilated_conv` computes a convolution with these settings; see `library_conv`."""
    size, around = kernel.shape[0], dilation * (kernel.shape[0] // 2)
    same = kernel.shape[1] == size and tuple(map(tuple, pads)) == ((around, around),) * 2
    return dilation > 1 and stride == 1 and size % 2 == 1 and size > 1 and same


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dilated_conv(x: jax.Array, kernel: jax.Array, dilation: int) -> jax.Array:
    """Convolution of (N, H, W, A) with (k, k, A / groups, B), k odd, that keeps the size.

    XLA's own kernel gradient of a dilated convolution is a forward convolution whose window is the whole map, which
    cuDNN has no fast kernel for. Here it is that of a plain convolution.
    """
    return _same_conv(x, kernel, dilation)


def _same_conv(x: jax.Array, kernel: jax.Array, dilation: int) -> jax.Array:
    around = dilation * (kernel.shape[0] // 2)
    return library_conv(x, kernel, 1, dilation, ((around, around), (around, around)))


def _dilated_forward(x, kernel, dilation):
    return dilated_conv(x, kernel, dilation), (x, kernel)


def _dilated_backward(dilation, saved, g):
    # The functions are linear in what is asked for: a transposition computes nothing forward, as `jax.vjp` would.
    x, kernel = saved
    (dx,) = jax.linear_transpose(lambda x: _same_conv(x, kernel, dilation), x)(g)
    x, g = _interleaved_maps(x, dilation), _interleaved_maps(g, dilation)
    (dkernel,) = jax.linear_transpose(lambda kernel: _same_conv(x, kernel, 1), kernel)(g)
    return dx, dkernel


dilated_conv.defvjp(_dilated_forward, _dilated_backward)


def _interleaved_maps(x: jax.Array, step: int) -> jax.Array:
    """(N, H, W, A) as (N * step * step, h, w, A): every `step`-th row and column, from each start; zeros fill up."""
    (count, *size, channels), (rows, columns) = x.shape, (-(-n // step) for n in x.shape[1:3])
    ends = ((0, rows * step - size[0], 0), (0, columns * step - size[1], 0))
    x = lax.pad(x, x.dtype.type(0), ((0, 0, 0), *ends, (0, 0, 0)))
    x = x.reshape(count, rows, step, columns, step, channels).transpose(0, 2, 4, 1, 3, 5)
    return x.reshape(-1, rows, columns, channels)
