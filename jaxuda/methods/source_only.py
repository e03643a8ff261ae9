"""Source only: supervised training on one labelled domain, the baseline and the first stage of most recipes.

There is no forward pass on the target: it would move the statistics of batch normalisation.
"""

from __future__ import annotations

from typing import Any

import jax
import optax

from jaxuda.methods.supervised import forward, init, supervised_loss
from jaxuda.models.deeplab import DeepLabV2
from jaxuda.train_state import TrainState

PyTree = Any
__all__ = ["init", "train_step"]


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
    """One update on `batch["source"]`: "image" (N, H, W, 3) float, "label" (N, H, W) int32."""
    source = batch["source"]

    def objective(params: PyTree) -> tuple[jax.Array, tuple]:
        outputs, batch_stats = forward(model, params["model"], state.batch_stats, source["image"], axis_name)
        loss, metrics = supervised_loss(outputs, source, config, axis_name)
        return loss, (batch_stats, {"loss": loss, **metrics})

    grads, (batch_stats, metrics) = jax.grad(objective, has_aux=True)(state.params)
    return state.apply_gradients(grads, tx, axis_name=axis_name, batch_stats=batch_stats), metrics
