"""FADA: class-level adversarial alignment of features (Wang et al., ECCV 2020).

    python -m jaxuda.main --config configs/fada.py            # streets, two CPU cores
    python -m jaxuda.main --config configs/fada.py:camvid     # day -> dusk, after jaxuda.prepare camvid

Stages: source only -> FADA from there -> oracle. The published experiments (gta5, synthia) use ResNet-101 with frozen
batch normalisation, learning rate 2.5e-4 (heads 10x), temperature 1.8, adversarial weight 0.001 and a discriminator
with Adam 1e-4. Their last stage, self-training on the adapted network's soft predictions, is left out; SDCA's
hard pseudo-labels can be used instead. Steps and batch sizes are those of SDCA, which was built on FADA's code. The
paper, with self-distillation: mIoU 50.1 on GTA5 -> Cityscapes, 45.2 on SYNTHIA (mIoU* 52.5); without it no score is
known for these recipes. All other large benchmarks, from crosscity-CITY to darkzurich, are trained in the same way.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(benchmark: str = "streets") -> ConfigDict:
    """The config for one benchmark: one of common.BENCHMARKS."""
    config = common.base("fada", benchmark, published=common.PUBLISHED)
    config.pipeline = ("source_only", "adapt", "oracle")
    start, adapt = {}, {"lr": 0.005, "lambda_adv": 0.005, "discriminator_width": 64}
    if benchmark in common.PUBLISHED:
        config.model.update({"backbone": "resnet101", "width": 64, "norm": "frozen"})
        config.optim.update({"head_factor": 10.0, "train_norm": False})
        start = {"lr": 5e-4, "steps": 20_000, "schedule_steps": 31_250, "batch": 8, "init": "imagenet"}
        adapt = {"lr": 2.5e-4, "steps": 40_000, "schedule_steps": 62_500}
        adapt |= {"lambda_adv": 0.001, "discriminator_width": 256}
    config.source_only = common.source_only(**start)
    config.adapt = common.train_stage("fada", init="source_only", temperature=1.8, discriminator_lr=1e-4, **adapt)
    config.oracle = common.oracle(**start)
    return common.lite(config)
