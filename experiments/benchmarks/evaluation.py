"""Evaluation against PyTorch: images of 1024x512 through the network, scores at 2048x1024, argmax, confusion matrix.

    python experiments/benchmarks/evaluation.py
    python experiments/benchmarks/evaluation.py --network resnet18 --width 32

jaxuda's evaluator (which also computes figures that need no labels) and the loop of published evaluations take turns,
with the same weights on the same images in memory. A check tests that both predict the same.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import torch
from ml_collections import ConfigDict
from torch.nn import functional as F
from torch_networks import DeepLab
from train_step import CLASSES, interleaved, stage_config, torch_weights

from jaxuda import methods
from jaxuda.models import make_model
from jaxuda.models.layers import normalise
from jaxuda.sweeps.evaluate import make_evaluator
from jaxuda.training.allocation import keep_freed_memory

INPUT, OUTPUT = (1024, 512), (2048, 1024)


def make_records(count: int) -> list[dict]:
    """Images at the network's input size, labels at the size of the result."""
    rng = np.random.default_rng(0)
    width, height = INPUT
    images = rng.integers(0, 256, (count, height // 16, width // 16, 3), np.uint8).repeat(16, 1).repeat(16, 2)
    labels = rng.integers(0, CLASSES, (count, OUTPUT[1] // 32, OUTPUT[0] // 32), np.uint8).repeat(32, 1).repeat(32, 2)
    return [{"image": i, "label": k, "id": str(n)} for n, (i, k) in enumerate(zip(images, labels, strict=True))]


@torch.no_grad()
def torch_evaluate(model: DeepLab, records: list[dict], preprocess: str, device: str, layout) -> np.ndarray:
    """The confusion matrix, image by image."""
    total = np.zeros((CLASSES, CLASSES), np.int64)
    for record in records:
        image = torch.from_numpy(np.array(normalise(record["image"][None], preprocess))).permute(0, 3, 1, 2)
        logits = model(image.to(device).contiguous(memory_format=layout))[0]
        logits = F.interpolate(logits, record["label"].shape, mode="bilinear", align_corners=True)
        pairs = CLASSES * torch.from_numpy(record["label"]).to(device).long() + logits.argmax(1)[0]
        total += torch.bincount(pairs.flatten(), minlength=CLASSES**2).reshape(CLASSES, CLASSES).cpu().numpy()
    return total


def main() -> None:
    """Prints seconds per image and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=("resnet18", "resnet50", "resnet101"), default="resnet101")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--images", type=int, default=1, help="in each pass")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    options.method, options.levels, options.dtype = "source_only", 1, "float32"
    keep_freed_memory()

    config = ConfigDict(stage_config(options).to_dict())
    config.evaluation.update({"size": INPUT, "batch": 1})
    model, records = make_model(config.model, CLASSES), make_records(options.images)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    evaluate = make_evaluator(model, methods.load("source_only"), config, jax.local_devices()[:1])

    device = "cuda" if torch.cuda.is_available() else "cpu"
    layout = torch.channels_last if device == "cuda" else torch.contiguous_format
    theirs = DeepLab(CLASSES, options.network, options.width, config.model.variant == "caffe", False)
    weights = {name: torch.from_numpy(x) for name, x in torch_weights(variables, model).items()}
    theirs.load_state_dict(weights, strict=False)
    theirs.eval().to(device, memory_format=layout)

    ours = lambda: evaluate(variables, records)  # noqa: E731
    other = lambda: torch_evaluate(theirs, records, config.preprocess, device, layout)  # noqa: E731
    differing = np.abs(ours().confusion - other()).sum() / 2 / (options.images * OUTPUT[0] * OUTPUT[1])
    assert differing < 1e-4, f"{differing:.2%} of the predictions differ"
    seconds = np.median(interleaved([ours, other], options.repeats), axis=0) / options.images
    place = jax.devices()[0]
    print(f"{options.network} of width {options.width}, {INPUT} -> {OUTPUT}, {place.platform} ({place.device_kind})")
    for name, value in zip(("ours", "PyTorch"), seconds, strict=True):
        print(f"{name:10}{value:10.3f} s per image, ratio {value / seconds[1]:.2f}")


if __name__ == "__main__":
    main()
