"""`streets`: two domains of drawn street scenes with exact labels and inverse depth, the embedded default.

`game` is clean and saturated, like a game engine; `camera` looks like a dull dashboard camera, and its
streets are narrower, lower and busier. Nothing is downloaded: (domain, split, index, seed) decide every scene.
It is for learning, tests and demonstrations: its scores say nothing about real benchmarks.

`scenes/look.py` holds the constants that set the distance between the looks, `scenes/plan.py` those of the
contents; `experiments/streets_requirements.py` measures what is asked of both.
"""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jaxuda.data import encoding
from jaxuda.data.checking import Tally
from jaxuda.data.datasets import Dataset
from jaxuda.data.datasets.cityscapes import COLOURS
from jaxuda.data.datasets.scenes.look import finish
from jaxuda.data.datasets.scenes.plan import STATISTICS
from jaxuda.data.datasets.scenes.scene import paint_scene

SPLITS = {"train": 512, "val": 100}


def draw_scene(
    domain: str, split: str, index: int, *, size: tuple[int, int] = (256, 128), seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws one scene; the same arguments give the same scene.

    Args:
      domain: "game" or "camera".
      split: any text; scenes of different splits are different.
      index: number of the scene in its split.
      size: (width, height) in pixels.
      seed: another seed gives another set of scenes.

    Returns:
      image (H, W, 3) uint8 RGB; label (H, W) uint8 Cityscapes train ids; depth (H, W) uint16, centimetres
      minus one, so that the inverse depth is 65536 / (depth + 1); 65535 is the sky.

    Raises:
      ValueError: there is no such domain.
    """
    if domain not in STATISTICS:
        raise ValueError(f"no domain {domain!r} in streets; there are {', '.join(STATISTICS)}")
    # Python's generator: seeded by text, and several times faster than NumPy's for single numbers.
    rng = random.Random(f"streets {domain} {split} {index} {seed}")
    return finish(paint_scene(domain, rng, size), domain, rng)


class Streets(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Labels are stored as Cityscapes train ids; depth as SYNTHIA stores it."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012
        tfds.core.BuilderConfig(name="game", description="clean and saturated, like a game engine"),
        tfds.core.BuilderConfig(name="camera", description="dull, hazy and noisy, like a dashboard camera"),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        # In the order of drawing, so that index i is the same scene on every machine.
        return tfds.core.DatasetInfo(builder=self, features=encoding.features(depth=True), disable_shuffling=True)

    def _split_generators(self, dl_manager: Any) -> dict[str, "Scenes"]:
        del dl_manager  # nothing to download
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> "Scenes":
        return Scenes(self.builder_config.name, split, SPLITS[split])


class Scenes:
    """Iterates over (key, encoded record) of a split, as `checking.Examples` does; knows its length."""

    def __init__(self, domain: str, split: str, count: int):
        self._domain, self._split, self._count = domain, split, count
        self.tally, self.remarks = Tally(), []

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for index in range(self._count):
            image, label, depth = draw_scene(self._domain, self._split, index)
            record = {
                "image": encoding.encode_image(image),
                "label": encoding.encode_label(label),
                "depth": encoding.encode_depth(depth),
                "id": f"{self._domain}_{self._split}_{index:05d}",
            }
            self.tally.add(record, np.bincount(label.ravel(), minlength=256))
            yield index, record


DATASET = Dataset(builder=Streets, classes=dict(enumerate(COLOURS)), space="cityscapes19")
