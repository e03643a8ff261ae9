"""FADA: an adversary that knows the classes.

Wang et al., Classes Matter: A Fine-grained Adversarial Approach to Cross-domain Semantic Segmentation, ECCV 2020,
section 3.2. The discriminator D tells at every pixel, from the features f, the class and the domain: 2C logits,
upsampled to the image. With q = softmax(logits / T), no entry above 0.9, as soft labels (no gradient), and CE the
cross-entropy against the soft labels of one domain, 0 in the other:

  segmenter      CE(logits_s / T, labels) + lambda_adv * CE(D(f_t), [q_t, 0])
  discriminator  1/2 CE(D(sg f_s), [q_s, 0]) + 1/2 CE(D(sg f_t), [0, q_t])

Each pass is one scalar for both, as in AdvEnt.
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
LARGEST = 0.9  # of a soft label


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
    source, player = batch["source"], params["discriminator"]["main"]
    outputs, carry = forward(
        model, params["model"], carry, source["image"], keys=keys, use="source", axis_name=axis_name
    )
    outputs = soften(outputs, config.temperature)
    loss, metrics = supervised_loss(outputs, source, config, axis_name)
    stopped = stop_gradient(outputs.features)
    d_source = discriminate(player, stopped, outputs, source["image"], SOURCE, model, config, axis_name)
    return loss + 0.5 * d_source, carry.log(**metrics, d_source=d_source)


def target_pass(
    params: PyTree, carry: Carry, batch: PyTree, *, model: Any, config: Any, keys: Keys, axis_name: str | None, **_: Any
) -> tuple[jax.Array, Carry]:
    """The adversarial loss of the segmenter, and the discriminator's target term."""
    images, player = batch["target"]["image"], params["discriminator"]["main"]
    outputs, carry = forward(model, params["model"], carry, images, keys=keys, use="target", axis_name=axis_name)
    outputs = soften(outputs, config.temperature)
    features = outputs.features
    adv = discriminate(stop_gradient(player), features, outputs, images, SOURCE, model, config, axis_name)
    d_target = discriminate(player, stop_gradient(features), outputs, images, TARGET, model, config, axis_name)
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
    """CE of what the discriminator says of `features`, against the soft labels of a domain.

    Args:
      params: of the discriminator.
      features: (N, h, w, A), of `outputs`, stopped or not.
      outputs: softened, of `images`; their probabilities are the labels.
      images: (N, H, W, 3), whose size counts.
      domain: `SOURCE` or `TARGET`.
      model, config, axis_name: as a pass has them.
    """
    labels = jnp.minimum(jax.nn.softmax(upsample(outputs.main, images, config)), LARGEST)
    logits = upsample(make_discriminator(model, config).apply({"params": params}, features), images, config)
    return class_domain_ce(logits, stop_gradient(labels), domain, axis_name=axis_name)
