"""Checks the values of a config before anything runs; one message reports all that are wrong.

Names (of benchmarks, methods, label spaces) are checked where they are looked up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from jaxuda.data.joined import domain_transform
from jaxuda.data.transforms import build_transform
from jaxuda.errors import UserError

_LARGEST = 2**31 - 1
# Last part of a field name -> its minimum. The limits of `width` and `size` bound the memory that a typing error takes.
_LEAST = {
    **dict.fromkeys(("log_every", "eval_every", "checkpoint_every", "mean_of_last", "batch", "steps", "accumulate"), 1),
    **dict.fromkeys(("lovasz_shrink", "stem", "block", "shortcut", "width"), 1),
    **dict.fromkeys(("keep_every", "devices", "num_workers", "seed", "schedule_steps", "lr", "momentum", "power"), 0),
    **dict.fromkeys(("weight_decay", "head_factor", "norm_eps", "rare_class_pixels"), 0),
    **dict.fromkeys(("warmup_steps", "warmup_ratio", "rare_class_crop_ratio"), 0),
    **dict.fromkeys(
        ("alpha", "threshold", "feature_ratio", "mask_ratio", "strength", "ignore_top", "ignore_bottom"), 0
    ),
    "mask_block": 1,
    "rare_class_temperature": 1e-6,
    **dict.fromkeys(("channels", "bank"), 1),
    **dict.fromkeys(("contrast_start", "contrast_weight", "crop_limit"), 0),
    "tau": 1e-6,
}
_NEEDED = ("name", "benchmark", "seed", "pipeline", "source", "target", "evaluation", "test", "model", "optim")
_STAGE = {"domains", "init", "labels", "split", "reads"}  # fields of every stage, and of one that trains
_TRAINING = _STAGE | {"steps", "schedule_steps", "batch", "lr", "order"}
_TYPES = ("float32", "bfloat16", "float16", "float64")  # that networks can compute in
_MOST = {
    **dict.fromkeys(
        ("momentum", "warmup_ratio", "alpha", "threshold", "feature_ratio", "mask_ratio", "strength", "crop_limit"), 1
    ),
    **{"width": 4096, "num_workers": 1024},
}


def check(config: ConfigDict) -> None:
    """Raises a UserError that names every field of a config whose value is invalid."""
    plain = config.to_dict()
    if missing := [field for field in _NEEDED if field not in plain]:
        raise UserError(f"the config lacks {', '.join(missing)}: make it with configs.common.base, then change it")
    wrong = [f"config.{field}={value!r} {problem}" for field, value, problem in _numbers(plain)]
    for domain in ("source", "target"):
        if not plain[domain]["name"]:
            continue  # the config has no such domain
        try:
            domain_transform(plain[domain])
        except UserError as error:
            wrong.append(f"config.{domain}: {error}")
    if not _pair(plain["evaluation"]["size"]):
        wrong.append(f"config.evaluation.size={plain['evaluation']['size']!r} must be (width, height)")
    try:
        build_transform({"interpolation": plain["evaluation"].get("interpolation")})
    except UserError as error:
        wrong.append(f"config.evaluation: {error}")
    scales, weights = plain["test"]["scales"], plain["test"]["weights"]
    if not _all_numbers(plain.get("class_weights", ())):
        wrong.append(f"config.class_weights={plain['class_weights']!r} must be one number for each class")
    if not scales or not _all_numbers(scales) or min(scales) <= 0:
        wrong.append(f"config.test.scales={scales!r} must be factors above 0, such as (1.0,)")
    if not _all_numbers(weights) or min(weights, default=0) < 0 or (weights and not sum(weights)):
        wrong.append(f"config.test.weights={weights!r} must be numbers of at least 0, and not all 0")
    by_class = plain["test"].get("class_weights", ())
    if not _all_numbers(by_class) or any(weight <= 0 for weight in by_class):
        wrong.append(f"config.test.class_weights={by_class!r} must be numbers above 0, one for each class")
    blocks = plain["model"].get("blocks")  # not every network family has it
    if blocks is not None and not (_all_numbers(blocks) and all(type(n) is int and 0 < n < 1000 for n in blocks)):
        wrong.append(f"config.model.blocks={blocks!r} must be the number of blocks of each stage")
    if (dtype := plain["model"].get("dtype", _TYPES[0])) not in _TYPES:
        wrong.append(f"config.model.dtype={dtype!r} must be one of {', '.join(_TYPES)}")
    wrong += _pipeline(plain)
    if wrong:
        raise UserError("\n  ".join(["the config cannot be run:", *wrong] if len(wrong) > 1 else wrong))


def _numbers(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any, str]]:
    """(field, value, what is wrong) for each invalid number in a config."""
    wrong = []
    for name, value in tree.items():
        if isinstance(value, Mapping):
            wrong += _numbers(value, f"{prefix}{name}.")
            continue
        for number in value if isinstance(value, tuple | list) else (value,):
            if type(number) not in (int, float):
                continue
            if not math.isfinite(number) or (type(number) is int and abs(number) > _LARGEST):
                wrong.append((f"{prefix}{name}", value, "is not finite, or too large"))
            elif number < _LEAST.get(name, -math.inf):
                wrong.append((f"{prefix}{name}", value, f"must be at least {_LEAST[name]}"))
            elif number > _MOST.get(name, math.inf):
                wrong.append((f"{prefix}{name}", value, f"must be at most {_MOST[name]}"))
    return wrong


def _pipeline(plain: Mapping[str, Any]) -> list[str]:
    """What is wrong with the list of stages, and with the division of their batches into parts."""
    names = plain["pipeline"]
    sections = [plain[name] for name in names if isinstance(plain.get(name), Mapping)]
    if len(set(names)) < len(names) or not any("train" in section for section in sections):
        return [f"config.pipeline={names!r} must name stages, each once, and at least one that trains"]
    wrong = []
    for name in names:
        section = plain.get(name)
        if not isinstance(section, Mapping) or not {"train", "sweep"} & section.keys():
            wrong.append(f"config.pipeline names '{name}', but config.{name} is no stage: it lacks `train` or `sweep`")
            continue
        if missing := sorted((_TRAINING if "train" in section else _STAGE) - section.keys()):
            wrong.append(f"config.{name} lacks {', '.join(missing)}: make stages with the functions of configs.common")
            continue
        if not section["domains"] or not {"source", "target"} >= set(section["domains"]):
            wrong.append(f"config.{name}.domains={section['domains']!r} must name 'source', 'target' or both")
        if "train" in section:
            parts = max(1, plain.get("accumulate", 1))
            parts = parts if parts > 1 else max(1, section.get("accumulate", 1))
            if section["batch"] % parts:
                wrong.append(f"config.{name}.batch={section['batch']} does not divide into {parts} parts")
    return wrong


def _pair(size: Any) -> bool:
    return isinstance(size, Sequence) and len(size) == 2 and all(type(n) is int and 0 < n <= 2**15 for n in size)


def _all_numbers(values: Any) -> bool:
    return isinstance(values, Sequence) and all(type(value) in (int, float) for value in values)
