"""ResNet backbones with output stride 8 (He et al., CVPR 2016), in the three kinds that published weights come
in.

"caffe": a bottleneck strides in its first 1x1, the max-pool rounds up, the first dilated block already uses
the new dilation. "torchvision": it strides in its 3x3, the pool rounds down, the first block of a dilated
stage keeps the dilation of the stage before (half of its own). "v1c": like torchvision's, but three 3x3 convolutions
replace the 7x7 of the stem (He et al., CVPR 2019, figure 2, ResNet-C).
"""

from collections.abc import Callable

import flax.linen as nn
import jax

from jaxuda.errors import UserError
from jaxuda.models.layers import max_pool, residual_join

# name -> (whether blocks are bottlenecks, blocks per stage)
DEPTHS = {
    "resnet18": (False, (2, 2, 2, 2)),
    "resnet50": (True, (3, 4, 6, 3)),
    "resnet101": (True, (3, 4, 23, 3)),
}
VARIANTS = ("caffe", "torchvision", "v1c")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; `conv` and `norm` make layers of the network's dtype and normalisation."""

    features: int
    stride: int
    dilations: tuple[int, int]
    variant: str
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        first, second = self.dilations
        y = self.conv(self.features, 3, stride=self.stride, dilation=first, name="conv1")(x)
        y = nn.relu(self.norm(name="bn1")(y, train))
        y = self.conv(self.features, 3, dilation=second, name="conv2")(y)
        y = self.norm(name="bn2")(y, train)
        if self.stride != 1 or x.shape[-1] != self.features:
            x = self.conv(self.features, 1, stride=self.stride, name="downsample_conv")(x)
            x = self.norm(name="downsample_bn")(x, train)
        return residual_join(y, x)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions, the last to four times `features`."""

    features: int
    stride: int
    dilations: tuple[int, int]
    variant: str
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        first, second = (self.stride, 1) if self.variant == "caffe" else (1, self.stride)
        y = self.conv(self.features, 1, stride=first, name="conv1")(x)
        y = nn.relu(self.norm(name="bn1")(y, train))
        y = self.conv(self.features, 3, stride=second, dilation=self.dilations[0], name="conv2")(y)
        y = nn.relu(self.norm(name="bn2")(y, train))
        y = self.conv(4 * self.features, 1, name="conv3")(y)
        y = self.norm(name="bn3")(y, train)
        if self.stride != 1 or x.shape[-1] != 4 * self.features:
            x = self.conv(4 * self.features, 1, stride=self.stride, name="downsample_conv")(x)
            x = self.norm(name="downsample_bn")(x, train)
        return residual_join(y, x)


class ResNet(nn.Module):
    """Stem and four stages; the last two keep stride 1 and, where `dilated`, use dilations 2 and 4.

    With `remat` only the input of each block is kept for the gradient; the rest is computed again.

    Returns the maps of stages 3 and 4: (N, h, w, 16 * width) and (N, h, w, 32 * width) for bottlenecks, a
    quarter of those channels for basic blocks; h and w are about an eighth of the image's.
    """

    depth: str
    variant: str
    width: int
    blocks: tuple[int, ...] | None
    dilated: bool
    remat: bool
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
        bottleneck, blocks = DEPTHS[self.depth]
        blocks = self.blocks or blocks
        if len(blocks) != 4:
            raise UserError(f"model.blocks = {tuple(blocks)}: {self.depth} needs 4 numbers, one per stage")
        make_block = Bottleneck if bottleneck else BasicBlock
        if self.remat:
            make_block = nn.remat(make_block, static_argnums=(2,))  # `train`, counting from self
        strides = (1, 2, 1, 1)
        dilations = (1, 1, 2, 4) if self.dilated else (1, 1, 1, 1)

        x = self._stem(images, train)
        # The ReLU comes after the pool: the same result, at a quarter of the positions.
        x = nn.relu(max_pool(x, 3, 2, padding=1, ceil=self.variant == "caffe"))
        outputs = []
        for stage in range(4):
            for block in range(blocks[stage]):
                first = new = dilations[stage]
                if block == 0 and self.variant != "caffe":
                    first = dilations[max(stage - 1, 0)]
                x = make_block(
                    features=self.width * 2**stage,
                    stride=strides[stage] if block == 0 else 1,
                    dilations=(first, new),
                    variant=self.variant,
                    conv=self.conv,
                    norm=self.norm,
                    name=f"layer{stage + 1}_{block}",
                )(x, train)
            outputs.append(x)
        return outputs[2], outputs[3]

    def _stem(self, images: jax.Array, train: bool) -> jax.Array:
        """The layers before the pool, without the last ReLU: (N, H, W, 3) to (N, H / 2, W / 2, width)."""
        if self.variant != "v1c":
            return self.norm(name="bn1")(self.conv(self.width, 7, stride=2, name="conv1")(images), train)
        x = images
        for layer, features in enumerate((self.width // 2, self.width // 2, self.width), start=1):
            x = nn.relu(x) if layer > 1 else x
            x = self.conv(features, 3, stride=2 if layer == 1 else 1, name=f"conv{layer}")(x)
            x = self.norm(name=f"bn{layer}")(x, train)
        return x
