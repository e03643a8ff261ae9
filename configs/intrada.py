"""IntraDA: from easy to hard target images (Pan et al., CVPR 2020).

    python -m jaxuda.main --config configs/intrada.py            # streets, two CPU cores
    python -m jaxuda.main --config configs/intrada.py:camvid     # day -> dusk, after jaxuda.prepare camvid

Stages: source only -> AdvEnt from source to target ("inter") -> target images ranked by entropy -> pseudo-labels of
that network -> AdvEnt from the easy images with their pseudo-labels to the hard ones ("intra") -> oracle.

As published (gta5, synthia): both AdvEnt trainings start from ImageNet; mIoU 46.3 on GTA5 -> Cityscapes, 41.7 on
SYNTHIA (mIoU* 48.9). Their ranking used the checkpoint that was best on the target's labels, which here is
`--config.rank.init=inter:best`; and it multiplied the scores as `favour_rare` does, although the paper does not.
All other large benchmarks, from crosscity-CITY to darkzurich, are trained in the same way; no score was published.
"""

from ml_collections import ConfigDict

from configs import common
from configs.advent import adversarial


def get_config(benchmark: str = "streets") -> ConfigDict:
    """The config for one benchmark: one of common.BENCHMARKS."""
    config = common.base("intrada", benchmark, published=common.PUBLISHED)
    config.pipeline = ("source_only", "inter", "rank", "pseudo_labels", "intra", "oracle")
    published = benchmark in common.PUBLISHED
    baseline = common.ADVENT_SCHEDULE if published else {}
    inter = intra = {**common.ADVENT_SCHEDULE, **adversarial(0.001)}
    if published:
        common.advent_family(config)
    else:
        inter = {"init": "source_only", "lr": 0.005, **adversarial(0.005)}
        intra = {"init": "inter", "steps": 200, "lr": 0.005, **adversarial(0.005)}
    config.source_only = common.source_only(**baseline)
    config.inter = common.train_stage("advent", **inter)
    config.rank = common.sweep_stage("entropy_rank", init="inter", easy_share=0.67, favour_rare=False)
    config.pseudo_labels = common.sweep_stage("pseudo_label", init="inter", threshold_cap=0.0)
    config.intra = common.train_stage(
        "advent", domains=("target", "target"), labels="pseudo_labels", split="rank", **intra
    )
    config.oracle = common.oracle(**baseline)
    return common.lite(config)
