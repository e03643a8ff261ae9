"""Rare class sampling against numbers of the published code, and the statistics of its draws."""

from pathlib import Path

import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from jaxuda.data.labels import make_label_space
from jaxuda.data.orders import rare_class
from jaxuda.data.orders.rare_class import rare_class_order, rare_class_probabilities
from jaxuda.errors import UserError

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "rcs.npz"))
ELIGIBLE = GOLDEN["pixel_counts"] > GOLDEN["min_pixels"]


@pytest.mark.parametrize("case", "abc")
def test_probabilities(case):
    found = rare_class_probabilities(GOLDEN["total_counts"], float(GOLDEN[f"{case}_temperature"]))
    classes = GOLDEN[f"{case}_classes"]
    np.testing.assert_allclose(found[classes], GOLDEN[f"{case}_probs_f64"], rtol=1e-6, atol=1e-12)
    assert np.delete(found, classes).tolist() == [0.0] and np.isclose(found.sum(), 1)


def test_all_classes_alike():
    np.testing.assert_allclose(rare_class_probabilities(np.array([5, 0, 1, 94]), np.inf), [1 / 3, 0, 1 / 3, 1 / 3])


class Counted:
    """Records that keep counts of their pixels."""

    name = "some images"
    label_space = make_label_space("many", {str(index): (index, 0, 0) for index in range(19)})

    def __init__(self, counts: np.ndarray, area: int):
        self.counts = np.column_stack([counts, area - counts.sum(1)])

    def class_pixels(self):
        return self.counts


CONFIG = FrozenConfigDict({"seed": 3})
AREA = int(GOLDEN["pixel_counts"].sum(1).max() + 1280 * 760)


def test_images_are_drawn_for_their_class():
    np.testing.assert_array_equal(ELIGIBLE, GOLDEN["eligible"])
    pixels, draws = GOLDEN["total_counts"], 40_000
    order, drawn = rare_class_order(pixels, ELIGIBLE, draws, 3, temperature=0.3)
    assert order.dtype == drawn.dtype == np.int32
    assert ELIGIBLE[order, drawn].all()
    classes = rare_class_probabilities(pixels, 0.3) * ELIGIBLE.any(0)
    expected = (ELIGIBLE / np.maximum(ELIGIBLE.sum(0), 1)) @ (classes / classes.sum())
    np.testing.assert_allclose(np.bincount(order, minlength=len(expected)) / draws, expected, atol=0.012)
    np.testing.assert_allclose(np.bincount(drawn, minlength=19) / draws, classes / classes.sum(), atol=0.012)
    for longer, shorter in zip((order, drawn), rare_class_order(pixels, ELIGIBLE, 77, 3, 0.3), strict=True):
        np.testing.assert_array_equal(shorter, longer[:77])
    assert np.any(rare_class_order(pixels, ELIGIBLE, 77, 4, 0.3)[0] != order[:77])


@pytest.mark.filterwarnings("ignore:no image of")
def test_the_order_of_a_stage():
    counts, total = GOLDEN["pixel_counts"], GOLDEN["total_counts"]
    order = rare_class.order(Counted(counts, AREA), None, 50, CONFIG, {})
    np.testing.assert_array_equal(order[:2], rare_class_order(total, ELIGIBLE, 50, 3))
    np.testing.assert_array_equal(order.pixels, np.full(50, 1500))
    fields = {"seed": 3, "rare_class_temperature": 1.0, "rare_class_pixels": 1, "rare_class_crop_ratio": 2.0}
    order = rare_class.order(Counted(counts, AREA), None, 50, FrozenConfigDict(fields), {})
    np.testing.assert_array_equal(order[:2], rare_class_order(total, counts > 1, 50, 3, 1.0))
    np.testing.assert_array_equal(order.pixels, np.full(50, 2))


def test_small_images_need_fewer_pixels():
    counts = np.zeros((3, 19), int)
    counts[:, 0] = 20_000
    counts[:2, 1] = 93, 92  # 3000 of an image of 1280x760 are 92.5 of one of 30,000 pixels
    order = rare_class.order(Counted(counts, 30_000), None, 200, CONFIG, {})
    assert set(order.indices.tolist()) == {0} and set(order.classes.tolist()) == {1}
    np.testing.assert_allclose(order.pixels, 0.5 * 3000 * 30_000 / (1280 * 760))


def test_classes_that_no_image_shows_enough_of_are_left_out_and_named():
    counts = np.zeros((2, 19), int)
    counts[:, 0] = 2_000_000
    counts[1, 5] = 3000
    with pytest.warns(UserWarning, match="no image of some images shows enough of 5 to be drawn for it"):
        order = rare_class.order(Counted(counts, 2_100_000), None, 100, CONFIG, {})
    assert set(order.indices.tolist()) == {0, 1} and set(order.classes.tolist()) == {0}
    with pytest.raises(UserError, match="lower rare_class_pixels"):
        rare_class_order(np.ones(2), np.zeros((4, 2), bool), 5, 0)
