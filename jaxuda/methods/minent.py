"""MinEnt: direct minimisation of the entropy of target predictions.

Vu et al., ADVENT: Adversarial Entropy Minimization for Domain Adaptation in Semantic Segmentation, CVPR 2019,
section 3.1:  L = L_seg(source) + lambda_entropy * L_ent(main, target) + lambda_entropy_aux * L_ent(aux, target).
"""

from __future__ import annotations

from typing import Any

import jax
import optax

from jaxuda.losses.entropy import entropy_loss
from jaxuda.methods.supervised import forward, init, supervised_loss, upsample
from jaxuda.models.deeplab import DeepLabV2, Outputs
from jaxuda.train_state import TrainState

PyTree = Any
__all__ = ["init", "target_entropy", "train_step"]


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
    """One update on `batch["source"]` ("image", "label") and `batch["target"]` ("image")."""
    source, target = batch["source"], batch["target"]

    def objective(params: PyTree) -> tuple[jax.Array, tuple]:
        # The source pass moves the running statistics first, then the target pass, as in the published loop.
        outputs, batch_stats = forward(model, params["model"], state.batch_stats, source["image"], axis_name)
        loss, metrics = supervised_loss(outputs, source, config, axis_name)

        outputs, batch_stats = forward(model, params["model"], batch_stats, target["image"], axis_name)
        entropy, more = target_entropy(outputs, target["image"], config, axis_name)
        loss, metrics = loss + entropy, metrics | more
        return loss, (batch_stats, {"loss": loss, **metrics})

    grads, (batch_stats, metrics) = jax.grad(objective, has_aux=True)(state.params)
    return state.apply_gradients(grads, tx, axis_name=axis_name, batch_stats=batch_stats), metrics


def target_entropy(
    outputs: Outputs, images: jax.Array, config: Any, axis_name: str | None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """lambda_entropy * L_ent(main) + lambda_entropy_aux * L_ent(aux) of target images (N, H, W, 3), and its terms."""
    loss, metrics = 0.0, {}
    for level, logits, weight in (
        ("entropy", outputs.main, config.lambda_entropy),
        ("entropy_aux", outputs.aux, config.lambda_entropy_aux),
    ):
        if logits is not None:
            probs = jax.nn.softmax(upsample(logits, images, config))
            metrics[level] = entropy_loss(probs, axis_name=axis_name)
            loss += weight * metrics[level]
    return loss, metrics
