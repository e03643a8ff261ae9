"""HRDA (Hoyer et al., ECCV 2022): any network on two views of an image, joined by a learned attention to scale.

The context view is the whole image at half its size, the detail view a part of it at full size. One network computes
both; a small head on the context decides for each class and position how much the detail counts:

    fused = up(a) * detail + up((1 - a) * context),  a = sigmoid(scale attention of the context), 0 outside the detail

In training the detail is one part of the image, the same for the whole batch and drawn for each forward pass. In
inference, and in training without a key for "dropout" (a teacher), overlapping parts cover the image, and where they
overlap their logits are averaged; the parts of all images are one batch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxuda.errors import UserError
from jaxuda.interop.layouts import LEAVES, Layout
from jaxuda.interop.torch_checkpoint import published_layout, torch_layouts
from jaxuda.models import Detail, Outputs
from jaxuda.models.decoders import SegFormerDecoder
from jaxuda.models.layers import Conv, Dropout, cut, head_init, resize_bilinear
from jaxuda.models.windows import averaged, cut_out, windows

SCALE = 2  # how many times smaller the context view is


class ScaleAttention(nn.Module):
    """Logits of the attention, (N, h, w, C), from the maps of all stages (N, h_i, w_i, A_i), the largest first."""

    num_classes: int
    width: int
    dropout: float
    dtype: str
    axis_name: str | None

    @nn.compact
    def __call__(self, levels: tuple[jax.Array, ...], train: bool, index: jax.Array | None) -> jax.Array:
        features = SegFormerDecoder(self.width, self.dtype, self.axis_name, name="decoder")(levels, train)
        dropped = Dropout(self.dropout, channels=True)(features, train, index)
        conv = Conv(self.num_classes, 1, use_bias=True, dtype=self.dtype, kernel_init=head_init, name="head")
        logits = conv(dropped)
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


class HRDA(nn.Module):
    """A network in the sense of `jaxuda.models` made of another one; its fields are those of `config.model.hrda`.

    network: the network of both views. Its maps must have a whole number of cells for the views.
    crop: (width, height) of the detail view; an image that is smaller is its own detail view.
    window: (width, height) of the parts of larger images that inference computes, overlapping by half. Logits and
      features are then averaged at the resolution of the image.
    detail_weight: the weight of the detail prediction in a supervised loss; that of the fused one is 1 - detail_weight.
    attention_width: channels of the head of the scale attention.

    Variables: those of the network, and params["scale_attention"], batch_stats["scale_attention"]. `Outputs.main` is
    the fused prediction, at the resolution of the detail view; `features` are those of the context view, enlarged;
    `levels` and what else there is are those of the context view.
    """

    network: nn.Module
    crop: tuple[int, int] = (512, 512)
    window: tuple[int, int] = (1024, 1024)
    detail_weight: float = 0.1
    attention_width: int = 256

    def setup(self) -> None:
        nn.share_scope(self, self.network)
        dropout = getattr(self.network, "dropout", 0.0)
        self.scale_attention = ScaleAttention(
            self.num_classes, self.attention_width, dropout, self.dtype, self.axis_name
        )

    def __call__(self, images: jax.Array, train: bool = False, index: jax.Array | None = None) -> Outputs:
        """Maps normalised images (N, H, W, 3) to `Outputs`."""
        size, (width, height) = images.shape[1:3], self.window
        if train or (size[0] <= height and size[1] <= width):
            return self._views(images, train, index)
        boxes = windows(size, (min(height, size[0]), min(width, size[1])))
        parts = self._views(cut_out(images, boxes), train, index)
        # Features that nobody reads are not computed.
        whole = lambda x: averaged(resize_bilinear(x, boxes.part, align_corners=False), boxes)  # noqa: E731
        return Outputs(whole(parts.main), whole(parts.features))

    def _views(self, images: jax.Array, train: bool, index: jax.Array | None) -> Outputs:
        height, width = images.shape[1:3]
        half, crop = (height // SCALE, width // SCALE), (min(self.crop[1], height), min(self.crop[0], width))
        context = self.network(resize_bilinear(images, half, align_corners=False), train, index)
        stride = self._stride(images.shape[1:3], crop, context.main.shape[1:3])
        cells = (height // stride, width // stride)
        levels = (context.features,) if context.levels is None else context.levels
        attention, found = jax.nn.sigmoid(self.scale_attention(levels, train, index)), None
        if train and self.has_rng("dropout") and not self.is_initializing():
            offset = draw_offset(self.make_rng("dropout"), (height, width), crop, stride * SCALE)
            detail = self.network(cut(images, offset, crop), train, index).main
            attention *= _inside(offset, crop, context.main.shape[1:3], stride * SCALE)[..., None]
            zeros = jnp.zeros((*detail.shape[:1], *cells, detail.shape[-1]), detail.dtype)
            none = jnp.zeros((), offset.dtype)
            placed = lax.dynamic_update_slice(zeros, detail, (none, *(offset // stride), none))
            found = Detail(detail, offset, jnp.asarray(self.detail_weight, detail.dtype))
        else:
            boxes = windows((height, width), crop)
            placed = averaged(self.network(cut_out(images, boxes), train).main, boxes.shrunk(stride))
        up = lambda x: resize_bilinear(x, cells, align_corners=False)  # noqa: E731
        main = up(attention) * placed + up((1 - attention) * context.main)
        return context._replace(main=main, features=up(context.features), detail=found)

    def _stride(self, size: tuple[int, int], crop: tuple[int, int], cells: tuple[int, int]) -> int:
        """Pixels per cell of the network's logits; `size`, `crop`: of image and detail, `cells`: of the context."""
        stride = max(1, round(size[0] / SCALE / cells[0]))
        whole = all(side == SCALE * stride * count for side, count in zip(size, cells, strict=True))
        if not whole or any(side % (SCALE * stride) for side in crop):
            raise UserError(
                f"HRDA needs views with a whole number of cells: an image of {size[1]}x{size[0]} and a detail view of "
                f"{crop[1]}x{crop[0]} must have sides that {SCALE * stride} divides (see resize and crop of the "
                "domains, evaluation.size, model.hrda.crop and model.hrda.window), and the network's maps must not be "
                "larger than the image over its stride (as those of model.variant=caffe are)"
            )
        return stride

    # As the network of both views, except for the shared head.

    @property
    def num_classes(self) -> int:
        return self.network.num_classes

    @property
    def dtype(self) -> str:
        return self.network.dtype

    @property
    def axis_name(self) -> str | None:
        return self.network.axis_name

    @property
    def CLASSIFIERS(self) -> tuple[str, ...]:
        return self.network.CLASSIFIERS

    @property
    def SHAPE_FIELDS(self) -> tuple[str, ...]:
        return (*self.network.SHAPE_FIELDS, "hrda")

    @property
    def NEW_LAYERS(self) -> tuple[str, ...]:
        return getattr(self.network, "NEW_LAYERS", ())

    @property
    def LICENCE(self) -> str:
        return getattr(self.network, "LICENCE", "")

    def clone(self, **updates: Any) -> HRDA:  # type: ignore[override]
        """As Flax's; fields of the network of both views may be updated too."""
        own = {"parent", "_deep_clone", "_reset_names", "name", *self.__dataclass_fields__}
        inner = {name: value for name, value in updates.items() if name not in own}
        if inner:
            updates = {name: value for name, value in updates.items() if name in own}
            updates["network"] = self.network.clone(**inner)
        return super().clone(**updates)

    def classifier(self, num_classes: int) -> nn.Module:
        return self.network.classifier(num_classes)

    def parameter_group(self, path: tuple[str, ...]) -> str:
        return "head" if path[0] == "scale_attention" else self.network.parameter_group(path)

    def describe(self) -> str:
        return f"{self.network.describe()}, HRDA"

    def torch_layouts(self) -> dict[str, Layout]:
        """The network's, with the names that HRDA's authors give to their two heads."""
        return {name: _both_heads(layout) for name, layout in torch_layouts(self.network).items()}

    def published_layout(self) -> str:
        return published_layout(self.network)

    def backbone_layouts(self) -> dict[str, Layout]:
        return self.network.backbone_layouts()

    def other_backbone(self, shapes: Mapping[str, tuple[int, ...]]) -> str:
        return self.network.other_backbone(shapes) if hasattr(self.network, "other_backbone") else ""


