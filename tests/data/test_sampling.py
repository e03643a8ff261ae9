import numpy as np
import pytest

from jaxuda.data.input import make_input
from jaxuda.data.orders.class_balanced import class_balanced_order, classes_of_images
from jaxuda.data.transforms import build_transform
from jaxuda.errors import UserError


def _present(images=200, seed=0):
    """Class 0 everywhere, class 1 in half of the images, class 2 in three of them, class 3 nowhere."""
    rng = np.random.default_rng(seed)
    present = np.zeros((images, 4), bool)
    present[:, 0] = True
    present[:, 1] = rng.random(images) < 0.5
    present[[5, images // 4, images - 2], 2] = True
    return present


def test_the_order_follows_from_the_seed_and_longer_ones_continue_shorter_ones():
    present = _present()
    order = class_balanced_order(present, 500, 3, sub_epoch=120)
    assert order.shape == (500,) and order.dtype == np.int32
    np.testing.assert_array_equal(class_balanced_order(present, 500, 3, sub_epoch=120), order)
    for shorter in (0, 1, 119, 120, 250):
        np.testing.assert_array_equal(class_balanced_order(present, shorter, 3, sub_epoch=120), order[:shorter])
    assert np.any(class_balanced_order(present, 500, 4, sub_epoch=120) != order)


def test_rare_classes_come_often():
    present = _present()
    order = class_balanced_order(present, 3000, 0)
    shares = present[order].mean(0)
    assert shares[0] == 1  # every image shows it
    assert shares[2] > 10 * present[:, 2].mean()
    assert shares[3] == 0


def test_shares_settle_where_the_rule_says():
    """Each class has its own images: the shares alone decide the draws, which plain Python simulates here."""
    present = np.repeat(np.eye(3, dtype=bool), [50, 5, 1], axis=0)
    drawn = present[class_balanced_order(present, 3000, 0)].sum(0)
    rng, seen = np.random.default_rng(1), np.zeros(3)
    for _ in range(3000):
        weights = 1 / np.log(1.01 + seen / max(seen.sum(), 1))
        seen[rng.choice(3, p=weights / weights.sum())] += 1
    np.testing.assert_allclose(drawn / 3000, seen / 3000, atol=0.05)


def test_a_class_gives_all_its_images_before_one_comes_again():
    present = np.ones((10, 1), bool)
    order = class_balanced_order(present, 40, 0, sub_epoch=20)
    for half in order.reshape(2, 20):
        np.testing.assert_array_equal(np.bincount(half, minlength=10), 2)
    assert np.any(order[:20] != order[20:])


def test_images_without_labels_are_never_drawn():
    present = _present(20)
    present[7] = False
    present[:, 2] = False
    assert 7 not in class_balanced_order(present, 300, 0)
    with pytest.raises(UserError, match="no image of the source has a labelled pixel"):
        class_balanced_order(np.zeros((4, 3), bool), 10, 0)


def _records(count=6):
    rng = np.random.default_rng(0)
    image = lambda: rng.integers(0, 256, (8, 8, 3), np.uint8)  # noqa: E731
    return [{"image": image(), "label": np.full((8, 8), i % 3, np.uint8), "id": str(i)} for i in range(count)]


def test_classes_are_read_from_the_labels():
    records = _records(4)
    records[3]["label"] = np.full((8, 8), 255, np.uint8)
    records[0]["label"] = np.array([[0, 2], [255, 0]], np.uint8)
    expected = [[1, 0, 1], [0, 1, 0], [0, 0, 1], [0, 0, 0]]
    np.testing.assert_array_equal(classes_of_images(records, 3), np.array(expected, bool))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_keep_the_order_and_resume_in_it(num_workers):
    records, order = _records(), class_balanced_order(classes_of_images(_records(), 3), 24, 0, sub_epoch=10)
    options = {"batch": 4, "steps": 6, "source_transform": build_transform({"crop": (4, 4)}), "source_order": order}

    def batches(**more):
        with make_input(records, **options, **more) as made:
            return [batch["source"] for batch in made]

    whole = batches(num_workers=num_workers)
    assert [int(name) for batch in whole for name in batch["id"]] == order.tolist()
    for batch, again in zip(whole[2:], batches(start=2), strict=True):
        np.testing.assert_array_equal(batch["image"], again["image"])
    # An image that comes again is augmented anew.
    first = [
        (name, image.tobytes()) for batch in whole for name, image in zip(batch["id"], batch["image"], strict=True)
    ]
    assert len(set(first)) > len(records)


def test_too_short_an_order_is_an_error():
    with pytest.raises(UserError, match="the order of the source has 3 entries, but 8 records are to be drawn"):
        make_input(_records(), batch=4, steps=2, source_transform=build_transform({}), source_order=[0, 1, 2])
