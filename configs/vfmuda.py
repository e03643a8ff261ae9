"""VFM-UDA: an EMA teacher, mixed images and masked tokens on DINOv2 (Englert et al., CVPR 2024 workshop).

    python -m jaxuda.main --config configs/vfmuda.py:gta5     # ViT-B/14; also synthia, acdc, darkzurich
    python -m jaxuda.main --config configs/vfmuda.py:folder   # own images, ViT-S/14; also streets, camvid

Stages: source only -> VFM-UDA -> oracle, all from DINOv2's weights, which are under Apache-2.0. The student learns from
source images, from mixed ones as in configs/daformer.py, and from target images of which 70% of the patches are
replaced by a mask token; the teacher's labels are those of the image and of its mirror image. Other sizes are
`--config.model.variant=vits14` or `vitl14`, those with registers `--config.model.registers=True`; one linear layer
instead of the decoder, the honest baseline, is `--config.model.head=linear`. `--config.remat=True` and
`--config.model.dtype=bfloat16` save memory.

As published: AdamW, 5e-5 times the root of the batch for the decoder and a tenth of it for the transformer, 40,000
steps of 8 + 8 crops of 1024. The published mIoU is 77 on GTA5 with ViT-B/14, and about 79 with ViT-L/14; none was
published for synthia, acdc and darkzurich. Differences: colours change on all source images, on pasted parts too, and
not on the target's part of mixed images; the loss on the source is a mean over all pixels; margins without trusted
labels are rows of the crop, not shares of the image.
"""

from ml_collections import ConfigDict

from configs import common, daformer

# The short sides of source and target images from which crops are taken: from 0.9 to 1.1 times that of Cityscapes, ACDC
# and Dark Zurich, and of enlarged GTA5 and SYNTHIA.
_CITYSCAPES, _NIGHT = (922, 1126), (972, 1188)
SHORT_SIDES = {
    "gta5": ((1296, 1584), _CITYSCAPES),
    "synthia": ((1368, 1672), _CITYSCAPES),
    "acdc": (_CITYSCAPES, _NIGHT),
    "darkzurich": (_CITYSCAPES, _NIGHT),
}
CROP = 1024
# brightness, contrast, saturation, hue of source images
COLOURS = (32 / 255, 0.5, 0.5, 18 / 360)


def get_config(benchmark: str = "streets") -> ConfigDict:
    """The config for one benchmark: streets, camvid, folder, or one of `SHORT_SIDES`."""
    config = common.base("vfmuda", benchmark, published=tuple(SHORT_SIDES), variants=())
    config.pipeline = ("source_only", "adapt", "oracle")
    fields = {**daformer.self_training(config.label_space), **ADAPT}
    if benchmark in SHORT_SIDES:
        config.model = common.dinov2_model(window=common.optional((CROP, CROP)))
        crops(config, *SHORT_SIDES[benchmark])
        adverse = benchmark in common.ADVERSE
        config.evaluation.size = (1920, 1080) if adverse else (2048, 1024)
        config.eval_every = 4000
        shared = {"steps": 40_000, "batch": 8, "init": "imagenet"}
        # 3% and 25% of the rows, where the car is visible.
        fields |= {"ignore_top": 0, "ignore_bottom": 0} if adverse else {"ignore_top": 31, "ignore_bottom": 256}
    else:
        config.model = common.dinov2_model("vits14")
        shared = {"init": "imagenet"}
        fields |= {"ignore_top": 0, "ignore_bottom": 0}
    long = "steps" in shared
    common.adamw(config, head_factor=10.0, warmup_steps=1500 if long else 30, warmup_ratio=1e-3)
    shared |= {"lr": 5e-6 * shared.get("batch", 4) ** 0.5, "align_corners": False}
    config.source_only = common.source_only(**shared)
    config.adapt = common.train_stage("daformer", **{**shared, **fields})
    config.oracle = common.oracle(**shared)
    return config


# The fields of the stage "adapt" that differ from DAFormer's.
ADAPT = {
    "order": "rare_class",
    "rare_class_temperature": 0.05,
    "rare_class_crop_ratio": 2.0,
    "lambda_features": 0.0,
    "weights": (),
    "teacher_flip": True,
    "lambda_mask": 1.0,
    "mask_images": "tokens",
}


def crops(config: ConfigDict, source: tuple[int, int], target: tuple[int, int]) -> None:
    """Square crops of both domains, which are resized to short sides within these limits."""
    for domain, sides in ((config.source, source), (config.target, target)):
        domain.update({"resize": None, "short_side": sides, "crop": (CROP, CROP), "flip": 0.5})
        domain.interpolation = "bilinear"
    config.source.jitter = COLOURS
    config.source.balanced = common.optional(0.75)
