"""FADA: an adversary that knows the classes.

Wang et al., Classes Matter: A Fine-grained Adversarial Approach to Cross-domain Semantic Segmentation, ECCV 2020,
section 3.2. The discriminator D tells at every pixel, from the features f, the class and the domain: 2C logits,
upsampled to the image. With q = softmax(logits / T), no entry above 0.9, as soft labels (no gradient), and CE the
cross-entropy against the soft labels of one domain, 0 in the other:

  segmenter      CE(logits_s / T, labels) + lambda_adv * CE(D(f_t), [q_t, 0])
  discriminator  1/2 CE(D(sg f_s), [q_s, 0]) + 1/2 CE(D(sg f_t), [0, q_t])

Both players stand in one scalar, as in AdvEnt.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.lax import stop_gradient

from jaxuda.losses.adversarial import SOURCE, TARGET, class_domain_ce
from jaxuda.methods.supervised import forward, supervised_loss, upsample
from jaxuda.models.deeplab import DeepLabV2, Outputs
from jaxuda.models.discriminator import ClassDiscriminator
from jaxuda.train_state import TrainState

PyTree = Any
LARGEST = 0.9  # of a soft label


def init(key: jax.Array, *, model: DeepLabV2, batch: PyTree, config: Any, artifacts: PyTree) -> tuple[dict, tuple]:
    """The discriminator, params["discriminator"]["main"]."""
    features = jax.eval_shape(model.init_with_output, key, batch["source"]["image"][:1])[0].features
    maps = jnp.zeros((1, 8, 8, features.shape[-1]))
    return {"discriminator": {"main": make_discriminator(model, config).init(key, maps)["params"]}}, ()


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

    def objective(params: PyTree) -> tuple[jax.Array, tuple]:
        ours, batch_stats = forward(model, params["model"], state.batch_stats, source["image"], axis_name)
        theirs, batch_stats = forward(model, params["model"], batch_stats, target["image"], axis_name)
        ours, theirs = (soften(outputs, config.temperature) for outputs in (ours, theirs))
        loss, metrics = supervised_loss(ours, source, config, axis_name)
        player = params["discriminator"]["main"]
        terms = adversarial_terms(player, (ours, source), (theirs, target), model, config, axis_name)
        loss += config.lambda_adv * terms["adv"] + 0.5 * terms["d_source"] + 0.5 * terms["d_target"]
        return loss, (batch_stats, {"loss": loss, **metrics, **terms})

    grads, (batch_stats, metrics) = jax.grad(objective, has_aux=True)(state.params)
    return state.apply_gradients(grads, tx, axis_name=axis_name, batch_stats=batch_stats), metrics


def make_discriminator(model: DeepLabV2, config: Any) -> ClassDiscriminator:
    """One discriminator, of the same precision as the network."""
    return ClassDiscriminator(model.num_classes, config.discriminator_width, model.dtype)


def soften(outputs: Outputs, temperature: float) -> Outputs:
    """The outputs with their logits divided by the temperature."""
    return outputs._replace(main=outputs.main / temperature)


def adversarial_terms(
    player: PyTree,
    ours: tuple[Outputs, dict[str, jax.Array]],
    theirs: tuple[Outputs, dict[str, jax.Array]],
    model: DeepLabV2,
    config: Any,
    axis_name: str | None,
) -> dict[str, jax.Array]:
    """The three losses of the discriminator.

    Args:
      player: its parameters.
      ours: softened outputs of the source images, and the source's part of the batch.
      theirs: likewise of the target.
      model: the network.
      config: the stage's.
      axis_name: the device axis, or None.

    Returns:
      adv, which moves the segmenter alone; d_source and d_target, which move the discriminator alone.
    """
    discriminator = make_discriminator(model, config)

    def term(player: PyTree, features: jax.Array, side: tuple[Outputs, dict], domain: int) -> jax.Array:
        outputs, images = side[0], side[1]["image"]
        labels = jnp.minimum(jax.nn.softmax(upsample(outputs.main, images, config)), LARGEST)
        logits = upsample(discriminator.apply({"params": player}, features), images, config)
        return class_domain_ce(logits, stop_gradient(labels), domain, axis_name=axis_name)

    return {
        "adv": term(stop_gradient(player), theirs[0].features, theirs, SOURCE),
        "d_source": term(player, stop_gradient(ours[0].features), ours, SOURCE),
        "d_target": term(player, stop_gradient(theirs[0].features), theirs, TARGET),
    }
