"""DADA: depth as privileged information of the source.

Vu et al., DADA: Depth-aware Domain Adaptation in Semantic Segmentation, ICCV 2019. The network predicts inverse
depth as well as classes, and multiplies its features by those from which depth is decoded (`DepthBranch`). With
J = entropy map of the upsampled prediction * upsampled depth:

  segmenter      L_seg(source) + lambda_depth * berHu(depth_s) + lambda_adv * BCE(D(J_t), source)
  discriminator  BCE(D(sg J_s), source) + BCE(D(sg J_t), target)

The discriminator's terms are not halved, unlike AdvEnt's. There is one level.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.lax import stop_gradient

from jaxuda.errors import UserError
from jaxuda.losses.adversarial import SOURCE
from jaxuda.losses.depth import berhu
from jaxuda.methods import Carry, Keys, Start, advent
from jaxuda.methods.supervised import forward, supervise, upsample
from jaxuda.models import Outputs, output_shapes

PyTree = Any


def init(key: jax.Array, *, model: Any, batch: PyTree, config: Any, **given: Any) -> Start:
    """The discriminator, params["discriminator"]["main"].

    Raises:
      UserError: the source has no depth, or the network has no depth branch or more than one level.
    """
    if "depth" not in batch["source"]:
        raise UserError(
            "DADA learns from the depth of the source, and this source has no depth: use one that has it "
            "(streets/game, synthia), or adapt with configs/advent.py, which needs no depth"
        )
    outputs = output_shapes(model, batch["source"]["image"].shape[1:3])
    if outputs.depth is None or outputs.aux is not None:
        raise UserError("DADA needs a network of one level with a depth branch: set model.depth=True, model.aux=False")
    return advent.init(key, model=model, batch=batch, config=config, **given)


def passes(config: Any, step: int) -> tuple[Callable, ...]:
    """The source pass, then the target pass."""
    return source_pass, target_pass


def source_pass(
    params: PyTree, carry: Carry, batch: PyTree, *, model: Any, config: Any, axis_name: str | None, **given: Any
) -> tuple[jax.Array, Carry]:
    """The supervised loss, the loss of the inverse depth "depth" (N, H, W), and the discriminator's source term."""
    source = batch["source"]
    outputs, loss, carry = supervise(params, carry, batch, model=model, config=config, axis_name=axis_name, **given)
    depth, maps = weighted_maps(outputs, source["image"], config)
    berhu_loss = berhu(depth, source["depth"], axis_name=axis_name)
    discriminator = params["discriminator"]["main"]
    d_source = advent.discriminate(model, config, discriminator, stop_gradient(maps), SOURCE, axis_name)
    loss += config.lambda_depth * berhu_loss + d_source
    return loss, carry.log(depth=berhu_loss, d_source_main=d_source)


def target_pass(
    params: PyTree, carry: Carry, batch: PyTree, *, model: Any, config: Any, keys: Keys, axis_name: str | None, **_: Any
) -> tuple[jax.Array, Carry]:
    """The adversarial loss of the segmenter, and the discriminator's target term."""
    images = batch["target"]["image"]
    outputs, carry = forward(model, params["model"], carry, images, keys=keys, use="target", axis_name=axis_name)
    _, maps = weighted_maps(outputs, images, config)
    adv, d_target = advent.target_terms(model, config, params["discriminator"]["main"], maps, axis_name)
    return config.lambda_adv * adv + d_target, carry.log(adv_main=adv, d_target_main=d_target)


def weighted_maps(outputs: Outputs, images: jax.Array, config: Any) -> tuple[jax.Array, jax.Array]:
    """Predicted depth (N, H, W, 1) and J (N, H, W, C), at the size of `images`."""
    depth = upsample(outputs.depth, images, config)
    return depth, advent.entropy_maps(outputs, images, config)["main"] * depth
