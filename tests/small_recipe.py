"""A recipe of one stage and one sweep, whose network compiles within seconds: `--config tests/small_recipe.py`.

The schedule does not depend on the number of steps, so that runs of any length share a compiled step.
"""

from ml_collections import ConfigDict

from configs import common, sdca


def get_config(benchmark: str = "folder") -> ConfigDict:
    """The first half of SDCA; batches of 8, which 1, 2, 4 and 8 devices share."""
    config = sdca.get_config(benchmark)
    config.pipeline = ("source_only", "statistics")
    config.model.update({"width": 8, "blocks": (1, 1, 1, 1), "dtype": "float64"})
    for domain in (config.source, config.target):
        domain.resize = (48, 32)
    config.evaluation.size = (48, 32)
    config.update({"log_every": 1, "eval_every": 3, "checkpoint_every": 2})
    config.source_only = common.source_only(batch=8, steps=3, schedule_steps=10)
    return config
