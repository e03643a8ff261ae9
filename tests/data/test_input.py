import numpy as np
import pytest

from jaxuda.data.input import Draws, make_input, prefetch_to_device, sweep_batches
from jaxuda.data.joined import domain_transform
from jaxuda.data.transforms import build_transform
from jaxuda.errors import UserError

RANDOM = {
    "scale": (0.5, 1.5),
    "crop": (12, 10),
    "flip": 0.5,
    "jitter": (0.5, 0.5, 0.5, 0.2),
    "blur": (0.1, 2.0),
}


def _records(count, seed=0, depth=False):
    rng = np.random.default_rng(seed)
    records = []
    for index in range(count):
        label = rng.integers(0, 5, (18, 24), np.uint8)
        record = {
            "image": rng.integers(0, 256, (18, 24, 3), np.uint8),
            "label": label,
            "id": f"{seed}-{index}",
        }
        records.append({**record, "depth": label + np.float32(1)} if depth else record)
    return records


def _batches(source=None, target=None, *, batch=4, steps=6, spec=RANDOM, **options):
    transform = build_transform(spec)
    target_transform = transform if target else None
    with make_input(
        source or _records(7, depth=True), target, batch=batch, steps=steps,
        source_transform=transform, target_transform=target_transform, **options,
    ) as batches:  # fmt: skip
        return list(batches)


