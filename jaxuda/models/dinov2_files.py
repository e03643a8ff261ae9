"""The names of a DINOv2 network's variables in torch files."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

from jaxuda.interop.layouts import Layout, Rules, named

_ENCODER: Rules = ((r"\bblock(\d+)\b", r"blocks.\1"), (r"\bpatch_embed\b", "patch_embed.proj"))
_VFMUDA: Rules = (
    (r"^backbone\b", "encoder"),
    (r"^decoder\.up1\b", "upscale.0"),
    (r"^decoder\.norm1\b", "upscale.1"),
    (r"^decoder\.up2\b", "upscale.3"),
    (r"^decoder\.norm2\b", "upscale.4"),
    (r"^decoder\.conv\b", "upscale.5"),
    (r"^decoder\.norm3\b", "upscale.6"),
    (r"^head\b", "out"),
)
_HUGGING_FACE: Rules = (
    (r"^backbone\.(cls_token|mask_token|register_tokens)$", r"embeddings.\1"),
    (r"^backbone\.pos_embed$", "embeddings.position_embeddings"),
    (r"^backbone\.patch_embed\b", "embeddings.patch_embeddings.projection"),
    (r"^backbone\.norm\b", "layernorm"),
    (r"^backbone\.block(\d+)\b", r"encoder.layer.\1"),
    (r"\battn\.qkv\b", "attention.attention.{query,key,value}"),
    (r"\battn\.proj\b", "attention.output.dense"),
    (r"\bls(\d)\.gamma$", r"layer_scale\1.lambda1"),
)
_JOINS = {
    "attention.attention.{query,key,value}": (
        "attention.attention.query",
        "attention.attention.key",
        "attention.attention.value",
    )
}
_SIZES = {"s": "S", "b": "B", "l": "L"}


def head_layouts(head: str) -> dict[str, Layout]:
    """The layouts of files of a network with that head; only VFM-UDA's was published."""
    if head == "linear":
        return {"linear": Layout(functools.partial(named, (*_ENCODER, (r"^backbone\b", "encoder"))), "head.weight")}
    name = functools.partial(named, (*_ENCODER, *_VFMUDA))
    # The layer that masks tokens repeats the token.
    return {"vfmuda": Layout(name, "upscale.0.weight", copies={"token_masking.mask_token": "encoder.mask_token"})}


def backbone_layouts() -> dict[str, Layout]:
    """The layouts of the files of DINOv2, which have no head."""
    return {
        "dinov2": Layout(
            functools.partial(named, (*_ENCODER, (r"^backbone\.", ""))),
            "patch_embed.proj.weight",
        ),
        "hugging_face": Layout(
            functools.partial(named, _HUGGING_FACE), "embeddings.patch_embeddings.projection.weight", joins=_JOINS
        ),
    }


def kind(width: int, blocks: int, registers: bool, known: Mapping[str, tuple[int, int]]) -> str:
    """A network in words; `known`: variant -> (channels, blocks)."""
    variant = next((name for name, sizes in known.items() if sizes == (width, blocks)), "")
    size = f"ViT-{_SIZES[variant[3]]}/{variant[4:]}" if variant else f"ViT of {blocks} blocks, {width} channels"
    return f"a DINOv2 {size}{' with registers' if registers else ''}"


def backbone_kind(shapes: Mapping[str, tuple[int, ...]], known: Mapping[str, tuple[int, ...]]) -> str:
    """The DINOv2 network in a torch file, in words; "" if there is none.

    Args:
      shapes: torch name -> shape; names may have a prefix.
      known: variant -> (channels, blocks).
    """
    patches = re.compile(r"\bpatch_embed(\.proj|dings\.projection)\.weight$")
    width = next((shape[0] for name, shape in shapes.items() if patches.search(name) and len(shape) == 4), 0)
    blocks = {match[1] for name in shapes if (match := re.search(r"\b(?:blocks|encoder\.layer)\.(\d+)\.", name))}
    registers = any(name.endswith("register_tokens") for name in shapes)
    return kind(width, len(blocks), registers, known) if width and blocks else ""
