"""DACS: self-training on images with pasted source classes (Tranheden et al., WACV 2021).

    python -m jaxuda.main --config configs/dacs.py            # streets, two CPU cores
    python -m jaxuda.main --config configs/dacs.py:camvid     # day -> dusk, after jaxuda.prepare camvid
    python -m jaxuda.main --config configs/dacs.py:gta5       # also synthia, acdc, darkzurich, ...

Stages: source only -> DACS -> oracle. This is DACS as the baseline of DAFormer's authors: their step (see
configs/daformer.py) with a teacher that follows faster, and without rare class sampling, margins and the distance to
ImageNet features; network, optimizer and crops are theirs. The original uses SGD over 250,000 steps from MS-COCO
weights and draws the pasted classes from each image's own; mIoU 52.1 on GTA5, 48.3 on SYNTHIA (13 classes: 54.8).
"""

from ml_collections import ConfigDict

from configs import daformer


def get_config(benchmark: str = "streets") -> ConfigDict:
    """The config for one benchmark: one of common.BENCHMARKS."""
    return daformer.recipe(
        "dacs", benchmark, lambda_features=0.0, alpha=0.99, order="shuffled", ignore_top=0, ignore_bottom=0
    )
