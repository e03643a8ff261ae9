"""A recipe whose network and method are a user's own: `--config tests/plugins/network_recipe.py`."""

from ml_collections import ConfigDict

from configs import common

NETWORK = {"name": "plugins.encoder_decoder", "width": 4, "dropout": 0.2, "depth": False, "dtype": "float32"}


def get_config(benchmark: str = "folder") -> ConfigDict:
    """Source only, then a noisy student whose EMA teacher is evaluated."""
    config = common.base("network_recipe", benchmark)
    config.pipeline = ("source_only", "adapt")
    config.model = ConfigDict(NETWORK)
    for domain in (config.source, config.target):
        domain.resize = (48, 32)
    config.evaluation.size = (48, 32)
    config.update({"log_every": 1, "eval_every": 4, "checkpoint_every": 1})
    config.source_only = common.source_only(steps=2, batch=2)
    config.adapt = common.train_stage(
        "plugins.noisy_teacher", init="source_only", steps=4, batch=2, noise=0.1, alpha=0.5, target_starts=1
    )
    config.adapt.evaluation = ConfigDict({"network": "teacher"})
    return config
