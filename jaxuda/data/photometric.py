"""Changes of colour and sharpness, in JAX, with given parameters: augmentation that runs inside a train step."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # columns of factors, and values of `order`


def kornia_jitter(x: jax.Array, factors: jax.Array, order: jax.Array) -> jax.Array:
    """Colour jitter as version 0.5.8 of kornia defines it, which DAFormer and its followers use.

    Brightness adds factor - 1, contrast multiplies by the factor (both clip to 0..1), saturation multiplies the S of
    HSV (clipped), hue is added to the H of HSV in turns. Later versions of kornia and torchvision define other
    operations under the same names.

    Args:
      x: (N, H, W, 3) float, RGB in 0..1.
      factors: (N, 4) float: brightness, contrast, saturation and hue of each image; (1, 1, 1, 0) changes nothing.
      order: (N, 4) integers: the order in which an image's four operations (columns of `factors`) are applied.

    Returns:
      (N, H, W, 3), the dtype of `x`.
    """
    brightness, contrast, saturation, hue = factors.astype(x.dtype).T[..., None, None, None]
    for operation in order.T[..., None, None, None]:  # (N, 1, 1, 1)
        bright = jnp.clip(x + (brightness - 1), 0, 1)
        contrasted = jnp.clip(x * contrast, 0, 1)
        coloured = _in_hsv(x, jnp.where(operation == SATURATION, saturation, 1), jnp.where(operation == HUE, hue, 0))
        x = jnp.where(operation == BRIGHTNESS, bright, jnp.where(operation == CONTRAST, contrasted, coloured))
    return x


def _in_hsv(x: jax.Array, saturation: jax.Array, hue: jax.Array) -> jax.Array:
    """RGB images whose S is multiplied by `saturation` and clipped, and whose H is moved by `hue` turns."""
    red, green, blue = (x[..., c : c + 1] for c in range(3))
    value = jnp.max(x, axis=-1, keepdims=True)
    chroma = value - jnp.min(x, axis=-1, keepdims=True)
    safe = jnp.where(chroma > 0, chroma, 1)
    sixth = jnp.where(
        value == red,
        (green - blue) / safe,
        jnp.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sixth = jnp.where(chroma > 0, sixth, 0) + 6 * hue
    level = value * jnp.clip(saturation * chroma / (value + 1e-6), 0, 1)
    # A channel lies below V by the share of V * S that the distance of the hue from the channel's colour decides.
    place = jnp.mod(jnp.asarray([5, 3, 1], x.dtype) + sixth, 6)
    return value - level * jnp.clip(jnp.minimum(place, 4 - place), 0, 1)


def blur_size(side: int) -> int:
    """The width of the blur's kernel for an image side: a tenth of it, rounded up, made odd by taking one away."""
    size = math.ceil(0.1 * side)
    return size if size % 2 else size - 1


def gaussian_blur(x: jax.Array, sigma: jax.Array, sizes: tuple[int, int]) -> jax.Array:
    """Gaussian blur with reflected borders, whose outermost pixels are not repeated.

    Args:
      x: (N, H, W, A) float.
      sigma: (N,) the deviation in pixels, above 0.
      sizes: the odd widths of the kernel along H and along W; half of each must be smaller than the side.

    Returns:
      (N, H, W, A), the dtype of `x`.
    """
    for axis, size in zip((1, 2), sizes, strict=True):
        reach = size // 2
        distances = jnp.arange(-reach, reach + 1, dtype=x.dtype)
        weights = jax.nn.softmax(-jnp.square(distances / sigma.astype(x.dtype)[:, None]) / 2)  # (N, size)
        pads = [(reach, reach) if each == axis else (0, 0) for each in range(4)]
        padded, side = jnp.pad(x, pads, mode="reflect"), x.shape[axis]
        x = sum(
            weights[:, tap, None, None, None] * jax.lax.slice_in_dim(padded, tap, tap + side, axis=axis)
            for tap in range(size)
        )
    return x
