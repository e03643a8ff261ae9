"""Discriminators, which classify source against target."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxuda.interop.layouts import LEAVES, Layout
from jaxuda.models.layers import Conv


def _uniform_bias(bound: float) -> nn.initializers.Initializer:
    return lambda key, shape, dtype=float: jax.random.uniform(key, shape, dtype, -bound, bound)


def _conv(x: jax.Array, features: int, size: int, stride: int, dtype: str, name: str) -> jax.Array:
    """A convolution with padding 1; weights and biases start uniform in +-1 / sqrt(fan-in), as in torch."""
    return Conv(
        features,
        size,
        stride=stride,
        padding=1,
        use_bias=True,
        dtype=dtype,
        kernel_init=nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
        bias_init=_uniform_bias(1 / math.sqrt(size * size * x.shape[-1])),
        name=name,
    )(x)


class FCDiscriminator(nn.Module):
    """Fully convolutional discriminator (ADVENT, section 4.2; after AdaptSegNet and DCGAN).

    Five 4x4 convolutions of stride 2 with LeakyReLU 0.2 between; maps (N, H, W, C), an entropy map at image
    size, to (N, H/32, W/32, 1) logits, positive for target. `width` is the first layer's channel count."""

    width: int = 64
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        widths = (self.width, 2 * self.width, 4 * self.width, 8 * self.width, 1)
        for index, features in enumerate(widths):
            x = _conv(x, features, 4, 2, self.dtype, f"conv{index}")
            if index < len(widths) - 1:
                x = nn.leaky_relu(x, 0.2)
        return x.astype("float32") if self.dtype == "bfloat16" else x

    def torch_layouts(self) -> dict[str, Layout]:
        """How published files name the variables: a list of layers, with activations at the odd places."""

        def name(path: tuple[str, ...]) -> str:
            return f"{2 * int(path[1].removeprefix('conv'))}.{LEAVES[path[2]]}"

        return {"sequential": Layout(name, "0.weight", reads_maps=True)}


class ClassDiscriminator(nn.Module):
    """Predicts class and domain at every position of the features (FADA, Wang et al., ECCV 2020, section 3.2).

    Two 3x3 convolutions with LeakyReLU 0.2, of `width` and `width` / 2 channels, then one 3x3 convolution per domain.
    Features (N, h, w, A) become (N, h, w, 2C) logits: the C source classes, then the C target classes.
    """

    num_classes: int
    width: int = 256
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = functools.partial(_conv, size=3, stride=1, dtype=self.dtype)
        x = nn.leaky_relu(conv(x.astype(self.dtype), self.width, name="conv0"), 0.2)
        x = nn.leaky_relu(conv(x, self.width // 2, name="conv1"), 0.2)
        domains = [conv(x, self.num_classes, name=domain) for domain in ("source", "target")]
        x = jnp.concatenate(domains, axis=-1)
        return x.astype("float32") if self.dtype == "bfloat16" else x