def _assert_equal(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for domain in a:
            assert a[domain].keys() == b[domain].keys()
            for key in a[domain]:
                np.testing.assert_array_equal(a[domain][key], b[domain][key])


def test_target_labels_enter_a_batch_only_if_asked_for():
    target, options = _records(3, seed=1, depth=True), {"steps": 2}
    plain, labelled = _batches(target=target, **options), _batches(target=target, target_labels=True, **options)
    assert labelled[0]["target"].keys() == {"image", "label", "id"}
    assert labelled[0]["target"]["label"].shape == (4, 10, 12)
    for batch in labelled:
        del batch["target"]["label"]
    _assert_equal(plain, labelled)
    for record in target:
        del record["label"]
    assert _batches(target=target, target_labels=True, **options)[0]["target"].keys() == {"image", "id"}


def test_batches_have_the_promised_content():
    batches = _batches(target=_records(3, seed=1, depth=True))
    assert len(batches) == 6
    for batch in batches:
        assert batch.keys() == {"source", "target"}
        assert batch["source"].keys() == {"image", "label", "depth", "id"}
        assert batch["target"].keys() == {"image", "id"}  # no labels of the target
        for domain in batch.values():
            assert domain["image"].shape == (4, 10, 12, 3)
            assert domain["image"].dtype == np.uint8
            assert len(domain["id"]) == 4
            assert all(type(name) is str for name in domain["id"])
        assert batch["source"]["label"].shape == (4, 10, 12)
        assert batch["source"]["label"].dtype == np.uint8
        assert batch["source"]["depth"].dtype == np.float32
    assert _batches()[0].keys() == {"source"}


def test_batches_follow_from_the_seed():
    target = _records(3, seed=1)
    _assert_equal(_batches(target=target, seed=3), _batches(target=target, seed=3))
    first, second = _batches(target=target, seed=3), _batches(target=target, seed=4)
    assert [b["source"]["id"] for b in first] != [b["source"]["id"] for b in second]
    with_target, without = _batches(target=target), _batches()
    _assert_equal([{"source": b["source"]} for b in with_target], without)


@pytest.mark.parametrize("start", [1, 4, 6])
def test_any_start_continues_the_same_run(start):
    target = _records(3, seed=1)
    _assert_equal(_batches(target=target)[start:], _batches(target=target, start=start))


def test_one_worker_gives_the_same_batches():
    target = _records(3, seed=1)
    _assert_equal(_batches(target=target), _batches(target=target, num_workers=1))


@pytest.mark.slow
def test_four_workers_give_the_same_batches():
    target = _records(3, seed=1)
    _assert_equal(_batches(target=target, start=1), _batches(target=target, start=1, num_workers=4))


def test_processes_share_the_global_batch_in_order():
    target = _records(3, seed=1)
    whole = _batches(target=target)
    parts = [_batches(target=target, process_index=index, process_count=2) for index in range(2)]
    for batch, first, second in zip(whole, *parts, strict=True):
        for domain in batch:
            np.testing.assert_array_equal(
                batch[domain]["image"], np.concatenate([first[domain]["image"], second[domain]["image"]])
            )
            assert batch[domain]["id"] == first[domain]["id"] + second[domain]["id"]


def test_every_epoch_has_every_record_in_another_order():
    ids = [name for batch in _batches(_records(6), batch=3, steps=8, spec={}) for name in batch["source"]["id"]]
    epochs = [ids[i : i + 6] for i in range(0, 24, 6)]
    assert all(sorted(epoch) == [f"0-{i}" for i in range(6)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_augmentation_differs_between_epochs():
    batches = _batches(_records(1), batch=1, steps=8, spec={"crop": (4, 4), "flip": 0.5})
    assert len({batch["source"]["image"].tobytes() for batch in batches}) > 4


def test_a_dataset_may_be_smaller_than_a_batch():
    batches = _batches(_records(2), _records(1, seed=1), batch=5, steps=3)
    assert batches[2]["source"]["image"].shape[0] == 5
    assert set(batches[2]["target"]["id"]) == {"1-0"}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_mixed_sizes_are_explained(num_workers):
    records = _records(2)
    records[0] = {**records[0], "image": records[0]["image"][:10]}
    with pytest.raises(UserError, match=r"images of a batch differ in size: .*; give the transform a resize"):
        _batches(records, spec={}, num_workers=num_workers)


def test_wrong_arguments_are_explained():
    with pytest.raises(UserError, match="a batch of 4 cannot be divided between 3 processes"):
        _batches(process_count=3)
    with pytest.raises(UserError, match="the target dataset is empty"):
        make_input(_records(1), [], batch=1, steps=1, source_transform=None, target_transform=build_transform({}))


@pytest.mark.parametrize("count", [5, 6])
def test_sweeps_go_through_everything_once(count):
    records = _records(count)
    records[1] = {**records[1], "image": records[1]["image"][:9], "label": records[1]["label"][:9]}
    batches = list(sweep_batches(records, build_transform({"resize": (12, 8)}), 2))
    assert [b["count"] for b in batches] == ([2, 2, 1] if count == 5 else [2, 2, 2])
    assert [name for b in batches for name in b["id"]] == [r["id"] for r in records]
    assert all(b["image"].shape == (2, 8, 12, 3) for b in batches)
    assert [size for b in batches for size in b["size"]] == [r["image"].shape[:2] for r in records]
    for label, record in zip([x for b in batches for x in b["label"]], records, strict=True):
        np.testing.assert_array_equal(label, record["label"])
    if count == 5:
        np.testing.assert_array_equal(batches[2]["image"][0], batches[2]["image"][1])


def test_sweeps_of_unlabelled_data_and_of_nothing():
    records = [{key: r[key] for key in ("image", "id")} for r in _records(3)]
    assert all(b["label"] is None for b in sweep_batches(records, build_transform({}), 2))
    assert list(sweep_batches([], build_transform({}), 2)) == []


def test_a_sweep_may_be_left_early():
    sweep = sweep_batches(_records(50), build_transform({}), 2)
    next(sweep)
    sweep.close()


def test_prefetch_places_arrays_and_keeps_the_rest():
    placed = []

    def put(arrays):
        placed.append(arrays)
        return {"source": {key: ("device", value) for key, value in arrays["source"].items()}}

    batches = [{"source": {"image": np.full(2, i), "id": [f"a{i}"]}, "count": i} for i in range(5)]
    results = prefetch_to_device(batches, put, depth=2)
    first = next(results)
    assert len(placed) == 3  # the one in use and two ahead
    assert all(tree.keys() == {"source"} and tree["source"].keys() == {"image"} for tree in placed)
    everything = [first, *results]
    assert [b["count"] for b in everything] == list(range(5))
    assert [b["source"]["id"] for b in everything] == [[f"a{i}"] for i in range(5)]
    assert everything[3]["source"]["image"][0] == "device"
    np.testing.assert_array_equal(everything[3]["source"]["image"][1], [3, 3])


SPOTS = {"crop": (8, 6), "flip": 0.5, "balanced": 0.9}


def _spots(count=4):
    """Records with class 1 in a corner, the rest class 0 with a line of class 2."""
    records = _records(count)
    for record in records:
        record["label"][:] = 0
        record["label"][9] = 2
        record["label"][11:, 15:] = 1
    return records


def test_crops_show_the_class_that_they_are_drawn_for():
    order = np.arange(40) % 4
    draws = Draws(order, np.where(order < 2, 1, 2), np.where(order < 2, 12.0, 0.0))
    batches = _batches(_spots(), steps=10, spec=SPOTS, source_order=draws)
    assert batches[0]["source"].keys() == {"image", "label", "id"}
    counts = {1: [], 2: []}
    for batch in batches:
        for name, label in zip(batch["source"]["id"], batch["source"]["label"], strict=True):
            wanted = 1 if name in ("0-0", "0-1") else 2
            counts[wanted].append((label == wanted).sum())
    free = _batches(_spots(), steps=10, spec=SPOTS, source_order=order)
    found = sum((label == 1).sum() > 12 for batch in free for label in batch["source"]["label"])
    assert np.mean(np.array(counts[1]) > 12) > 0.8 and found < 0.4 * 40
    assert np.mean(np.array(counts[2]) > 0) > 0.95


@pytest.mark.parametrize("num_workers", [0, 1])
def test_crops_that_are_drawn_again_resume(num_workers):
    draws = Draws(np.arange(24) % 4, np.ones(24, int), np.full(24, 12.0))
    options = {"spec": SPOTS, "source_order": draws}
    whole = _batches(_spots(), **options)
    _assert_equal(whole[2:], _batches(_spots(), start=2, num_workers=num_workers, **options))


def test_balanced_crops_of_the_target_are_refused():
    balanced = domain_transform({"name": "a+b", "crop": (8, 6), "parts": {"b": {"balanced": 0.75}}})
    for transform in (build_transform(SPOTS), balanced):
        with pytest.raises(UserError, match="a stage that adapts to the target must not read"):
            make_input(_spots(), _spots(), batch=1, steps=1, source_transform=transform, target_transform=transform)
