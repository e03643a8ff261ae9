"""AdvEnt: target entropy maps that a discriminator cannot tell from source ones.

Vu et al., ADVENT: Adversarial Entropy Minimization for Domain Adaptation in Semantic Segmentation, CVPR 2019,
section 3.2. With I the weighted self-information of the upsampled prediction, per level of the network:

    segmenter      L_seg(source) + lambda_adversarial * BCE(D(I_target), source)
    discriminator  1/2 BCE(D(I_source), source) + 1/2 BCE(D(I_target), target)
"""

from __future__ import annotations

from typing import Any

import jax
import optax

from jaxuda.losses.entropy import entropy_map
from jaxuda.methods.adversarial import adversarial_terms, init_discriminators, make_discriminator
from jaxuda.methods.supervised import forward, supervised_loss, upsample
from jaxuda.models.deeplab import DeepLabV2, Outputs
from jaxuda.train_state import TrainState

PyTree = Any
__all__ = ["init", "train_step"]


def init(key: jax.Array, *, model: DeepLabV2, batch: PyTree, config: Any, artifacts: PyTree) -> tuple[dict, tuple]:
    """Adds the discriminators: params["discriminator"]["main"], and "aux" for a network of two levels."""
    return {"discriminator": init_discriminators(key, model, config)}, ()


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
    """One update of both players on `batch["source"]` ("image", "label") and `batch["target"]` ("image").

    The metric "loss" is the segmenter's.
    """
    source, target = batch["source"], batch["target"]
    discriminator = make_discriminator(model, config)

    def maps(outputs: Outputs, level: str, images: jax.Array) -> jax.Array:
        return entropy_map(jax.nn.softmax(upsample(getattr(outputs, level), images, config)))

    def objective(params: PyTree) -> tuple[jax.Array, tuple]:
        # The source pass moves the running statistics first, then the target pass, as in the published loop.
        of_source, batch_stats = forward(model, params["model"], state.batch_stats, source["image"], axis_name)
        loss, metrics = supervised_loss(of_source, source, config, axis_name)
        of_target, batch_stats = forward(model, params["model"], batch_stats, target["image"], axis_name)

        other = 0.0
        for level, suffix, weight in (
            ("main", "", config.lambda_adversarial),
            ("aux", "_aux", config.lambda_adversarial_aux),
        ):
            if level not in params["discriminator"]:
                continue
            terms = adversarial_terms(
                discriminator,
                params["discriminator"][level],
                maps(of_source, level, source["image"]),
                maps(of_target, level, target["image"]),
                axis_name,
            )
            loss += weight * terms.adversarial
            other += 0.5 * terms.source + 0.5 * terms.target
            metrics[f"adversarial{suffix}"] = terms.adversarial
            metrics[f"d_source{suffix}"], metrics[f"d_target{suffix}"] = terms.source, terms.target
        return loss + other, (batch_stats, {"loss": loss, **metrics})

    grads, (batch_stats, metrics) = jax.grad(objective, has_aux=True)(state.params)
    return state.apply_gradients(grads, tx, axis_name=axis_name, batch_stats=batch_stats), metrics
