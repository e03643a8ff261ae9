"""CrCDA: contextual relations of the source kept in the target (Huang et al., ECCV 2020).

    python -m jaxuda.main --config configs/crcda.py            # streets, two CPU cores
    python -m jaxuda.main --config configs/crcda.py:camvid     # day -> dusk, after jaxuda.prepare camvid

Stages: source only -> the relations found in the source's label maps -> CrCDA from the source-only network -> oracle.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(benchmark: str = "streets") -> ConfigDict:
    """The config for one benchmark: streets, camvid, folder, gta5 or synthia."""
    config = common.base("crcda", benchmark, published=True)
    config.pipeline = ("source_only", "context_relations", "adapt", "oracle")
    config.context_relations = common.sweep_stage(
        "context_relations",
        init="scratch",
        domains=("source",),
        region_sizes=(4,),
        sample=20_000,
        eps=0.18,
        min_samples=10,
        max_relations=100,
    )
    if benchmark in ("gta5", "synthia"):
        common.advent_family(config)
        config.context_relations.update({"eps": 0.15, "min_samples": 20})
        config.source_only = common.source_only(**common.ADVENT_SCHEDULE)
        config.adapt = common.train_stage("crcda", **common.ADVENT_SCHEDULE, **max_min(0.001, 0.001))
        config.oracle = common.oracle(**common.ADVENT_SCHEDULE)
    else:
        config.source_only = common.source_only()
        config.adapt = common.train_stage("crcda", init="source_only", lr=0.005, **max_min(0.02, 0.02))
        config.oracle = common.oracle()
    return config


def max_min(pixels: float, regions: float) -> dict:
    """The fields of CrCDA; the second level has a fifth of the pixels' weight, as in AdvEnt."""
    return {
        "reads": ("context_relations",),
        "region_sizes": (4,),
        "adaptive": True,
        "lambda_pixels": pixels,
        "lambda_pixels_aux": pixels / 5,
        "lambda_regions": regions,
        "lambda_region_ce": 0.1,
    }
