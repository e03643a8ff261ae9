"""What all configs share: the benchmarks, and the building blocks of stages.

A config is a `ConfigDict` with shared sections (data, model, optimizer, evaluation), one sub-config per stage,
and `pipeline`, the tuple of stage names to run in order. Any field can be set on the command line:
`--config.adapt.lr=0.01`, `--config.model.width=64`.
"""

from ml_collections import ConfigDict


def domain(name: str, **transforms) -> ConfigDict:
    """One training domain: a dataset ("streets/game"), and how its images are transformed (None = not at all).

    Sizes are (width, height). The order is: resize | short_side | scale, crop, flip, jitter, grey, blur.
    """
    config = ConfigDict({"name": name, "path": "", "split": "train", "interpolation": "bicubic"})
    for field in ("resize", "short_side", "scale", "crop", "flip", "jitter", "grey", "blur"):
        config[field] = transforms.pop(field, None)
    assert not transforms, f"unknown transforms: {', '.join(transforms)}"
    return config


def quick_model(**fields) -> ConfigDict:
    """A ResNet-18 of half width that trains from scratch within minutes; there is no ImageNet start here."""
    return ConfigDict(
        {
            "backbone": "resnet18",
            "variant": "torchvision",
            "width": 32,
            "blocks": None,
            "aux": False,
            "head_bias": True,
            "dilated": True,
            "norm": "batch",
            "norm_eps": 1e-5,
            "dtype": "float32",
            **fields,
        }
    )


def base(name: str, benchmark: str) -> ConfigDict:
    """Everything but the stages.

    Args:
      name: of the config file.
      benchmark: "streets" (drawn, nothing to download), "camvid" (day -> dusk) or "folder" (the user's own
        images: `--config.source.path=... --config.target.path=...`).
    """
    benchmarks = {"streets": _streets, "camvid": _camvid, "folder": _folder}
    if benchmark not in benchmarks:
        raise ValueError(f"configs/{name}.py has no benchmark '{benchmark}' (known: {', '.join(benchmarks)})")
    config = ConfigDict(
        {
            "name": name,
            "benchmark": benchmark,
            "seed": 0,
            "devices": 0,  # 0: as many local devices as divide the batch
            "platform": "",  # "gpu": refuse to fall back to the CPU
            "data_dir": "",  # "": $TFDS_DATA_DIR, else ~/tensorflow_datasets
            "num_workers": 0,  # processes that decode and transform; 0: threads of this one
            "log_every": 10,
            "eval_every": 100,
            "checkpoint_every": 100,
            "mean_of_last": 3,  # evaluations that the table's 'mean of last' averages
            "preprocess": "imagenet",
            "model": quick_model(),
            "optim": {
                "head_factor": 1.0,
                "momentum": 0.9,
                "weight_decay": 5e-4,
                "power": 0.9,
                "train_norm": True,
                "repeat": {"stem": 1, "block": 1, "shortcut": 1},
                "repeat_decay": "fresh",
            },
        }
    )
    config.evaluation = ConfigDict({"split": "val", "size": None, "batch": 4})
    benchmarks[benchmark](config)
    return config


def _streets(config: ConfigDict) -> None:
    config.label_space = "cityscapes19"
    config.source = domain("streets/game", resize=(256, 128), flip=0.5)
    config.target = domain("streets/camera", resize=(256, 128), flip=0.5)
    config.evaluation.size = (256, 128)


def _camvid(config: ConfigDict) -> None:
    config.label_space = "camvid11"
    config.source = domain("camvid/day", resize=(240, 180), flip=0.5)
    config.target = domain("camvid/dusk", resize=(240, 180), flip=0.5)
    config.evaluation.size = (240, 180)


def _folder(config: ConfigDict) -> None:
    config.label_space = ""  # the classes of the source's classes.json
    config.source = domain("folder", resize=(256, 128), flip=0.5)
    config.target = domain("folder", resize=(256, 128), flip=0.5)
    config.evaluation.size = (256, 128)


def train_stage(method: str, **fields) -> ConfigDict:
    """A training stage.

    Args:
      method: a file in `jaxuda/methods`.
      **fields: what differs from the defaults below, and the method's own weights.
    """
    return ConfigDict(
        {
            "train": method,
            "init": "scratch",  # or the name of an earlier stage, or "STAGE:best" (chosen with target labels)
            "domains": ("source", "target"),
            "steps": 300,
            "schedule_steps": 0,  # of the poly schedule; 0: `steps`
            "batch": 4,  # images of each domain per step, all devices together
            "lr": 0.02,
            "align_corners": True,
            "lambda_aux": 0.1,
            "lambda_lovasz": 0.0,
            "lovasz_shrink": 1,
            **fields,
        }
    )


def source_only(**fields) -> ConfigDict:
    """Supervised training on the source: the lower bound of every table."""
    return train_stage("source_only", domains=("source",), **fields)


def oracle(**fields) -> ConfigDict:
    """Supervised training on the target's own labels: the upper bound, same start and steps as `source_only`."""
    return train_stage("source_only", domains=("target",), **fields)


def advent(**fields) -> ConfigDict:
    """A stage of AdvEnt; the adversarial weight suits some hundred steps of the small network."""
    defaults = {
        "lambda_adversarial": 0.005,
        "lambda_adversarial_aux": 0.001,
        "discriminator_lr": 1e-4,
        "discriminator_width": 32,
    }
    return train_stage("advent", **(defaults | fields))
