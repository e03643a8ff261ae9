"""Hand-written work folders, as a run of many stages leaves them: no network runs."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxuda.data.labels import make_label_space
from jaxuda.metrics import iou, mean_iou, pixel_accuracy
from jaxuda.report.gallery import Gallery, Picture

CLASSES = ["road", "a&b", "<script>alert(1)</script>"]
EVIL = "\"><img src=x onerror=alert(1)><script>alert(2)</script>'"
TRAINED = {"init": "scratch", "labels": "", "steps": 20}
STAGES = {
    "source_only": {"train": "source_only", "domains": ["source"], **TRAINED},
    "rank": {"sweep": "entropy_rank", "domains": ["source", "target"], "init": "source_only"},
    "adapt": {"train": "minent", "domains": ["source", "target"], **TRAINED, "init": "source_only:best"},
    "oracle": {"train": "source_only", "domains": ["target"], **TRAINED},
}


def evaluation(step: int, seed: int, count: int) -> dict:
    rng = np.random.default_rng([seed, step])
    confusion = rng.integers(0, 1000, (count, count)) + np.diag(rng.integers(0, 20_000, count))
    confusion[2] = confusion[:, 2] = 0
    scores = {"miou": mean_iou(confusion), "pixel_accuracy": pixel_accuracy(confusion)}
    values = [None if np.isnan(v) else float(v) for v in iou(confusion)]
    figures = {"entropy": 0.25, "diversity": 0.5, "snd": 4.0}
    return {"step": step, **scores, **figures, "iou": values, "confusion": confusion.tolist()}


def draw_run(
    folder: Path,
    *,
    done: int = 4,
    seed: int = 0,
    labelled: bool = True,
    stages: dict = STAGES,
    classes: Sequence[str] = CLASSES,
    **config,
) -> Path:
    """A work folder in which the first `done` stages are done and the next one is half done."""
    folder.mkdir(parents=True)
    domain = {"name": "folder", "path": EVIL, "split": "train"}
    settings = {"name": "minent", "benchmark": "tiny", "seed": seed, "label_space": "", "pipeline": list(stages)}
    settings |= {"source": domain, "target": domain, "evaluation": {"split": "val"}, **stages, **config}
    saved = {"config": settings, "versions": {"jax": "1.2.3"}, "git": "abc"}
    (folder / "config.json").write_text(json.dumps(saved))
    rows, reported = [], {}
    for index, (name, own) in enumerate(stages.items()):
        if index > done:
            break
        (folder / name).mkdir()
        status = "done" if index < done else "started"
        record = {"status": status, "fingerprint": name, "identity": own}
        (folder / name / "stage.json").write_text(json.dumps(record))
        reported[name] = {}
        if "sweep" in own:
            continue
        steps = (10, 20) if status == "done" else (10,)
        rows += [{"stage": name, "step": s, "time": 0.0, "loss": 1 / s, "ce": 1.0, "images_per_s": 1} for s in steps]
        found = [evaluation(s, seed + index, len(classes)) for s in steps]
        if not labelled:
            found = [{k: row[k] for k in ("step", "entropy", "diversity", "snd")} for row in found]
        (folder / name / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
        if status == "done":
            reported[name] = {"step": 20, "last": found[-1]}
            if labelled:
                best = max(found, key=lambda row: row["miou"])
                mean = float(np.mean([row["miou"] for row in found]))
                reported[name]["mean_of_last"] = {"count": 2, "miou": mean}
                reported[name]["best_on_val_using_target_labels"] = {"step": best["step"], "miou": best["miou"]}
            (folder / name / "results.json").write_text(json.dumps(reported[name]))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"stage": "ada')
    if done == len(stages):
        validation = "folder val" if labelled else None
        results = {"config": "minent", "benchmark": "tiny", "seed": seed, "validation": validation}
        (folder / "results.json").write_text(json.dumps({**results, "classes": classes, "stages": reported}))
    return folder


def hostile_gallery(classes: Sequence[str] = CLASSES) -> Gallery:
    colours = {name: (240 * index // len(classes), 10, 20) for index, name in enumerate(classes)}
    space = make_label_space("mine", colours)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (20, 30, 3)).astype(np.uint8)
    ids = rng.integers(0, 3, (20, 30)).astype(np.uint8)
    picture = Picture(EVIL, image, ids, {"source_only": ids, "adapt": ids}, {"adapt": 80 * ids})
    return Gallery("folder val", "0", space, [picture, picture])
