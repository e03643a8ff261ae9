"""Memory and time of the search for context relations on a source as large as GTA5, from a run on part of it.

    python experiments/benchmarks/context_relations.py                  # 400 label maps of 1280x720, 19 classes

The label maps are enlarged random windows of those of `streets`, any number of different ones. Peak
memory of the process is read at several counts of maps: it stops growing once the sample is full, so that the last
figure holds for any number of maps, and time is linear in them. The clustering uses the sample alone.
"""

import argparse
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configs import crcda
from jaxuda import data
from jaxuda.data.transforms import resize_nearest
from jaxuda.errors import UserError
from jaxuda.models.deeplab import DeepLabV2, feature_shape
from jaxuda.prepare import prepare
from jaxuda.sweeps.context_relations import collect, find_relations

SIZE, EVERYTHING = (1280, 720), 24_966  # GTA5 in the published recipes


class Windows(Sequence):
    """`count` label maps of `SIZE`, each a random window of one of `streets`."""

    def __init__(self, count: int):
        prepare("streets/game")
        records = data.load("streets/game", "train")
        self.label_space = records.label_space
        self._labels = [records[index]["label"] for index in range(min(len(records), 64))]
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < self._count:
            raise IndexError(index)
        rng = np.random.default_rng(index)
        label = self._labels[rng.integers(len(self._labels))]
        height, width = label.shape
        zoom = rng.uniform(0.6, 1.0)
        rows, columns = int(zoom * height), int(zoom * width)
        top, left = rng.integers(height - rows + 1), rng.integers(width - columns + 1)
        return {"label": resize_nearest(label[top : top + rows, left : left + columns], SIZE)}


def peak_megabytes() -> float:
    """Largest memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main() -> None:
    """Prints memory and time by number of maps, then for the clustering, then for a whole source."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--maps", type=int, default=400)
    options = parser.parse_args()
    config = ConfigDict({**crcda.get_config("gta5").context_relations, "seed": 0})
    grid = feature_shape(DeepLabV2(19, "resnet101", "caffe"), SIZE[::-1])[:2]
    print(f"before: {peak_megabytes():.0f} MB")
    for part in (8, 4, 2, 1):
        source, began = Windows(options.maps // part), time.process_time()
        regions, weights = collect(source, SIZE, grid, config)[config.region_sizes[0]]
        each = (time.process_time() - began) / len(source)
        print(
            f"{len(source):6} maps, {weights.sum():8.0f} regions: {peak_megabytes():.0f} MB, {1e3 * each:.0f} ms a map"
        )
    began = time.process_time()
    try:
        found = f"{len(find_relations(regions, weights, 19, config).members)} relations"
    except UserError as error:
        found = str(error)
    seconds = time.process_time() - began
    print(f"clustering {len(regions)} regions: {peak_megabytes():.0f} MB, {seconds:.1f} s; {found}")
    print(
        f"{EVERYTHING} maps: {peak_megabytes():.0f} MB, {(EVERYTHING * each + seconds) / 60:.0f} min of processor time "
        "and the decoding of the files"
    )


if __name__ == "__main__":
    main()
