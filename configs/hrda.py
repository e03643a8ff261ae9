"""HRDA: self-training at full resolution, on two views of each image (Hoyer et al., ECCV 2022).

    python -m jaxuda.main --config configs/hrda.py            # streets, two CPU cores
    python -m jaxuda.main --config configs/hrda.py:camvid     # day -> dusk, after jaxuda.prepare camvid
    python -m jaxuda.main --config configs/hrda.py:gta5       # MiT-B5; also synthia, acdc, darkzurich, ...

Stages: source only -> HRDA -> oracle, all as in configs/daformer.py, with MiT and with the two views of
`jaxuda.models.hrda`: the whole image at half its size, and a part of it at full size. `--config.model.hrda.crop` is the
size of the part, `--config.model.hrda.window` the size of the parts of an image that evaluation computes and averages.

As published: MiT-B5, crops of 1024, detail views of 512, 40,000 steps of 2 + 2 images; evaluation at 2048x1024 in
windows of 1024; mIoU 73.8 on GTA5, mIoU* 65.8 on SYNTHIA (synthia-19; mean of three seeds, last checkpoint), mIoU 68.0
on ACDC and 55.9 on Dark Zurich (their test servers). The teacher's labels are not trusted in 30 rows at the top, 240 at
the bottom and 30 columns at either side of an image of Cityscapes; on acdc and darkzurich they are everywhere. MiT's
weights may only be used non-commercially. The quick recipes, MiT-B0 from random weights, show that it runs.
"""

from ml_collections import ConfigDict

from configs import daformer


def get_config(benchmark: str = "streets") -> ConfigDict:
    """The config for one benchmark: one of common.QUICK and common.PUBLISHED."""
    if "," in benchmark:
        raise ValueError(f"configs/hrda.py:{benchmark.partition(',')[0]} has no variants")
    quick = {"steps": 300}
    config = daformer.recipe("hrda", f"{benchmark},hrda", lambda_features=0.005, variants=("hrda",), quick=quick)
    config.benchmark = benchmark
    return config
