"""What all configs share: the benchmarks, and the building blocks of stages.

A config is a `ConfigDict` with shared sections (data, model, optimizer, evaluation), one sub-config per stage,
and `pipeline`, the tuple of stage names to run in order. Any field can be set on the command line:
`--config.adapt.lr=0.01`, `--config.model.width=64`.
"""

from functools import partial
from typing import Any

from ml_collections import ConfigDict, FieldReference

CITIES = ("rio", "rome", "taipei", "tokyo")
CONDITIONS = ("fog", "night", "rain", "snow")
# The benchmarks of papers: to Cityscapes (from two sources in the 16 classes of both, or in 19), from Cityscapes to
# each city of Cross-City, to Mapillary in 7 or 19 classes, and from Cityscapes to weather and night.
TO_CITYSCAPES = ("gta5", "synthia", "synthia-19", "gta5+synthia", "gta5+synthia-19")
ADVERSE = ("acdc", "darkzurich")
MAPILLARY = ("mapillary", "mapillary-19")
PUBLISHED = (*TO_CITYSCAPES, *(f"crosscity-{city}" for city in CITIES), *MAPILLARY, *ADVERSE)
# Those that train within minutes; "streets,lite" starts from ImageNet weights of a small network, see `lite`.
QUICK = ("streets", "camvid", "folder")
BENCHMARKS = (*QUICK, *(f"{name},lite" for name in QUICK), *PUBLISHED)
# The Lovasz term of quick recipes, computed at a quarter of the image's width and height.
LOVASZ = {"lambda_lovasz": 0.75, "lovasz_shrink": 4}


def unset() -> FieldReference:
    """None, for a field that takes any value on the command line; a plain None could not be set there."""
    return optional(None)


def optional(value: Any) -> FieldReference:
    """A value that --config.FIELD=None unsets."""
    return FieldReference(value, field_type=object)


def domain(name: str, **transforms) -> ConfigDict:
    """One training domain: a dataset ("streets/game"), and how its images are transformed (None = not at all).

    Several are joined with "+" ("gta5+synthia"); `parts` has what differs, {"synthia": {"resize": (1280, 760)}}.
    `reference`: the target's images come with others of the same places, such as those by day of "darkzurich".
    Sizes are (width, height). The order is: resize | within | fit | short_side | scale, margins, crop (balanced), flip,
    jitter, grey, blur.
    """
    interpolation = transforms.pop("interpolation", "bicubic")
    config = ConfigDict({"name": name, "path": "", "split": "train", "interpolation": interpolation})
    for field in ("resize", "short_side", "scale", "base", "crop", "flip", "jitter", "grey", "blur"):
        config[field] = optional(transforms.pop(field, None))
    # Set only when used: every field enters the stage's fingerprint.
    for field in ("within", "fit", "margins", "balanced"):
        if field in transforms:
            config[field] = optional(transforms.pop(field))
    for field in ("parts", "reference"):
        if field in transforms:
            config[field] = transforms.pop(field)
    assert not transforms, f"unknown transforms: {', '.join(transforms)}"
    return config


def quick_model(**fields) -> ConfigDict:
    """A ResNet-18 of half width that trains from scratch within minutes, without ImageNet weights."""
    return ConfigDict(
        {
            "name": "deeplab",  # a file in `jaxuda/models`, or the dotted path of a module of your own
            "backbone": "resnet18",
            "variant": "torchvision",
            "width": 32,
            "blocks": unset(),
            "aux": False,
            "head_bias": True,
            "dilated": True,
            "norm": "batch",
            "norm_eps": 1e-5,
            "dtype": "float32",
            **fields,
        }
    )


def lite_model() -> ConfigDict:
    """EfficientNet-Lite0 with its light head."""
    return ConfigDict(
        {
            "name": "efficientnet_lite",
            "head": "light",
            "stride": 32,
            "width": 32,
            "blocks": unset(),
            "decoder_width": 64,
            "norm": "batch",
            "dtype": "float32",
        }
    )


def mit_model(variant: str = "b0", **fields) -> ConfigDict:
    """A Mix Transformer with DAFormer's head; see `jaxuda.models.mix_transformer`."""
    return ConfigDict(
        {
            "name": "mix_transformer",
            "variant": variant,
            "head": "daformer",
            "width": unset(),
            "blocks": unset(),
            "head_width": unset(),
            "drop_path": 0.1,
            "dropout": 0.1,
            "dtype": "float32",
            **fields,
        }
    )


