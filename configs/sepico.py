"""SePiCo: self-training with an EMA teacher, and pixel contrast with the source's classes (Xie et al., TPAMI 2023).

    python -m jaxuda.main --config configs/sepico.py            # streets, two CPU cores
    python -m jaxuda.main --config configs/sepico.py:camvid     # day -> dusk, after jaxuda.prepare camvid
    python -m jaxuda.main --config configs/sepico.py:gta5       # as published; also darkzurich, synthia, ...

Stages: source only -> SePiCo -> oracle. The step is that of configs/daformer.py without the distance to ImageNet
features, with the contrast, with changed colours of all images, and with target images that arrive larger than the
source's and are cropped where their pseudo-labels are balanced. `--config.adapt.contrast` chooses what pixels are
contrasted with: "dist", the distribution of each class in the source, "proto", its mean, or "bank", the means of the
latest `bank` batches.

As published (gta5): ResNet-101 v1c under DeepLab-v2's head of four branches, AdamW with 6e-5 (heads 10x), 40,000 steps
of 2 + 2 images, crops of 640, the contrast from step 3000 on at temperature 100; the last step is scored, at 1280x640.
Expected mIoU: GTA5 61.0 (proto 58.8, bank 59.8), SYNTHIA 58.1 (56.8, 57.4; 16 classes), one run each. With MiT-B5
(gta5,mit and synthia,mit): GTA5 70.3 (68.5, 68.7), SYNTHIA 64.3 (62.9, 63.3), non-commercial weights. At temperature
100 the gradients of "dist" and "proto" differ by 2e-5 of their size, and the contrast's on the backbone is 0.003 of the
cross-entropy's: compare variants over several seeds, and try a smaller `--config.adapt.tau`. The sign of the
regulariser (`reg_weight`) is as in the published code; it drives predictions away from uniform ones, and has no lower
bound at small temperatures. No recipe was published for SYNTHIA, and none exists for crosscity-CITY and mapillary;
these have no margins, since their images do not show the car that takes them.

As published (darkzurich): 60,000 steps, no margins, images of 1280x720. The teacher labels each image by night with the
help of one by day of the same place, `day_ratio` and `static_classes`; rare classes weigh more in the losses and in the
probabilities of the labels (`config.class_weights`), and at last the predicted probabilities are multiplied by weights
too (`config.test.class_weights`), in `--mode eval`, which shows both scores, and in `--mode predict`. Published on the
test server, with these last weights: 45.4 (54.2 with MiT-B5). acdc, which was not published, has none of that.

The quick recipes start from the source-only stage, have the Lovasz term in every stage, no margins and no crops, count
pixels from a probability of 0.8 on as confident, and contrast 64 channels at temperature 1, where the contrast's
gradient is 0.3 of the cross-entropy's, from a tenth of the steps on and without the regulariser.
"""

import math
import statistics

from ml_collections import ConfigDict

from configs import common, daformer

SIDE = 640  # of crops
VARIANTS = ("mit",)  # MiT-B5 with DAFormer's head in place of ResNet-101
# The classes' shares of the pixels of Cityscapes, as in Wu et al., DANNet, CVPR 2021.
SHARES = (
    *(0.36869696, 0.06084986, 0.22824049, 0.00655399, 0.00877272, 0.01227341, 0.00207795, 0.0055127, 0.15928651),
    *(0.01157818, 0.04018982, 0.01218957, 0.00135122, 0.06994545, 0.00267456, 0.00235192, 0.00232904, 0.00098658),
    0.00413907,
)
STATIC = (0, 1, 2, 3, 4, 8, 9, 10)  # road, sidewalk, building, wall, fence, vegetation, terrain, sky


def get_config(benchmark: str = "streets") -> ConfigDict:
    """The config for one benchmark: one of common.BENCHMARKS, or with ",mit" behind it."""
    config = common.base("sepico", benchmark, published=common.PUBLISHED, variants=("lite", *VARIANTS))
    config.pipeline = ("source_only", "adapt", "oracle")
    place, _, variant = benchmark.partition(",")
    if place in common.PUBLISHED:
        _published(config, margins=place in common.TO_CITYSCAPES, mit=variant == "mit")
        if place == "darkzurich":
            _dark(config)
    else:
        _quick(config)
    return common.lite(config)


def _quick(config: ConfigDict) -> None:
    steps = 300
    config.source_only = common.source_only(**common.LOVASZ)
    config.adapt = common.train_stage(
        "sepico",
        init="source_only",
        steps=steps,
        **common.LOVASZ,
        **_fields(threshold=0.8, tau=1.0, contrast_start=steps // 10, reg_weight=0.0, channels=64),
    )
    config.oracle = common.oracle(**common.LOVASZ)


def _published(config: ConfigDict, margins: bool, mit: bool) -> None:
    if not mit:
        daformer.cnn(config)
        config.model.head_dilations = (6, 12, 18, 24)
    _sizes(config)
    config.source_only = common.source_only(**daformer.LONG)
    rows = {"ignore_top": 15, "ignore_bottom": 120} if margins else {}
    config.adapt = common.train_stage("sepico", **daformer.LONG, **_fields(**rows))
    config.oracle = common.oracle(**daformer.LONG, target={"crop": (SIDE, SIDE), "balanced": 0.75})


def _dark(config: ConfigDict) -> None:
    """Pseudo-labels with the help of images by day, and weighted classes."""
    config.target.reference = True
    config.class_weights, config.test.class_weights = class_weights(0.05), class_weights(0.16)
    config.adapt.update({"steps": 60_000, "day_ratio": 0.8, "static_classes": STATIC})


def class_weights(spread: float) -> tuple[float, ...]:
    """Larger for rarer classes: 1 + `spread` times the negative logarithm of the share, standardised over classes."""
    logs = [math.log(share) for share in SHARES]
    mean, deviation = statistics.mean(logs), statistics.stdev(logs)
    return tuple(1 + spread * (mean - each) / deviation for each in logs)


def _sizes(config: ConfigDict) -> None:
    """Square crops of the source; the target's images are cropped in the step."""
    daformer.crops(config, SIDE)
    if config.source.name == "cityscapes":
        config.source.within = (1280, SIDE)
    whole = (1280, 720) if config.target.name.startswith(common.ADVERSE) else (1280, SIDE)
    config.target.update({"within": None, "resize": whole, "crop": None})
    config.evaluation.size = whole
    if config.target.name == "mapillary":  # its images differ in size
        config.target.update({"within": (1280, 960), "resize": None, "crop": (1280, SIDE)})
        config.evaluation.size = (1280, 960)
    config.eval_every = 1000


def _fields(**fields: float) -> dict:
    """The fields of SePiCo's step, by default as published without margins."""
    return {
        "order": "rare_class",
        "alpha": 0.999,
        "threshold": 0.968,
        "ignore_top": 0,
        "ignore_bottom": 0,
        "strength": 0.2,  # of the changes of colours
        "crop_limit": 0.75,  # crops in which a class covers at least this share are not balanced
        "contrast": "dist",
        "channels": 512,  # of the projected features
        "tau": 100.0,
        "contrast_start": 3000,  # until this step the projection head is held, and nothing is contrasted
        "contrast_weight": 1.0,
        "reg_weight": 1.0,
        "bank": 200,  # rows per class
        **fields,
    }
