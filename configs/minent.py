"""MinEnt: entropy minimisation on the target (Vu et al., ADVENT, CVPR 2019).

    python -m jaxuda.main --config configs/minent.py            # streets, two CPU cores: minutes
    python -m jaxuda.main --config configs/minent.py:camvid     # day -> dusk, after jaxuda.prepare camvid

Stages: source only -> MinEnt from there -> oracle. The published experiments train MinEnt from ImageNet weights
with entropy weights 0.001 and 0.0002 over 120,000 steps; the small networks here start from the source-only
stage and take larger weights, since they have some hundred steps to move.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(benchmark: str = "streets") -> ConfigDict:
    """The config for one benchmark: streets, camvid or folder."""
    config = common.base("minent", benchmark)
    config.pipeline = ("source_only", "adapt", "oracle")
    config.source_only = common.source_only()
    config.adapt = common.train_stage(
        "minent", init="source_only", lr=0.005, lambda_entropy=0.02, lambda_entropy_aux=0.004
    )
    config.oracle = common.oracle()
    return config
