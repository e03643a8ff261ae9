"""DADA: depth of the source as privileged information (Vu et al., ICCV 2019).

    python -m jaxuda.main --config configs/dada.py            # streets, two CPU cores

Stages: source only -> DADA from there -> oracle, all with the same network, which has a depth branch and one level.
The source must have depth: `streets`, whose depth is exact, or SYNTHIA: to Cityscapes (`synthia`) and to
Mapillary Vistas in 7 super-classes (`mapillary`). CamVid, GTA5 and folders have no depth.

As published (synthia, mapillary): ResNet-101 from ImageNet weights, batch 1 + 1, learning rate 2.5e-4 (head and depth
branch 10x), all weights 0.001, 90,000 steps; mIoU 42.6 on SYNTHIA -> Cityscapes (mIoU* 49.8), the best snapshot on the
target's labels, one every 2,000 steps. As in AdvEnt, backbone weights are updated several times per step (see `repeat`
in jaxuda/optimizers/sgd.py).
"""

from ml_collections import ConfigDict

from configs import common
from configs.advent import adversarial

PUBLISHED = {**common.ADVENT_SCHEDULE, "steps": 90_000, "schedule_steps": 90_000}


def get_config(benchmark: str = "streets") -> ConfigDict:
    """The config for one benchmark: streets, synthia or mapillary."""
    if benchmark.partition(",")[0] not in ("streets", "synthia", "mapillary"):
        raise ValueError(
            f"DADA needs the depth of source images, which '{benchmark}' does not have: use configs/dada.py:streets, "
            f":synthia or :mapillary, or configs/advent.py:{benchmark}, which adapts without depth"
        )
    config = common.base("dada", benchmark, published=("synthia", "mapillary"), variants=())
    config.pipeline = ("source_only", "adapt", "oracle")
    if benchmark != "streets":
        common.advent_family(config)
        config.source_only = common.source_only(**PUBLISHED)
        config.adapt = common.train_stage("dada", **PUBLISHED, **adversarial(0.001), lambda_depth=0.001)
        config.oracle = common.oracle(**PUBLISHED)
    else:
        config.optim.head_factor = 10.0
        config.source_only = common.source_only(lr=0.01)
        config.adapt = common.train_stage("dada", init="source_only", lr=0.005, **adversarial(0.005), lambda_depth=0.01)
        config.oracle = common.oracle(lr=0.01)
    config.model.update({"aux": False, "depth": True})
    return config
