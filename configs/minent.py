"""MinEnt: entropy minimisation on the target (Vu et al., ADVENT, CVPR 2019).

    python -m jaxuda.main --config configs/minent.py            # streets, two CPU cores: minutes
    python -m jaxuda.main --config configs/minent.py:camvid     # day -> dusk, after jaxuda.prepare camvid

Stages: source only -> MinEnt from there -> oracle. The published experiments train MinEnt from ImageNet weights
with entropy weights 0.001 and 0.0002 over 120,000 steps; the small networks here start from the source-only
stage and use larger weights, since they train for a few hundred steps only. The published recipes are gta5 and
synthia: mIoU 42.3 on GTA5 -> Cityscapes, 38.1 on SYNTHIA (mIoU* 44.2), the best snapshot on the target's labels.
All other large benchmarks, from crosscity-CITY to darkzurich, are trained in the same way; no score was published.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(benchmark: str = "streets") -> ConfigDict:
    """The config for one benchmark: one of common.BENCHMARKS."""
    config = common.base("minent", benchmark, published=common.PUBLISHED)
    config.pipeline = ("source_only", "adapt", "oracle")
    if benchmark in common.PUBLISHED:
        common.advent_family(config)
        config.source_only = common.source_only(**common.ADVENT_SCHEDULE)
        config.adapt = common.train_stage(
            "minent", lambda_entropy=0.001, lambda_entropy_aux=0.0002, **common.ADVENT_SCHEDULE
        )
        config.oracle = common.oracle(**common.ADVENT_SCHEDULE)
        return config
    config.source_only = common.source_only()
    config.adapt = common.train_stage(
        "minent", init="source_only", lr=0.005, lambda_entropy=0.02, lambda_entropy_aux=0.004
    )
    config.oracle = common.oracle()
    return common.lite(config)
