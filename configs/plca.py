"""PLCA: pixel-level cycle association (Kang et al., NeurIPS 2020).

    python -m jaxuda.main --config configs/plca.py            # streets, two CPU cores
    python -m jaxuda.main --config configs/plca.py:camvid     # day -> dusk, after jaxuda.prepare camvid
    python -m jaxuda.main --config configs/plca.py:gta5       # as published; also synthia, acdc, darkzurich, ...

Stages: source only (with Lovasz) -> PLCA from there -> oracle. With ",paired" after the benchmark
(`configs/plca.py:streets,paired`), each target image gets, out of 16 random source images, the one that best covers the
classes which the source-only network predicts in it. The small networks are evaluated without test-time aggregation:
they have only 16x32 positions, and it blurs their predictions (mIoU 18.5 instead of 24.6 on streets with seed 0).

As published (gta5, synthia): ResNet-101 from ImageNet without head bias, learning rate 2.5e-4 everywhere, batch 8 + 8
accumulated in two parts, normalisation trained; images of both domains with a short side of 760..988, crop 730x730;
28 of 30 epochs of 372 steps on GTA5, 8 of 10 on SYNTHIA; evaluated at 1460x730 with test-time aggregation: mIoU 47.8
and 46.9 (16 classes). Their Lovasz weight of 0.75 was multiplied by 2 GPUs x 2 accumulated parts; here a weight is used
as it is given, so the recipes have 3.0. Their Lovasz was computed over the 2 images of one GPU, ours over the 4 of a
part. Blocks of the network are computed twice (`model.remat`), so that a part of 4 + 4 fits an accelerator of 24 GiB.
gta5+synthia, acdc and darkzurich are trained as GTA5.
"""

from ml_collections import ConfigDict

from configs import common

ON = (*common.TO_CITYSCAPES, *common.ADVERSE)
EPOCH = 372
PUBLISHED = {"lr": 2.5e-4, "batch": 8, "init": "imagenet", "align_corners": False, "lambda_lovasz": 3.0}


VARIANTS = ("paired",)


def get_config(benchmark: str = "streets") -> ConfigDict:
    """The config for one benchmark: a quick one or one of `ON`; "streets,paired" pairs by class."""
    config = common.base("plca", benchmark, published=ON, variants=("lite", *VARIANTS))
    benchmark, _, variant = benchmark.partition(",")
    config.pipeline = ("source_only", "adapt", "oracle")
    if benchmark in ON:
        _published(config, *((10, 8) if benchmark.startswith("synthia") else (30, 28)))
    else:
        config.source_only = common.source_only(**common.LOVASZ)
        config.adapt = common.train_stage(
            "plca",
            init="source_only",
            steps=200,
            lr=0.005,
            align_corners=False,
            **common.LOVASZ,
            **association(test_aggregation=0.0),
        )
        config.oracle = common.oracle(**common.LOVASZ)
    if variant == "paired":
        pair(config)
    return common.lite(config)


def _published(config: ConfigDict, schedule_epochs: int, epochs: int) -> None:
    config.preprocess = "caffe"
    config.model.update({"backbone": "resnet101", "variant": "caffe", "width": 64, "head_bias": False, "remat": True})
    crops(config)
    schedule = {"steps": EPOCH * epochs, "schedule_steps": EPOCH * schedule_epochs}
    config.source_only = common.source_only(**PUBLISHED, **schedule)
    config.adapt = common.train_stage("plca", **PUBLISHED, **schedule, **association(accumulate=2))
    config.oracle = common.oracle(**PUBLISHED, **schedule)


def crops(config: ConfigDict) -> None:
    """Images of both domains, and evaluation, as in PLCA and in the report of LFASS."""
    for domain in (config.source, config.target):
        domain.update({"resize": None, "short_side": (760, 988), "flip": 0.5, "crop": (730, 730)})
        domain.interpolation = "bilinear"
    width, height = config.evaluation.size
    config.evaluation.size = (round(730 * width / height), 730)  # 1460x730 for Cityscapes


def association(**fields) -> dict:
    """The fields of PLCA."""
    return {
        "lambda_features": 0.1,
        "lambda_probs": 0.1,
        "lambda_smooth": 0.01,
        "aggregation": 0.5,
        "test_aggregation": 0.5,
        "separate_norm": False,
        "accumulate": 1,
        "pairing": "",
        "pairing_pool": 16,
        **fields,
    }


def pair(config: ConfigDict) -> None:
    """Adds the stage that finds the classes for choosing pairs."""
    config.name += "_paired"
    config.pipeline = ("source_only", "target_classes", "adapt", "oracle")
    config.target_classes = common.sweep_stage("target_classes", init="source_only")
    config.adapt.update({"order": "paired", "pairing": "target_classes"})
