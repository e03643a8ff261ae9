import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from configs import common
from jaxuda.data.transforms import build_transform, resize_image, resize_nearest
from jaxuda.errors import UserError

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "sepico_crop.npz"))
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


def test_margins_move_with_the_image():
    """They are of the resized image, and a crop that leaves the image is not trusted there."""
    record = {"image": np.zeros((30, 40, 3), np.uint8), "label": np.full((30, 40), 255, np.uint8)}
    record["label"][4:-6, 2:-8] = 1
    transform = build_transform({"resize": (20, 15), "margins": (2, 3, 1, 4), "crop": (12, 18), "flip": 0.5})
    found = [transform(record, np.random.default_rng(seed)) for seed in range(20)]
    for each in found:
        np.testing.assert_array_equal(each["trusted"], each["label"] == 1)
    assert len({each["trusted"].tobytes() for each in found}) > 5 and found[0]["trusted"].dtype == np.uint8


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
        ({"resise": (4, 4)}, "unknown transform field resise; known: resize, within, fit, short_side"),
        ({"resize": (4, 4), "scale": (1, 2)}, "takes one of resize, within, fit, short_side and scale"),
        ({"within": (4, 4), "fit": (4, 4)}, "takes one of resize, within, fit, short_side and scale"),
        ({"within": (4, 0)}, "positive integers"),
        ({"balanced": 0.75}, "crop is not set"),
        ({"balanced": 1.0, "crop": (4, 4)}, "must be a share below 1"),
        ({"base": (4, 4)}, "scale is not set"),
        ({"resize": (4, 0)}, "positive integers"),
        ({"resize": 4}, "must be 2 numbers"),
        ({"crop": (4.5, 4)}, "positive integers"),
        ({"flip": 1.5}, "must be a probability"),
        ({"scale": (1.5, 0.5)}, "0 < low <= high"),
        ({"jitter": (1, 1, 1)}, "must be 4 numbers"),
        ({"margins": (30, 240)}, "must be 4 numbers"),
        ({"margins": (30, 240, 0, -1)}, "must be integers, none negative"),
        ({"jitter": (1, 1, 1, 0.6)}, "hue at most 0.5"),
        ({"interpolation": "cubic"}, "choose bicubic, bilinear or opencv"),
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


@pytest.mark.parametrize(
    ("size", "within", "expected"),
    [
        ((1914, 1052), (1280, 720), (1280, 704)),
        ((1914, 1052), (2560, 1440), (2560, 1407)),
        ((1280, 760), (2560, 1520), (2560, 1520)),
        ((1920, 1080), (960, 540), (960, 540)),
        ((20, 60), (40, 30), (10, 30)),
        ((20, 9), (10, 10), (10, 5)),  # 4.5: half up
    ],
)
def test_within_keeps_the_aspect_without_padding(size, within, expected):
    image = np.ones((*size[::-1], 3), np.uint8)
    found = build_transform({"within": within, "interpolation": "opencv"})({"image": image}, np.random.default_rng(0))
    assert found["image"].shape[1::-1] == expected and found["image"].all()


