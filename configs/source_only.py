"""Source only and oracle: the lower and the upper bound of adaptation.

    python -m jaxuda.main --config configs/source_only.py            # streets, two CPU cores: about 4 minutes
    python -m jaxuda.main --config configs/source_only.py:camvid     # day -> dusk, after jaxuda.prepare camvid

Both train the same small network from scratch for the same number of steps, one on source labels, one on
target labels. Every other config has these two stages too, and reuses them if they have run before.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(benchmark: str = "streets") -> ConfigDict:
    """The config for one benchmark: streets, camvid or folder, also with ",lite"."""
    config = common.base("source_only", benchmark)
    config.pipeline = ("source_only", "oracle")
    config.source_only = common.source_only()
    config.oracle = common.oracle()
    return common.lite(config)
