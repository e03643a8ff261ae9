"""The names of a Mix Transformer's variables in torch files, and how those differ from ours."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping

import numpy as np

from jaxuda.interop.layouts import Layout, Rules, named

Path = tuple[str, ...]
_BACKBONE: Rules = ((r"\bblock(\d)_(\d+)\b", r"block\1.\2"), (r"\bdwconv\b", "dwconv.dwconv"))
_DAFORMER: Rules = (
    (r"^decoder\.embed(\d)\b", r"decode_head.embed_layers.\1.proj"),
    (r"^decoder\.branch(\d)\.(depth|point)wise\b", r"decode_head.fuse_layer.aspp_modules.\1.\2wise_conv"),
    (r"^decoder\.branch(\d)\b", r"decode_head.fuse_layer.aspp_modules.\1"),
    (r"^decoder\.bottleneck\b", "decode_head.fuse_layer.bottleneck"),
    (r"^head\b", "decode_head.conv_seg"),
)
_SEGFORMER: Rules = (
    (r"^decoder\.embed(\d)\b", r"decode_head.linear_c.\1.proj"),
    (r"^decoder\.fuse\b", "decode_head.linear_fuse"),
    (r"^head\b", "decode_head.linear_pred"),
)


def _earlier(text: str) -> Callable[[re.Match], str]:
    """`text` with the first group, a number counted from 1, counted from 0."""
    return lambda match: text.format(int(match[1]) - 1, *match.groups()[1:])


_NVLABS: Rules = (
    (r"^decoder\.embed(\d)\b", lambda match: f"decode_head.linear_c{int(match[1]) + 1}.proj"),
    *_SEGFORMER[1:],
)
_HUGGING_FACE: Rules = (
    (r"^backbone\.block\d_\d+\.attn\.(q|kv|sr|norm)\b", lambda match: match[0].replace("attn.", "attention.self.")),
    (r"\battn\.proj\b", "attention.output.dense"),
    (r"\bself\.q\b", "self.query"),
    (r"\bself\.kv\b", "self.{key,value}"),
    (r"\bself\.norm\b", "self.layer_norm"),
    (r"\bmlp\.fc(\d)\b", r"mlp.dense\1"),
    (r"\bdwconv\b", "dwconv.dwconv"),
    (r"^backbone\.norm(\d)\b", _earlier("backbone.layer_norm.{}")),
    (r"^backbone\.block(\d)_(\d+)\.norm(\d)\b", _earlier("backbone.block.{}.{}.layer_norm_{}")),
    (r"^backbone\.block(\d)_(\d+)\b", _earlier("backbone.block.{}.{}")),
    (r"^backbone\.patch_embed(\d)\.proj\b", _earlier("backbone.patch_embeddings.{}.proj")),
    (r"^backbone\.patch_embed(\d)\.norm\b", _earlier("backbone.patch_embeddings.{}.layer_norm")),
    (r"^backbone\b", "segformer.encoder"),
    (r"^decoder\.embed(\d)\b", r"decode_head.linear_c.\1.proj"),
    (r"^decoder\.fuse\.conv\b", "decode_head.linear_fuse"),
    (r"^decoder\.fuse\.bn\b", "decode_head.batch_norm"),
    (r"^head\b", "decode_head.classifier"),
)
_JOINS = {"attention.self.{key,value}": ("attention.self.key", "attention.self.value")}
# The generic classifier of the framework, which the SegFormer head does not use.
_UNUSED = ("decode_head.conv_seg.",)


def head_layouts(head: str) -> dict[str, Layout]:
    """The layouts of files of a network with that head; a file is compared with them in this order."""
    if head == "daformer":
        name = functools.partial(named, (*_BACKBONE, *_DAFORMER))
        return {"daformer": Layout(name, "decode_head.fuse_layer.bottleneck.conv.weight")}
    return {
        "hugging_face": Layout(
            functools.partial(named, _HUGGING_FACE),
            "decode_head.classifier.weight",
            joins=_JOINS,
            change=_last_stage_first,
        ),
        "nvlabs": Layout(
            functools.partial(named, (*_BACKBONE, *_NVLABS)),
            "decode_head.linear_c1.proj.weight",
            change=_last_stage_first,
            unneeded=_UNUSED,
        ),
        "daformer": Layout(
            functools.partial(named, (*_BACKBONE, *_SEGFORMER)), "decode_head.linear_pred.weight", unneeded=_UNUSED
        ),
    }


def backbone_layouts() -> dict[str, Layout]:
    """The layouts of the files of image classifiers."""
    return {
        "mit": Layout(functools.partial(named, (*_BACKBONE, (r"^backbone\.", ""))), "patch_embed1.proj.weight"),
        "hugging_face": Layout(
            functools.partial(named, _HUGGING_FACE), "segformer.encoder.patch_embeddings.0.proj.weight", joins=_JOINS
        ),
    }


def backbone_kind(shapes: Mapping[str, tuple[int, ...]], known: Mapping[str, tuple[int, tuple[int, ...]]]) -> str:
    """The Mix Transformer in a torch file, in words; "" if it is not known.

    Args:
      shapes: torch name -> shape; names may have a prefix.
      known: variant -> (channels of the first stage, blocks per stage).
    """
    found = {tuple(map(int, m.groups())) for name in shapes if (m := re.search(r"\bblock\.?(\d)\.(\d+)\.", name))}
    stages = sorted({stage for stage, _ in found})
    blocks = tuple(sum(stage == each for stage, _ in found) for each in stages)
    first = re.compile(r"\bpatch_embed(1|dings\.0)\.proj\.weight$")
    width = next((shape[0] for name, shape in shapes.items() if first.search(name)), 0)
    return next((f"a MiT-{name.upper()}" for name, sizes in known.items() if sizes == (width, blocks)), "")


def _last_stage_first(path: Path, array: np.ndarray) -> np.ndarray:
    """The kernel of the layer that joins four stages, with the channels of the last stage first."""
    if path[-3:] != ("fuse", "conv", "kernel"):
        return array
    return np.concatenate(np.split(array, 4, axis=2)[::-1], axis=2)
