"""The distance of features to those of a frozen ImageNet network (Hoyer et al., DAFormer, CVPR 2022, section 3.3)."""

import jax
import jax.numpy as jnp

from jaxuda.losses.reduction import masked_mean
from jaxuda.losses.segmentation import IGNORE


def shrink_labels(labels: jax.Array, factor: int, min_ratio: float, num_classes: int) -> jax.Array:
    """Labels at the resolution of features: the class that fills most of a cell of `factor` x `factor` pixels.

    Args:
      labels: (N, H, W) integers in 0..C-1, or 255 = ignore.
      factor: side of a cell in pixels; a remainder of the image at the right and at the bottom is dropped.
      min_ratio: a cell is 255 if its class covers a smaller share of it.
      num_classes: C.

    Returns:
      (N, H // factor, W // factor) int32. The lowest class wins ties; 255 counts as a class after the last.
    """
    count, height, width = labels.shape[0], labels.shape[1] // factor, labels.shape[2] // factor
    cells = labels[:, : height * factor, : width * factor].reshape(count, height, factor, width, factor)
    values = jnp.asarray([*range(num_classes), IGNORE], labels.dtype)
    pixels = jnp.sum(cells[..., None] == values, axis=(2, 4), dtype=jnp.int32)  # (N, h, w, C + 1)
    best = jnp.argmax(pixels, axis=-1).astype(jnp.int32)
    kept = (jnp.max(pixels, axis=-1) / factor**2 >= min_ratio) & (best < num_classes)
    return jnp.where(kept, best, IGNORE)


def feature_distance(
    features: jax.Array, reference: jax.Array, mask: jax.Array, axis_name: str | None = None
) -> jax.Array:
    """Mean over the cells of a mask of the Euclidean distance between two features.

    At a distance of 0 the gradient is 0. So it is near 0: there the gradient of a norm is still a unit vector, which
    would turn the rounding of two programs that compute the same features into noise of full size.

    Args:
      features: (N, h, w, A) float.
      reference: (N, h, w, A) float, the features of the frozen network.
      mask: (N, h, w) bool, the cells that count.
      axis_name: device axis over which the mean is taken.

    Returns:
      Scalar; 0 if no cell counts.
    """
    difference = features - reference
    squares = jnp.sum(jnp.square(difference), axis=-1)
    least = 1e-9 if squares.dtype == jnp.float64 else 1e-5
    near = squares <= least**2
    distances = jnp.where(near, 0, jnp.sqrt(jnp.where(near, 1, squares)))
    return masked_mean(distances, mask, axis_name)
