"""AdvEnt: adversarial entropy minimisation (Vu et al., ADVENT, CVPR 2019).

    python -m jaxuda.main --config configs/advent.py            # streets, two CPU cores: minutes
    python -m jaxuda.main --config configs/advent.py:camvid     # day -> dusk, after jaxuda.prepare camvid

Stages: source only -> AdvEnt from there -> oracle. The small network has one level, so that its baselines are
those of the other recipes; a discriminator half as wide as the published one keeps the step short.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(benchmark: str = "streets") -> ConfigDict:
    """The config for one benchmark: streets, camvid or folder."""
    config = common.base("advent", benchmark)
    config.pipeline = ("source_only", "adapt", "oracle")
    config.source_only = common.source_only()
    config.adapt = common.advent(init="source_only", lr=0.005)
    config.oracle = common.oracle()
    return config
