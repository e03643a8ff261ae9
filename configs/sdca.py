"""SDCA: contrast with the class distributions of the source (Li et al., arXiv 2105.05013).

    python -m jaxuda.main --config configs/sdca.py            # streets, two CPU cores
    python -m jaxuda.main --config configs/sdca.py:camvid     # day -> dusk, after jaxuda.prepare camvid

Stages: source only (with Lovasz) -> class statistics of that network over the source -> SDCA from there ->
pseudo-labels for the target, kept where they are confident -> self-training on them -> oracle. The published recipe
starts the self-training from ImageNet again; here, where there is none, it starts from the adapted network.

As published: temperature 100, confidence 0.9, both contrast terms with weight 1, Lovasz 0.75, learning rate 2.5e-4
(heads 10x) over 40,000 steps of 4 + 4 images. At temperature 100 the gradient of the contrast is of the order of
1 / 100 of that of the cross-entropy: it needs those ten thousands of steps to move a network. The quick benchmarks
have some hundred, so they take temperature 1. The Lovasz term sorts pixels x classes and is computed on a
quarter of the image's width and height here.
"""

from ml_collections import ConfigDict

from configs import common

LOVASZ = {"lambda_lovasz": 0.75, "lovasz_shrink": 4}


def get_config(benchmark: str = "streets") -> ConfigDict:
    """The config for one benchmark: streets, camvid or folder."""
    config = common.base("sdca", benchmark)
    config.pipeline = ("source_only", "statistics", "adapt", "pseudo_labels", "self_train", "oracle")
    config.source_only = common.source_only(**LOVASZ)
    config.statistics = common.sweep_stage("class_statistics", init="source_only")
    config.adapt = adapt(lr=0.005, tau=1.0)
    config.pseudo_labels = common.sweep_stage("pseudo_label", init="adapt", threshold_cap=0.9)
    config.self_train = common.train_stage(
        "source_only", init="adapt", domains=("target",), labels="pseudo_labels", lr=0.005
    )
    config.oracle = common.oracle(**LOVASZ)
    return config


def adapt(**fields) -> ConfigDict:
    """The adaptation stage; what is not given is as published."""
    published = {"tau": 100.0, "confidence": 0.9, "lambda_features": 1.0, "lambda_logits": 1.0}
    return common.train_stage("sdca", init="source_only", reads=("statistics",), **{**LOVASZ, **published, **fields})
