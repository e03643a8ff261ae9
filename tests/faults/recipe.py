"""The recipe for the fault tests: training, pseudo-labels, training on these; three classes, six steps."""

from ml_collections import ConfigDict

from configs import common


def get_config(benchmark: str = "folder") -> ConfigDict:
    """A recipe with every kind of file that a work folder holds, at the smallest size."""
    config = common.base("faults", benchmark)
    for domain in (config.source, config.target):
        domain.resize = (48, 32)
    config.evaluation.size = (48, 32)
    config.model.update({"width": 8, "blocks": (1, 1, 1, 1)})
    config.update({"log_every": 1, "eval_every": 3, "checkpoint_every": 2, "devices": 1})
    shared = {"steps": 6, "batch": 2}
    config.source_only = common.source_only(**shared)
    config.pseudo_labels = common.sweep_stage("pseudo_label", init="source_only", threshold_cap=0.9)
    config.self_train = common.train_stage(
        "source_only", domains=("target",), labels="pseudo_labels", init="source_only", **shared
    )
    config.pipeline = ("source_only", "pseudo_labels", "self_train")
    return config
