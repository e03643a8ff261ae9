import numpy as np
import pytest

from jaxuda import files
from jaxuda.data.input import draw_order, make_input
from jaxuda.data.orders.paired import FILE, class_shares, coverage, paired_order, partners
from jaxuda.data.transforms import build_transform
from jaxuda.errors import UserError


class Images(list):
    """Records in memory, with the attributes that pairing needs."""

    class label_space:
        classes = ("a", "b", "c")

    def ids(self):
        return [record["id"] for record in self]


def records(count, seed):
    rng = np.random.default_rng(seed)
    rows = [
        {
            "image": np.full((4, 6, 3), index, np.uint8),
            "label": rng.choice(np.array([0, index % 3, 255], np.uint8), (4, 6)),
            "id": f"{seed}-{index}",
        }
        for index in range(count)
    ]
    return Images(rows)


def test_the_target_is_drawn_in_the_order_that_pairs_are_made_in():
    target, transform = records(5, 1), build_transform(None)
    with make_input(
        records(7, 0), target, batch=3, steps=6, seed=4, source_transform=transform, target_transform=transform
    ) as batches:
        drawn = [name for batch in batches for name in batch["target"]["id"]]
    assert drawn == [target.ids()[index] for index in draw_order(5, 18, 4, "target")]


def test_shares_of_classes():
    rows = records(3, 0)
    shares = class_shares(rows, 3)
    assert shares.shape == (3, 3) and shares.dtype == np.float32
    for row, record in zip(shares, rows, strict=True):
        np.testing.assert_allclose(row, [(record["label"] == c).mean() for c in range(3)])


def test_classes_count_before_areas():
    wanted = np.array([0.9, 0.1, 0.0])
    candidates = np.array([[0.9, 0.0, 0.1], [0.1, 0.01, 0.0], [0.2, 0.01, 0.79], [0.0, 0.0, 1.0]])
    assert list(np.argsort(-coverage(candidates, wanted))) == [2, 1, 0, 3]


def test_partners_cover_better_than_chance_and_longer_orders_continue_shorter_ones():
    rng = np.random.default_rng(0)
    source, target = (rng.random((n, 8)) * (rng.random((n, 8)) < 0.3) for n in (60, 20))
    drawn = rng.integers(0, 20, 300)
    order = paired_order(source, target, drawn, seed=3, pool=16)
    assert order.dtype == np.int32
    chance = rng.permutation(np.tile(np.arange(60), 5))
    missing = lambda order: np.mean((target[drawn] > 0) & (source[order] == 0))  # noqa: E731
    assert missing(order) < 0.6 * missing(chance)
    np.testing.assert_array_equal(paired_order(source, target, drawn[:7], 3, 16), order[:7])
    assert np.any(paired_order(source, target, drawn, 4, 16) != order)


def test_partners_read_the_stage_and_refuse_another(tmp_path):
    source, target = records(9, 0), records(4, 1)
    images = {name: [1.0, 0.0, 0.0] for name in target.ids()}
    files.write_json(tmp_path / FILE, {"classes": ["a", "b", "c"], "images": images})
    assert partners(tmp_path, source, target, 12, 0, 3).shape == (12,)
    with pytest.raises(UserError, match=r"of other classes or images.*--from_stage"):
        partners(tmp_path, source, records(5, 2), 12, 0, 3)
