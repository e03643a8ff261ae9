"""CFContra: contrast of pixels with class prototypes of both domains (coarse-to-fine contrastive adaptation).

    python -m jaxuda.main --config configs/cfcontra.py            # streets, two CPU cores
    python -m jaxuda.main --config configs/cfcontra.py:camvid     # day -> dusk, after jaxuda.prepare camvid
    python -m jaxuda.main --config configs/cfcontra.py:gta5       # as published; synthia

Stages: source only -> MinEnt -> prototypes of both domains under that network -> CFContra -> oracle. All but the
third and fourth are those of configs/minent.py, and are reused from its work folder if that is next to this one.

As published (gta5, synthia): images of 1280x640, batch 1 + 1, 120,000 steps of a 250,000-step schedule, each of the
four contrast terms with weight 0.001 at temperature 0.07; +3.5 mIoU over MinEnt on GTA5 -> Cityscapes, the best
snapshot on the target's labels. Only the prototypes come from MinEnt, the network starts from ImageNet again;
`--config.adapt.init=minent` starts it from MinEnt, as the quick benchmarks do. The published optimizer never updated
the projection head; `--config.adapt.train_head=False` does the same. The published code also has a transfer of the
target's appearance to source images, which is switched off; it is left out here. All other large
benchmarks, from crosscity-CITY to darkzurich, are trained in the same way; no score was published.

The small networks here train for a few hundred steps. After 20 of them on streets, the gradient of a contrast term on
the backbone is 2 to 3 times the cross-entropy's before weighting; with weight 0.01 the four terms together are a tenth
of it, with 0.001 a hundredth. The length of the features is arbitrary, so they are compared at unit length. There a
margin of 0.05 keeps half of the target's pixels, 69% of them correct, and 0.1 keeps a quarter, 89% correct; hence 0.1
(60 images of each domain, prototypes of a MinEnt network; 45% are correct without a margin).

`projection` ("mlp", "linear" or "none"), `margin` and `normalise_for_labels` must be set in both `prototypes` and
`adapt`. `adapt.margin_decay` reduces the margin to 0 over the schedule.
"""

from ml_collections import ConfigDict

from configs import common, minent

TERMS = ("source", "target", "target_to_source", "source_to_target")


def get_config(benchmark: str = "streets") -> ConfigDict:
    """The config for one benchmark: one of common.BENCHMARKS."""
    config = minent.get_config(benchmark)
    config.name, config.minent = "cfcontra", config.adapt
    config.pipeline = ("source_only", "minent", "prototypes", "adapt", "oracle")
    entropy = {name: config.minent[name] for name in ("lambda_entropy", "lambda_entropy_aux")}
    size = {}
    if benchmark in common.PUBLISHED:
        if benchmark in common.TO_CITYSCAPES:
            size = {domain: {"resize": (1280, 640)} for domain in ("source", "target")}
        fields = {**common.ADVENT_SCHEDULE, **size, "optim": {"repeat_decay": "fresh"}}
        labels, weight = {"margin": 0.05, "normalise_for_labels": False}, 0.001
    else:
        fields = {"init": "minent", "steps": 250, "lr": 0.005}
        labels, weight = {"margin": 0.1, "normalise_for_labels": True}, 0.01
    shared = {"projection": "mlp", **labels}
    config.prototypes = common.sweep_stage(
        "prototypes", init="minent", source_images=300, target_images=1600, **shared, **size
    )
    config.adapt = common.train_stage(
        "cfcontra",
        reads=("prototypes",),
        margin_decay=False,
        train_head=True,
        temperature=0.07,
        momentum=0.9,
        target_label_figures=benchmark not in common.PUBLISHED,
        **{f"lambda_{term}": weight for term in TERMS},
        **entropy,
        **shared,
        **fields,
    )
    return common.lite(config)
