"""MinEnt: direct minimisation of the entropy of target predictions.

Vu et al., ADVENT: Adversarial Entropy Minimization for Domain Adaptation in Semantic Segmentation, CVPR 2019,
section 3.1:  L = L_seg(source) + lambda_entropy * L_ent(main, target) + lambda_entropy_aux * L_ent(aux, target).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxuda.losses.entropy import entropy_loss
from jaxuda.methods import Carry, Keys
from jaxuda.methods.supervised import forward, source_pass, upsample
from jaxuda.models import Outputs

PyTree = Any


def passes(config: Any, step: int) -> tuple[Callable, ...]:
    """The source pass moves the running statistics first, then the target pass, as in the published loop."""
    return source_pass, target_pass


def target_pass(
    params: PyTree, carry: Carry, batch: PyTree, *, model: Any, config: Any, keys: Keys, axis_name: str | None, **_: Any
) -> tuple[jax.Array, Carry]:
    """The entropy of the predictions on the target."""
    images = batch["target"]["image"]
    outputs, carry = forward(model, params["model"], carry, images, keys=keys, use="target", axis_name=axis_name)
    loss, metrics = target_entropy(outputs, images, config, axis_name)
    return loss, carry.log(**metrics)


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
