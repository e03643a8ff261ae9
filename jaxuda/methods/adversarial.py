"""What methods with domain discriminators share: the discriminators, and the terms of the two players.

Both players live in one scalar. The segmenter's term sees the discriminator behind a stop-gradient, the
discriminator's terms see the segmenter's predictions behind one, so that one differentiation gives each player
exactly its own gradient, from the same parameters.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxuda.losses.adversarial import SOURCE, TARGET, domain_bce
from jaxuda.models.deeplab import DeepLabV2
from jaxuda.models.discriminator import FCDiscriminator

PyTree = Any


class AdversarialTerms(NamedTuple):
    """Scalars, unweighted. adversarial: the segmenter's, target maps taken for source. source, target: the
    discriminator's, each domain recognised."""

    adversarial: jax.Array
    source: jax.Array
    target: jax.Array


def make_discriminator(model: DeepLabV2, config: Any) -> FCDiscriminator:
    """The discriminator of a stage: `config.discriminator_width` channels first, in the network's precision."""
    return FCDiscriminator(config.discriminator_width, model.dtype)


def init_discriminators(key: jax.Array, model: DeepLabV2, config: Any) -> dict[str, PyTree]:
    """Parameters of one discriminator per level of the network: {"main": ..., and "aux" where there is one}."""
    start = jax.jit(make_discriminator(model, config).init)
    maps = jnp.zeros((1, 64, 64, model.num_classes))
    levels = ("main", "aux") if model.aux else ("main",)
    return {level: start(jax.random.fold_in(key, index), maps)["params"] for index, level in enumerate(levels)}


def adversarial_terms(
    discriminator: FCDiscriminator, params: PyTree, source: jax.Array, target: jax.Array, axis_name: str | None
) -> AdversarialTerms:
    """The three losses on the maps (N, H, W, C) of both domains.

    Args:
      discriminator: the module.
      params: its parameters; they get a gradient from `source` and `target` of the result alone.
      source: maps of source images; they get no gradient.
      target: maps of target images; they get a gradient from `adversarial` of the result alone.
      axis_name: the device axis, or None.
    """

    def judge(weights: PyTree, maps: jax.Array, domain: int) -> jax.Array:
        return domain_bce(discriminator.apply({"params": weights}, maps), domain, axis_name=axis_name)

    stop = jax.lax.stop_gradient
    return AdversarialTerms(
        judge(stop(params), target, SOURCE), judge(params, stop(source), SOURCE), judge(params, stop(target), TARGET)
    )
