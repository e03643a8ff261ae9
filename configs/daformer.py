"""DAFormer's self-training: an EMA teacher labels the target, source classes are pasted in (Hoyer et al., CVPR 2022).

    python -m jaxuda.main --config configs/daformer.py            # streets, two CPU cores
    python -m jaxuda.main --config configs/daformer.py:camvid     # day -> dusk, after jaxuda.prepare camvid
    python -m jaxuda.main --config configs/daformer.py:gta5       # DeepLab-v2; also synthia, acdc, darkzurich, ...
    python -m jaxuda.main --config configs/daformer.py:gta5,mit   # MiT-B5; so for all of these and for the quick ones

Stages: source only -> DAFormer -> oracle. Source images are drawn for their rare classes, and with ",lite" and in the
published recipes the features of things stay near those of the ImageNet network (`lambda_features`). The quick recipes
start from the source-only stage, have the Lovasz term in every stage and no margins, and count pixels from a
probability of 0.8 on as confident, not 0.968, which was chosen on streets, seed 0, with target labels. Student and
teacher are both scored; `--config.evaluation.network=teacher` makes the teacher the one that is kept and exported.

As published: AdamW with 6e-5 (head 10x), 40,000 steps of 2 + 2 crops of 512, with ResNet-101 of mmsegmentation (v1c)
under two branches of DeepLab-v2's head, as its authors train CNNs. With MiT-B5 in place of ResNet-101 (gta5,mit and
synthia-19,mit, which differ in nothing else but weight decay, which normalisation layers lack) the published mIoU is
68.3 on GTA5, the mIoU* 60.9 on SYNTHIA (mean of three seeds, last checkpoint), the mIoU 55.4 on ACDC and 53.8 on Dark
Zurich (their test servers); MiT's weights may only be used non-commercially. No score was published for
crosscity-CITY and mapillary; these have no margins, since their images do not show the car that takes them. streets,mit
(MiT-B0 from random weights) shows that it runs: transformers need far more data.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import common

LONG = {"lr": 6e-5, "steps": 40_000, "batch": 2, "init": "imagenet", "align_corners": False}
# Of crops of 1024 pixels: pixels of the drawn class, side of masked blocks.
LARGE = {"rare_class_crop_ratio": 2.0, "mask_block": 64}
VARIANTS = ("mit",)  # MiT-B5 in place of ResNet-101
# The train ids of things, what can be counted, in each label space; own classes have none known, and all are used.
THINGS = {
    "cityscapes19": (6, 7, 11, 12, 13, 14, 15, 16, 17, 18),
    "synthia16": (6, 7, 10, 11, 12, 13, 14, 15),
    "synthia19": (6, 7, 11, 12, 13, 14, 15, 16, 17, 18),
    "crosscity13": (3, 4, 7, 8, 9, 10, 11, 12),
    "super7": (2, 5, 6),
    "camvid11": (6, 8, 9, 10),
    "": (),
}


def get_config(benchmark: str = "streets") -> ConfigDict:
    """The config for one benchmark: one of common.BENCHMARKS, or with ",mit" behind it."""
    return recipe("daformer", benchmark, lambda_features=0.005, variants=("lite", *VARIANTS))


def recipe(
    name: str,
    benchmark: str,
    lambda_features: float,
    variants: tuple[str, ...] = ("lite",),
    quick: dict | None = None,
    **fields: Any,
) -> ConfigDict:
    """The config of a method that is a setting of DAFormer's step.

    Args:
      name: of the config file.
      benchmark: one of common.BENCHMARKS, or a benchmark and one of the variants.
      lambda_features: weight of the distance to ImageNet features; 0 where a network starts from random weights.
      variants: as for `common.base`.
      quick: fields of the stage "adapt" in quick recipes only.
      **fields: fields of that stage that differ from DAFormer's.
    """
    config = common.base(name, benchmark, published=common.PUBLISHED, variants=variants)
    config.pipeline = ("source_only", "adapt", "oracle")
    fields = {**self_training(config.label_space), "order": "rare_class", **fields}
    place, _, variant = benchmark.partition(",")
    if place in common.PUBLISHED:
        if not variant:
            cnn(config)
        crops(config, 1024 if variant == "hrda" else 512)
        # HRDA's authors have margins of whole images, where the car is visible; DAFormer's have them in crops, in night
        # and weather too.
        if variant == "hrda":
            fields |= LARGE
            if place in common.TO_CITYSCAPES:
                config.target.margins = (30, 240, 30, 30)
        if variant == "hrda" or place not in (*common.TO_CITYSCAPES, *common.ADVERSE):
            fields |= {"ignore_top": 0, "ignore_bottom": 0}
        shared, start = LONG, {}
    else:
        lambda_features = lambda_features if variant == "lite" else 0.0
        shared, start = common.LOVASZ, {"init": "source_only"}
        fields |= {"threshold": 0.8, "steps": 400, "ignore_top": 0, "ignore_bottom": 0, **(quick or {})}
    config.source_only = common.source_only(**shared)
    reference = {"lambda_features": lambda_features, "weights": ("imagenet",) if lambda_features else ()}
    config.adapt = common.train_stage("daformer", **{**shared, **start, **fields, **reference})
    config.oracle = common.oracle(**shared)
    return common.lite(config)


def self_training(label_space: str) -> dict:
    """The fields of DAFormer's step, as published; `lambda_features` and `weights` are not among them."""
    return {
        "alpha": 0.999,
        "threshold": 0.968,
        "feature_classes": THINGS[label_space],
        "feature_ratio": 0.75,
        "ignore_top": 15,  # rows without trusted labels: the images of Cityscapes show the car at the bottom
        "ignore_bottom": 120,
        "strength": 0.2,  # of the changes of colours
        "lambda_mask": 0.0,
        "mask_block": 32,
        "mask_ratio": 0.7,
        "mask_images": "augmented",  # or "separate": the first image of each domain, as they are
    }


def cnn(config: ConfigDict) -> None:
    """The CNN of DAFormer's authors, and their optimizer."""
    config.model.update({"backbone": "resnet101", "variant": "v1c", "width": 64, "head_dilations": (6, 12)})
    common.adamw(config, head_factor=10.0, warmup_steps=1500)


def crops(config: ConfigDict, side: int) -> None:
    """Square crops of both domains, resized as OpenCV does, and the evaluation of DAFormer's authors.

    Crops of 512 pixels or fewer are of images at half of the resolution that crops of 1024 are of.
    """
    scale = 2 if side > 640 else 1
    for domain in (config.source, config.target):
        within = tuple(scale * length for length in domain.get("fit") or domain.resize)
        domain.update({"resize": None, "crop": (side, side), "flip": 0.5, "interpolation": "opencv"})
        if "fit" in domain:
            domain.fit = None
        domain.within = common.optional(within)  # the size without the change of aspect
    config.source.balanced = common.optional(0.75)
    size = tuple(scale * length for length in config.evaluation.size)
    config.evaluation.update({"size": size, "interpolation": "opencv", "through_input": True})
    config.eval_every = 4000
