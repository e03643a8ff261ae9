"""DADA: depth as privileged information of the source.

Vu et al., DADA: Depth-aware Domain Adaptation in Semantic Segmentation, ICCV 2019. The network predicts inverse
depth beside the classes and multiplies its features by what the depth was decoded from (`DepthBranch`). With
J = entropy map of the upsampled prediction * upsampled depth:

  segmenter      L_seg(source) + lambda_depth * berHu(depth_s) + lambda_adv * BCE(D(J_t), source)
  discriminator  BCE(D(sg J_s), source) + BCE(D(sg J_t), target)

The discriminator's terms are not halved, unlike AdvEnt's. There is one level.
"""

from __future__ import annotations

from typing import Any

import jax
import optax

from jaxuda.errors import UserError
from jaxuda.losses.depth import berhu
from jaxuda.methods import advent
from jaxuda.methods.supervised import forward, supervised_loss, upsample
from jaxuda.models.deeplab import DeepLabV2, Outputs
from jaxuda.train_state import TrainState

PyTree = Any


def init(key: jax.Array, *, model: DeepLabV2, batch: PyTree, config: Any, artifacts: PyTree) -> tuple[dict, tuple]:
    """The discriminator, params["discriminator"]["main"].

    Raises:
      UserError: the source has no depth, or the network no depth branch, or more than one level.
    """
    if "depth" not in batch["source"]:
        raise UserError(
            "DADA learns from the depth of the source, and this source has none: take one that has it "
            "(streets/game, synthia), or adapt with configs/advent.py, which needs no depth"
        )
    if not model.depth or model.aux:
        raise UserError("DADA needs a network of one level with a depth branch: set model.depth=True, model.aux=False")
    return advent.init(key, model=model, batch=batch, config=config, artifacts=artifacts)


def train_step(
    state: TrainState,
    batch: PyTree,
    key: jax.Array,
    *,
    model: DeepLabV2,
    tx: optax.GradientTransformation,
    config: Any,
    axis_name: str | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of both players.

    `batch["source"]` has "image", "label" and "depth" (N, H, W) float inverse depth, `batch["target"]` "image".
    """
    source, target = batch["source"], batch["target"]
    discriminator = advent.make_discriminator(model, config)

    def weighted_maps(outputs: Outputs, domain: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        depth = upsample(outputs.depth, domain["image"], config)
        return depth, advent.entropy_maps(outputs, domain, config)["main"] * depth

    def objective(params: PyTree) -> tuple[jax.Array, tuple]:
        ours, batch_stats = forward(model, params["model"], state.batch_stats, source["image"], axis_name)
        loss, metrics = supervised_loss(ours, source, config, axis_name)
        theirs, batch_stats = forward(model, params["model"], batch_stats, target["image"], axis_name)

        depth, source_maps = weighted_maps(ours, source)
        _, target_maps = weighted_maps(theirs, target)
        metrics["depth"] = berhu(depth, source["depth"], axis_name=axis_name)
        player = params["discriminator"]["main"]
        terms = advent.adversarial_terms(discriminator, player, source_maps, target_maps, axis_name)
        loss += config.lambda_depth * metrics["depth"] + config.lambda_adv * terms["adv"]
        loss += terms["d_source"] + terms["d_target"]
        metrics |= {f"{name}_main": value for name, value in terms.items()}
        return loss, (batch_stats, {"loss": loss, **metrics})

    grads, (batch_stats, metrics) = jax.grad(objective, has_aux=True)(state.params)
    return state.apply_gradients(grads, tx, axis_name=axis_name, batch_stats=batch_stats), metrics
