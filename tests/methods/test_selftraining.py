"""The pieces of self-training against numbers of the published code, and what they draw at random."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import golden, random_variables
from ml_collections import ConfigDict
from plugins import encoder_decoder

from jaxuda.errors import UserError
from jaxuda.methods import Keys, selftraining
from jaxuda.methods.selftraining import Coins
from jaxuda.models.layers import denormalise, normalise


def case_of(name: str, case: str) -> dict[str, np.ndarray]:
    return {key[2:]: array for key, array in golden(name).items() if key.startswith(f"{case}_")}


def keys(count: int = 4) -> Keys:
    return Keys(jax.random.key(0), jnp.arange(count))


def on_devices(function, *arrays):
    """`function(..., axis_name=...)` on as many devices as the arrays have examples, one example on each."""
    parts = (array[:, None] for array in arrays)
    return jax.pmap(functools.partial(function, axis_name="device"), axis_name="device")(*parts)


# The teacher ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case, alpha", [("a", 0.999), ("b", 0.5)])
def test_the_teacher_follows_the_student(case, alpha):
    arrays, given = golden("ema"), case_of("ema", case)
    teacher = {name: np.zeros_like(arrays[f"student_{name}"][0]) for name in "wb"}
    move = jax.jit(selftraining.follow, static_argnames="alpha")
    for step in range(6):
        student = {name: arrays[f"student_{name}"][step] for name in "wb"}
        teacher = move(teacher, student, jnp.int32(step), alpha=alpha)
        for name in "wb":
            assert teacher[name].dtype == np.float32
            np.testing.assert_allclose(teacher[name], given[f"teacher_{name}_f64"][step], rtol=0, atol=3e-7)


def test_weights_of_late_steps():
    """Also in float32, in which 1 - 0.999 is not 0.001."""
    arrays = golden("ema")
    for step, alpha in zip(arrays["iterations"][1:], arrays["iteration_alpha_f64"][1:], strict=True):
        kept = selftraining.follow(jnp.float32(1), jnp.float32(0), jnp.int32(step), 0.999)
        taken = selftraining.follow(jnp.float32(0), jnp.float32(1), jnp.int32(step), 0.999)
        np.testing.assert_allclose([kept, taken], [alpha, 1 - alpha], rtol=3e-7)


@pytest.fixture
def network():
    model = encoder_decoder.make({"width": 4, "dropout": 0.5, "depth": False, "dtype": "float32"}, 3)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16, 3)), jnp.float32)
    return model, random_variables(model, images), images


def test_a_forward_pass_of_the_teacher(network):
    """Batch statistics as in training, its own running statistics moved, nothing dropped, the same on two devices."""
    model, variables, images = network
    teacher = selftraining.start_teacher(variables)
    assert selftraining.start_teacher({"params": {}}).batch_stats == {}
    outputs, moved = jax.jit(functools.partial(selftraining.teacher_forward, model))(teacher, images)
    calm = model.clone(dropout=0.0)
    expected, updated = calm.apply(variables, images, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(outputs.main, expected.main, rtol=1e-5, atol=1e-6)
    assert np.abs(outputs.main - calm.apply(variables, images).main).max() > 0.1  # batch statistics matter
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), moved.batch_stats, updated["batch_stats"])
    jax.tree.map(np.testing.assert_array_equal, moved.params, variables["params"])
    split, shared = on_devices(functools.partial(selftraining.teacher_forward, model, teacher), images)
    np.testing.assert_allclose(split.main[:, 0], outputs.main, rtol=1e-4, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-4, atol=1e-6), shared.batch_stats, moved.batch_stats
    )


# Pseudo-labels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", "abc")
def test_pseudo_labels_and_their_weights(case):
    given = case_of("pseudo_weight", case)
    logits, top, bottom = given["teacher_logits"], int(given["ignore_top"]), int(given["ignore_bottom"])
    labels, share, confidence = jax.jit(selftraining.pseudo_labels)(logits, 0.968)
    assert labels.dtype == jnp.int32
    np.testing.assert_array_equal(labels, given["pseudo_label"])
    np.testing.assert_allclose(confidence, given["max_prob"], rtol=1e-6)
    np.testing.assert_allclose(share, given["share_f64"], rtol=1e-6)
    images, columns = {"image": np.zeros((*labels.shape, 3))}, np.arange(labels.shape[2]) > 1
    np.testing.assert_allclose(weights(share, images, top, bottom), given["weight_rows"], rtol=1e-6)
    np.testing.assert_array_equal(weights(share, images), np.full(labels.shape, share))
    images["trusted"] = np.broadcast_to(columns, labels.shape).astype(np.uint8)
    np.testing.assert_allclose(weights(share, images, top, bottom), given["weight_rows"] * columns, rtol=1e-6)
    if len(logits) > 1:
        _, shares, _ = on_devices(functools.partial(selftraining.pseudo_labels, threshold=0.968), logits)
        np.testing.assert_allclose(shares, np.full(len(logits), share), rtol=1e-6)


def test_margins_that_leave_nothing_are_refused():
    with pytest.raises(UserError, match="ignore_top=15 and ignore_bottom=120 leave none of the 135 rows"):
        weights(jnp.float32(1), {"image": np.zeros((2, 135, 4, 3))}, 15, 120)


def weights(share: jax.Array, images: dict, top: int = 0, bottom: int = 0) -> jax.Array:
    return selftraining.trusted(share, images, ConfigDict({"ignore_top": top, "ignore_bottom": bottom}))


# ClassMix ---------------------------------------------------------------------------------------------------


def flags(classes) -> np.ndarray:
    """(20,) bool from class ids, the last one for 255."""
    return np.isin([*range(19), 255], classes)


@pytest.mark.parametrize("case", "abc")
def test_class_mix(case):
    given = case_of("classmix", case)
    labels = given["source_label"]
    np.testing.assert_array_equal(selftraining.present_classes(labels, 19), flags(given["present_classes"]))
    if len(labels) > 1:
        present = on_devices(functools.partial(selftraining.present_classes, num_classes=19), labels)
        np.testing.assert_array_equal(present, [flags(given["present_classes"])] * len(labels))
    mask = selftraining.class_mask(labels, jnp.asarray([flags(row) for row in given["chosen_classes"]]))
    np.testing.assert_array_equal(mask, given["mask"])
    for source, target, mixed in (
        (given["source"], given["target"], given["mixed"]),
        (labels, given["pseudo_label"], given["mixed_label"]),
        (1, given["pseudo_weight"], given["mixed_weight"]),
    ):
        found = selftraining.mix(mask, source, jnp.asarray(target))
        assert found.dtype == target.dtype
        np.testing.assert_array_equal(found, mixed)


def test_half_of_the_present_classes_are_drawn():
    arrays, draw = golden("classmix"), jax.jit(selftraining.draw_classes)
    for present, chosen in zip(arrays["count_present"], arrays["count_chosen"], strict=True):
        found = np.asarray(draw(keys(), flags([*range(19), 255][20 - present :])))
        assert found.sum(1).tolist() == [chosen] * 4
        assert not found[:, : 20 - present].any()
    assert not draw(keys(), np.zeros(20, bool)).any()


def test_every_present_class_is_drawn_as_often_by_every_image():
    drawn = np.asarray(selftraining.draw_classes(keys(4000), flags([1, 4, 7, 255])))
    np.testing.assert_allclose(drawn.mean(0), 0.5 * flags([1, 4, 7, 255]), atol=0.04)
    pairs = np.unique(drawn, axis=0, return_counts=True)[1]
    assert len(pairs) == 6 and pairs.min() > 550
    again = selftraining.draw_classes(Keys(jax.random.key(0), jnp.arange(7, 9)), flags([1, 4, 7, 255]))
    np.testing.assert_array_equal(again, drawn[7:9])


# Masked images ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", "abcd")
def test_block_masks(case):
    given = case_of("masking", case)
    size = given["image"].shape[1:3]
    draws = selftraining.block_draws(keys(len(given["draws"])), size, int(given["block"]))
    assert draws.shape == given["draws"].shape and len(np.unique(draws)) == draws.size
    mask = selftraining.block_mask(jnp.asarray(given["draws"]), size, float(given["ratio"]))
    np.testing.assert_array_equal(mask, given["mask"])
    np.testing.assert_array_equal(given["image"] * mask[..., None], given["masked"])


def test_a_block_larger_than_the_image_is_refused():
    with pytest.raises(UserError, match="mask_block=64 is too large for images of 32 rows and 96 columns"):
        selftraining.block_draws(keys(), (32, 96), 64)


# Augmentation -----------------------------------------------------------------------------------------------


def parameters(count: int, first: int = 0, **options) -> tuple[np.ndarray, ...]:
    """The factors, orders and deviations that `augment` draws."""
    draw = jax.jit(functools.partial(selftraining.augment_parameters, strength=0.2, dtype=np.float32, **options))
    return tuple(map(np.asarray, draw(Keys(jax.random.key(0), first + jnp.arange(count)))))


def test_coins():
    coins = jax.vmap(lambda key: selftraining.flip_coins(Keys(key, jnp.arange(2))))(
        jax.random.split(jax.random.key(1), 4000)
    )
    np.testing.assert_allclose([coins.jitter.mean(), coins.blur.mean()], [0.8, 0.5], atol=0.03)
    assert abs(np.corrcoef(coins.jitter, coins.blur)[0, 1]) < 0.06


def test_parameters_of_the_augmentation():
    factors, order, sigma = parameters(4000)
    np.testing.assert_allclose(factors.min(0), [0.8, 0.8, 0.8, -0.2], atol=0.002)
    np.testing.assert_allclose(factors.max(0), [1.2, 1.2, 1.2, 0.2], atol=0.002)
    np.testing.assert_allclose([sigma.min(), sigma.max()], [0.15, 1.15], atol=0.005)
    counts = np.unique(order, axis=0, return_counts=True)[1]
    assert len(counts) == 24 and counts.min() > 110 and counts.max() < 230
    drawn = np.column_stack([factors, sigma, order[:, 0]])
    assert np.abs(np.corrcoef(drawn.T) - np.eye(6)).max() < 0.08


def test_a_batch_may_share_order_and_deviation():
    factors, order, sigma = parameters(5, per_batch=True)
    assert len(np.unique(sigma)) == 1 and len(np.unique(order, axis=0)) == 1
    np.testing.assert_array_equal(factors, parameters(5)[0])
    # The share of another device.
    later = parameters(2, first=3, per_batch=True)
    for part, whole in zip(later, (factors, order, sigma), strict=True):
        np.testing.assert_array_equal(part, whole[3:])


def test_coins_decide_what_is_done():
    images = normalise(np.random.default_rng(0).integers(0, 256, (2, 30, 40, 3)), "imagenet")
    augment = jax.jit(lambda images, *coins: selftraining.augment(images, keys(2), "imagenet", coins=Coins(*coins)))
    np.testing.assert_array_equal(augment(images, False, False), images)
    jittered, blurred, both = augment(images, True, False), augment(images, False, True), augment(images, True, True)
    assert np.abs(jittered - images).max() > 0.1 and np.abs(blurred - images).max() > 0.1
    np.testing.assert_allclose(augment(jittered, False, True), both, rtol=0, atol=1e-4)


def test_colours_are_changed_alike_whatever_their_normalisation():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 30, 40, 3))
    factors, order, sigma = parameters(2)

    def change(preprocess):
        images = normalise(pixels, preprocess)
        return denormalise(
            selftraining.augmented(images, preprocess, Coins(True, True), factors, order, sigma), preprocess
        )

    found = jax.jit(lambda: [change(preprocess) for preprocess in ("imagenet", "caffe", "efficientnet")])()
    np.testing.assert_allclose(found[1:], [found[0]] * 2, rtol=0, atol=5e-3)
    assert found[0].min() > -0.01 and found[0].max() < 255.01
