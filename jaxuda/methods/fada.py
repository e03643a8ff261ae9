"""FADA: a discriminator that predicts classes as well as domains.

Wang et al., Classes Matter: A Fine-grained Adversarial Approach to Cross-domain Semantic Segmentation, ECCV 2020,
section 3.2. From the features f, the discriminator D predicts class and domain of every pixel: 2C logits, upsampled to
the image. With the soft labels q = min(softmax(logits / T), 0.9), which carry no gradient, and CE the cross-entropy
against soft labels [of the source, of the target]:

  segmenter      CE(logits_s / T, labels) + lambda_adv * CE(D(f_t), [q_t, 0])
  discriminator  1/2 CE(D(sg f_s), [q_s, 0]) + 1/2 CE(D(sg f_t), [0, q_t])

Each pass returns one scalar for both networks, as in AdvEnt.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from jaxuda.losses.adversarial import SOURCE, TARGET, class_domain_ce
from jaxuda.methods import Carry, Keys, Start
from jaxuda.methods.supervised import forward, supervised_loss, upsample
from jaxuda.models import Outputs, output_shapes
from jaxuda.models.discriminator import ClassDiscriminator

PyTree = Any
LARGEST = 0.9  # largest entry of a soft label


def init(key: jax.Array, *, model: Any, batch: PyTree, config: Any, **_: Any) -> Start:
    """The discriminator, params["discriminator"]["main"]."""
    features = output_shapes(model, batch["source"]["image"].shape[1:3]).features
    maps = jnp.zeros((1, 8, 8, features.shape[-1]))
    return Start({"discriminator": {"main": make_discriminator(model, config).init(key, maps)["params"]}})


def passes(config: Any, step: int) -> tuple[Callable, ...]:
    """The source pass, then the target pass."""
    return source_pass, target_pass


def source_pass(
    params: PyTree, carry: Carry, batch: PyTree, *, model: Any, config: Any, keys: Keys, axis_name: str | None, **_: Any
) -> tuple[jax.Array, Carry]:
    """The supervised loss on softened logits, and the discriminator's source term."""
    source, discriminator = batch["source"], params["discriminator"]["main"]
    outputs, carry = forward(
        model, params["model"], carry, source["image"], keys=keys, use="source", axis_name=axis_name
    )
    outputs = soften(outputs, config.temperature)
    loss, metrics = supervised_loss(outputs, source, config, axis_name)
    stopped = stop_gradient(outputs.features)
    d_source = discriminate(discriminator, stopped, outputs, source["image"], SOURCE, model, config, axis_name)
    return loss + 0.5 * d_source, carry.log(**metrics, d_source=d_source)


def target_pass(
    params: PyTree, carry: Carry, batch: PyTree, *, model: Any, config: Any, keys: Keys, axis_name: str | None, **_: Any
) -> tuple[jax.Array, Carry]:
    """The adversarial loss of the segmenter, and the discriminator's target term."""
    images, discriminator = batch["target"]["image"], params["discriminator"]["main"]
    outputs, carry = forward(model, params["model"], carry, images, keys=keys, use="target", axis_name=axis_name)
    outputs = soften(outputs, config.temperature)
    features = outputs.features
    adv = discriminate(stop_gradient(discriminator), features, outputs, images, SOURCE, model, config, axis_name)
    d_target = discriminate(discriminator, stop_gradient(features), outputs, images, TARGET, model, config, axis_name)
    return config.lambda_adv * adv + 0.5 * d_target, carry.log(adv=adv, d_target=d_target)


def make_discriminator(model: Any, config: Any) -> ClassDiscriminator:
    """One discriminator, of the same precision as the network."""
    return ClassDiscriminator(model.num_classes, config.discriminator_width, model.dtype)


def soften(outputs: Outputs, temperature: float) -> Outputs:
    """The outputs with their logits divided by the temperature."""
    return outputs._replace(main=outputs.main / temperature)


def discriminate(
    params: PyTree,
    features: jax.Array,
    outputs: Outputs,
    images: jax.Array,
    domain: int,
    model: Any,
    config: Any,
    axis_name: str | None,
) -> jax.Array:
    """CE of the discriminator's output for `features` against the soft labels, in a domain.

    Args:
      params: parameters of the discriminator.
      features: (N, h, w, A), those of `outputs`, with or without a gradient.
      outputs: softened outputs for `images`; their probabilities are the labels.
      images: (N, H, W, 3); only their size is used.
      domain: `SOURCE` or `TARGET`.
      model, config, axis_name: those of the pass.
    """
    labels = jnp.minimum(jax.nn.softmax(upsample(outputs.main, images, config)), LARGEST)
    logits = upsample(make_discriminator(model, config).apply({"params": params}, features), images, config)
    return class_domain_ce(logits, stop_gradient(labels), domain, axis_name=axis_name)
