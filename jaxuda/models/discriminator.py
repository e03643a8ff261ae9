"""Discriminators that tell source from target."""

import math

import flax.linen as nn
import jax

from jaxuda.models.layers import Conv


def _uniform_bias(bound: float) -> nn.initializers.Initializer:
    return lambda key, shape, dtype=float: jax.random.uniform(key, shape, dtype, -bound, bound)


class FCDiscriminator(nn.Module):
    """Fully convolutional discriminator (ADVENT, section 4.2; after AdaptSegNet and DCGAN).

    Five 4x4 convolutions of stride 2 with LeakyReLU 0.2 between; maps (N, H, W, C), an entropy map at image
    size, to (N, H/32, W/32, 1) logits, positive for target. `width` is the first layer's channel count.
    Weights and biases start uniform in +-1 / sqrt(fan-in), as in the published code.
    """

    width: int = 64
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        widths = (self.width, 2 * self.width, 4 * self.width, 8 * self.width, 1)
        for index, features in enumerate(widths):
            x = Conv(
                features,
                4,
                stride=2,
                padding=1,
                use_bias=True,
                dtype=self.dtype,
                kernel_init=nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
                bias_init=_uniform_bias(1 / math.sqrt(16 * x.shape[-1])),
                name=f"conv{index}",
            )(x)
            if index < len(widths) - 1:
                x = nn.leaky_relu(x, 0.2)
        return x.astype("float32") if self.dtype == "bfloat16" else x
