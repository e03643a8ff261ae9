"""Reports and pictures of a run with real, tiny networks; and the page in a browser."""

import json
import os
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import browser
import cv2
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import jaxuda
from jaxuda import report
from jaxuda.artifacts.statistics import LevelStatistics, write_statistics
from jaxuda.data import encoding, sheet
from jaxuda.errors import UserError
from jaxuda.inference import predictor
from jaxuda.losses.contrastive import ClassStatistics
from jaxuda.losses.entropy import entropy_map
from jaxuda.main import main
from jaxuda.models.deeplab import DeepLabV2
from jaxuda.report import figures, pictures
from jaxuda.report.gallery import make_gallery
from jaxuda.report.runs import read_run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    """A work folder in which a whole recipe has run."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    os.chdir(ROOT)
    assert main(["jaxuda", *tiny.arguments("minent", workdir=workdir, **data)]) == 0
    return workdir


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """A copy of it that a test may change."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.mark.slow
def test_load_predicts_what_the_command_line_does(finished: Path, data: dict, tmp_path) -> None:
    predictor = jaxuda.load(str(finished / "adapt"))
    assert predictor.classes == tiny.CLASSES
    images = data["target"] / "images" / "val"
    words = tiny.arguments("minent", workdir=tmp_path, **data)
    more = ["--mode=predict", f"--checkpoint={finished / 'adapt'}", f"--images={images}/*.png"]
    assert main(["jaxuda", *words, *more]) == 0
    for path in sorted(images.glob("*.png"))[:2]:
        labels, probabilities = predictor.predict(encoding.decode_image(path.read_bytes()))
        assert labels.dtype == np.uint8 and probabilities.shape == (32, 48, 3)
        np.testing.assert_allclose(probabilities.sum(-1), 1, atol=1e-5)
        expected = cv2.imread(str(tmp_path / "predictions" / "ids" / path.name), cv2.IMREAD_UNCHANGED)
        assert np.mean(labels == expected) > 0.999  # batches of one and of four may round differently


def test_load_takes_any_size_and_refuses_what_is_no_image(finished: Path) -> None:
    predictor = jaxuda.load(str(finished / "source_only"))
    labels, probabilities = predictor.predict(np.zeros((50, 70, 3), np.uint8))
    assert labels.shape == (50, 70) and probabilities.shape == (50, 70, 3)
    for wrong in (np.zeros((50, 70), np.uint8), np.zeros((50, 70, 3), np.float32)):
        with pytest.raises(UserError, match="one RGB image"):
            predictor.predict(wrong)
    with pytest.raises(UserError, match="not the folder of a training stage"):
        jaxuda.load(str(finished))


def test_a_method_with_its_own_predict_is_asked(finished: Path, monkeypatch) -> None:
    from jaxuda.methods import minent

    def predict(variables, images, *, model, config):
        """All pixels get the class that the stage's own config names."""
        grid = model.apply(variables, images, train=False).main.shape[1:3]
        return jnp.broadcast_to(jnp.eye(3)[int(config.lambda_entropy > 0)], (len(images), *grid, 3))

    monkeypatch.setattr(minent, "predict", predict, raising=False)
    labels, _ = jaxuda.load(str(finished / "adapt")).predict(np.zeros((32, 48, 3), np.uint8))
    assert (labels == 1).all()


