"""Pseudo-labels and lists of ids that do not belong to the data are refused."""

import numpy as np
import pytest

from jaxuda.data import PseudoLabelled
from jaxuda.data.labels import make_label_space
from jaxuda.data.pseudo import LABELS, write_pseudo_label
from jaxuda.data.records import EASY, Subset, read_split, write_split
from jaxuda.errors import UserError

SPACE = make_label_space("two", {"ground": (10, 20, 30), "sky": (0, 0, 200)})


class Images(list):
    """Records in memory."""

    name, label_space, labelled = "a target", None, False

    def ids(self) -> list[str]:
        return [record["id"] for record in self]

    def images_only(self) -> "Images":
        return self


@pytest.fixture
def images() -> Images:
    return Images({"id": name, "image": np.zeros((4, 6, 3), np.uint8)} for name in ("a", "b", "c"))


def test_round_trip(images: Images, tmp_path) -> None:
    (tmp_path / LABELS).mkdir()
    rng = np.random.default_rng(0)
    maps = {name: rng.choice(np.array([0, 1, 255], np.uint8), (4, 6)) for name in images.ids()}
    for name, ids in maps.items():
        write_pseudo_label(tmp_path, name, ids, SPACE)
    labelled = PseudoLabelled(images, tmp_path, SPACE)
    assert len(labelled) == 3 and labelled.ids() == ["a", "b", "c"]
    for record in labelled:
        np.testing.assert_array_equal(record["label"], maps[record["id"]])


def test_labels_of_other_data(images: Images, tmp_path) -> None:
    (tmp_path / LABELS).mkdir()
    write_pseudo_label(tmp_path, "a", np.zeros((5, 6), np.uint8), SPACE)
    with pytest.raises(UserError, match=r"2 images of a target have no pseudo-label.*such as 'b'"):
        PseudoLabelled(images, tmp_path, SPACE)
    with pytest.raises(UserError, match="is 6x5, unlike its image"):
        PseudoLabelled(Images(images[:1]), tmp_path, SPACE)[0]


def test_ids_with_blanks_are_kept_in_a_split(tmp_path) -> None:
    write_split(tmp_path, EASY, ["my photo 1", "b"])
    assert read_split(tmp_path, EASY) == ["my photo 1", "b"]


def test_subset(images: Images) -> None:
    assert [record["id"] for record in Subset(images, ["c", "a"])] == ["c", "a"]
    with pytest.raises(UserError, match="a target has no image 'z'"):
        Subset(images, ["a", "z"])
