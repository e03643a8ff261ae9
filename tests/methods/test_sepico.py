"""SePiCo's step, beyond the contract that every method keeps and the published trajectories."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import golden
from methods.test_contract import CLASSES, assert_close, begin, make_batch, stage_config
from ml_collections import ConfigDict

from jaxuda import parallel
from jaxuda.errors import UserError
from jaxuda.losses.segmentation import IGNORE
from jaxuda.methods import Keys
from jaxuda.methods import sepico as method
from jaxuda.models import make_model
from jaxuda.optimizers import make_optimizer
from jaxuda.training.checkpoints import Checkpoints
from jaxuda.training.step import before_update, make_step, to_float

ADAMW = {
    **{"name": "adamw", "head_factor": 1.0, "weight_decay": 0.1, "power": 1.0, "train_norm": True},
    **{"undecayed": (), "warmup_steps": 0, "warmup_ratio": 0.0},
}


def changed(dtype: str = "float32", **fields) -> ConfigDict:
    """The quick recipe with a bank of two rows and all terms, on a tiny network."""
    config = stage_config("sepico", dtype=dtype)
    config.update({"contrast": "bank", "bank": 2, "channels": 8, "reg_weight": 0.1, "threshold": 0.3, **fields})
    return config


def wide_batch(seed: int = 0) -> dict:
    """Target images that are larger than the source's."""
    batch = make_batch(seed)
    image = np.random.default_rng(seed).integers(0, 256, (len(batch["source"]["image"]), 40, 72, 3), np.uint8)
    return {**batch, "target": {"image": image}}


def steps(config: ConfigDict) -> tuple:
    """The state before the first step, and the compiled step of each phase."""
    start, constants, _ = begin(config)
    model = make_model(config.model, CLASSES)
    phases = (0, config.contrast_start)
    made = [make_step(method, model, make_optimizer(config, model), config, phase) for phase in phases]
    return start, [jax.jit(functools.partial(step, constants=constants, seed=0)) for step in made]


@pytest.mark.slow
def test_head_waits_for_the_contrast() -> None:
    """Until then neither decay nor the optimizer's count of updates touches it; the statistics are there at once."""
    config = changed(contrast="dist", contrast_start=2)
    config.optim = ConfigDict(ADAMW)
    start, (early, late) = steps(config)
    states, rows = [start], []
    for index in range(3):
        state, row = (early if index < 2 else late)(states[-1], batch=make_batch(index))
        states.append(jax.device_get(state))
        rows.append(row)
    heads = [state.params["projection"] for state in states]
    for head in heads[1:3]:
        jax.tree.map(np.testing.assert_array_equal, head, heads[0])
    # The first update of Adam moves each weight by the learning rate of step 2, and decays it.
    rate = config.lr * (1 - 2 / config.schedule_steps)
    for before, after in zip(jax.tree.leaves(heads[2]), jax.tree.leaves(heads[3]), strict=True):
        moved = np.abs(after - before * (1 - rate * 0.1))
        assert np.median(moved) == pytest.approx(rate, rel=1e-3) and moved.max() < 1.001 * rate
    assert [("contrast_source" in row, "contrast_target" in row) for row in rows] == [(False, False)] * 2 + [
        (True,) * 2
    ]
    counts = [float(np.sum(state.extra.statistics.count)) for state in states]
    assert counts[0] == 0 and np.all(np.diff(counts) > 0)
    # The teacher's head is the student's until that moves; its running statistics stay at their start.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), states[2].extra.projection, heads[0])
    assert np.any(states[3].extra.projection["conv0"]["kernel"] != heads[0]["conv0"]["kernel"])
    assert not np.any(states[2].extra.projection_stats["bn0"]["mean"])
    assert np.any(states[3].extra.projection_stats["bn0"]["mean"])


@pytest.mark.slow
def test_a_restored_run_goes_on_with_bank_statistics_and_teacher(tmp_path: Path) -> None:
    start, (step, _) = steps(changed(contrast_start=0))
    before = jax.device_get(step(start, batch=wide_batch(0))[0])
    assert np.all(before.extra.bank.count[:4] >= 1) and np.max(before.extra.bank.count) == 2
    saved = Checkpoints(tmp_path)
    saved.save(1, before)
    restored = saved.restore(saved.newest(), start)
    saved.close()
    jax.tree.map(np.testing.assert_array_equal, restored.extra, before.extra)
    (after, row), (again, other) = (step(state, batch=wide_batch(1)) for state in (before, restored))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get((after, row)), jax.device_get((again, other)))


@pytest.mark.slow
def test_two_devices_crop_and_fill_the_bank_as_one() -> None:
    with jax.enable_x64(True):
        config = changed("float64", contrast_start=0)
        start, constants, step = begin(config)
        states = []
        for count in (1, 2):
            devices = jax.local_devices()[:count]
            compiled, state = parallel.compile_step(step, devices), parallel.replicate(start, devices)
            for index in range(2):
                batch = parallel.shard(wide_batch(index), devices)
                state, _ = compiled(state, parallel.replicate(constants, devices), 0, batch)
            states.append(parallel.first(state, devices))
    one, two = states
    assert_close(two, one, 1e-10)
    assert np.max(one.extra.bank.count) == 3  # the zero row has left


