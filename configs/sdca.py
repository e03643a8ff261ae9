"""SDCA: contrast with the class distributions of the source (Li et al., arXiv 2105.05013).

    python -m jaxuda.main --config configs/sdca.py            # streets, two CPU cores
    python -m jaxuda.main --config configs/sdca.py:camvid     # day -> dusk, after jaxuda.prepare camvid

Stages: source only (with Lovasz) -> SDCA from there -> oracle. Without a stage that collects class statistics
beforehand they start from zero and fill up with the first batches.

As published: temperature 100, confidence 0.9, both contrast terms with weight 1, Lovasz 0.75, learning rate 2.5e-4
(heads 10x) over 40,000 steps of 4 + 4 images. At temperature 100 the contrast hardly speaks: after 25 steps on
streets its gradient on the backbone is 0.0005 (features) and 0.001 (logits) of the cross-entropy's, which only ten
thousands of steps can make something of. At temperature 1 it is 0.05 and 0.1, which some hundred steps can feel;
hence 1 in the quick benchmarks. The Lovasz term sorts pixels x classes and is computed on a quarter of the image's
width and height here.
"""

from ml_collections import ConfigDict

from configs import common

LOVASZ = {"lambda_lovasz": 0.75, "lovasz_shrink": 4}


def get_config(benchmark: str = "streets") -> ConfigDict:
    """The config for one benchmark: streets, camvid or folder."""
    config = common.base("sdca", benchmark)
    config.pipeline = ("source_only", "adapt", "oracle")
    config.source_only = common.source_only(**LOVASZ)
    config.adapt = adapt(lr=0.005, tau=1.0)
    config.oracle = common.oracle(**LOVASZ)
    return config


def adapt(**fields) -> ConfigDict:
    """The adaptation stage; what is not given is as published."""
    published = {"tau": 100.0, "confidence": 0.9, "lambda_features": 1.0, "lambda_logits": 1.0}
    return common.train_stage("sdca", init="source_only", **{**LOVASZ, **published, **fields})
