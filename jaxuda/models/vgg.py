"""VGG-16 backbone with output stride 8 (Simonyan and Zisserman, ICLR 2015; dilated as in DeepLab and SDCA).

The last two pools are gone, the fifth stage has dilation 2, fc6 and fc7 are 3x3 convolutions with dilation 4
and 1024 channels. There is no normalisation layer.
"""

from collections.abc import Callable

import flax.linen as nn
import jax

from jaxuda.errors import UserError
from jaxuda.models.layers import max_pool

BLOCKS = (2, 2, 3, 3, 3)
# Layers of the segmentation network that the weights of an image classifier lack.
NEW_LAYERS = ("fc6", "fc7")


class VGG(nn.Module):
    """Five stages of 3x3 convolutions; returns (N, h, w, 16 * width), h and w = floor of an eighth."""

    width: int
    blocks: tuple[int, ...] | None
    conv: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        blocks = self.blocks or BLOCKS
        if len(blocks) != 5:
            raise UserError(f"model.blocks = {tuple(blocks)}: vgg16 needs 5 numbers, one per stage")
        x = images
        for stage, count in enumerate(blocks):
            features = self.width * min(2**stage, 8)
            dilation = 2 if stage == 4 else 1
            for index in range(count):
                name = f"conv{stage + 1}_{index + 1}"
                x = nn.relu(self.conv(features, 3, dilation=dilation, use_bias=True, name=name)(x))
            if stage < 3:
                x = max_pool(x, 2, 2)
        for name in NEW_LAYERS:
            x = nn.relu(self.conv(16 * self.width, 3, dilation=4, use_bias=True, name=name)(x))
        return x
