"""Which names of files belong together though they differ, and which names of folders mean splits."""

import pytest

from jaxuda.data.names import is_derived, looks_like_split, pairings


@pytest.mark.parametrize(
    ("images", "others", "affixes"),
    [
        (["a/1_leftImg8bit", "a/2_leftImg8bit"], ["a/1_gtFine_ids", "a/2_gtFine_ids"], ("_leftImg8bit", "_gtFine_ids")),
        (["1_leftImg8bit"], ["1_gtFine_labelIds"], ("_leftImg8bit", "_gtFine_labelIds")),
        (["x", "y"], ["x.jpg", "y.jpg"], ("", ".jpg")),
        (["0001TP_6690", "0001TP_6720", "0001TP_6750"], ["0001TP_6690_L", "0001TP_6750_L"], ("", "_L")),
        (["img001", "img002"], ["mask001", "mask002"], ("img", "mask")),
        (["town/image_1", "town/image_2"], ["town/label_1", "town/label_2"], ("image_", "label_")),
    ],
)
def test_names_that_belong_together(images, others, affixes):
    (pairing,) = pairings(images, others)
    assert (pairing.image, pairing.partner) == affixes
    for image, other in pairing.partners.items():
        assert image.replace(pairing.image, "") == other.replace(pairing.partner, "")
    assert len(pairing.partners) == min(len(images), len(others))


@pytest.mark.parametrize(
    ("images", "others"),
    [
        (["cat"], ["dog"]),
        (["site_a"], ["site_b"]),
        (["frame_1", "frame_2"], ["frame_3", "frame_4"]),
        (["rome_1", "rome_2"], ["oslo_1", "oslo_2"]),
        (["x", "y"], ["x_mask"]),  # one agreement may be chance
        (["a/x", "a/y"], ["b/x_mask", "b/y_mask"]),
        ([], []),
    ],
)
def test_names_that_do_not(images, others):
    assert pairings(images, others) == []


def test_several_kinds_of_labels_are_several_pairings():
    images = [f"{i}_leftImg8bit" for i in "123"]
    kinds = ("_gtFine_labelIds", "_gtFine_color", "_gtFine_instanceIds")
    found = pairings(images, [f"{i}{kind}" for i in "123" for kind in kinds])
    assert {pairing.partner for pairing in found} == set(kinds)


def test_files_that_tools_derive():
    assert is_derived("00001_labelTrainIds", {"00001"}) and is_derived("a.b_color", {"a.b"})
    assert not is_derived("00001_2", {"00001"}) and not is_derived("00002_labelTrainIds", {"00001"})


def test_folders_that_look_like_splits():
    for name in (
        "train2017",
        "Val",
        "TEST",
        "trainA",
        "my-valid",
        "X_test",
        "TrainSet",
        "test_images",
        "dev",
        "trains",
        "xtrain",
    ):
        assert looks_like_split(name), name
    for name in ("rome", "strain", "valley", "site1", "contest", "developers"):
        assert not looks_like_split(name), name
