import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jaxuda.data.transforms import build_transform, resize_image, resize_nearest
from jaxuda.errors import UserError

EVERYTHING = {
    "scale": (0.5, 1.5),
    "crop": (24, 16),
    "flip": 0.5,
    "jitter": (0.5, 0.5, 0.5, 0.2),
    "grey": 0.2,
    "blur": (0.1, 2.0),
}


def _record(height=30, width=40, seed=0):
    """A record whose image and depth can be computed from its label."""
    label = np.random.default_rng(seed).integers(0, 200, (height, width), np.uint8)
    image = np.repeat(label[..., None], 3, 2) + np.uint8(1)
    return {"image": image, "label": label, "depth": label + np.float32(0.5), "id": "a"}


def _consistent(record):
    """Whether image, label and depth still belong together, up to padding."""
    inside = record["label"] != 255
    return (
        (record["image"][..., 0][inside] == record["label"][inside] + 1).all()
        and (record["depth"][inside] == record["label"][inside] + 0.5).all()
        and (record["image"][~inside] == 0).all()
        and (record["depth"][~inside] == 0).all()
    )


@pytest.mark.parametrize("name", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(20, 11), (64, 50)])
def test_resize_equals_pillow(name, size):
    record = _record()
    result = build_transform({"resize": size, "interpolation": name})(record, np.random.default_rng(0))
    resampling = getattr(Image.Resampling, name.upper())
    expected = np.asarray(Image.fromarray(record["image"]).resize(size, resampling))
    np.testing.assert_array_equal(result["image"], expected)
    expected = np.asarray(Image.fromarray(record["label"]).resize(size, Image.Resampling.NEAREST))
    np.testing.assert_array_equal(result["label"], expected)
    np.testing.assert_array_equal(result["depth"], expected + np.float32(0.5))
    assert record["image"].shape == (30, 40, 3)  # the record that came in is not changed


@settings(max_examples=50, deadline=None)
@given(*[st.integers(1, 60)] * 4)
def test_nearest_equals_pillow_at_any_size(width, height, new_width, new_height):
    label = np.arange(height * width, dtype=np.int32).reshape(height, width)
    expected = Image.fromarray(label).resize((new_width, new_height), Image.Resampling.NEAREST)
    np.testing.assert_array_equal(resize_nearest(label, (new_width, new_height)), expected)


@pytest.mark.parametrize("source", [(1914, 1052), (2048, 1024), (1280, 760), (480, 360)])
@pytest.mark.parametrize("target", [(1280, 720), (1024, 512), (1280, 640), (1460, 730), (240, 180)])
def test_nearest_equals_pillow_at_published_sizes(source, target):
    columns = np.arange(source[0]) % 251
    label = np.broadcast_to(columns.astype(np.uint8), source[::-1])[:8]
    expected = Image.fromarray(np.ascontiguousarray(label)).resize((target[0], 4), Image.Resampling.NEAREST)
    np.testing.assert_array_equal(resize_nearest(label, (target[0], 4)), np.asarray(expected))


def test_geometric_transforms_move_everything_together():
    for spec in (
        {"crop": (16, 12), "flip": 0.5},
        {"crop": (50, 20), "flip": 0.5},
        {"crop": (50, 40)},
        {"flip": 1.0},
    ):
        transform = build_transform(spec)
        for seed in range(10):
            result = transform(_record(seed=seed), np.random.default_rng(seed))
            assert _consistent(result)
            size = spec.get("crop", (40, 30))
            assert result["image"].shape == (size[1], size[0], 3)
            assert result["label"].shape == result["depth"].shape == (size[1], size[0])


def test_padding_is_at_the_right_and_bottom():
    result = build_transform({"crop": (44, 33)})(_record(), np.random.default_rng(0))
    assert (result["label"][30:] == 255).all()
    assert (result["label"][:, 40:] == 255).all()
    np.testing.assert_array_equal(result["label"][:30, :40], _record()["label"])


def test_crops_reach_all_positions():
    record = {"image": np.arange(12, dtype=np.uint8).reshape(3, 4, 1).repeat(3, 2)}
    transform = build_transform({"crop": (3, 2)})
    corners = {transform(record, np.random.default_rng(s))["image"][0, 0, 0] for s in range(100)}
    assert corners == {0, 1, 4, 5}


