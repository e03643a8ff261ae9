"""Several datasets as one domain."""

import pickle

import numpy as np
import pytest
import towns
from layouts import gta5, synthia

from jaxuda.data import PseudoLabelled, domain_transform, load, make_input
from jaxuda.data.labels import label_space
from jaxuda.data.pseudo import LABELS, write_pseudo_label
from jaxuda.data.records import Subset
from jaxuda.errors import UserError
from jaxuda.prepare import prepare


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A folder with GTA5, SYNTHIA and CamVid, prepared from tiny files."""
    top = tmp_path_factory.mktemp("joined")
    for name, source in (
        ("gta5", gta5(top / "g")),
        ("synthia", synthia(top / "s")),
        ("camvid", towns.camvid(top / "c")),
    ):
        prepare(name, manual_dir=source, data_dir=top)
    return top


def test_the_parts_follow_each_other(there):
    both = load("camvid/day+camvid/dusk", "train", data_dir=there)
    day, dusk = (load(f"camvid/{config}", "train", data_dir=there) for config in ("day", "dusk"))
    assert both.ids() == [f"camvid-day+{id_}" for id_ in day.ids()] + [f"camvid-dusk+{id_}" for id_ in dusk.ids()]
    assert len(both) == 5 and both.labelled and both.name == "camvid/day train + camvid/dusk train"
    for index, record in enumerate([*day, *dusk]):
        assert both[index]["id"] == both.ids()[index] and both[index - 5]["id"] == both.ids()[index]
        np.testing.assert_array_equal(both[index]["image"], record["image"])
        np.testing.assert_array_equal(both[index]["label"], record["label"])
    with pytest.raises(IndexError):
        both[5]
    np.testing.assert_array_equal(both.class_pixels(), np.concatenate([day.class_pixels(), dusk.class_pixels()]))
    assert both.images_only()[4].keys() == {"image", "id"} and both.labels_only()[4].keys() == {"label", "id"}
    some = Subset(both, [both.ids()[4], both.ids()[0]])
    np.testing.assert_array_equal(some.class_pixels(), both.class_pixels()[[4, 0]])
    assert pickle.loads(pickle.dumps(both))[4]["id"] == "camvid-dusk+0001TP_2"


def test_the_fingerprint_follows_from_those_of_the_parts(there):
    names = ("camvid/day+camvid/dusk", "camvid/dusk+camvid/day", "camvid/day")
    found = {load(name, "train", data_dir=there).fingerprint for name in names}
    assert len(found) == 3
    assert load(names[0], "train", data_dir=there).fingerprint in found
    assert load(names[0], "val", data_dir=there).fingerprint not in found


def test_all_parts_are_read_in_one_label_space(there):
    both = load("synthia+gta5", "train", data_dir=there)
    assert both.label_space.name == "synthia16"
    other = load("gta5", "train", label_space="synthia16", data_dir=there)
    np.testing.assert_array_equal(both[3]["label"], other[0]["label"])
    assert both.class_pixels().shape == (6, 17)
    assert {"depth"} == load("synthia", "train", data_dir=there)[0].keys() - both[0].keys()


def test_one_of_the_parts_must_have_each_class(there):
    both = load("gta5+synthia", "train", data_dir=there)
    assert both.label_space.name == "cityscapes19"
    gta5, synthia = both[0]["label"], both[4]["label"]
    nineteen, sixteen = (label_space(name).classes for name in ("cityscapes19", "synthia16"))
    assert set(np.unique(gta5)) == {*range(19), 255}
    assert {nineteen[index] for index in np.unique(synthia)[:-1]} == set(sixteen)
    assert both.class_pixels().shape == (6, 20) and not both.class_pixels()[4, nineteen.index("terrain")]
    with pytest.raises(UserError, match=r"synthia and camvid have no labels for .*terrain, train, truck"):
        load("synthia+camvid/day", "train", label_space="cityscapes19", data_dir=there)
    with pytest.raises(UserError, match="synthia has no labels for terrain, train, truck"):
        load("synthia", "train", label_space="cityscapes19", data_dir=there)


def test_what_cannot_be_joined(there):
    with pytest.raises(UserError, match=r"'gta5\+gta5' joins the same dataset twice"):
        load("gta5+gta5", "train", data_dir=there)
    with pytest.raises(UserError, match=r"python -m jaxuda.prepare cityscapes --manual_dir DIR"):
        load("gta5+cityscapes", "train", data_dir=there)


def test_each_part_is_transformed_as_it_asks_for(there):
    both = load("synthia+gta5", "train", data_dir=there)
    domain = {"name": "synthia+gta5", "path": "", "split": "train", "crop": (4, 4)}
    transform = domain_transform(domain | {"parts": {"gta5": {"resize": (4, 4)}}})
    with make_input(both, batch=6, steps=1, source_transform=transform) as batches:
        batch = next(batches)["source"]
    assert sorted(batch["id"]) == sorted(both.ids()) and batch["image"].shape == (6, 4, 4, 3)
    resized = domain_transform({"resize": (4, 4)})
    for image, name in zip(batch["image"], batch["id"], strict=True):
        whole = both[both.ids().index(name)]
        same = np.array_equal(image, resized(whole, np.random.default_rng(0))["image"])
        assert same == name.startswith("gta5+")
    with pytest.raises(UserError, match=r"parts.camvid is not a part of 'synthia\+gta5'"):
        domain_transform(domain | {"parts": {"camvid": {}}})


def test_parts_by_config_or_by_dataset():
    domain = {"name": "camvid/day+my.own.town/dusk+my.own.town/rain", "flip": 0.5}
    parts = {"camvid/day": {"flip": 0.0}, "town": {"resize": (8, 8)}, "town/rain": {"resize": (2, 2)}}
    found = domain_transform(domain | {"parts": parts}).transforms
    assert {name: (spec.flip, spec.resize) for name, spec in found.items()} == {
        "camvid-day+": (0.0, None),
        "my.own.town-dusk+": (0.5, (8, 8)),
        "my.own.town-rain+": (0.5, (2, 2)),
    }


def test_pseudo_labels_are_found_by_id(there, tmp_path):
    both = load("camvid/day+camvid/dusk", "train", data_dir=there)
    (tmp_path / LABELS).mkdir()
    for index, name in enumerate(both.ids()):
        write_pseudo_label(tmp_path, name, np.full(both[index]["label"].shape, index, np.uint8), both.label_space)
    found = PseudoLabelled(both, tmp_path, both.label_space)
    assert [found[index]["label"].max() for index in range(5)] == [*range(5)]