@pytest.mark.slow
def test_a_teacher_that_is_never_sure_labels_no_target_pixel() -> None:
    start, (step, _) = steps(changed(contrast_start=0, threshold=1.0))
    _, row = step(start, batch=make_batch())
    assert row["share"] == row["contrast_target"] == row["uniformity_target"] == 0
    assert row["contrast_source"] > 0 and row["uniformity_source"] < 0 and row["ce_mixed"] > 0


@pytest.mark.slow
def test_margins_of_the_target_have_no_labels() -> None:
    """They are cropped with the image; there, only pasted pixels count."""
    config = changed()
    start, constants, _ = begin(config)
    batch = to_float(wide_batch(), "imagenet")
    batch["target"]["trusted"] = jnp.broadcast_to(jnp.arange(72) >= 24, (8, 40, 72)).astype(jnp.uint8)
    carry, _ = before_update(method, make_model(config.model, CLASSES), config, start, constants, 0, batch)
    labelled = np.asarray(carry.values["target"]["label"] != IGNORE)
    first = labelled.argmax(2).min(1)  # of the columns that are trusted, up to 24 of each crop are not
    np.testing.assert_array_equal(labelled, np.broadcast_to(np.arange(48) >= first[:, None, None], labelled.shape))
    assert np.any(first > 0) and np.all(first <= 24)
    weights = np.asarray(carry.values["mixed"]["weight"])[~labelled]
    assert set(np.unique(weights)) == {0, 1}


# The crop


@pytest.mark.parametrize("case", "abcdef")
def test_best_crop_is_the_published_one(case: str) -> None:
    arrays = {key[2:]: value for key, value in golden("sepico_crop").items() if key.startswith(f"{case}_")}
    size = tuple(map(int, arrays["crop_size"]))
    for wide in (False, True):
        with jax.enable_x64(wide):
            y, x = method.best_crop(jnp.asarray(arrays["labels"]), jnp.asarray(arrays["draws"]), size, 0.75, 19)
        np.testing.assert_array_equal((y, y + size[0], x, x + size[1]), arrays["box"])
        np.testing.assert_array_equal(arrays["draws"][arrays["chosen"]], (y, x))
    cropped = arrays["labels"][y : y + size[0], x : x + size[1]]
    np.testing.assert_array_equal(cropped, arrays["cropped_labels"])


def test_corners_reach_both_ends_and_belong_to_their_example() -> None:
    keys = Keys(jax.random.key(0), jnp.arange(200, dtype=jnp.int32))
    corners = np.asarray(method.draw_corners(keys, (12, 20), (12, 16)))
    assert corners.shape == (200, 10, 2)
    assert set(corners[..., 0].flat) == {0} and set(corners[..., 1].flat) == {0, 1, 2, 3, 4}
    part = method.draw_corners(keys._replace(index=jnp.arange(7, 9, dtype=jnp.int32)), (12, 20), (12, 16))
    np.testing.assert_array_equal(part, corners[7:9])


def test_smaller_targets_are_refused() -> None:
    batch = make_batch()
    batch["target"]["image"] = batch["target"]["image"][:, :, :40]
    start, constants, step = begin(changed())
    with pytest.raises(UserError, match=r"smaller here \(40x32, the source's 48x32\): set source.crop"):
        jax.eval_shape(lambda state: step(state, constants, 0, batch), start)


def test_unknown_contrasts_are_refused() -> None:
    with pytest.raises(UserError, match="contrast = 'mean' is unknown; choose one of: proto, bank, dist"):
        begin(changed(contrast="mean"))


# Labels of cells


def test_labels_of_cells_that_reach_beyond_the_image() -> None:
    """60x94 has 8x12 positions at stride 8: the last row of cells lacks a half, the last column only a quarter."""
    labels = jnp.full((1, 60, 94), 2, jnp.int32)
    expected = np.full((1, 8, 12), 2)
    expected[:, 7] = IGNORE
    np.testing.assert_array_equal(method.cell_labels(labels, (8, 12), CLASSES), expected)
    np.testing.assert_array_equal(method.cell_labels(labels[:, :56, :88], (7, 11), CLASSES), 2)


@pytest.mark.parametrize(("levels", "hidden"), [(None, 64), ((16, 24, 40, 64), 36)])
def test_head_reads_the_features_or_all_levels(levels: tuple[int, ...] | None, hidden: int) -> None:
    maps = levels and tuple(jnp.zeros((1, 8 // 2**i, 8 // 2**i, width)) for i, width in enumerate(levels))
    outputs = method.Outputs(jnp.zeros((1, 4, 4, CLASSES)), jnp.zeros((1, 4, 4, 64)), levels=maps)
    head = method._head(method.contrasted(outputs), changed(), "float32")
    shapes = jax.eval_shape(head.init, jax.random.key(0), method.contrasted(outputs))["params"]
    assert shapes["conv0"]["kernel"].shape == (1, 1, sum(levels or (64,)), hidden)
    assert shapes["conv1"]["kernel"].shape == (1, 1, hidden, 8)
