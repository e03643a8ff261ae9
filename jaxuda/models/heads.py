"""Heads that networks and methods share."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxuda.errors import UserError
from jaxuda.models.layers import BatchNorm, Conv, add_bias, conv2d_sum, head_init, resize_bilinear

DILATIONS = (6, 12, 18, 24)
PROJECTIONS = ("mlp", "linear", "none")


class DilatedHead(nn.Module):
    """DeepLab-v2's classifier: the sum of dilated 3x3 convolutions from features (N, h, w, A) to logits.

    use_bias: whether each convolution has a bias.
    dtype: compute dtype.
    dilations: those of the convolutions.
    """

    num_classes: int
    use_bias: bool
    dtype: str
    dilations: tuple[int, ...] = DILATIONS

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = dilated_sum(self, x, self.num_classes, self.dilations, head_init)
        if self.use_bias:
            zeros = nn.initializers.zeros
            biases = [self.param(f"bias{i}", zeros, (self.num_classes,)) for i in range(len(self.dilations))]
            y = add_bias(y, sum(biases).astype(self.dtype))
        return y


def dilated_sum(
    module: nn.Module, x: jax.Array, features: int, dilations: tuple[int, ...], init: nn.initializers.Initializer
) -> jax.Array:
    """The sum of dilated 3x3 convolutions of (N, h, w, A); `module`, which has a `dtype`, gets kernel0, kernel1, ..."""
    shape = (3, 3, x.shape[-1], features)
    kernels = [module.param(f"kernel{i}", init, shape).astype(module.dtype) for i in range(len(dilations))]
    return conv2d_sum(x.astype(module.dtype), kernels, dilations)


class ProjectionHead(nn.Module):
    """A projection of the features before the contrastive loss (CFContra); as many channels out as in.

    kind: "mlp" (linear, ReLU, linear), "linear", or "none", which has no parameters and changes nothing.
    dtype: compute dtype; the result is at least float32.

    Weights start uniform in +-1 / sqrt(fan-in), biases at zero. Raises UserError on another kind.
    """

    kind: str = "mlp"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """Maps (N, h, w, A) to (N, h, w, A)."""
        if self.kind not in PROJECTIONS:
            raise UserError(f"projection = {self.kind!r} is unknown; choose one of: {', '.join(PROJECTIONS)}")
        x, layers = features, {"mlp": 2, "linear": 1, "none": 0}[self.kind]
        for index in range(layers):
            x = nn.relu(x) if index else x
            x = Conv(
                features.shape[-1],
                1,
                use_bias=True,
                dtype=self.dtype,
                kernel_init=nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
                name=f"linear{index}",
            )(x)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class Projection(nn.Module):
    """SePiCo's projection to unit vectors: twice a 1x1 convolution, batch normalisation and ReLU.

    hidden, channels: output channels of the first and of the second layer.
    dtype: compute dtype; the result is at least float32.
    axis_name: device axis over which batch statistics are reduced in training.

    Several maps are enlarged to the size of the first one, and joined.
    """

    hidden: int
    channels: int
    dtype: str = "float32"
    axis_name: str | None = None

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array], train: bool = False) -> jax.Array:
        """Maps (N, h_i, w_i, A_i), the finest first, to (N, h_0, w_0, channels), not negative."""
        size = maps[0].shape[1:3]
        x = jnp.concatenate([resize_bilinear(each, size, align_corners=False) for each in maps], axis=-1)
        for index, features in enumerate((self.hidden, self.channels)):
            x = Conv(features, 1, dtype=self.dtype, name=f"conv{index}")(x)
            x = nn.relu(BatchNorm(axis_name=self.axis_name, dtype=self.dtype, name=f"bn{index}")(x, train))
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return x * lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))
