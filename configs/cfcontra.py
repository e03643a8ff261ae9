"""CFContra: pixels against the class prototypes of both domains (coarse-to-fine contrastive adaptation).

python -m jaxuda.main --config configs/cfcontra.py            # streets, two CPU cores
"""

from ml_collections import ConfigDict

from configs import common, minent


def get_config(benchmark: str = "streets") -> ConfigDict:
    """The config for one benchmark: streets, camvid, folder, gta5 or synthia."""
    config = minent.get_config(benchmark)
    config.name = "cfcontra"
    config.minent = config.adapt
    config.pipeline = ("source_only", "minent", "prototypes", "adapt", "oracle")
    published = benchmark in ("gta5", "synthia")
    labels = {"projection": "mlp", "margin": 0.05, "normalise_for_labels": not published}
    config.prototypes = common.sweep_stage("prototypes", init="minent", source_images=300, target_images=1600, **labels)
    contrast = {
        "reads": ("prototypes",),
        **labels,
        "margin_decay": False,
        "train_head": True,
        "temperature": 0.07,
        "momentum": 0.9,
        "lambda_source": 0.001,
        "lambda_target": 0.001,
        "lambda_target_to_source": 0.001,
        "lambda_source_to_target": 0.001,
        "target_label_figures": not published,
    }
    entropy = {name: config.minent[name] for name in ("lambda_entropy", "lambda_entropy_aux")}
    if published:
        config.adapt = common.train_stage("cfcontra", **common.ADVENT_SCHEDULE, **entropy, **contrast)
    else:
        config.adapt = common.train_stage("cfcontra", init="minent", steps=250, lr=0.005, **entropy, **contrast)
    return config
