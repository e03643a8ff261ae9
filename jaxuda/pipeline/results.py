"""The scores of a run: what results.json holds, the table on the terminal, and which runs may be compared."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxuda import data
from jaxuda.data.few import FewLabels
from jaxuda.data.records import Domains
from jaxuda.errors import UserError
from jaxuda.metrics import iou_table
from jaxuda.pipeline.stages import Stage

# Which checkpoint each score in results.json belongs to.
CHECKPOINT_RULES = {
    "last": "the last checkpoint, after all steps of the recipe; shown in tables",
    "best_on_val_using_target_labels": "chosen with labels that an unlabelled target does not have",
    "chosen_without_labels": "chosen by a figure that needs no labels: lowest entropy, highest diversity or snd",
}


def versions() -> dict[str, Any]:
    """The versions of the packages that decide a result, and the revision of the code."""
    packages = ("jaxuda", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {"versions": {package: importlib.metadata.version(package) for package in packages}, "git": _git_revision()}


def _git_revision() -> str | None:
    """The commit of the code, with "+changes" if files differ from it; None outside a checkout."""
    where = ["git", "-C", str(Path(__file__).parent)]
    try:
        options = {"capture_output": True, "text": True, "check": True, "timeout": 10}
        revision = subprocess.run([*where, "rev-parse", "HEAD"], **options).stdout.strip()
        changed = subprocess.run([*where, "status", "--porcelain", "-uno"], **options).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return revision + ("+changes" if changed else "")


def collect(config: ConfigDict, recipe: list[Stage], domains: Domains) -> dict[str, Any]:
    """The scores, and everything that they depend on."""
    settings = json.dumps(config.to_dict(), sort_keys=True, default=list)
    opened = {"source": domains.source, "target": domains.target, "evaluation": next(iter(domains.validation), None)}
    return {
        "config": config.name,
        "benchmark": config.benchmark,
        "seed": config.seed,
        "validation": domains.validation[0].name if domains.validation else None,
        "classes": list(domains.label_space.classes),
        **({"starred": list(domains.label_space.starred)} if domains.label_space.starred else {}),
        "evaluation_size": list(config.evaluation.size),
        "checkpoints": CHECKPOINT_RULES | {"mean_of_last": f"mean of the last {config.mean_of_last} evaluations"},
        "data": {place: records and _described(records) for place, records in opened.items()},
        **({"target_labels": len(domains.source.few)} if isinstance(domains.source, FewLabels) else {}),
        **({"also": [_described(records) for records in domains.validation[1:]]} if domains.validation[1:] else {}),
        "config_sha256": hashlib.sha256(settings.encode()).hexdigest(),
        **versions(),
        "fingerprints": {stage.name: stage.fingerprint for stage in recipe},
        "stages": {stage.name: stage.results() for stage in recipe},
    }


def _described(records: data.Records) -> dict[str, Any]:
    described = {"name": records.name, "images": len(records), "labelled": records.labelled}
    return described | {"fingerprint": records.fingerprint}


def final_table(results: dict[str, Any]) -> str:
    """A table of the IoU per class of every training stage, and its other scores."""
    scored = {name: result for name, result in results["stages"].items() if "best_on_val_using_target_labels" in result}
    if not scored:
        return "no labelled validation images: nothing to score (see metrics.jsonl for the label-free figures)"
    columns = {}
    for name, result in scored.items():
        last, title = result["last"], name.replace("_", " ")
        others = last.get("other_networks", {})
        columns[f"{title} ({last['network']})" if others else title] = last
        columns |= {f"{title} ({network})": found for network, found in others.items()}
    lines = [f"IoU in % on {results['validation']}, last checkpoint of each stage", ""]
    lines += [
        iou_table(
            {name: np.asarray(found["confusion"]) for name, found in columns.items()},
            results["classes"],
            results.get("starred", ()),
        ),
        "",
    ]
    for beside in dict.fromkeys(name for result in scored.values() for name in result["last"].get("beside", {})):
        found = {name: result["last"].get("beside", {}).get(beside, {}).get("miou") for name, result in scored.items()}
        cells = (f"{name.replace('_', ' ')} {100 * miou:.1f}" for name, miou in found.items() if miou is not None)
        lines.append(f"mIoU, {beside}: {', '.join(cells)}")
    for name, result in scored.items():
        mean, best = result["mean_of_last"], result["best_on_val_using_target_labels"]
        lines.append(
            f"{name.replace('_', ' ')}: mean of the last {mean['count']} evaluations {100 * mean['miou']:.1f}; "
            f"best on val (uses target labels) {100 * best['miou']:.1f} at step {best['step']}"
        )
        chosen = result.get("chosen_without_labels", {})
        found = (f"by {figure} {100 * row['miou']:.1f} at step {row['step']}" for figure, row in chosen.items())
        lines += [f"  chosen without target labels: {', '.join(found)}"] if chosen else []
    return "\n".join(lines)


def check_comparable(runs: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """Refuses to compare runs whose scores mean different things.

    Args:
      runs: the name of each run and what its scores depend on, such as {"classes": ("road", "sky")}; None for an
        unknown value.

    Raises:
      UserError: two runs differ; the message has the field and both values.
    """
    first: dict[str, tuple[str, Any]] = {}
    for name, facts in runs:
        for what, value in facts.items():
            if value is None:
                continue
            other, known = first.setdefault(what, (name, value))
            if known != value:
                raise UserError(
                    f"{other} and {name} cannot be compared: their {what} differ: {_shown(known)} against "
                    f"{_shown(value)}. Compare runs of one benchmark"
                )


def _shown(value: Any) -> str:
    return f"{len(value)} ({', '.join(map(str, value))})" if isinstance(value, tuple) and len(value) > 2 else str(value)