def test_a_run_ends_with_its_report(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert page.count("<img ") == 4 * 6 and "There are no pictures" not in page
    assert len(page) < 3e6 and "report in" in (finished / "log.txt").read_text()


def test_a_failing_report_does_not_fail_the_run(copied: Path, data: dict, monkeypatch, capsys) -> None:
    def fail(*_) -> None:
        raise RuntimeError("no ink")

    (copied / "report.html").unlink()  # a report that is there stays as it is
    monkeypatch.setattr(report, "write", fail)
    assert main(["jaxuda", *tiny.arguments("minent", workdir=copied, **data)]) == 0
    told = capsys.readouterr().out
    assert "the report could not be written (RuntimeError: no ink)" in told and "mIoU (3)" in told


def test_gallery_holds_what_the_network_says_and_is_kept(copied: Path, monkeypatch) -> None:
    run = read_run(copied)
    gallery = make_gallery(run, 2)
    network = jaxuda.load(str(copied / "adapt"))
    for picture in gallery.pictures:
        labels, probabilities = network.predict(picture.image)
        np.testing.assert_array_equal(picture.labels["adapt"], labels)
        expected = 255 * np.asarray(entropy_map(probabilities).sum(-1))
        np.testing.assert_allclose(picture.entropy["adapt"], expected, atol=0.51)
    assert [picture.id for picture in gallery.pictures] == ["0", "5"]

    loaded = []
    load = predictor.load
    noted = lambda checkpoint, network: loaded.append(Path(checkpoint).name) or load(checkpoint, network)  # noqa: E731
    monkeypatch.setattr(predictor, "load", noted)
    again = make_gallery(run, 2)
    np.testing.assert_array_equal(again.pictures[1].labels["oracle"], gallery.pictures[1].labels["oracle"])
    assert loaded == []
    next((copied / "pictures").glob("0-adapt-labels-*.png")).write_bytes(b"damaged")
    make_gallery(run, 2)
    assert loaded == ["adapt"]
    record = json.loads((copied / "oracle" / "stage.json").read_text())
    (copied / "oracle" / "stage.json").write_text(json.dumps(record | {"fingerprint": "another"}))
    make_gallery(read_run(copied), 2)
    assert loaded == ["adapt", "oracle"] and len(list((copied / "pictures").glob("0-oracle-labels-*.png"))) == 1


def test_gallery_of_a_run_that_has_only_begun(copied: Path) -> None:
    for stage in ("adapt", "oracle"):
        shutil.rmtree(copied / stage)
    (copied / "results.json").unlink()
    page = report.write([copied]).read_text()
    assert page.count("<img ") == 4 * 4 and "not begun: adapt, oracle" in page  # with the entropy of source only
    shutil.rmtree(copied / "source_only" / "checkpoints")
    assert "has a checkpoint yet" in report.write([copied]).read_text()


@pytest.mark.parametrize(("absent", "shown"), [("target", "source"), ("source", "target")])
def test_gallery_of_a_run_with_one_domain(copied: Path, tmp_path, capsys, absent: str, shown: str) -> None:
    saved = json.loads((copied / "config.json").read_text())
    saved["config"][absent]["name"] = ""
    (copied / "config.json").write_text(json.dumps(saved))
    gallery = make_gallery(read_run(copied), 2)
    assert gallery.name == f"folder {shown} val" and gallery.space.classes == tiny.CLASSES
    labels = copied.parent / saved["config"][shown]["path"] / "labels" / "val"
    for picture in gallery.pictures:
        np.testing.assert_array_equal(
            picture.truth, cv2.imread(str(labels / f"{picture.id}.png"), cv2.IMREAD_UNCHANGED)
        )
        assert set(picture.labels) == {"source_only", "adapt", "oracle"}
    assert "There are no pictures" not in report.write([copied]).read_text()
    # Features are of both domains.
    out = str(tmp_path / "features.svg")
    assert pictures.main(["features", "--workdir", str(copied), "--out", out]) == 2
    assert f"there is no {absent}" in capsys.readouterr().err


def test_sheets_and_features(copied: Path, tmp_path, capsys) -> None:
    words = ["--workdir", str(copied), "--count", "2"]
    for kind, columns in (("predictions", 4), ("entropy", 3)):
        out = tmp_path / "new" / f"{kind}.png"
        assert pictures.main([kind, *words, "--out", str(out), "--stages", "source_only,adapt"]) == 0
        assert cv2.imread(str(out)).shape == (2 * 32 + sheet.HEADING, columns * 48, 3)
    out = tmp_path / "features.svg"
    assert pictures.main(["features", *words, "--out", str(out), "--stages", "adapt"]) == 0
    svg = ET.parse(out).getroot()
    texts = [element.text for element in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert {*tiny.CLASSES, "source: folder source train", "target: folder target val"} <= set(texts)
    assert len(list(svg.iter("{http://www.w3.org/2000/svg}circle"))) > 100
    capsys.readouterr()
    assert pictures.main(["entropy", *words, "--out", str(out)]) == 2
    assert "written as .png" in capsys.readouterr().err
    assert pictures.main(["features", *words, "--out", str(out), "--stages", "nothing"]) == 2
    assert "source_only, adapt, oracle" in capsys.readouterr().err
    assert pictures.main(["prototypes", *words, "--out", str(out)]) == 2
    assert "has written prototypes.npz" in capsys.readouterr().err


def test_curves(copied: Path, tmp_path, capsys) -> None:
    out = tmp_path / "curves.svg"
    assert pictures.main(["curves", "--workdir", str(copied), "--out", str(out)]) == 0
    svg = ET.parse(out).getroot()
    charts = svg.findall("{http://www.w3.org/2000/svg}svg")
    assert [len(list(chart.iter("{http://www.w3.org/2000/svg}polyline"))) for chart in charts] == [3, 3]
    assert [chart.get("y") for chart in charts] == ["0", "280"]
    # A run that has logged nothing has no curves.
    (copied / "metrics.jsonl").unlink()
    for stage in ("source_only", "adapt", "oracle"):
        (copied / stage / "evaluations.jsonl").unlink()
    capsys.readouterr()
    assert pictures.main(["curves", "--workdir", str(copied), "--out", str(out)]) == 2
    assert "has logged nothing yet" in capsys.readouterr().err


def test_principal_axes() -> None:
    rng = np.random.default_rng(0)
    plane = rng.normal(size=(200, 2)) * (5, 2)
    turn = np.linalg.qr(rng.normal(size=(7, 7)))[0][:2]
    points, shares = figures.principal_axes(plane @ turn + 3)
    centred = plane - plane.mean(0)
    np.testing.assert_allclose(shares.sum(), 1)
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), np.linalg.norm(centred, axis=1))
    assert np.var(points[:, 0]) > np.var(points[:, 1])


