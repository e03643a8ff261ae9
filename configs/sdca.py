"""SDCA: contrast with the class distributions of the source (Li et al., arXiv 2105.05013).

    python -m jaxuda.main --config configs/sdca.py            # streets, two CPU cores
    python -m jaxuda.main --config configs/sdca.py:camvid     # day -> dusk, after jaxuda.prepare camvid
    python -m jaxuda.main --config configs/sdca.py:gta5       # as published; gta5,vgg16, synthia, synthia,vgg16

Stages: source only (with Lovasz) -> class statistics of that network over the source -> SDCA from there ->
pseudo-labels for the target, kept where they are confident -> self-training on them -> oracle. The published recipe
starts the self-training from ImageNet again; the quick ones, without ImageNet weights, from the adapted network.

As published: temperature 100, confidence 0.9, both contrast terms with weight 1, Lovasz 0.75, learning rate 2.5e-4
(heads 10x) over 40,000 steps of 4 + 4 images. At temperature 100 the contrast is very weak: after 25 steps on
streets its gradient on the backbone is 0.0005 (features) and 0.001 (logits) of the cross-entropy's, which has an
effect only over tens of thousands of steps. At temperature 1 it is 0.05 and 0.1, which has an effect in a few hundred;
hence 1 in the quick benchmarks. With ",lite" the contrast has a tenth of its weight, which was chosen on streets, seed
0, with target labels: 30.1 after SDCA, 28.9 with the whole weight, both
at a quarter of today's learning rate of 1e-3. The Lovasz term sorts pixels x classes; in the quick benchmarks it is
computed at a quarter of the image's width and height.

Expected mIoU (best snapshot on the target's labels): GTA5 52.9, SYNTHIA 50.2 (mIoU* 56.8); with VGG-16 47.3 and 43.5
(50.3). No score was published for the other large benchmarks, from crosscity-CITY to darkzurich.
"""

from ml_collections import ConfigDict

from configs import common

VARIANTS = ("vgg16",)
PHOTOMETRIC = {"jitter": (0.5, 0.5, 0.5, 0.2), "grey": 0.2, "blur": (0.1, 2.0)}


def get_config(benchmark: str = "streets") -> ConfigDict:
    """The config for one benchmark: one of common.BENCHMARKS; "gta5,vgg16" for VGG-16."""
    place, _, variant = benchmark.partition(",")
    published = place in common.PUBLISHED
    variants = VARIANTS if published else ("lite",)
    config = common.base("sdca", benchmark, published=common.PUBLISHED, variants=variants)
    config.pipeline = ("source_only", "statistics", "adapt", "pseudo_labels", "self_train", "oracle")
    config.statistics = common.sweep_stage("class_statistics", init="source_only")
    config.pseudo_labels = common.sweep_stage("pseudo_label", init="adapt", threshold_cap=0.9)
    if published:
        _published(config, variant or "r101", place)
    else:
        _quick(config, weight=0.1 if variant == "lite" else 1.0)
    return common.lite(config)


def _quick(config: ConfigDict, weight: float) -> None:
    config.source_only = common.source_only(**common.LOVASZ)
    config.adapt = common.train_stage(
        "sdca", init="source_only", steps=200, lr=0.005, **common.LOVASZ, **_contrast(tau=1.0, weight=weight)
    )
    config.self_train = common.train_stage(
        "source_only", init="adapt", domains=("target",), labels="pseudo_labels", steps=200, lr=0.005
    )
    config.oracle = common.oracle(**common.LOVASZ)


def _published(config: ConfigDict, backbone: str, benchmark: str) -> None:
    networks = {"r101": ("resnet101", "imagenet"), "vgg16": ("vgg16", "vgg")}
    config.model.backbone, config.preprocess = networks[backbone]
    config.model.update({"width": 64, "norm": "frozen", "norm_eps": 0.0})
    config.optim.update({"head_factor": 10.0, "train_norm": False})
    long = {"lr": 5e-4, "steps": 20_000, "schedule_steps": 31_250, "batch": 8, "init": "imagenet"}
    config.source_only = common.source_only(**long, order="class_balanced", lambda_lovasz=0.75)
    config.adapt = common.train_stage(
        "sdca",
        init="source_only",
        lr=2.5e-4,
        steps=40_000,
        schedule_steps=62_500,
        order="class_balanced",
        lambda_lovasz=0.75,
        source=PHOTOMETRIC,
        **_contrast(tau=100.0),
    )
    zoom = {"resize": None, "scale": (0.5, 1.5), "base": (2048, 1024), "crop": (1024, 512), "flip": 0.5}
    if benchmark in common.ADVERSE:
        zoom |= {"base": (1920, 1080), "crop": (960, 540)}
    if (
        benchmark in common.MAPILLARY
    ):  # its images differ in size: scale the short side to the same range as for the others
        zoom = {"fit": None, "short_side": (512, 1536), "crop": (1024, 768), "flip": 0.5}
    config.self_train = common.train_stage(
        "source_only",
        domains=("target",),
        labels="pseudo_labels",
        target=zoom | (PHOTOMETRIC if backbone == "r101" else {}),
        model={"norm": "batch", "norm_eps": 1e-5},
        optim={"train_norm": True},
        **long,
    )
    config.oracle = common.oracle(**long, lambda_lovasz=0.75)


def _contrast(tau: float, weight: float = 1.0) -> dict:
    return {"reads": ("statistics",), "tau": tau, "confidence": 0.9, "lambda_features": weight, "lambda_logits": weight}
