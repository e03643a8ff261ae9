"""The train step: the one place where gradients are taken, averaged over devices, accumulated and applied.

A method gives passes (see `jaxuda.methods`). Their gradients are taken one after another, as the published loops call
backward per loss: only one pass's activations are in memory at a time. With `accumulate` the batch is cut into parts,
all passes run on each part, and one update uses the mean gradient of the parts. It is the gradient of the whole batch
if a loss is a mean over equally many pixels in every part and nothing is computed over the batch; batch normalisation,
Lovasz terms, statistics and memories use one part at a time, and each part updates them.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxuda.errors import UserError
from jaxuda.methods import Carry, Keys
from jaxuda.models.layers import normalise
from jaxuda.training.state import TrainState

PyTree = Any


def make_step(
    method: ModuleType, model: Any, tx: optax.GradientTransformation, config: Any, phase: int = 0
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """`step(state, constants, seed, batch, axis_name=None) -> (state, metrics)`: one optimizer update.

    `batch` is a batch of the input: uint8 images and labels.

    Args:
      method: a module of `jaxuda.methods`.
      model: the network.
      tx: the optimizer that made the state.
      config: the stage's settings.
      phase: 0, or the entry of the method's `starts` at which this step begins to be used.
    """
    update = make_update(method, model, tx, config, phase)

    def step(
        state: TrainState, constants: PyTree, seed: int, batch: PyTree, axis_name: str | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        return update(state, constants, seed, to_float(batch, config.preprocess), axis_name)

    return step


def make_update(
    method: ModuleType,
    model: Any,
    tx: optax.GradientTransformation,
    config: Any,
    phase: int = 0,
    value_and_grad: Callable = jax.value_and_grad,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """As `make_step`, for batches of normalised float images and int32 labels.

    `value_and_grad` has the signature of JAX's; a step that is only checked needs no gradient.
    """
    passes, parts = method.passes(config, phase), config.get("accumulate", 1)

    def update(
        state: TrainState, constants: PyTree, seed: int, batch: PyTree, axis_name: str | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        keys = _keys(state, seed, batch, axis_name)
        shared = {"step": state.step, "model": model, "config": config, "constants": constants, "axis_name": axis_name}

        def gradients(carry: Carry, batch: PyTree, keys: Keys) -> tuple[PyTree, Carry]:
            given = {**shared, "keys": keys}
            return _run_passes(method, passes, value_and_grad, state.params, carry, batch, given)

        carry = Carry(state.batch_stats, state.extra, {}, {})
        # One part needs no loop: XLA's convolutions on CPU are many times slower in a loop.
        grads, carry = (gradients if parts == 1 else _in_parts(gradients, state.params, parts))(carry, batch, keys)
        if axis_name is not None:
            # The losses are already global values: the mean over devices is the gradient of the global loss.
            grads = lax.pmean(grads, axis_name)
        state = state.apply_gradients(grads, tx).replace(batch_stats=carry.batch_stats, extra=carry.extra)
        if hasattr(method, "after_update"):
            updated = method.after_update(state, config=config)
            _same_structure("state", state, updated, "after_update")
            state = updated
        return state, carry.metrics

    return update


def before_update(
    method: ModuleType,
    model: Any,
    config: Any,
    state: TrainState,
    constants: PyTree,
    seed: int,
    batch: PyTree,
    axis_name: str | None = None,
) -> tuple[Carry, PyTree]:
    """How an update of a float `batch` begins: the carry after `before_passes` on its first part, and that part."""
    keys, parts = _keys(state, seed, batch, axis_name), config.get("accumulate", 1)
    if parts > 1:
        batch, index = jax.tree.map(lambda x: x[0], split((batch, keys.index), parts))
        keys = keys._replace(index=index)
    shared = {"step": state.step, "model": model, "config": config, "constants": constants, "axis_name": axis_name}
    carry = Carry(state.batch_stats, state.extra, {}, {})
    carry = _before_passes(method, state.params, carry, batch, {**shared, "keys": keys})
    return _fresh(carry), batch


def to_float(batch: PyTree, preprocess: str) -> PyTree:
    """Converts a batch of the input to normalised float32 images and int32 labels."""
    convert = {
        **dict.fromkeys(("image", "reference"), lambda image: normalise(image, preprocess)),
        "label": lambda label: label.astype(jnp.int32),
    }
    return {
        domain: {name: convert.get(name, lambda x: x)(value) for name, value in arrays.items()}
        for domain, arrays in batch.items()
    }


def _keys(state: TrainState, seed: int, batch: PyTree, axis_name: str | None) -> Keys:
    """The keys of one update. Randomness is derived from the step; the state has no key."""
    return Keys(jax.random.fold_in(jax.random.key(seed), state.step), _global_index(batch, axis_name))


def _global_index(batch: PyTree, axis_name: str | None) -> jax.Array:
    """(N,) int32: the place of each example of this device in the global batch."""
    count = len(jax.tree.leaves(batch)[0])
    index = jnp.arange(count, dtype=jnp.int32)
    return index if axis_name is None else index + count * lax.axis_index(axis_name)


def _run_passes(
    method: ModuleType,
    passes: tuple[Callable, ...],
    value_and_grad: Callable,
    params: PyTree,
    carry: Carry,
    batch: PyTree,
    given: dict[str, Any],
) -> tuple[PyTree, Carry]:
    """The sum of the gradients of all passes on one part of a batch, and the carry after the last of them."""
    grads, loss = None, 0.0
    carry = _before_passes(method, params, carry, batch, given)
    for number, pass_ in enumerate(passes):

        def objective(params: PyTree, pass_: Callable = pass_, carry: Carry = carry) -> tuple[jax.Array, Carry]:
            value, moved = pass_(params, _fresh(carry), batch, **given)
            return value, _joined(pass_, carry, moved)

        (value, carry), more = value_and_grad(objective, has_aux=True)(params)
        grads, loss = more if grads is None else jax.tree.map(jnp.add, grads, more), loss + value
        if number + 1 < len(passes):
            # Otherwise the compiler runs the next forward pass early, and keeps the activations of both.
            params, grads, carry = lax.optimization_barrier((params, grads, carry))
    return grads, carry.log(loss=loss)


def _before_passes(method: ModuleType, params: PyTree, carry: Carry, batch: PyTree, given: dict[str, Any]) -> Carry:
    """The carry that the first pass gets."""
    if not hasattr(method, "before_passes"):
        return carry
    return _joined(method.before_passes, carry, method.before_passes(params, _fresh(carry), batch, **given))


class _Values(dict):
    """Values of a carry; reading one that no earlier pass has kept raises an error that names it."""

    def __missing__(self, name: str) -> Any:
        raise UserError(
            f"a pass reads the value '{name}' of its carry, which no earlier pass of the method has kept (there are: "
            f"{', '.join(sorted(self)) or 'none'}): keep it there with carry.keep({name}=...)"
        )


def _fresh(carry: Carry) -> Carry:
    """The carry that a method's function gets: without metrics, so that a metric written twice is detected."""
    return carry._replace(values=_Values(carry.values), metrics={})