@pytest.mark.parametrize("size", [(13, 11), (64, 50)])
def test_resize_as_opencv(size):
    """Images by the two nearest pixels alone, with half-pixel centres; labels by pixel floor(i * in / out)."""
    record = {**_record(), "image": np.random.default_rng(1).integers(0, 256, (30, 40, 3), np.uint8)}
    found = build_transform({"resize": size, "interpolation": "opencv"})(record, np.random.default_rng(0))
    expected = record["image"].astype(float)
    for axis, length in enumerate(size[::-1]):
        position = np.clip((np.arange(length) + 0.5) * expected.shape[axis] / length - 0.5, 0, expected.shape[axis] - 1)
        low = position.astype(int)
        high = np.minimum(low + 1, expected.shape[axis] - 1)
        weight = np.expand_dims(position - low, tuple(k for k in range(3) if k != axis))
        expected = (1 - weight) * np.take(expected, low, axis) + weight * np.take(expected, high, axis)
    np.testing.assert_allclose(found["image"], expected, atol=1.01)  # OpenCV computes with integers
    rows, columns = (np.arange(new) * old // new for new, old in zip(size[::-1], (30, 40), strict=True))
    np.testing.assert_array_equal(found["label"], record["label"][rows[:, None], columns])
    np.testing.assert_array_equal(found["depth"], found["label"] + np.float32(0.5))


class Scripted:
    """A generator whose integers are given."""

    def __init__(self, corners):
        self.left = [int(each) for corner in corners for each in corner]

    def integers(self, high):
        value = self.left.pop(0)
        assert value < high
        return value


@pytest.mark.parametrize("case", "abcdef")
def test_balanced_crops_are_those_of_the_published_code(case):
    """Golden corners: the one that is taken, after those that were refused; in `d` ten are."""
    label = GOLDEN[f"{case}_labels"].astype(np.uint8)
    height, width = GOLDEN[f"{case}_crop_size"]
    top, bottom, left, right = GOLDEN[f"{case}_first_box"]
    rng = Scripted(GOLDEN[f"{case}_first_draws"])
    spec = {"crop": (int(width), int(height)), "balanced": 0.75}
    found = build_transform(spec)({"image": np.repeat(label[..., None], 3, 2), "label": label}, rng)["label"]
    expected = label[top:bottom, left:right]
    np.testing.assert_array_equal(found[: len(expected), : expected.shape[1]], expected)
    assert rng.left == [] and (found[len(expected) :] == 255).all() and found.shape == (height, width)


def _halves():
    """Class 3 in the left half, class 4 in the right one; columns are counted in the image."""
    label = np.repeat(np.array([[3] * 10 + [4] * 10], np.uint8), 8, 0)
    image = np.repeat(np.broadcast_to(np.arange(20, dtype=np.uint8), (8, 20))[..., None], 3, 2)
    return {"image": image, "label": label}


def test_a_crop_shows_more_than_the_wanted_pixels():
    crop = build_transform({"crop": (4, 8)})
    rng = Scripted([(0, 7), (0, 8), (0, 9)])  # 8, 16, 24 pixels of class 4
    found = crop({**_halves(), "wanted": (4, 16.0)}, rng)
    assert found["image"][0, 0, 0] == 9 and found.keys() == {"image", "label"}
    rng = Scripted([(0, left) for left in range(1, 12)])
    assert crop({**_halves(), "wanted": (5, 0)}, rng)["image"][0, 0, 0] == 11 and rng.left == []  # the eleventh
    whole = build_transform({})({**_halves(), "wanted": (5, 0)}, np.random.default_rng(0))
    assert whole.keys() == {"image", "label"}


def test_a_class_on_just_the_share_is_too_large():
    rng = Scripted([(0, 8)] * 10 + [(0, 9)])
    crop = build_transform({"crop": (4, 8), "balanced": 0.5})
    assert crop(_halves(), rng)["image"][0, 0, 0] == 9 and rng.left == []


def test_each_crop_for_a_wanted_class_is_a_balanced_one():
    crop = build_transform({"crop": (4, 8), "balanced": 0.6})
    # Balanced crops begin at column 8 alone; one that is balanced, but shows too little, is refused as well.
    rng = Scripted([(0, 12), (0, 8), (0, 3), (0, 8)])
    assert crop({**_halves(), "wanted": (4, 15)}, rng)["image"][0, 0, 0] == 8 and len(rng.left) == 4
    rng = Scripted([(0, 8)] * 10 + [(0, 12), (0, 8)])
    assert crop({**_halves(), "wanted": (4, 16)}, rng)["image"][0, 0, 0] == 8 and rng.left == []


def test_a_domain_has_the_fields_of_some_recipes_only_where_they_are_set():
    plain = common.domain("gta5", resize=(1280, 720))
    assert not {"within", "fit", "balanced"} & set(plain) and plain.interpolation == "bicubic"
    fields = {"within": (1280, 720), "crop": (512, 512), "balanced": 0.75, "interpolation": "opencv"}
    set_ = common.domain("gta5", **fields).to_dict()
    assert {key: set_[key] for key in fields} == fields
    with pytest.raises(AssertionError, match="unknown transforms: withn"):
        common.domain("gta5", withn=(1280, 720))
