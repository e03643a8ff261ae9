"""AdvEnt: adversarial alignment of entropy maps (Vu et al., ADVENT, CVPR 2019).

    python -m jaxuda.main --config configs/advent.py            # streets, two CPU cores
    python -m jaxuda.main --config configs/advent.py:camvid     # day -> dusk, after jaxuda.prepare camvid

Stages: source only -> AdvEnt from there -> oracle. As published (gta5, synthia): ResNet-101 with two levels from
ImageNet weights, batch 1 + 1, learning rate 2.5e-4 (heads 10x), adversarial weights 0.001 and 0.0002, discriminators
with Adam 1e-4, 120,000 steps of a 250,000-step schedule; mIoU 43.8 on GTA5 -> Cityscapes, 40.8 on SYNTHIA (mIoU* 47.6),
the best snapshot on the target's labels; together with MinEnt (--mode eval with both checkpoints) 45.5 and 41.2 (48.0).
Those runs updated backbone weights several times per step by accident (see `repeat` in
jaxuda/optimizers/sgd.py); the published recipes here do the same. All other large benchmarks, from crosscity-CITY to
darkzurich, are trained in the same way; no score was published.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(benchmark: str = "streets") -> ConfigDict:
    """The config for one benchmark: one of common.BENCHMARKS."""
    config = common.base("advent", benchmark, published=common.PUBLISHED)
    config.pipeline = ("source_only", "adapt", "oracle")
    if benchmark in common.PUBLISHED:
        common.advent_family(config)
        config.source_only = common.source_only(**common.ADVENT_SCHEDULE)
        config.adapt = common.train_stage("advent", **common.ADVENT_SCHEDULE, **adversarial(0.001))
        config.oracle = common.oracle(**common.ADVENT_SCHEDULE)
    else:
        config.source_only = common.source_only()
        config.adapt = common.train_stage("advent", init="source_only", lr=0.005, **adversarial(0.005))
        config.oracle = common.oracle()
    return common.lite(config)


def adversarial(weight: float) -> dict:
    """The fields of AdvEnt; the second level has a fifth of the weight."""
    return {
        "lambda_adv": weight,
        "lambda_adv_aux": weight / 5,
        "discriminator_lr": 1e-4,
        "discriminator_width": 64,
    }
