"""CamVid, from tiny files in its layout."""

import numpy as np
import towns

from jaxuda.data import records
from jaxuda.data.datasets.camvid import Camvid
from jaxuda.data.records import load
from jaxuda.prepare import main


def test_camvid_has_its_two_domains(tmp_path, capsys):
    source = towns.camvid(tmp_path / "source")
    assert main(["camvid", "--manual_dir", str(source), "--data_dir", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "camvid/day has train 3, val 1 images; published are train 476, val 101" in output
    assert "sky 8.3%" in output
    ids = {
        (config, split): load(f"camvid/{config}", split, data_dir=tmp_path).ids()
        for config in ("day", "dusk") for split in ("train", "val")
    }  # fmt: skip
    assert ids == {
        ("day", "train"): ["0006R0_1", "0016E5_1", "Seq05VD_1"],
        ("day", "val"): ["0016E5_7"],
        ("dusk", "train"): ["0001TP_1", "0001TP_2"],
        ("dusk", "val"): ["0001TP_9"],
    }
    day = load("camvid/day", "train", data_dir=tmp_path)
    assert day.label_space.name == "camvid11"
    # The bytes of the file, not another encoding.
    stored = records.open_split(records.prepared_folder("camvid/day", tmp_path), "train")[0]["image"]
    assert stored == (source / "train" / "0006R0_1.jpg").read_bytes()
    np.testing.assert_array_equal(day[0]["label"].ravel()[:12], [*range(11), 255])


def test_camvid_published_numbers():
    assert Camvid.PUBLISHED == {"day": {"train": 476, "val": 101}, "dusk": {"train": 62, "val": 62}}


def test_camvid_complains_of_what_is_missing(tmp_path, capsys):
    assert "camvid/day needs --manual_dir DIR: the folder CamVid of" in towns.fails(
        capsys, "camvid", "--data_dir", tmp_path
    )
    missing = tmp_path / "nowhere"
    assert f"--manual_dir {missing}: there is no such folder" in towns.fails(
        capsys, "camvid", "--manual_dir", missing, "--data_dir", tmp_path
    )
    source = towns.camvid(tmp_path / "source")
    (source / "trainannot" / "0006R0_1.png").unlink()
    (source / "test" / "Seq05VD_1.jpg").unlink()
    (source / "val" / "0016E5_7.jpg").unlink()
    towns.image(source / "test" / "holiday.jpg")
    towns.label(source / "testannot" / "holiday.png")
    message = towns.fails(capsys, "camvid", "--manual_dir", source, "--data_dir", tmp_path)
    assert f"{source}/train/0006R0_1.jpg: has no label" in message
    assert f"{source}/testannot/Seq05VD_1.png: has no image" in message
    assert f"{source}/val: holds no files *.jpg or *.png" in message
    assert f"{source}/test/holiday.jpg: its name starts with none of 0006R0" in message
    assert not list(tmp_path.glob("camvid/*"))
