"""AdvEnt: entropy maps of the target made indistinguishable from those of the source.

Vu et al., ADVENT: Adversarial Entropy Minimization for Domain Adaptation in Semantic Segmentation, CVPR 2019,
section 3.2. With I = entropy map of the upsampled predictions and one discriminator D per level:

  segmenter      L_seg(source) + lambda_adv * BCE(D(I_t), source) + lambda_adv_aux * BCE(D_aux(I_aux,t), source)
  discriminator  1/2 BCE(D(sg I_s), source) + 1/2 BCE(D(sg I_t), target)

Each pass returns one scalar for both networks. The segmenter's term stops gradients at the discriminator's parameters,
the discriminator's terms stop them at the predictions, so that each network gets exactly its own gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from jaxuda.losses.adversarial import SOURCE, TARGET, domain_bce
from jaxuda.losses.entropy import entropy_map
from jaxuda.methods import Carry, Keys, Start
from jaxuda.methods.supervised import forward, supervise, upsample
from jaxuda.models import Outputs, output_shapes
from jaxuda.models.discriminator import FCDiscriminator

PyTree = Any


def init(key: jax.Array, *, model: Any, batch: PyTree, config: Any, **_: Any) -> Start:
    """The discriminators: "main", and "aux" where the network has a second level."""
    size = batch["target"]["image"].shape[1:3]
    maps = jnp.zeros((1, *size, model.num_classes))
    levels = ("main",) if output_shapes(model, size).aux is None else ("main", "aux")
    keys = jax.random.split(key, len(levels))
    discriminator = make_discriminator(model, config)
    params = {level: discriminator.init(k, maps)["params"] for level, k in zip(levels, keys, strict=True)}
    return Start({"discriminator": params})


def passes(config: Any, step: int) -> tuple[Callable, ...]:
    """The source pass, then the target pass."""
    return source_pass, target_pass


def source_pass(
    params: PyTree, carry: Carry, batch: PyTree, *, model: Any, config: Any, axis_name: str | None, **given: Any
) -> tuple[jax.Array, Carry]:
    """The supervised loss, and the discriminators' term on source predictions."""
    outputs, loss, carry = supervise(params, carry, batch, model=model, config=config, axis_name=axis_name, **given)
    for level, maps in entropy_maps(outputs, batch["source"]["image"], config).items():
        term = discriminate(model, config, params["discriminator"][level], stop_gradient(maps), SOURCE, axis_name)
        loss, carry = loss + 0.5 * term, carry.log(**{f"d_source_{level}": term})
    return loss, carry


def target_pass(
    params: PyTree, carry: Carry, batch: PyTree, *, model: Any, config: Any, keys: Keys, axis_name: str | None, **_: Any
) -> tuple[jax.Array, Carry]:
    """The adversarial loss of the segmenter, and the discriminators' term on target predictions."""
    images = batch["target"]["image"]
    outputs, carry = forward(model, params["model"], carry, images, keys=keys, use="target", axis_name=axis_name)
    loss, weights = 0.0, {"main": config.lambda_adv, "aux": config.lambda_adv_aux}
    for level, maps in entropy_maps(outputs, images, config).items():
        adv, d_target = target_terms(model, config, params["discriminator"][level], maps, axis_name)
        loss += weights[level] * adv + 0.5 * d_target
        carry = carry.log(**{f"adv_{level}": adv, f"d_target_{level}": d_target})
    return loss, carry


def make_discriminator(model: Any, config: Any) -> FCDiscriminator:
    """One discriminator, of the same precision as the network."""
    return FCDiscriminator(config.discriminator_width, model.dtype)


def entropy_maps(outputs: Outputs, images: jax.Array, config: Any) -> dict[str, jax.Array]:
    """(N, H, W, C) at the size of `images` (N, H, W, 3) for "main" and, where there is one, "aux"."""
    levels = {"main": outputs.main, "aux": outputs.aux}
    return {
        level: entropy_map(jax.nn.softmax(upsample(logits, images, config)))
        for level, logits in levels.items()
        if logits is not None
    }


def discriminate(
    model: Any, config: Any, params: PyTree, maps: jax.Array, domain: int, axis_name: str | None
) -> jax.Array:
    """BCE of the discriminator's output for `maps` (N, H, W, C) against a domain; `params` are its parameters."""
    return domain_bce(make_discriminator(model, config).apply({"params": params}, maps), domain, axis_name=axis_name)


def target_terms(
    model: Any, config: Any, params: PyTree, maps: jax.Array, axis_name: str | None
) -> tuple[jax.Array, jax.Array]:
    """For target `maps`, the term that trains the segmenter alone and the term that trains the discriminator alone."""
    adv = discriminate(model, config, stop_gradient(params), maps, SOURCE, axis_name)
    return adv, discriminate(model, config, params, stop_gradient(maps), TARGET, axis_name)
