"""The train step on methods with a few numbers: what it adds, passes on, draws, counts once, and refuses."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxuda import parallel
from jaxuda.errors import UserError
from jaxuda.methods import Carry
from jaxuda.training.state import TrainState
from jaxuda.training.step import make_update

BATCH = {"source": {"image": np.arange(8.0).reshape(8, 1, 1, 1)}}


def start(extra=(), batch_stats=()) -> TrainState:
    return TrainState.create({"model": {"w": np.ones(2)}}, optax.sgd(1.0), batch_stats, extra)


def once(method: SimpleNamespace, state: TrainState, devices: int = 1, **config) -> tuple[TrainState, dict]:
    """One update in double precision."""
    with jax.enable_x64(True):
        chosen = jax.local_devices()[:devices]
        step = parallel.compile_step(make_update(method, None, optax.sgd(1.0), config), chosen)
        state, batch = parallel.replicate(state, chosen), parallel.shard(BATCH, chosen)
        return parallel.first(step(state, (), 0, batch), chosen)


def method(*passes, **functions) -> SimpleNamespace:
    return SimpleNamespace(passes=lambda config, step: passes, **functions)


def plain(params, carry: Carry, batch, **_):
    """Gradient 1 for both weights, and nothing else."""
    return jnp.sum(params["model"]["w"]), carry


def test_gradients_and_losses_of_passes_are_added() -> None:
    def twice(params, carry, batch, **_):
        return 2 * params["model"]["w"][0], carry.log(first=params["model"]["w"][0])

    state, metrics = once(method(plain, twice), start())
    np.testing.assert_array_equal(state.params["model"]["w"], [1 - 3, 1 - 1])
    assert metrics == {"first": 1, "loss": 4}


def test_every_pass_sees_the_parameters_before_the_update_and_what_the_one_before_left() -> None:
    def first(params, carry, batch, **_):
        return params["model"]["w"][0], carry.keep(seen=params["model"]["w"] * 5)._replace(extra=carry.extra + 1)

    def second(params, carry, batch, **_):
        # Values carry no gradient.
        return jnp.sum(carry.values["seen"] * 3) + 0 * params["model"]["w"][0], carry._replace(extra=carry.extra * 10)

    state, metrics = once(method(first, second), start(extra=np.array(1.0)))
    np.testing.assert_array_equal(state.params["model"]["w"], [0, 1])
    assert state.extra == 20 and metrics["loss"] == 1 + 30


def test_before_passes_has_no_gradient() -> None:
    def before(params, carry, batch, **_):
        return carry.keep(scaled=10 * params["model"]["w"]).log(before=1.0)

    def pass_(params, carry, batch, **_):
        return jnp.sum(carry.values["scaled"] * params["model"]["w"]), carry

    state, metrics = once(method(pass_, before_passes=before), start())
    np.testing.assert_array_equal(state.params["model"]["w"], [-9, -9])
    assert metrics == {"before": 1, "loss": 20}


def noise(params, carry, batch, *, keys, axis_name, **_):
    """A mean over examples, each with its own draw; and one draw for the whole batch."""
    own = jax.vmap(lambda key: jax.random.normal(key, (), float))(keys.use("own").examples)
    value = jnp.mean(batch["source"]["image"][:, 0, 0, 0] * own)
    shared = jax.random.normal(keys.use("shared").batch, (), float)
    if axis_name is not None:
        value = jax.lax.pmean(value, axis_name)
    return params["model"]["w"][0] * value + params["model"]["w"][1] * shared, carry


@pytest.mark.parametrize(("devices", "parts"), [(2, 1), (8, 1), (1, 2), (1, 4), (2, 2), (4, 2)])
def test_draws_depend_on_neither_devices_nor_parts(devices: int, parts: int) -> None:
    whole, _ = once(method(noise), start())
    state, _ = once(method(noise), start(), devices, accumulate=parts)
    np.testing.assert_allclose(state.params["model"]["w"], whole.params["model"]["w"], rtol=1e-12)
    assert np.all(state.params["model"]["w"] != 1)


def test_uses_and_steps_draw_anew() -> None:
    def pass_(params, carry, batch, *, keys, **_):
        draws = [jax.random.uniform(keys.use(name).batch) for name in ("a", "b")]
        return plain(params, carry.log(a=draws[0], b=draws[1]), batch)

    with jax.enable_x64(True):
        step = jax.jit(make_update(method(pass_), None, optax.sgd(1.0), {}))
        state, first = step(start(), (), 0, BATCH)
        _, second = step(state, (), 0, BATCH)
        _, other = step(start(), (), 1, BATCH)
    assert len({float(row[name]) for row in (first, second, other) for name in "ab"}) == 6


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_after_update_runs_once_per_update(parts: int) -> None:
    def counted(params, carry, batch, **_):
        return plain(params, carry._replace(extra={**carry.extra, "parts": carry.extra["parts"] + 1}), batch)

    def after(state, *, config):
        return state.replace(extra={**state.extra, "updates": state.extra["updates"] + 1})

    extra = {"parts": np.array(0), "updates": np.array(0)}
    state, _ = once(method(counted, after_update=after), start(extra=extra), accumulate=parts)
    assert state.extra == {"parts": parts, "updates": 1} and state.step == 1


def twice_in_one(params, carry, batch, **_):
    return plain(params, carry.log(ce=1.0).log(ce=2.0), batch)


def ce(params, carry, batch, **_):
    return plain(params, carry._replace(metrics={"ce": 1.0}), batch)


def reads(params, carry, batch, **_):
    return plain(params, carry.keep(other=carry.values["pseudo"]), batch)


def of_extra(change):
    def renames(params, carry, batch, **_):
        return plain(params, carry._replace(extra=change(carry.extra)), batch)

    return renames


def of_norm(params, carry, batch, **_):
    return plain(params, carry._replace(batch_stats={"mean": carry.batch_stats["mean"][None]}), batch)


def loses_step(state, *, config):
    return state.replace(step=state.step.astype(float))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (method(twice_in_one), r"metric 'ce' is written twice"),
        (method(ce, ce), r"metric 'ce' is written twice"),
        (method(lambda p, c, b, **_: plain(p, c.log(loss=1.0), b)), r"metric 'loss' is written twice"),
        (method(reads), r"value 'pseudo' of its carry, which no earlier pass .* \(there are: none\)"),
        (
            method(of_extra(lambda extra: {"bank": extra["bank"].astype(np.float32)})),
            r"'renames' changes extra\.bank from float64\[3\] to float32\[3\]",
        ),
        (
            method(of_extra(lambda extra: {"memory": extra["bank"]})),
            r"'renames' changes extra\.bank from float64\[3\] to nothing",
        ),
        (method(of_norm), r"'of_norm' changes batch_stats\.mean from float64\[2\] to float64\[1, 2\]"),
        (method(plain, after_update=loses_step), r"'after_update' changes state\.step from int"),
        (method(before_passes=lambda p, c, b, **_: c._replace(extra={})), r"changes extra\.bank .* to nothing"),
    ],
)
def test_a_broken_method_is_told_what_it_does(broken: SimpleNamespace, message: str) -> None:
    state = start(extra={"bank": np.zeros(3)}, batch_stats={"mean": np.zeros(2)})
    for parts in (1, 2):
        with pytest.raises(UserError, match=message):
            once(broken, state, accumulate=parts)