def test_neighbours_stay_together() -> None:
    rng = np.random.default_rng(0)
    vectors = np.concatenate([rng.normal(size=(15, 9)) + 40 * shift for shift in (0, 1)])
    points = figures.neighbours(vectors)
    apart = np.linalg.norm(points[:, None] - points, axis=-1)
    nearest = np.argsort(apart, axis=1)[:, 1]
    assert points.shape == (30, 2) and ((nearest < 15) == (np.arange(30) < 15)).all()


def test_similarities_are_of_the_artifacts(tmp_path) -> None:
    names = ("<b>road</b>", "sky", "never seen")
    (tmp_path / "config.json").write_text(json.dumps({"config": {"pipeline": ["collect"], "collect": {"sweep": "x"}}}))
    folder = tmp_path / "collect" / "artifacts"
    folder.mkdir(parents=True)
    mean = np.array([[3.0, 4.0], [4.0, 3.0], [0.0, 0.0]], np.float32)
    level = ClassStatistics(mean, mean, np.array([1.0, 1.0, 0.0], np.float32))
    model = DeepLabV2(num_classes=3, backbone="resnet18", variant="torchvision")
    write_statistics(folder, LevelStatistics(level, level), model, names)
    np.savez(folder / "prototypes.npz", source=mean, target=-mean, classes=np.array(names))
    for kind, off_diagonal in (("statistics", ".96"), ("prototypes", "-.96")):
        out = tmp_path / f"{kind}.svg"
        assert pictures.main([kind, "--workdir", str(tmp_path), "--out", str(out)]) == 0
        texts = [element.text for element in ET.parse(out).getroot().iter("{http://www.w3.org/2000/svg}text")]
        assert texts.count(off_diagonal) == 2 and texts.count("<b>road</b>") == 2
        assert sum("." in text or "1" in text for text in texts) == 4  # nothing of the class never seen
    (folder / "prototypes.npz").write_bytes(b"damaged")
    with pytest.raises(UserError, match="corrupt"):
        pictures.draw("prototypes", tmp_path, tmp_path / "p.svg")


@pytest.mark.skipif(browser.CHROMIUM is None, reason="needs Chromium")
def test_page_in_a_browser(finished: Path, tmp_path) -> None:
    with browser.Browser(tmp_path / "profile") as page:
        for dark in (False, True):
            page.open(finished / "report.html", dark)
            picture = tmp_path / "page.png"
            page.screenshot(picture)
            pixels = cv2.imread(str(picture))
            assert pixels.shape[0] > 2000 and (np.median(pixels) < 60) == dark and np.unique(pixels).size > 50

        assert page.names("slider") == ["layer that is shown"]
        layers = ["image", "truth", "source only", "adapt", "oracle", "entropy of adapt"]
        assert page.names("button") == layers
        shown = [name for name in page.names("image") if "of image" in name or name.startswith("image ")]
        assert shown == [f"image {index}" for index in (0, 1, 3, 5)]  # hidden layers are not read out
        assert page.names("navigation") == ["Sections"] and all(page.names("table"))

        page.value("document.querySelector('input').focus()")
        spoken = "document.querySelector('input').getAttribute('aria-valuetext')"
        assert page.value(spoken) == "image"
        for key, code, expected in (
            ("ArrowRight", 39, "25% truth over image"),
            ("PageUp", 33, "truth"),
            ("End", 35, "entropy of adapt"),
            ("ArrowRight", 39, "entropy of adapt"),
            ("PageDown", 34, "oracle"),
            ("ArrowLeft", 37, "75% oracle over adapt"),
            ("Home", 36, "image"),
        ):
            page.press(key, code)
            assert page.value(spoken) == expected
        visible = "getComputedStyle(document.querySelectorAll('.frame img')[3]).visibility"
        assert page.value(visible) == "hidden"
        page.value("document.querySelectorAll('.gallery button')[3].click()")
        assert page.value(visible) == "visible" and page.value(spoken) == "adapt"
        assert page.value("document.documentElement.scrollWidth") <= 1200
        page.open(finished / "report.html", width=360)
        assert page.value("document.documentElement.scrollWidth") <= 360  # wide tables scroll by themselves
        assert page.problems == []

        # Even if escaping failed, a script from the data would not run, and nothing would be fetched.
        hostile = tmp_path / "hostile.html"
        added = "<script>window.hit = 1</script><img src='http://127.0.0.1:9/x.png' onerror='window.hit = 2'></body>"
        hostile.write_text((finished / "report.html").read_text().replace("</body>", added))
        page.open(hostile)
        assert page.value("typeof window.hit") == "undefined"
        assert any("Content Security Policy" in problem for problem in page.problems)
