"""`prepare` and `load`, on tiny folders."""

import fcntl
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import towns

from jaxuda.data import make_input, preparing, records
from jaxuda.data.records import Subset, load
from jaxuda.data.transforms import build_transform
from jaxuda.errors import UserError
from jaxuda.prepare import prepare


def test_records_pickle_and_have_a_fingerprint(tmp_path):
    root = towns.folder(tmp_path / "town")
    prepare("folder", path=str(root), data_dir=tmp_path)
    data = load("folder", "train", path=str(root), data_dir=tmp_path)
    first = data[0]
    copy = pickle.loads(pickle.dumps(data))
    assert len(pickle.dumps(data)) < 3000
    np.testing.assert_array_equal(copy[0]["image"], first["image"])
    again = load("folder", "train", path=str(root), data_dir=tmp_path)
    assert copy.fingerprint == again.fingerprint == data.fingerprint
    other = load("folder", "train", path=str(root), data_dir=tmp_path, label_space="cityscapes19")
    assert other.fingerprint != data.fingerprint
    assert int(data.fingerprint, 16)
    assert data.images_only()[0].keys() == {"image", "id"}
    assert data.labels_only()[0].keys() == Subset(data, ["1", "0"]).labels_only()[0].keys() == {"label", "id"}
    np.testing.assert_array_equal(data.labels_only()[0]["label"], data[0]["label"])
    assert data.labels_only().labelled and data[0].keys() == {"image", "label", "id"}


def test_records_feed_workers(tmp_path):
    root = towns.folder(tmp_path / "town")
    prepare("folder", path=str(root), data_dir=tmp_path)
    data = load("folder", "train", path=str(root), data_dir=tmp_path)
    transform = build_transform({"crop": (4, 4)})
    runs = []
    for num_workers in (0, 1):
        options = {"batch": 2, "steps": 3, "num_workers": num_workers}
        with make_input(data, data, **options, source_transform=transform, target_transform=transform) as batches:
            runs.append(list(batches))
    for first, second in zip(*runs, strict=True):
        np.testing.assert_array_equal(first["source"]["label"], second["source"]["label"])
        np.testing.assert_array_equal(first["target"]["image"], second["target"]["image"])
        assert first["target"].keys() == {"image", "id"}


def test_unknown_names(tmp_path):
    with pytest.raises(UserError, match="unknown dataset='street'; choose one of: acdc, camvid, cityscapes, crosscity"):
        load("street/game", "train", data_dir=tmp_path)
    with pytest.raises(UserError, match="unknown dataset 'camvid/night'; choose from camvid/day, camvid/dusk"):
        load("camvid/night", "train", data_dir=tmp_path)
    with pytest.raises(UserError, match="camvid/day takes no path"):
        load("camvid/day", "train", data_dir=tmp_path, path="x")
    with pytest.raises(UserError, match=r"python -m jaxuda.prepare camvid --manual_dir DIR --data_dir "):
        load("camvid/day", "train", data_dir=tmp_path)


def test_the_environment_names_the_data_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "there"))
    assert records.root(None) == tmp_path / "there"
    assert records.root(tmp_path) == tmp_path
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert records.root(None) == tmp_path / "tensorflow_datasets"


def test_a_killed_run_is_cleaned_up(tmp_path, capsys):
    root = towns.folder(tmp_path / "town")
    leftover = tmp_path / "folder" / ".preparing-other_123" / "folder"
    leftover.mkdir(parents=True)
    (leftover / "half.array_record").write_text("half")
    (final,) = prepare("folder", path=str(root), data_dir=tmp_path)
    assert sorted(p.name for p in (tmp_path / "folder").iterdir()) == [final.parent.name]
    capsys.readouterr()
    prepare("folder", path=str(root), data_dir=tmp_path)
    assert f"folder: already prepared in {final}" in capsys.readouterr().out


def test_a_killed_run_leaves_nothing_that_loads(tmp_path, monkeypatch):
    root = towns.folder(tmp_path / "town")
    code = (
        "import os, sys\nfrom jaxuda.data import preparing as p\n"
        "p._summarise = lambda *_: os.kill(os.getpid(), 9)\n"
        "p.prepare('folder', path=sys.argv[1], data_dir=sys.argv[2])"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(root), str(tmp_path)], capture_output=True)
    assert killed.returncode == -9
    assert list((tmp_path / "folder").glob(".preparing-*"))
    with pytest.raises(UserError, match="is not prepared"):
        load("folder", "train", path=str(root), data_dir=tmp_path)
    prepare("folder", path=str(root), data_dir=tmp_path)
    assert not list((tmp_path / "folder").glob(".preparing-*"))
    assert len(load("folder", "train", path=str(root), data_dir=tmp_path)) == 3


def test_the_lock_is_held_while_preparing(tmp_path):
    with preparing._locked(tmp_path):
        descriptor = os.open(tmp_path, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)


def test_a_full_or_unwritable_disk(tmp_path, monkeypatch, capsys):
    root = towns.folder(tmp_path / "town")
    (tmp_path / "file").write_text("")
    message = towns.fails(capsys, "folder", "--path", root, "--data_dir", tmp_path / "file")
    assert "cannot write the dataset below" in message
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr("jaxuda.data.preparing.shutil.disk_usage", lambda _: usage)
    assert "0.2 GiB are needed, 0.0 GiB are free" in towns.fails_on(capsys, root, tmp_path)


def test_damaged_records_are_named(tmp_path, monkeypatch):
    root = towns.folder(tmp_path / "town")
    prepare("folder", path=str(root), data_dir=tmp_path)
    data = load("folder", "train", path=str(root), data_dir=tmp_path)
    data._reader = [{"id": b"0", "image": b"damaged", "label": b""}]
    with pytest.raises(UserError, match="folder town train: record '0' is corrupt"):
        data[0]


def test_command_line_in_a_fresh_process(tmp_path):
    root = towns.folder(tmp_path / "town")
    command = [sys.executable, "-m", "jaxuda.prepare", "folder", "--data_dir", str(tmp_path), "--path"]
    done = subprocess.run([*command, str(root)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "road" in done.stdout
    assert "absl" not in done.stderr
    failed = subprocess.run([*command, str(tmp_path / "nowhere")], capture_output=True, text=True)
    assert failed.returncode == 2
    assert failed.stderr.count("\n") == 1
