import functools

import dense_association as dense
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import golden
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jaxuda.errors import UserError
from jaxuda.losses.association import aggregate, cycle, cycle_association, positive, smoothness
from jaxuda.models.layers import resize_labels

NAMES = {"cos": "cosine", "kl": "kl"}


def close(actual, expected, tolerance):
    """Compares with a tolerance relative to the largest entry of the tensor."""
    expected = np.asarray(expected)
    assert actual.shape == expected.shape
    error = np.abs(np.asarray(actual) - expected).max(initial=0)
    assert error <= tolerance * max(np.abs(expected).max(initial=0), 1e-12), error


def maps(rng, metric, *shape):
    values = rng.normal(size=shape)
    return np.asarray(jax.nn.softmax(3 * values) if metric == "kl" else values)


# Published numbers ------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def evaluate(source, target, labels, metric, share, block, logits):
    """Value and gradients for both maps, which are features, probabilities or (with `logits`) logits."""

    def loss(source, target):
        if logits:
            source, target = jax.nn.softmax(source), jax.nn.softmax(target)
        return cycle_association(source, target, labels, metric, share, block=block)

    return jax.value_and_grad(loss, (0, 1))(source, target)


follow = jax.jit(cycle, static_argnums=(2, 3, 4))


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("metric", NAMES)
@pytest.mark.parametrize("case", "ab")
def test_loss_and_gradients_equal_the_published_ones(case, metric, share):
    arrays = {key[2:]: value for key, value in golden("plca").items() if key.startswith(f"{case}_")}
    prefix = f"{metric}_agg{int(share > 0)}_"
    run = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
    kind = "features" if metric == "cos" else "logits"
    labels = arrays["src_labels"]
    # One case in double precision with many blocks, the other as in training: single precision, one block.
    wide, block = case == "a", 40 if case == "a" else 512
    with jax.enable_x64(wide):
        maps = [jnp.asarray(arrays[f"{d}_{kind}"], jnp.float64 if wide else jnp.float32) for d in ("src", "trg")]
        value, gradients = evaluate(*maps, labels, NAMES[metric], share, block, metric == "kl")
    np.testing.assert_allclose(value, run["loss_f64"], rtol=1e-9 if wide else 2e-6)
    for domain, gradient in zip(("src", "trg"), gradients, strict=True):
        close(gradient, run[f"grad_{domain}_{kind}"], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("metric", NAMES)
def test_cycles_equal_the_published_ones(metric, share):
    arrays, prefix = golden("plca"), f"b_{metric}_agg{int(share > 0)}_"
    maps = [arrays[f"b_{d}_{'features' if metric == 'cos' else 'logits'}"] for d in ("src", "trg")]
    if metric == "kl":
        maps = [jax.nn.softmax(x) for x in maps]
    found, labels = follow(*maps, NAMES[metric], share, 33), arrays["b_src_labels"]
    np.testing.assert_array_equal(found.target, arrays[f"{prefix}mid_index"])
    np.testing.assert_array_equal(found.source, arrays[f"{prefix}end_index"])
    np.testing.assert_array_equal(positive(found, labels.reshape(len(labels), -1)), arrays[f"{prefix}positive"])
    np.testing.assert_allclose(np.exp(found.log_likelihood), arrays[f"{prefix}sim"], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("metric", NAMES)
def test_aggregated_maps_and_probability_gradients_equal_the_published_ones(metric):
    arrays = golden("plca")
    maps = [arrays[f"a_{d}_{'features' if metric == 'cos' else 'logits'}"] for d in ("src", "trg")]
    if metric == "kl":
        maps = [jax.nn.softmax(x) for x in maps]
        _, gradients = evaluate(*maps, arrays["a_src_labels"], "kl", 0.5, 40, False)
        for domain, gradient in zip(("src", "trg"), gradients, strict=True):
            close(gradient, arrays[f"a_kl_agg1_grad_{domain}_probs"], 1e-5)
    found = jax.jit(functools.partial(aggregate, metric=NAMES[metric], share=1.0, block=17))(maps[1])
    close(found, arrays[f"a_{metric}_agg1_aggregated_trg"], 1e-5)


@pytest.mark.parametrize("threshold", [10, 0])
def test_smoothness_equals_the_published_one(threshold):
    arrays = golden("plca")
    value, gradient = jax.value_and_grad(smoothness)(jnp.asarray(arrays["lsr_logits"]), threshold)
    np.testing.assert_allclose(value, arrays[f"lsr_thres{threshold}_loss"], rtol=1e-5)
    close(gradient, arrays[f"lsr_thres{threshold}_grad_logits"], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", "ab")
def test_lfass_code_and_its_equations(case):
    """The replication's code normalises column j with the statistics of row j, and lets gradients through them.

    With only that changed, our oracle gives its numbers. From its aggregated target on, our cycles, which do not depend
    on the normalisation, are its cycles.
    """
    arrays = {key[2:]: value for key, value in golden("lfass").items() if key.startswith(f"{case}_")}
    size = arrays["labels_small"].shape[1:]
    labels = resize_labels(arrays["labels"], size)
    np.testing.assert_array_equal(labels, arrays["labels_small"])
    flat = jnp.asarray(labels.reshape(-1))

    def code(source, target):
        x, y = (z.reshape(-1, z.shape[-1]) for z in (source, target))

        def crooked(s):
            mean = jnp.mean(s, axis=1)
            return (s - mean) / jnp.sqrt(jnp.sum(jnp.square(s - mean), axis=1) / (len(s) - 1))

        own = jax.nn.softmax(crooked(dense.similarities(y, y, "cosine")))
        y = 0.5 * y + 0.5 * own @ y
        s = dense.similarities(x, y, "cosine")
        there, back = (jax.nn.log_softmax(crooked(z)) for z in (s, s.T))
        middle, end = jnp.argmax(s, axis=1), jnp.argmax(s, axis=0)
        rows = jnp.arange(len(x))
        kept = (flat == flat[end[middle]]) & (flat != 255)
        terms = there[rows, middle] + back[middle, end[middle]]
        return -jnp.sum(jnp.where(kept, terms, 0)) / jnp.sum(kept), s

    with jax.enable_x64(True):
        source, target = (jnp.asarray(arrays[f"{d}_features"], jnp.float64) for d in ("src", "trg"))
        (value, s), gradients = jax.jit(jax.value_and_grad(code, (0, 1), has_aux=True))(source, target)
    np.testing.assert_allclose(value, arrays["loss_f64"], rtol=1e-9)
    np.testing.assert_allclose(s, arrays["cos_src_trg"], atol=1e-6)
    for domain, gradient in zip(("src", "trg"), gradients, strict=True):
        close(gradient, arrays[f"grad_{domain}_features"], 1e-5)

    found = cycle(arrays["src_features"], arrays["aggregated_trg"], aggregation=0.0)
    kept = np.flatnonzero(positive(found, flat[None])[0])
    np.testing.assert_array_equal(np.stack([kept, found.target[0][kept], found.source[0][kept]], 1), arrays["pairs"])


# The dense formulation ---------------------------------------------------------------------------------------


oracle = jax.jit(jax.value_and_grad(dense.loss, (0, 1)), static_argnums=(3, 4))
# (source grid, target grid, share, block): one position, blocks of one, a last block that is smaller, one block.
SHAPES = [
    ((1, 1), (1, 1), 0.5, 512),
    ((1, 4), (3, 1), 1.0, 1),
    ((5, 7), (4, 6), 0.3, 8),
    ((6, 6), (3, 5), 0.0, 512),
]


@pytest.mark.slow
@pytest.mark.parametrize("metric", NAMES.values())
@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_streaming_equals_dense(shape, metric, seed):
    rng, (grid, other, share, block) = np.random.default_rng(seed), shape
    with jax.enable_x64(True):
        source, target = maps(rng, metric, 2, *grid, 4), maps(rng, metric, 2, *other, 4)
        labels = rng.choice([0, 1, 255], source.shape[:-1])
        value, gradients = evaluate(source, target, labels, metric, share, block, False)
        expected, oracles = oracle(source, target, labels, metric, share)
        np.testing.assert_allclose(value, expected, rtol=1e-9, atol=1e-12)
        for gradient, other in zip(gradients, oracles, strict=True):
            np.testing.assert_allclose(gradient, other, rtol=1e-7, atol=1e-9 * max(np.abs(other).max(), 1))


@pytest.mark.parametrize("block", [7, 512])
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_of_equals_the_first_counts(block, seed):
    """Features whose cosines are exact, so that many are exactly equal."""
    rng = np.random.default_rng(seed)
    vectors = np.array([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [2, 2, 2, 2], [-1, -1, -1, -1]], np.float32)
    x, y = vectors[rng.integers(0, 5, 30)], vectors[rng.integers(0, 5, 17)]
    found = follow(x, y, "cosine", 0.0, block)
    target, source, likelihood = jax.jit(dense.one_pair, static_argnums=(2, 3))(x, y, "cosine", 0.0)
    np.testing.assert_array_equal(found.target[0], target)
    np.testing.assert_array_equal(found.source[0], source)
    np.testing.assert_allclose(found.log_likelihood[0], likelihood, rtol=1e-5)


# Edges -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", NAMES.values())
def test_no_positive_gives_zero(metric):
    rng = np.random.default_rng(0)
    source, target = (maps(rng, metric, 1, 3, 4, 5).astype(np.float32) for _ in range(2))
    # No labels; and labels so different that only a cycle that returns to its own pixel is positive.
    for labels in (np.full((1, 3, 4), 255), np.arange(12).reshape(1, 3, 4)):
        value, gradients = evaluate(source, target, labels, metric, 0.5, 512, False)
        found = follow(source, target, metric, 0.5, 512)
        ended = positive(found, labels.reshape(1, -1))
        assert np.array_equal(ended[0], (found.source[0] == np.arange(12)) & (labels.reshape(-1) != 255))
        assert np.isfinite(value) and all(np.isfinite(gradient).all() for gradient in gradients)
        if not ended.any():
            assert value == 0 and not any(np.any(gradient) for gradient in gradients)


@pytest.mark.parametrize("metric", NAMES.values())
@pytest.mark.parametrize("sizes", [(1, 1), (9, 1), (9, 9)])
def test_constant_maps_are_finite(metric, sizes):
    """Also with one position, and with zeros, which have no direction."""
    labels = np.zeros((1, 1, sizes[0]), np.int32)
    for constant in (0.0, 0.2, 1.0):
        source, target = (np.full((1, 1, size, 5), constant, np.float32) for size in sizes)
        loss, gradients = evaluate(source, target, labels, metric, 0.5, 4, False)
        np.testing.assert_allclose(loss, np.log(sizes[0]) + np.log(sizes[1]), atol=1e-5)
        assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_flat_maps_are_one_pair_and_bfloat16_is_widened():
    rng = np.random.default_rng(0)
    source, target, labels = rng.normal(size=(6, 5)), rng.normal(size=(9, 5)), np.arange(6) // 3
    expected = cycle_association(source.reshape(1, 2, 3, 5), target.reshape(1, 3, 3, 5), labels.reshape(1, 2, 3))
    np.testing.assert_allclose(cycle_association(source, target, labels), expected, rtol=1e-6)
    assert cycle_association(jnp.bfloat16(source), jnp.bfloat16(target), labels).dtype == jnp.float32


@pytest.mark.parametrize(
    ("source", "target", "labels", "message"),
    [
        ((1, 3, 4, 5), (1, 3, 4, 6), (1, 3, 4), r"\(1, 3, 4, 5\).*\(1, 3, 4, 6\).*channels"),
        ((1, 3, 4, 5), (1, 3, 4, 5), (1, 4, 3), r"labels \(1, 4, 3\).*\(1, 3, 4, 5\)"),
        ((2, 3, 4, 5), (1, 3, 4, 5), (2, 3, 4), r"\(2, 3, 4, 5\).*\(1, 3, 4, 5\).*images"),
        ((12, 5), (1, 3, 4, 5), (12,), r"\(12, 5\).*\(1, 3, 4, 5\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(source, target, labels, message):
    with pytest.raises(UserError, match=message):
        cycle_association(jnp.zeros(source), jnp.zeros(target), jnp.zeros(labels, int))


def test_unknown_metric():
    with pytest.raises(UserError, match=r"'dot'.*cosine, kl"):
        cycle_association(jnp.zeros((4, 5)), jnp.zeros((4, 5)), jnp.zeros(4, int), "dot")


@pytest.mark.slow
@pytest.mark.parametrize("metric", NAMES.values())
def test_devices_together_equal_one_device(metric):
    """Positives are counted over all devices; one of them has none."""
    rng, devices = np.random.default_rng(3), 4
    labels = rng.choice([0, 1, 255], (devices, 4, 5))
    labels[1] = 255
    with jax.enable_x64(True):
        images, others, weight = rng.normal(size=(devices, 4, 5, 3)), rng.normal(size=(devices, 3, 4, 3)), np.eye(3)

        def loss(weight, images, others, labels, axis_name=None):
            x, y = jnp.tanh(images @ weight), jnp.tanh(others @ weight)
            smooth = smoothness(x, axis_name=axis_name)
            if metric == "kl":
                x, y = jax.nn.softmax(x), jax.nn.softmax(y)
            return smooth + cycle_association(x, y, labels, metric, axis_name=axis_name, block=8)

        value, gradient = jax.jit(jax.value_and_grad(loss))(weight, images, others, labels)

        def step(*local):
            result, gradient = jax.value_and_grad(functools.partial(loss, axis_name="device"))(weight, *local)
            return result, lax.pmean(gradient, "device")

        values, gradients = jax.pmap(step, axis_name="device")(images[:, None], others[:, None], labels[:, None])
        np.testing.assert_allclose(values, np.full(devices, value), rtol=1e-12)
        np.testing.assert_allclose(gradients, np.tile(gradient, (devices, 1, 1)), rtol=1e-9, atol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("metric", NAMES.values())
def test_memory_grows_with_positions_not_with_their_square(metric):
    def temporary(length):
        shapes = jax.ShapeDtypeStruct((length, 16), "float32"), jax.ShapeDtypeStruct((length,), "int32")
        loss = functools.partial(cycle_association, metric=metric, block=128)
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(shapes[0], shapes[0], shapes[1]).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporary(2048), temporary(8192)
    assert large < 4.5 * small
    assert large < 8192 * 8192 * 4 / 4