def wrap(network: nn.Module, fields: Mapping[str, Any]) -> HRDA:
    """The network of a section `config.model` that has a section `hrda`, whose fields these are."""
    return HRDA(network.clone(parent=None), **fields)


def draw_offset(key: jax.Array, size: tuple[int, int], crop: tuple[int, int], unit: int) -> jax.Array:
    """Where the detail view begins, (2,) int32 (row, column): multiples of `unit`, as published never the last one.

    Args:
      key: a random key.
      size, crop: (height, width) of the image and of the detail view.
      unit: pixels per cell of the context's maps.
    """
    counts = jnp.asarray([max((side - part + 1) // unit, 1) for side, part in zip(size, crop, strict=True)])
    return unit * jax.random.randint(key, (2,), 0, counts, jnp.int32)


def _inside(offset: jax.Array, crop: tuple[int, int], cells: tuple[int, int], unit: int) -> jax.Array:
    """(h, w) bool: the cells of the context, of `unit` pixels, that the detail view shows."""
    rows, columns = (
        (unit * jnp.arange(count) >= start) & (unit * jnp.arange(count) < start + side)
        for count, start, side in zip(cells, offset, crop, strict=True)
    )
    return rows[:, None] & columns


# The second head in the files of HRDA's authors.
_ATTENTION = (
    (r"^scale_attention\.decoder\.embed(\d)\b", r"decode_head.scale_attention.embed_layers.\1.proj"),
    (r"^scale_attention\.decoder\.fuse\b", "decode_head.scale_attention.fuse_layer"),
    (r"^scale_attention\.head\b", "decode_head.scale_attention.conv_seg"),
)


def _both_heads(layout: Layout) -> Layout:
    """The layout of a network's files with the names that it has below HRDA."""
    shared = lambda name: name.replace("decode_head.", "decode_head.head.", 1)  # noqa: E731

    def name(path: tuple[str, ...]) -> str | None:
        if path[1] != "scale_attention":
            own = layout.name(path)
            return own and shared(own)
        own = ".".join((*path[1:-1], LEAVES[path[-1]]))
        for pattern, new in _ATTENTION:
            own = re.sub(pattern, new, own)
        return own

    return layout._replace(name=name, anchor=shared(layout.anchor), unneeded=tuple(map(shared, layout.unneeded)))