def _joined(function: Callable, before: Carry, after: Carry) -> Carry:
    """The carry that a method's function returned, checked, with the metrics of the functions before it added."""
    for field in ("batch_stats", "extra"):
        _same_structure(
            field, getattr(before, field), getattr(after, field), getattr(function, "__name__", str(function))
        )
    return after._replace(values=dict(after.values), metrics=before.metrics).log(**after.metrics)


def _same_structure(what: str, before: PyTree, after: PyTree, function: str) -> None:
    """Raises a UserError that names the first leaf whose place, shape or dtype has changed."""
    old, new = (
        {
            jax.tree_util.keystr(path, simple=True, separator="."): f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}"
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (before, after)
    )
    for name in dict.fromkeys([*old, *new]):
        if old.get(name) != new.get(name):
            raise UserError(
                f"the method's function '{function}' changes {what}.{name} from {old.get(name, 'nothing')} to "
                f"{new.get(name, 'nothing')}: it must keep its structure, shapes and dtypes"
            )


def _in_parts(gradients: Callable, params: PyTree, parts: int) -> Callable[..., tuple[PyTree, Carry]]:
    """Runs `gradients` on one part of the batch after another: the mean gradient, and the mean of the metrics."""

    def accumulated(carry: Carry, batch: PyTree, keys: Keys) -> tuple[PyTree, Carry]:
        def add(lasting: tuple, part: tuple) -> tuple[tuple, dict]:
            total, batch_stats, extra = lasting
            grads, moved = gradients(Carry(batch_stats, extra, {}, {}), part[0], keys._replace(index=part[1]))
            return (jax.tree.map(jnp.add, total, grads), moved.batch_stats, moved.extra), moved.metrics

        start = (jax.tree.map(jnp.zeros_like, params), carry.batch_stats, carry.extra)
        (total, batch_stats, extra), metrics = lax.scan(add, start, split((batch, keys.index), parts))
        metrics = jax.tree.map(lambda x: jnp.mean(x, axis=0), metrics)
        return jax.tree.map(lambda x: x / parts, total), Carry(batch_stats, extra, {}, metrics)

    return accumulated


def split(batch: PyTree, parts: int) -> PyTree:
    """Each (N, ...) as (parts, N / parts, ...); image n is in part n % parts, on any number of devices."""

    def cut(x: jax.Array) -> jax.Array:
        if len(x) % parts:
            raise UserError(
                f"accumulate={parts} does not divide the {len(x)} images per device: change the stage's batch or "
                "accumulate, or config.devices"
            )
        return jnp.moveaxis(x.reshape(len(x) // parts, parts, *x.shape[1:]), 1, 0)

    return jax.tree.map(cut, batch)
