"""Entropy minimisation from day and night of the toy dataset, joined, to night; scored on night and on day."""

from ml_collections import ConfigDict

from configs import common


def get_config(benchmark: str = "toydata") -> ConfigDict:
    """Three steps of a tiny network; the classes are those of the source's dataset."""
    config = common.base("toydata", "folder")
    config.benchmark = benchmark
    config.source = common.domain(
        "plugins.toydata/day+plugins.toydata/night", crop=(48, 32), parts={"toydata/day": {"resize": (56, 40)}}
    )
    config.target = common.domain("plugins.toydata/night", resize=(48, 32))
    config.evaluation.update({"size": (48, 32), "also": ("plugins.toydata/day:val",)})
    config.model.update({"width": 8, "blocks": (1, 1, 1, 1)})
    config.update({"log_every": 1, "eval_every": 3, "checkpoint_every": 3})
    config.pipeline = ("source_only", "adapt")
    config.source_only = common.source_only(steps=3, batch=2, order="rare_class")
    config.adapt = common.train_stage(
        "minent", init="source_only", steps=3, batch=2, lambda_entropy=0.01, lambda_entropy_aux=0.0
    )
    return config
