"""DAFormer's step, beyond the contract that every method keeps and the published trajectories."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import random_variables
from methods.test_contract import CLASSES, assert_close, begin, make_batch, stage_config
from ml_collections import ConfigDict
from test_stages import DOMAINS

from configs import common, daformer, mic
from jaxuda import parallel
from jaxuda.cli import MISTAKE
from jaxuda.data.labels import label_space
from jaxuda.errors import UserError
from jaxuda.losses.segmentation import IGNORE, weighted_cross_entropy
from jaxuda.main import main
from jaxuda.methods import Carry, Keys
from jaxuda.methods import daformer as method
from jaxuda.methods.selftraining import start_teacher
from jaxuda.methods.supervised import lovasz_term
from jaxuda.models import Outputs, make_model
from jaxuda.pipeline.stages import missing_weights, plan
from jaxuda.pipeline.tracing import check_steps
from jaxuda.training.step import to_float

MARGINS = {"ignore_top": 2, "ignore_bottom": 5}
KEYS = Keys(jax.random.key(3), jnp.arange(8, dtype=jnp.int32))


def changed(**fields) -> ConfigDict:
    config = stage_config("daformer")
    config.update(fields)
    return config


@functools.cache
def prepared(label: int | None = None, columns: int = 0, **fields) -> Carry:
    """The carry after `before_passes` on `float_batch(label, columns)`."""
    config = changed(**fields)
    model = make_model(config.model, CLASSES)
    variables = random_variables(model, jnp.zeros((1, 32, 48, 3)))

    @jax.jit
    def run(variables: dict, batch: dict) -> Carry:
        carry = Carry(variables["batch_stats"], start_teacher(variables), {}, {})
        return method.before_passes(
            variables["params"], carry, batch, model=model, config=config, keys=KEYS, axis_name=None
        )

    return run(variables, float_batch(label, columns))


def float_batch(label: int | None = None, columns: int = 0) -> dict:
    """A batch of normalised images; `label`: the only class of the source; `columns` of the target are not trusted."""
    batch = to_float(make_batch(), "imagenet")
    if columns:
        trusted = np.ones(batch["target"]["image"].shape[:3], np.uint8)
        trusted[:, :, :columns] = 0
        batch["target"]["trusted"] = trusted
    if label is not None:
        batch["source"]["label"] = jnp.full_like(batch["source"]["label"], label)
    return batch


@pytest.mark.slow
def test_margins_of_the_target_do_not_count() -> None:
    """Neither in masked images nor, but for pasted pixels, in mixed ones."""
    plain, carry = prepared(), prepared(columns=20)
    for name in ("masked", "mixed"):
        expected, found = (np.array(each.values[name]["weight"]) for each in (plain, carry))
        pasted = (found == 1) if name == "mixed" else np.zeros_like(found, bool)
        assert np.any(expected[:, :, :20]) and not np.any(found[:, :, :20][~pasted[:, :, :20]])
        np.testing.assert_array_equal(found[:, :, 20:], expected[:, :, 20:])


def test_only_pasted_pixels_count_where_the_teacher_is_never_sure() -> None:
    batch, carry = float_batch(), prepared(threshold=1.0)
    mixed, masked = carry.values["mixed"], carry.values["masked"]
    assert carry.metrics["share"] == 0 and not np.any(masked["weight"])
    pasted = mixed["weight"] == 1
    assert set(np.unique(mixed["weight"])) == {0, 1}
    np.testing.assert_array_equal(mixed["label"][pasted], batch["source"]["label"][pasted])
    outputs = Outputs(jax.random.normal(jax.random.key(0), (8, 32, 48, CLASSES)), None)
    loss, gradient = jax.value_and_grad(
        lambda logits: method.pixel_loss(Outputs(logits, None), masked, changed(), None)
    )(outputs.main)
    assert loss == 0 and not np.any(gradient)
    assert method.pixel_loss(outputs, mixed, changed(), None) > 0


def test_pseudo_labels_weigh_as_much_as_the_teacher_is_sure() -> None:
    carry = prepared(**MARGINS)
    share, mixed, masked = carry.metrics["share"], carry.values["mixed"], carry.values["masked"]
    assert 0.05 < share < 0.95
    assert set(np.unique(mixed["weight"])) == {0, float(share), 1}
    assert not np.any(masked["weight"][:, :2]) and not np.any(masked["weight"][:, -5:])
    np.testing.assert_array_equal(masked["weight"][:, 2:-5], share)
    blocks = np.abs(masked["image"]).max(-1).reshape(8, 4, 8, 6, 8).max((2, 4))
    assert 0.5 < np.mean(blocks == 0) < 0.9  # 0.7 of the blocks are hidden, each as a whole


def test_a_source_of_one_class_replaces_the_target() -> None:
    mixed = prepared(label=2, strength=0.0).values["mixed"]
    np.testing.assert_array_equal(mixed["label"], 2)
    np.testing.assert_array_equal(mixed["weight"], 1)
    difference = np.abs(mixed["image"] - float_batch()["source"]["image"])
    assert np.median(difference) < 1  # blurred at most


def test_classes_that_never_occur_have_no_distance() -> None:
    """And no gradient that is not finite; with () all labelled positions count."""
    labels = jnp.asarray(make_batch()["source"]["label"], jnp.int32)
    labels = jnp.where(labels == 4, 3, labels)
    maps = jax.random.normal(jax.random.key(0), (2, 8, 4, 6, 10))

    def distance(features: jax.Array, classes: tuple[int, ...]) -> jax.Array:
        outputs, fixed = Outputs(None, features), Outputs(None, maps[1])
        return method.reference_distance(outputs, fixed, labels, CLASSES, changed(feature_classes=classes), None)

    value, gradient = jax.value_and_grad(distance)(maps[0], (4,))
    assert value == 0 and not np.any(gradient)
    cells = np.array(labels[:, 4::8, 4::8])
    apart = np.linalg.norm(maps[0] - maps[1], axis=-1)
    cells[:, 0] = IGNORE  # three of eight rows are ignored
    for classes in ((1, 3), ()):
        counted = np.isin(cells, classes) if classes else cells != IGNORE
        np.testing.assert_allclose(distance(maps[0], classes), apart[counted].mean(), rtol=1e-5)


def test_distance_of_maps_that_do_not_divide_the_image() -> None:
    """The last stage of the backbone is compared, where whole cells of labels have a position."""
    labels = jnp.ones((1, 36, 50), jnp.int32)
    maps = jax.random.normal(jax.random.key(0), (2, 1, 5, 7, 10))
    student, fixed = (Outputs(None, None, levels=(None, each)) for each in maps)
    found = method.reference_distance(student, fixed, labels, CLASSES, changed(), None)
    expected = np.linalg.norm(maps[0] - maps[1], axis=-1)[:, :4, :6].mean()
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_source_loss_has_the_terms_of_the_supervised_loss() -> None:
    source = float_batch()["source"]
    main = jax.random.normal(jax.random.key(0), (8, 4, 6, CLASSES))
    config = changed(align_corners=False, lambda_aux=0.3)
    loss, terms = method.source_loss(Outputs(main, None), source, config, None)
    lovasz, expected = lovasz_term(Outputs(main, None), source, config, None)
    assert terms == {"ce": terms["ce"], **expected} and expected["lovasz"] > 0.1
    np.testing.assert_allclose(loss, terms["ce"] + 0.75 * expected["lovasz"], rtol=1e-6)
    np.testing.assert_allclose(lovasz, 0.75 * expected["lovasz"], rtol=1e-6)
    config.lambda_lovasz = 0.0
    assert method.source_loss(Outputs(main, None), source, config, None)[0] == terms["ce"]
    with_aux = method.pixel_loss(Outputs(main, None, aux=main), source, config, None)
    np.testing.assert_allclose(with_aux, 1.3 * terms["ce"], rtol=1e-6)


def test_class_weights() -> None:
    logits = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    labels = jnp.asarray(np.random.default_rng(0).choice([0, 1, 2, IGNORE], (2, 8, 8)), jnp.int32)
    images = {"image": jnp.zeros((2, 8, 8, 3)), "label": labels, "weight": jnp.full(labels.shape, 0.5)}
    config = changed(class_weights=(1.0, 2.0, 5.0))
    parts = [weighted_cross_entropy(logits, jnp.where(labels == c, c, IGNORE)) for c in range(3)]
    expected = 0.5 * (parts[0] + 2 * parts[1] + 5 * parts[2])
    np.testing.assert_allclose(method.pixel_loss(Outputs(logits, None), images, config, None), expected, rtol=1e-5)


@pytest.mark.slow
def test_separate_masks_on_two_devices() -> None:
    """They use the first images of the whole batch, or of the whole part, on any number of devices."""
    with jax.enable_x64(True):
        config = changed(mask_images="separate", accumulate=2)
        config.model.dtype = "float64"
        state, constants, step = begin(config)
        ends = []
        for count in (1, 2):
            devices = jax.local_devices()[:count]
            compiled = parallel.compile_step(step, devices)
            given = [parallel.replicate(each, devices) for each in (state, constants)]
            after, metrics = compiled(*given, 0, parallel.shard(make_batch(), devices))
            ends.append(parallel.first(after, devices))
    assert_close(ends[1], ends[0], 1e-10)
    assert np.all(metrics["ce_masked"] > 0)


def test_separate_masks_hide_parts_of_the_first_images() -> None:
    masked = prepared(mask_images="separate").values["masked"]
    batch = float_batch()
    assert masked["image"].shape == (2, 32, 48, 3)
    np.testing.assert_array_equal(masked["label"][0], batch["source"]["label"][0])
    np.testing.assert_array_equal(masked["weight"][0], 1)
    for shown, image in zip(masked["image"], (batch["source"]["image"][0], batch["target"]["image"][0]), strict=True):
        kept = np.any(shown != 0, axis=-1)
        assert 0.05 < kept.mean() < 0.6
        np.testing.assert_array_equal(shown[kept], image[kept])


@pytest.mark.slow
def test_masked_tokens() -> None:
    """VFM-UDA: images are complete, and the network hides their tokens; one without tokens is refused."""
    config = changed(mask_images="tokens")
    masked = prepared(mask_images="tokens").values["masked"]
    assert np.mean(np.abs(masked["image"]).max(-1) == 0) < 0.01 and np.any(masked["weight"])

    def loss(model: object, variables: dict, mask_ratio: float) -> float:
        config.mask_ratio = mask_ratio
        carry = Carry(variables.get("batch_stats", {}), None, {}, {}).keep(masked=masked)
        params = {"model": variables["params"]}
        return method.masked_pass(params, carry, {}, model=model, config=config, keys=KEYS, axis_name=None)[0]

    model = make_model({"name": "dinov2", "width": 8, "blocks": (1,), "grid": 3}, CLASSES)
    variables = random_variables(model, jnp.zeros((1, 32, 48, 3)))
    none, most, again = (loss(model, variables, ratio) for ratio in (0.0, 0.7, 0.7))
    assert none != most == again
    model = make_model(config.model, CLASSES)
    with pytest.raises(UserError, match="'tokens' hides tokens of the network, and this network has none"):
        loss(model, random_variables(model, jnp.zeros((1, 32, 48, 3))), 0.7)


def test_a_teacher_that_sees_mirror_images_too() -> None:
    """Its probabilities are the mean of both views: those of a mirrored image are mirrored."""
    images = float_batch()["target"]["image"]
    model = make_model(changed().model, CLASSES)
    teacher = start_teacher(random_variables(model, images[:1]))

    @functools.partial(jax.jit, static_argnums=1)
    def probabilities(images: jax.Array, flip: bool) -> jax.Array:
        config = changed(teacher_flip=flip)
        return jax.nn.softmax(method.teacher_logits(model, teacher, images, config, None)[0])

    plain, mirrored = probabilities(images, False), probabilities(images[:, :, ::-1], False)[:, :, ::-1]
    assert np.abs(plain - mirrored).max() > 0.01
    for view, there in ((images, slice(None)), (images[:, :, ::-1], slice(None, None, -1))):
        np.testing.assert_allclose(probabilities(view, True)[:, :, there], (plain + mirrored) / 2, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mask_images": "separate", "batch": 1}, "raise the stage's batch, or lower accumulate"),
        ({"mask_images": "separate", "batch": 2, "accumulate": 2}, "raise the stage's batch, or lower accumulate"),
        ({"mask_images": "both"}, "mask_images='both': choose one of: augmented, separate"),
        ({"ignore_top": 200}, "leave none of the 128 rows"),
        ({"mask_block": 1000}, "mask_block=1000 is too large"),
        ({"target": {"resize": (128, 64)}}, "source images are 256x128 and target images 128x64"),
        ({"lambda_features": 0.1}, "needs the network's ImageNet weights"),
    ],
)
def test_refused_before_training(fields: dict, message: str) -> None:
    config = mic.get_config("streets")
    config.model.update({"width": 8, "blocks": (1, 1, 1, 1)})
    config.update({"accumulate": fields.pop("accumulate", 1), **{"target": fields.pop("target", {})}})
    config.adapt.update(fields)
    (stage,) = [each for each in plan(config, Path("runs/x"), DOMAINS) if each.name == "adapt"]
    with pytest.raises(UserError, match=message):
        check_steps([stage], 19, False)


@pytest.mark.parametrize(
    "word", ["threshold=1.5", "threshold=-0.1", "alpha=1.1", "mask_ratio=2", "feature_ratio=-1.0", "ignore_top=-1"]
)
def test_values_without_meaning(word: str, capsys) -> None:
    words = ["jaxuda", "--config=configs/mic.py", "--workdir=/nowhere/at/all", f"--config.adapt.{word}"]
    assert main(words) == MISTAKE
    assert f"config.adapt.{word.partition('=')[0]}" in capsys.readouterr().err


@pytest.mark.slow
def test_the_networks_of_a_state() -> None:
    """After the first update the teacher is the mean of both students; it is scored with the student's statistics."""
    config = changed()
    config.model.norm = "batch"
    state, constants, step = begin(config)
    after, _ = jax.jit(functools.partial(step, seed=0))(state, constants, batch=make_batch())
    networks = method.evaluated(after, config=config)
    assert list(networks) == ["student", "teacher"]
    assert networks["teacher"]["batch_stats"] is networks["student"]["batch_stats"] is after.batch_stats
    jax.tree.map(
        lambda teacher, old, new: np.testing.assert_allclose(teacher, (old + new) / 2, atol=1e-6),
        *(networks["teacher"]["params"], state.params["model"], networks["student"]["params"]),
    )
    with pytest.raises(AssertionError):
        jax.tree.map(np.testing.assert_array_equal, after.extra.batch_stats, after.batch_stats)


