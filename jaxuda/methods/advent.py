"""AdvEnt: entropy maps of the target made indistinguishable from those of the source.

Vu et al., ADVENT: Adversarial Entropy Minimization for Domain Adaptation in Semantic Segmentation, CVPR 2019,
section 3.2. With I = entropy map of the upsampled predictions and one discriminator D per level:

  segmenter      L_seg(source) + lambda_adv * BCE(D(I_t), source) + lambda_adv_aux * BCE(D_aux(I_aux,t), source)
  discriminator  1/2 BCE(D(sg I_s), source) + 1/2 BCE(D(sg I_t), target)

Both players stand in one scalar: the segmenter's terms see stopped discriminator parameters, the discriminator's
terms see stopped predictions, so that one gradient gives each player exactly its own.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.lax import stop_gradient

from jaxuda.losses.adversarial import SOURCE, TARGET, domain_bce
from jaxuda.losses.entropy import entropy_map
from jaxuda.methods.supervised import forward, supervised_loss, upsample
from jaxuda.models.deeplab import DeepLabV2, Outputs
from jaxuda.models.discriminator import FCDiscriminator
from jaxuda.train_state import TrainState

PyTree = Any


def init(key: jax.Array, *, model: DeepLabV2, batch: PyTree, config: Any, artifacts: PyTree) -> tuple[dict, tuple]:
    """The discriminators: "main", and "aux" where the network has a second level."""
    maps = jnp.zeros((1, *batch["target"]["image"].shape[1:3], model.num_classes))
    levels = ("main", "aux") if model.aux else ("main",)
    keys = jax.random.split(key, len(levels))
    discriminator = make_discriminator(model, config)
    players = {level: discriminator.init(k, maps)["params"] for level, k in zip(levels, keys, strict=True)}
    return {"discriminator": players}, ()


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
    """One update of both players on `batch["source"]` ("image", "label") and `batch["target"]` ("image")."""
    source, target = batch["source"], batch["target"]
    discriminator = make_discriminator(model, config)

    def objective(params: PyTree) -> tuple[jax.Array, tuple]:
        ours, batch_stats = forward(model, params["model"], state.batch_stats, source["image"], axis_name)
        loss, metrics = supervised_loss(ours, source, config, axis_name)
        theirs, batch_stats = forward(model, params["model"], batch_stats, target["image"], axis_name)

        source_maps, target_maps = entropy_maps(ours, source, config), entropy_maps(theirs, target, config)
        weights = {"main": config.lambda_adv, "aux": config.lambda_adv_aux}
        for level, player in params["discriminator"].items():
            terms = adversarial_terms(discriminator, player, source_maps[level], target_maps[level], axis_name)
            loss += weights[level] * terms["adv"] + 0.5 * terms["d_source"] + 0.5 * terms["d_target"]
            metrics |= {f"{name}_{level}": value for name, value in terms.items()}
        return loss, (batch_stats, {"loss": loss, **metrics})

    grads, (batch_stats, metrics) = jax.grad(objective, has_aux=True)(state.params)
    return state.apply_gradients(grads, tx, axis_name=axis_name, batch_stats=batch_stats), metrics


def make_discriminator(model: DeepLabV2, config: Any) -> FCDiscriminator:
    """One discriminator, of the same precision as the network."""
    return FCDiscriminator(config.discriminator_width, model.dtype)


def entropy_maps(outputs: Outputs, batch: dict[str, jax.Array], config: Any) -> dict[str, jax.Array]:
    """(N, H, W, C) at the image's size for "main" and, where there is one, "aux"."""
    levels = {"main": outputs.main, "aux": outputs.aux}
    return {
        level: entropy_map(jax.nn.softmax(upsample(logits, batch["image"], config)))
        for level, logits in levels.items()
        if logits is not None
    }


def adversarial_terms(
    discriminator: FCDiscriminator,
    player: PyTree,
    source_maps: jax.Array,
    target_maps: jax.Array,
    axis_name: str | None,
) -> dict[str, jax.Array]:
    """The three losses of one discriminator.

    Args:
      discriminator: the network of one level.
      player: its parameters.
      source_maps: (N, H, W, C).
      target_maps: likewise.
      axis_name: the device axis, or None.

    Returns:
      adv, which moves the segmenter alone; d_source and d_target, which move the discriminator alone.
    """

    def bce(player: PyTree, maps: jax.Array, domain: int) -> jax.Array:
        return domain_bce(discriminator.apply({"params": player}, maps), domain, axis_name=axis_name)

    return {
        "adv": bce(stop_gradient(player), target_maps, SOURCE),
        "d_source": bce(player, stop_gradient(source_maps), SOURCE),
        "d_target": bce(player, stop_gradient(target_maps), TARGET),
    }
