"""MIC: masked image consistency on top of DAFormer's self-training (Hoyer et al., CVPR 2023).

    python -m jaxuda.main --config configs/mic.py            # streets, two CPU cores
    python -m jaxuda.main --config configs/mic.py:camvid     # day -> dusk, after jaxuda.prepare camvid
    python -m jaxuda.main --config configs/mic.py:gta5       # DeepLab-v2; also synthia, acdc, darkzurich, ...

Stages: source only -> MIC -> oracle, all as in configs/daformer.py. In addition, the student learns the teacher's
labels of target images of which 70% are hidden, in blocks of 32 pixels (of 8 in the quick recipes, whose images are
small). On acdc and darkzurich the masked images are one of each domain, as they are, and there are no margins. The
published mIoU is with HRDA and MiT-B5 at full resolution, with blocks of 64 pixels (gta5,hrda and so on): 75.9 on GTA5,
mIoU* 67.3 on SYNTHIA (synthia-19), 70.4 on ACDC and 60.2 on Dark Zurich (their test servers); gta5,mit: 70.6. MiT's
weights may only be used non-commercially.
"""

from ml_collections import ConfigDict

from configs import common, daformer

VARIANTS = ("mit", "hrda")  # MiT-B5, and MiT-B5 on two views of an image


def get_config(benchmark: str = "streets") -> ConfigDict:
    """The config for one benchmark: one of common.BENCHMARKS, or with ",mit" or ",hrda" behind it."""
    fields = {"lambda_mask": 1.0, "quick": {"mask_block": 8, "steps": 300}}
    if benchmark.partition(",")[0] in common.ADVERSE:
        fields |= {"mask_images": "separate", "ignore_top": 0, "ignore_bottom": 0}
    return daformer.recipe("mic", benchmark, lambda_features=0.005, variants=("lite", *VARIANTS), **fields)