def dinov2_model(variant: str = "vitb14", **fields) -> ConfigDict:
    """A vision transformer of DINOv2 with VFM-UDA's decoder; see `jaxuda.models.dinov2`."""
    return ConfigDict(
        {
            "name": "dinov2",
            "variant": variant,
            "registers": False,
            "head": "vfmuda",
            "width": unset(),
            "blocks": unset(),
            "heads": unset(),
            "grid": 37,
            "window": unset(),
            "dtype": "float32",
            **fields,
        }
    )


def adamw(config: ConfigDict, **fields) -> None:
    """Replaces the optimizer's section by AdamW's.

    `undecayed` names the groups without weight decay, such as ("norm",). The learning rate grows from `warmup_ratio`
    of its value within `warmup_steps`.
    """
    defaults = {"head_factor": 1.0, "weight_decay": 0.01, "power": 1.0, "train_norm": True}
    defaults |= {"undecayed": (), "warmup_steps": 0, "warmup_ratio": 1e-6}
    assert fields.keys() <= defaults.keys(), f"AdamW has no {', '.join(fields.keys() - defaults.keys())}"
    config.optim = ConfigDict({"name": "adamw", **defaults, **fields})


def base(
    name: str, benchmark: str, published: tuple[str, ...] = (), variants: tuple[str, ...] = ("lite",)
) -> ConfigDict:
    """Everything but the stages.

    Args:
      name: of the config file.
      benchmark: "streets" (drawn, nothing to download), "camvid" (day -> dusk), "folder" (the user's own
        images: `--config.source.path=... --config.target.path=...`), or one of `published`; a variant may follow after
        a comma.
      published: those of `PUBLISHED` for which the config has a recipe.
      variants: those that the config has; "lite" only of the benchmarks `QUICK`. "mit" and "hrda" change the network,
        see `transformer`.
    """
    benchmark, _, variant = benchmark.partition(",")
    benchmarks = {"streets": _streets, "camvid": _camvid, "folder": _folder}
    known = {"gta5": _gta5, "mapillary": _mapillary, "mapillary-19": _mapillary_19}
    known |= {"synthia": partial(_synthia, label_space="synthia16")}
    known |= {"synthia-19": partial(_synthia, label_space="synthia19")}
    known |= {"gta5+synthia": partial(_both, label_space="synthia16")}
    known |= {"gta5+synthia-19": partial(_both, label_space="cityscapes19"), "acdc": _acdc, "darkzurich": _darkzurich}
    known |= {f"crosscity-{city}": partial(_crosscity, city=city) for city in CITIES}
    benchmarks |= {name: known[name] for name in published}
    if benchmark not in benchmarks:
        raise ValueError(f"configs/{name}.py has no benchmark '{benchmark}' (known: {', '.join(benchmarks)})")
    fitting = [each for each in variants if each != "lite" or benchmark in QUICK]
    if variant and variant not in fitting:
        known = f"known: {', '.join(fitting)}" if fitting else "there are none"
        raise ValueError(f"configs/{name}.py:{benchmark} has no variant '{variant}' ({known})")
    config = ConfigDict(
        {
            "name": name,
            "benchmark": f"{benchmark},{variant}" if variant in ("lite", "mit", "hrda") else benchmark,
            "seed": 0,
            "devices": 0,  # 0: as many local devices as divide the batch
            "platform": "",  # "gpu": refuse to fall back to the CPU
            "data_dir": "",  # "": $TFDS_DATA_DIR, else ~/tensorflow_datasets
            "accumulate": 1,  # parts of a batch whose gradients are added up to one update, in all training stages
            "control": False,  # also train like the adaptation but without its target loss, to measure its gain against
            "remat": False,  # compute a network's blocks twice to save memory, in all training stages
            "num_workers": 0,  # processes that decode and transform; 0: threads of this one
            "log_every": 10,
            "eval_every": 100,
            "checkpoint_every": 100,
            "keep_every": 0,  # also keep the checkpoints of every so many steps; 0: the latest two and the best
            "class_weights": (),  # weights of the classes in the cross-entropy of every stage; (): all the same
            "mean_of_last": 3,  # evaluations that the table's 'mean of last' averages
            "preprocess": "imagenet",
            "model": quick_model(),
            "optim": {
                "name": "sgd",  # a file in `jaxuda/optimizers`, or a dotted path
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
    config.evaluation = ConfigDict({"split": "val", "size": None, "batch": 4, "network": "student"})
    # What --mode eval and predict average: mirrored images, factors of the input size, weights of several
    # checkpoints (none: equal ones); what they multiply class probabilities by (none: nothing).
    config.test = ConfigDict({"flip": False, "scales": (1.0,), "weights": (), "class_weights": ()})
    benchmarks[benchmark](config)
    # How many target images, chosen by the seed, are learned from with their labels (or a file with one id per line),
    # and their share of the labelled images of a batch.
    config.target.update({"labelled": unset(), "labelled_share": 0.5})
    if variant == "lite":
        config.preprocess = "efficientnet"
        config.model = lite_model()
        adamw(config, head_factor=5.0)
    if variant in ("mit", "hrda"):
        transformer(config, benchmark in QUICK, two_views=variant == "hrda")
    return config


def transformer(config: ConfigDict, quick: bool, two_views: bool) -> None:
    """MiT-B5 with DAFormer's head and optimizer, or MiT-B0 in quick recipes; with HRDA's two views of an image or one.

    In quick recipes the detail view is half of the image along each axis, as published.
    """
    config.model = mit_model("b0" if quick else "b5")
    adamw(config, head_factor=10.0, undecayed=("norm",), warmup_steps=30 if quick else 1500)
    if two_views:
        width, height = (side // 16 * 16 for side in config.evaluation.size) if quick else (1024, 1024)
        if quick and (width, height) != tuple(config.evaluation.size):  # views have whole numbers of cells
            config.source.resize = config.target.resize = config.evaluation.size = (width, height)
        config.model.hrda = ConfigDict(
            {
                "crop": (width // 2, height // 2),
                "window": (width, height),
                "detail_weight": 0.1,
                "attention_width": 256,
            }
        )


def lite(config: ConfigDict) -> ConfigDict:
    """The config, finished: learning rates that fit AdamW, and with ",lite" stages that start from ImageNet weights.

    1e-3 was chosen on streets, seed 0, with target labels: adaptation at 1e-4 had hardly begun when it ended. With
    transformers from random weights it is half as much.
    """
    place, _, variant = config.benchmark.partition(",")
    for stage in (config[name] for name in config.pipeline if place in QUICK and variant in ("lite", "mit", "hrda")):
        if "train" in stage:
            stage.lr = 1e-3 if variant == "lite" else 5e-4
            if variant == "lite" and stage.init == "scratch":
                stage.init = "imagenet"
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


def _gta5(config: ConfigDict) -> None:
    config.label_space = "cityscapes19"
    config.source = domain("gta5", resize=(1280, 720))
    _cityscapes(config)


def _synthia(config: ConfigDict, label_space: str) -> None:
    """16 classes, where the target's terrain, trucks and trains are ignored, or a network for all 19."""
    config.label_space = label_space
    config.source = domain("synthia", resize=(1280, 760))
    _cityscapes(config)


def _both(config: ConfigDict, label_space: str) -> None:
    """GTA5 and SYNTHIA as one source, at one size, so that images of both fit into a batch.

    In 16 classes, GTA5's terrain, trucks and trains are ignored; in 19, SYNTHIA shows none of these.
    """
    config.label_space = label_space
    config.source = domain("gta5+synthia", resize=(1280, 720))
    _cityscapes(config)


def _crosscity(config: ConfigDict, city: str) -> None:
    """The 13 classes that both have; the city's 100 labelled images are its test split."""
    config.label_space = "crosscity13"
    config.source = domain("cityscapes", resize=(1024, 512))
    config.target = domain(f"crosscity/{city}", resize=(1024, 512))
    config.evaluation.update({"split": "test", "size": (1024, 512), "batch": 1})
    _long(config)


def _mapillary(config: ConfigDict) -> None:
    """From SYNTHIA, 7 super-classes; images keep their aspect within 1024x768, as published with DADA."""
    config.label_space = "super7"
    config.source = domain("synthia", resize=(1280, 760))
    _to_mapillary(config)


def _mapillary_19(config: ConfigDict) -> None:
    """From GTA5, 19 classes; --config.target.name=mapillary2 takes the labels of v2.0."""
    config.label_space = "cityscapes19"
    config.source = domain("gta5", resize=(1280, 720))
    _to_mapillary(config)


def _to_mapillary(config: ConfigDict) -> None:
    config.target = domain("mapillary", fit=(1024, 768))
    config.evaluation.update({"size": (1024, 768), "batch": 1, "keep_aspect": True})
    _long(config)


def _acdc(config: ConfigDict) -> None:
    """All conditions as one target; each is scored alone, too, as are all datasets that are joined."""
    _darkzurich(config, "+".join(f"acdc/{condition}" for condition in CONDITIONS))


def _darkzurich(config: ConfigDict, target: str = "darkzurich") -> None:
    """From Cityscapes; images of the target have half their published size."""
    config.label_space = "cityscapes19"
    config.source = domain("cityscapes", resize=(1024, 512))
    config.target = domain(target, resize=(960, 540))
    config.evaluation.update({"size": (960, 540), "batch": 1})
    _long(config)


def _cityscapes(config: ConfigDict) -> None:
    config.target = domain("cityscapes", resize=(1024, 512))
    config.evaluation.update({"size": (1024, 512), "batch": 1})
    _long(config)


def _long(config: ConfigDict) -> None:
    config.update({"log_every": 100, "eval_every": 2000, "checkpoint_every": 1000, "num_workers": 4})


# Learning rate, steps and start of MinEnt, AdvEnt and IntraDA as published.
ADVENT_SCHEDULE = {"lr": 2.5e-4, "steps": 120_000, "schedule_steps": 250_000, "batch": 1, "init": "imagenet"}


def advent_family(config: ConfigDict) -> None:
    """Network and optimizer of the published MinEnt, AdvEnt and IntraDA experiments.

    Their optimizer updated block convolutions three times and shortcuts four times per step, and each time added weight
    decay to the gradient again (torch 0.4); their papers describe `optim.repeat` = 1 everywhere.
    """
    config.preprocess = "caffe"
    config.model.update({"backbone": "resnet101", "variant": "caffe", "width": 64, "aux": True})
    config.optim.update({"head_factor": 10.0, "train_norm": False, "repeat_decay": "accumulate"})
    config.optim.repeat.update({"stem": 1, "block": 3, "shortcut": 4})


def train_stage(method: str, **fields) -> ConfigDict:
    """A training stage.

    Args:
      method: a file in `jaxuda/methods`.
      **fields: fields that differ from the defaults below, and the method's own weights.
    """
    return ConfigDict(
        {
            "train": method,
            # Or "imagenet", an earlier stage, "STAGE:best" (chosen with target labels), the path of any stage's folder.
            "init": "scratch",
            "domains": ("source", "target"),  # labelled images come from the first, unlabelled ones from the second
            "labels": "",  # a stage whose pseudo-labels replace the labels of the first domain
            "split": "",  # a ranking stage: labelled images are its easy ones, unlabelled ones its hard ones
            "reads": (),  # stages whose artifacts the method starts from
            "order": "shuffled",  # a file in `jaxuda/data/orders`: in which order labelled images are drawn
            "steps": 300,
            "schedule_steps": 0,  # length of the poly schedule; 0: `steps`
            "batch": 4,  # images of each domain per step, all devices together
            "lr": 0.02,
            "align_corners": True,
            "lambda_aux": 0.1,
            "lambda_lovasz": 0.0,
            "lovasz_shrink": 1,
            **fields,
        }
    )


def sweep_stage(sweep: str, init: str, **fields) -> ConfigDict:
    """A pass over a dataset with the network of an earlier stage; it writes artifacts for later stages.

    Args:
      sweep: a file in `jaxuda/sweeps`.
      init: the stage whose network is used; "scratch" for a sweep over the data alone.
      **fields: the fields that the sweep needs.
    """
    shared = {"domains": ("source", "target"), "labels": "", "split": "", "reads": (), "align_corners": True}
    return ConfigDict({"sweep": sweep, "init": init, **shared, **fields})


def source_only(**fields) -> ConfigDict:
    """Supervised training on the source: the lower bound of every table."""
    return train_stage("source_only", domains=("source",), **fields)


def oracle(**fields) -> ConfigDict:
    """Supervised training on the target's own labels: the upper bound, same start and steps as `source_only`."""
    return train_stage("source_only", domains=("target",), **fields)