def test_pictures() -> None:
    batch = float_batch()
    names = ["source", "target", "mixed", "mixed_label", "weights"]
    for fields, more in ((MARGINS, ["masked"]), ({"mask_images": "separate"}, [])):
        shown = method.pictures(prepared(**fields), batch, config=changed(**fields))
        assert list(shown) == names + more
        assert all(array.shape[:3] == (8, 32, 48) for array in shown.values())


def test_things_are_things() -> None:
    things = {"light", "sign", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"}
    things |= {"object", "human", "vehicle", "pedestrian", "bicyclist"}
    for name, ids in daformer.THINGS.items():
        if name:
            assert ids == tuple(i for i, each in enumerate(label_space(name).classes) if each in things)
    assert {common.base("x", place, common.PUBLISHED).label_space for place in common.BENCHMARKS} == set(
        daformer.THINGS
    )


def test_recipes() -> None:
    config = mic.get_config("gta5")
    stages = {stage.name: stage for stage in plan(config, Path("runs/x"), DOMAINS)}
    adapt = stages["adapt"].config
    assert (adapt.train, adapt.order, adapt.lambda_features, adapt.lambda_mask) == ("daformer", "rare_class", 0.005, 1)
    assert (adapt.ignore_top, adapt.ignore_bottom, adapt.mask_block) == (15, 120, 32)
    assert adapt.source.crop == adapt.target.crop == (512, 512) and adapt.source.resize is None
    assert (adapt.source.within, adapt.source.balanced, adapt.target.within) == ((1280, 720), 0.75, (1024, 512))
    assert "balanced" not in adapt.target
    assert (adapt.optim.name, adapt.optim.head_factor, adapt.optim.undecayed) == ("adamw", 10.0, ())
    assert adapt.model.head_dilations == (6, 12) and adapt.model.variant == "v1c"
    assert mic.get_config("mapillary").target.within == (1024, 768)


def test_the_reference_is_the_networks_own(tmp_path: Path) -> None:
    """`weights = ("imagenet",)` asks for what `init = "imagenet"` starts from; quick recipes from scratch need none."""
    config = daformer.get_config("streets,lite")
    config.data_dir = str(tmp_path)
    stages = {stage.name: stage for stage in plan(config, Path("runs/x"), DOMAINS)}
    assert stages["adapt"].weights == {"imagenet": tmp_path / "weights" / "efficientnet-lite0" / "checkpoints"}
    (message,) = missing_weights(config)
    assert "config.source_only.init" in message and "config.adapt.weights" in message
    config = daformer.get_config("streets")
    config.data_dir = str(tmp_path)
    assert not missing_weights(config) and not plan(config, Path("runs/x"), DOMAINS)[1].weights