def test_short_side_and_scale_ranges():
    record = _record(30, 60)
    sides, widths = set(), []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        shape = build_transform({"short_side": (10, 12)})(record, rng)["image"].shape
        assert shape[1] == 2 * shape[0]
        sides.add(shape[0])
        shape = build_transform({"scale": (0.5, 1.5), "base": (100, 40)})(record, rng)["image"].shape
        assert abs(shape[1] / 100 - shape[0] / 40) < 0.03
        widths.append(shape[1])
    assert sides == {10, 11, 12}
    assert 50 <= min(widths) < 65
    assert 135 < max(widths) <= 150


def test_equal_generators_give_equal_records():
    transform = pickle.loads(pickle.dumps(build_transform(EVERYTHING)))
    results = [transform(_record(), np.random.default_rng(s)) for s in (3, 3, 4)]
    np.testing.assert_array_equal(results[0]["image"], results[1]["image"])
    np.testing.assert_array_equal(results[0]["label"], results[1]["label"])
    assert (results[0]["image"] != results[2]["image"]).any()


def test_a_label_does_not_change_the_randomness():
    transform = build_transform(EVERYTHING)
    with_label = transform(_record(), np.random.default_rng(5))
    without = transform({"image": _record()["image"]}, np.random.default_rng(5))
    np.testing.assert_array_equal(with_label["image"], without["image"])


def test_photometric_transforms_touch_the_image_alone():
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    record = {**_record(20, 30), "image": picture}
    for spec in ({"jitter": (0.5, 0.5, 0.5, 0.2)}, {"grey": 1.0}, {"blur": (1.0, 2.0)}):
        result = build_transform(spec)(record, np.random.default_rng(1))
        assert result["image"].dtype == np.uint8
        assert (result["image"] != picture).any()
        np.testing.assert_array_equal(result["label"], record["label"])
    grey = build_transform({"grey": 1.0})(record, np.random.default_rng(1))["image"]
    assert (grey == grey[..., :1]).all()


def test_jitter_strengths():
    picture = np.full((4, 4, 3), (100, 60, 20), np.uint8)
    levels = [
        build_transform({"jitter": (0.5, 0, 0, 0)})({"image": picture}, np.random.default_rng(s))["image"][0, 0]
        for s in range(50)
    ]
    assert 48 <= min(v[0] for v in levels) < 60
    assert 140 < max(v[0] for v in levels) <= 151
    same = build_transform({"jitter": (0, 0, 0, 0)})({"image": picture}, np.random.default_rng(0))["image"]
    np.testing.assert_array_equal(same, picture)


def test_nothing_is_done_without_a_spec():
    record = _record()
    for spec in (None, {}, {"resize": None}):
        result = build_transform(spec)(record, np.random.default_rng(0))
        assert result.keys() == record.keys()
        np.testing.assert_array_equal(result["image"], record["image"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"resise": (4, 4)}, "unknown transform field resise; known: resize, fit, short_side"),
        ({"resize": (4, 4), "scale": (1, 2)}, "takes one of resize, fit, short_side and scale"),
        ({"base": (4, 4)}, "scale is not set"),
        ({"resize": (4, 0)}, "positive integers"),
        ({"resize": 4}, "must be 2 numbers"),
        ({"crop": (4.5, 4)}, "positive integers"),
        ({"flip": 1.5}, "must be a probability"),
        ({"scale": (1.5, 0.5)}, "0 < low <= high"),
        ({"jitter": (1, 1, 1)}, "must be 4 numbers"),
        ({"jitter": (1, 1, 1, 0.6)}, "hue at most 0.5"),
        ({"interpolation": "cubic"}, "choose bicubic or bilinear"),
    ],
)
def test_wrong_specs_are_explained(spec, message):
    with pytest.raises(UserError, match=message):
        build_transform(spec)


def test_fit_keeps_the_aspect_and_pads():
    rng = np.random.default_rng(0)
    image, label = rng.integers(1, 256, (30, 80, 3), np.uint8), rng.integers(0, 9, (30, 80), np.uint8)
    depth = rng.random((30, 80), np.float32) + 1
    fitted = build_transform({"fit": (64, 48)})({"image": image, "label": label, "depth": depth}, rng)
    np.testing.assert_array_equal(fitted["image"][:24], resize_image(image, (64, 24)))
    np.testing.assert_array_equal(fitted["label"][:24], resize_nearest(label, (64, 24)))
    assert fitted["image"].shape == (48, 64, 3) and not fitted["image"][24:].any()
    assert (fitted["label"][24:] == 255).all() and not fitted["depth"][24:].any()
    high = build_transform({"fit": (64, 48)})({"image": image.transpose(1, 0, 2)}, rng)["image"]
    assert high.shape == (48, 64, 3) and high[:, :18].any(-1).all() and not high[:, 18:].any()
