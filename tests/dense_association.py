"""Cycle association with all similarities in memory: the reference for the streaming form, in tests and benchmarks."""

import jax
import jax.numpy as jnp
from jax import lax


def similarities(x, y, metric):
    """(P, Q) similarities of (P, A) and (Q, A)."""
    if metric == "cosine":
        unit = lambda z: z / jnp.maximum(jnp.linalg.norm(z, axis=-1, keepdims=True), 1e-12)  # noqa: E731
        return jnp.matmul(unit(x), unit(y).T, precision="highest")
    cross = jnp.matmul(x, jnp.log(y + 1e-10).T, precision="highest")
    return cross - jnp.sum(x * jnp.log(x + 1e-10), axis=-1, keepdims=True)


def normalise(s):
    """Contrast normalisation of each row; its statistics are constants."""
    mean = jnp.mean(s, axis=1, keepdims=True)
    squares = jnp.sum(jnp.square(s - mean), axis=1, keepdims=True)
    mean, std = lax.stop_gradient((mean, jnp.sqrt(squares / max(s.shape[1] - 1, 1))))
    return (s - mean) / (std + 1e-10)


def weights(x, metric):
    s = similarities(x, x, metric)
    return jax.nn.softmax(normalise(s) if metric == "cosine" else s)


def aggregate(x, metric, share):
    return (1 - share) * x + share * jnp.matmul(weights(x, metric), x, precision="highest")


def one_pair(x, y, metric, share):
    """j*(i), i*(j*(i)) and the logarithm of both steps' likelihood; (P,) each."""
    if share:
        y = aggregate(y, metric, share)
    there = similarities(x, y, metric)
    back = there.T if metric == "cosine" else similarities(y, x, metric)
    there, back = jax.nn.log_softmax(normalise(there)), jax.nn.log_softmax(normalise(back))
    target = jnp.argmax(there, axis=1)
    source = jnp.argmax(back, axis=1)[target]
    # Not by jnp.max: compiled, its gradient looks for the largest entry again and may not find it to the bit.
    return target, source, there[jnp.arange(len(x)), target] + back[target, source]


def loss(source, target, labels, metric="cosine", share=0.5):
    """The loss of (N, h, w, A) maps and (N, h, w) labels."""
    total = count = 0
    for x, y, label in zip(source, target, labels, strict=True):
        label = label.reshape(-1)
        _, end, likelihood = one_pair(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]), metric, share)
        positive = (label[end] == label) & (label != 255)
        total += jnp.sum(jnp.where(positive, jnp.minimum(-likelihood, 100), 0))
        count += jnp.sum(positive)
    return total / jnp.maximum(count, 1)
