import numpy as np
import pytest

from jaxuda.data.labels import IGNORE, colourise, label_space, lookup_table, table_by_name
from jaxuda.errors import UserError


@pytest.mark.parametrize(
    ("name", "count", "first", "last"),
    [
        ("cityscapes19", 19, "road", "bicycle"),
        ("synthia16", 16, "road", "bicycle"),
        ("common13", 13, "road", "bicycle"),
        ("crosscity13", 13, "road", "bicycle"),
        ("super7", 7, "flat", "vehicle"),
        ("camvid11", 11, "sky", "bicyclist"),
    ],
)
def test_spaces(name, count, first, last):
    space = label_space(name)
    assert (space.num_classes, space.classes[0], space.classes[-1]) == (count, first, last)
    assert space.palette.shape == (count, 3)
    assert space.palette.dtype == np.uint8
    assert len({tuple(colour) for colour in space.palette}) == count


def test_smaller_spaces_keep_the_order_of_the_nineteen():
    nineteen = label_space("cityscapes19")
    for name, missing in (
        ("synthia16", {"terrain", "truck", "train"}),
        ("common13", {"terrain", "truck", "train", "wall", "fence", "pole"}),
    ):
        space = label_space(name)
        assert space.classes == tuple(c for c in nineteen.classes if c not in missing)
        for index, name in enumerate(space.classes):
            assert (space.palette[index] == nineteen.palette[nineteen.classes.index(name)]).all()


# Written out from the published tables, not taken from the code; every id that is missing must be ignored.
_CITYSCAPES_19 = """7:0 8:1 11:2 12:3 13:4 17:5 19:6 20:7 21:8 22:9 23:10 24:11 25:12 26:13 27:14 28:15
    31:16 32:17 33:18"""
_TABLES = {
    ("cityscapes", "cityscapes19"): _CITYSCAPES_19,
    ("gta5", "cityscapes19"): _CITYSCAPES_19,
    (
        "cityscapes",
        "synthia16",
    ): """7:0 8:1 11:2 12:3 13:4 17:5 19:6 20:7 21:8 23:9 24:10 25:11 26:12 28:13 32:14
        33:15""",
    ("synthia", "synthia16"): "3:0 4:1 2:2 21:3 5:4 7:5 15:6 9:7 6:8 1:9 10:10 17:11 8:12 19:13 12:14 11:15",
    ("crosscity", "crosscity13"): "7:0 8:1 11:2 19:3 20:4 21:5 23:6 24:7 25:8 26:9 28:10 32:11 33:12",
    ("synthia", "common13"): "3:0 4:1 2:2 15:3 9:4 6:5 1:6 10:7 17:8 8:9 19:10 12:11 11:12",
    ("synthia", "super7"): "1:4 2:1 3:0 4:0 5:1 6:3 7:2 8:6 9:2 10:5 11:6 15:2 22:0",
    (
        "cityscapes",
        "super7",
    ): """7:0 8:0 9:0 10:0 11:1 12:1 13:1 14:1 15:1 16:1 17:2 18:2 19:2 20:2 21:3 22:3 23:4
        24:5 25:5 26:6 27:6 28:6 29:6 30:6 31:6 32:6 33:6""",
    ("camvid", "camvid11"): " ".join(f"{i}:{i}" for i in range(11)),
    ("acdc", "cityscapes19"): " ".join(f"{i}:{i}" for i in range(19)),
    ("darkzurich", "cityscapes19"): " ".join(f"{i}:{i}" for i in range(19)),
    ("streets", "cityscapes19"): " ".join(f"{i}:{i}" for i in range(19)),
    ("streets", "super7"): """0:0 1:0 2:1 3:1 4:1 5:2 6:2 7:2 8:3 9:3 10:4 11:5 12:5 13:6 14:6 15:6 16:6 17:6
        18:6""",
}


@pytest.mark.parametrize(("dataset", "space"), _TABLES)
def test_tables(dataset, space):
    expected = np.full(256, IGNORE, np.uint8)
    for pair in _TABLES[dataset, space].split():
        raw, train = map(int, pair.split(":"))
        expected[raw] = train
    table = lookup_table(dataset, space)
    assert table.dtype == np.uint8
    np.testing.assert_array_equal(table, expected)


def test_what_cannot_be_mapped_is_an_error():
    with pytest.raises(UserError, match="unknown label space 'city'; known: camvid11, "):
        label_space("city")
    with pytest.raises(UserError, match="unknown dataset='ade'; choose one of: acdc, camvid, "):
        lookup_table("ade", "cityscapes19")
    with pytest.raises(UserError, match="synthia has no labels for terrain, train, truck"):
        lookup_table("synthia", "cityscapes19")


def test_names_outside_the_space_are_ignored():
    table = table_by_name({3: "sky", 4: "zebra"}, label_space("cityscapes19"))
    assert table[3] == 10
    assert (np.delete(table, 3) == IGNORE).all()


def test_colourise():
    space = label_space("cityscapes19")
    colours = colourise(np.array([[0, 13, 255]], np.uint8), space)
    assert colours.dtype == np.uint8
    np.testing.assert_array_equal(colours, [[(128, 64, 128), (0, 0, 142), (0, 0, 0)]])
