"""Changes of colour and sharpness, in JAX, with given parameters: augmentation that runs inside a train step."""

from __future__ import annotations

import math
from collections.abc import Sequence

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
    brightness, contrast, saturation, hue = factors.astype(x.dtype).T[..., None, None]  # (N, 1, 1) each
    channels = [x[..., c] for c in range(3)]  # elementwise on single channels: XLA makes one loop of it
    for operation in order.T[..., None, None]:
        saturated = jnp.where(operation == SATURATION, saturation, 1)
        turned = jnp.where(operation == HUE, hue, 0)
        coloured = _in_hsv(channels, saturated, turned)
        shifted = jnp.where(operation == BRIGHTNESS, brightness - 1, 0)
        scaled = jnp.where(operation == CONTRAST, contrast, 1)
        toned = [jnp.clip(scaled * (channel + shifted), 0, 1) for channel in channels]
        is_tone = (operation == BRIGHTNESS) | (operation == CONTRAST)
        channels = [jnp.where(is_tone, a, b) for a, b in zip(toned, coloured, strict=True)]
    return jnp.stack(channels, axis=-1)


def _in_hsv(channels: Sequence[jax.Array], saturation: jax.Array, hue: jax.Array) -> list[jax.Array]:
    """The channels (N, H, W) of RGB images, S multiplied by `saturation` and clipped, H moved by `hue` turns."""
    red, green, blue = channels
    value = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    safe = jnp.where(chroma > 0, chroma, 1)
    sixth = jnp.where(
        value == red,
        (green - blue) / safe,
        jnp.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sixth += 6 * hue  # a grey pixel has no hue: its S is 0
    level = value * jnp.clip(saturation * chroma / (value + 1e-6), 0, 1)
    # A channel lies below V by the share of V * S that the distance of the hue from the channel's colour decides.
    turns = [(start + sixth) / 6 for start in (5, 3, 1)]
    places = [6 * (turn - jnp.floor(turn)) for turn in turns]
    return [value - level * jnp.clip(jnp.minimum(place, 4 - place), 0, 1) for place in places]


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
