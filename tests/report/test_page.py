"""Reports of hand-written work folders: no network runs here."""

import html.parser
import json
import re

import numpy as np
import pytest
from drawn_run import CLASSES, EVIL, STAGES, TRAINED, draw_run, evaluation, hostile_gallery

from jaxuda import report
from jaxuda.errors import UserError
from jaxuda.report.__main__ import main
from jaxuda.report.page import run_page
from jaxuda.report.runs import read_run


class Parsed(html.parser.HTMLParser):
    """elements: (name, attributes). tables: caption -> rows of cells. text: all visible text."""

    def __init__(self, page: str):
        super().__init__()
        self.elements, self.tables, self.text = [], {}, ""
        self._rows, self._caption, self._open = [], "", []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self._rows, self._caption = [], dict(attrs)["aria-label"]
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")
        self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag, f"{tag} is closed where something else is open"
        if tag == "table":
            self.tables[self._caption] = self._rows

    def handle_data(self, data):
        if not {"style", "script"} & set(self._open):
            self.text += data
        if {"td", "th"} & set(self._open):
            self._rows[-1][-1] += data


def assert_harmless(page: str) -> Parsed:
    """There is one script, ours; nothing is fetched; attributes have no handlers."""
    parsed = Parsed(page)
    assert [name for name, _ in parsed.elements].count("script") == 1
    for name, attributes in parsed.elements:
        assert not [key for key in attributes if key.startswith("on")], (name, attributes)
        assert attributes.get("src", "data:").startswith("data:")
        assert attributes.get("href", "#").startswith("#")
    assert not {"link", "iframe", "object", "base", "form"} & {name for name, _ in parsed.elements}
    assert not re.search(r"https?://|url\(|@import", page)
    return parsed


def test_everything_from_data_is_escaped_and_nothing_is_fetched(tmp_path) -> None:
    folder = draw_run(tmp_path / "run", name=EVIL, note={EVIL: EVIL})
    page = run_page(read_run(folder), hostile_gallery(), [EVIL])
    parsed = assert_harmless(page)
    assert "<script>alert(1)</script>" in parsed.text and EVIL in parsed.text
    assert sum(name == "img" for name, _ in parsed.elements) == 2 * 5


def test_table_holds_the_numbers_of_the_results(tmp_path) -> None:
    folder = draw_run(tmp_path / "run")
    parsed = assert_harmless(report.write([folder]).read_text())
    results = json.loads((folder / "results.json").read_text())["stages"]
    caption = "IoU in % on folder val. Checkpoint: the last of each stage, except in the row marked *."
    head, *rows = parsed.tables[caption]
    titles = ("class", "source only", "adapt", "oracle", "gain")
    assert all(cell.startswith(name) for cell, name in zip(head, titles, strict=True))
    found = {cells[0]: cells[1:] for cells in rows}
    names = ("source_only", "adapt", "oracle")

    def shown(values) -> list[str]:
        return ["-" if value is None else f"{100 * value:.1f}" for value in values]

    for index, name in enumerate(CLASSES):
        assert found[name][:3] == shown(results[stage]["last"]["iou"][index] for stage in names)
    assert found["mIoU (3 classes)"][:3] == shown(results[stage]["last"]["miou"] for stage in names)
    assert found["pixel accuracy"][:3] == shown(results[stage]["last"]["pixel_accuracy"] for stage in names)
    mean = found["mIoU, mean of the last 2 evaluations"]
    assert mean[:3] == shown(results[stage]["mean_of_last"]["miou"] for stage in names)
    best = found["mIoU, best on val (uses target labels) *"]
    assert best[:3] == shown(results[stage]["best_on_val_using_target_labels"]["miou"] for stage in names)
    gained = results["adapt"]["last"]["miou"] - results["source_only"]["last"]["miou"]
    assert found["mIoU (3 classes)"][3] == f"{100 * gained:+.1f}"
    assert "chosen with target labels" in parsed.tables["Stages, in the order in which they run"][3][3]
    confusion = next(rows for caption, rows in parsed.tables.items() if caption.startswith("adapt: rows"))
    counts = np.array(results["adapt"]["last"]["confusion"])
    assert confusion[1][1:] == [f"{100 * count / counts[0].sum():.0f}" for count in counts[0]]
    assert confusion[3][1:] == ["-", "-", "-"]


def test_a_teacher_and_its_student_are_side_by_side(tmp_path) -> None:
    folder = draw_run(tmp_path / "run")
    path = folder / "adapt" / "evaluations.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row |= {"network": "teacher", "other_networks": {"student": {**evaluation(row["step"], 9, 3), "step": 0}}}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = json.loads((folder / "adapt" / "results.json").read_text()) | {"last": rows[-1]}
    (folder / "adapt" / "results.json").write_text(json.dumps(results))
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps({"stage": "adapt", "step": s, "loss": 1.0, "share": s / 40}) + "\n" for s in (10, 20))
    )
    parsed = assert_harmless(report.write([folder]).read_text())
    head, *lines = next(rows for caption, rows in parsed.tables.items() if caption.startswith("IoU in % on"))
    titles = ("class", "source only", "adapt (teacher)", "adapt (student)", "oracle", "gain")
    assert all(cell.startswith(name) for cell, name in zip(head, titles, strict=True))
    found = {cells[0]: cells[1:] for cells in lines}
    student = [row["other_networks"]["student"]["miou"] for row in rows]
    assert found["mIoU (3 classes)"][1:3] == [f"{100 * score:.1f}" for score in (rows[-1]["miou"], student[-1])]
    assert found["mIoU, mean of the last 2 evaluations"][1:3] == [f"{100 * results['mean_of_last']['miou']:.1f}", "-"]
    before = json.loads((folder / "source_only" / "results.json").read_text())["last"]["miou"]
    assert found["mIoU (3 classes)"][4] == f"{100 * (rows[-1]['miou'] - before):+.1f}"  # that of the teacher
    spoken = [attributes.get("aria-label", "") for name, attributes in parsed.elements if name == "svg"]
    curves = next(text for text in spoken if text.startswith("mIoU in %"))
    assert f"adapt (student): from {100 * student[0]:.3g} to {100 * student[1]:.3g}" in curves
    assert "Share of confident pixels, in %. adapt: from 25 to 50" in spoken


@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_half_finished_runs_say_what_is_missing(tmp_path, done: int) -> None:
    folder = draw_run(tmp_path / "run", done=done)
    parsed = assert_harmless(report.write([folder]).read_text())
    assert "This run is not complete" in parsed.text
    assert ("so far: step 10 of 20" in parsed.text) == (done != 1)  # the second stage is a sweep
    status = {row[0]: row[-1] for row in parsed.tables["Stages, in the order in which they run"][1:]}
    expected = ["done"] * done + ["started"] + ["missing"] * (3 - done)
    assert list(status.values()) == expected


def test_runs_without_labels_show_label_free_figures(tmp_path) -> None:
    stages = {name: own for name, own in STAGES.items() if name != "oracle"}
    folder = draw_run(tmp_path / "run", done=3, labelled=False, stages=stages)
    parsed = assert_harmless(report.write([folder]).read_text())
    assert "no labelled validation images, so there are no scores; see the label-free figures." in parsed.text
    assert parsed.tables["Label-free figures, last checkpoint"][1][1:] == ["0.250", "0.250"]


def test_runs_without_a_target_show_no_figures(tmp_path) -> None:
    stages, none = {"source_only": STAGES["source_only"]}, {"name": "", "path": "", "split": "train"}
    folder = draw_run(tmp_path / "run", done=1, stages=stages, labelled=False, target=none)
    for name in ("source_only/evaluations.jsonl", "source_only/results.json", "results.json"):
        (folder / name).unlink()
    parsed = assert_harmless(report.write([folder]).read_text())
    assert "no labelled validation images, so there are no scores." in parsed.text
    assert [row[0] for row in parsed.tables["Data"]] == ["domain", "source", "target"]


def test_missing_parts_are_survived(tmp_path) -> None:
    only_results = draw_run(tmp_path / "a")
    for path in sorted(only_results.rglob("*"), reverse=True):
        if path.name != "results.json" or path.parent != only_results:
            path.rmdir() if path.is_dir() else path.unlink()
    parsed = assert_harmless(report.write([only_results]).read_text())
    assert "config.json is missing" in parsed.text and "mIoU (3 classes)" in parsed.text

    nothing_logged = draw_run(tmp_path / "b")
    (nothing_logged / "metrics.jsonl").unlink()
    parsed = assert_harmless(report.write([nothing_logged]).read_text())
    assert "Taken over from another work folder" in parsed.text

    # A neighbour with the same stages has the losses.
    draw_run(tmp_path / "d")
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "stage.json").write_text("{corrupt")
    parsed = assert_harmless(report.write([nothing_logged]).read_text())
    assert "Taken over from another work folder" not in parsed.text
    spoken = [attributes.get("aria-label", "") for name, attributes in parsed.elements if name == "svg"]
    assert any(text.startswith("Loss, as each stage defines it. source only: from 0.1 to 0.05") for text in spoken)

    just_begun = draw_run(tmp_path / "c", done=0)
    for name in ("stage.json", "evaluations.jsonl"):
        (just_begun / "source_only" / name).unlink()
    (just_begun / "metrics.jsonl").unlink()
    assert_harmless(report.write([just_begun]).read_text())


def test_stage_names_do_not_lead_out_of_the_work_folder(tmp_path) -> None:
    folder = draw_run(tmp_path / "run", done=0, stages={"../outside": STAGES["adapt"], "adapt": STAGES["adapt"]})
    assert [stage.name for stage in read_run(folder).stages] == ["adapt"]


def test_comparison(tmp_path) -> None:
    folders = [draw_run(tmp_path / f"run{seed}", seed=seed) for seed in (1, 7)]
    page = report.write(folders, tmp_path / "out" / "both.html").read_text()
    parsed = assert_harmless(page)
    head, *rows = parsed.tables["mIoU in %, last checkpoint of each stage, except in the column marked *"]
    for folder, row in zip(folders, rows, strict=True):
        results = json.loads((folder / "results.json").read_text())["stages"]
        found = dict(zip(head, row, strict=True))
        for column, stage in (("source only", "source_only"), ("adapted", "adapt"), ("oracle", "oracle")):
            assert found[column] == f"{100 * results[stage]['last']['miou']:.1f}"
    over_seeds = next(rows for caption, rows in parsed.tables.items() if "over seeds" in caption)
    assert ["minent: adapt", "tiny", "2"] in [row[:3] for row in over_seeds]
    differing = parsed.tables["Settings and versions that are not the same in all runs"]
    assert ["seed", "1", "7"] in differing and not any(row[0] == "adapt.steps" for row in differing)
    per_class = parsed.tables["IoU in %, last checkpoint of each run's adapted stage"]
    assert [row[0] for row in per_class[1:]] == [*CLASSES, "mIoU (3 classes)"]


def test_runs_that_cannot_be_compared_are_refused(tmp_path, capsys) -> None:
    folder, plain = draw_run(tmp_path / "first"), draw_run(tmp_path / "plain", seed=1)
    results = json.loads((plain / "results.json").read_text())
    (plain / "results.json").write_text(json.dumps(results | {"classes": ["road", "car", "sky"]}))
    sized = [draw_run(tmp_path / f"{width}", evaluation={"split": "val", "size": [width, 8]}) for width in (8, 16)]
    for pair, reason in (
        ((folder, plain), "classes differ"),
        (sized, "evaluation sizes differ: (8, 8) against (16, 8)"),
    ):
        assert main(["--workdir", *map(str, pair), "--out", str(tmp_path / "both.html")]) == 2
        message = capsys.readouterr().err
        assert reason in message and "cannot be compared" in message and not (tmp_path / "both.html").exists()


def test_runs_of_one_name_are_told_apart_and_unfinished_ones_compared(tmp_path) -> None:
    folders = [draw_run(tmp_path / place / "run", done=done) for place, done in (("x", 4), ("y", 0), ("z", 1))]
    parsed = assert_harmless(report.write(folders, tmp_path / "both.html").read_text())
    rows = parsed.tables["mIoU in %, last checkpoint of each stage, except in the column marked *"][1:]
    assert len({row[0] for row in rows}) == 3


def test_command(tmp_path, capsys) -> None:
    folder = draw_run(tmp_path / "run")
    assert main(["--workdir", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    assert main(["--workdir", str(folder), str(folder)]) == 2
    assert "--out" in capsys.readouterr().err
    assert main(["--workdir", str(tmp_path)]) == 2
    assert "is not a work folder" in capsys.readouterr().err
    with pytest.raises(UserError, match="corrupt"):
        (folder / "config.json").write_text("{")
        read_run(folder)


def test_a_control_stands_between_source_only_and_the_adapted_stage(tmp_path) -> None:
    control = {"train": "control", "domains": ["source", "target"], **TRAINED, "init": "source_only"}
    stages = {"source_only": STAGES["source_only"], "control": control}
    stages |= {name: STAGES[name] for name in ("adapt", "oracle")}
    folder = draw_run(tmp_path / "run", stages=stages)
    parsed = assert_harmless(report.write([folder]).read_text())
    head, *rows = next(rows for caption, rows in parsed.tables.items() if caption.startswith("IoU in % on"))
    titles = (
        "class",
        "source only",
        "control",
        "adapt",
        "oracle",
        "gainadapt over source only",
        "gainadapt over control",
    )
    assert all(cell.startswith(name) for cell, name in zip(head, titles, strict=True))
    scores = {n: r["last"]["miou"] for n, r in json.loads((folder / "results.json").read_text())["stages"].items()}
    found = {cells[0]: cells[1:] for cells in rows}
    gains = [f"{100 * (scores['adapt'] - scores[name]):+.1f}" for name in ("source_only", "control")]
    assert found["mIoU (3 classes)"][4:] == gains
    assert re.search(r"source only [\d.]+, control [\d.]+, adapt [\d.]+, oracle [\d.]+ on", parsed.text)
    plain = draw_run(tmp_path / "plain", seed=1)
    parsed = assert_harmless(report.write([folder, plain], tmp_path / "both.html").read_text())
    head, *rows = parsed.tables["mIoU in %, last checkpoint of each stage, except in the column marked *"]
    assert head[4:10] == ["source only", "control", "adapted", "oracle", "gain over source only", "gain over control"]
    assert rows[0][5] == f"{100 * scores['control']:.1f}" and rows[0][9] == gains[1] and rows[1][5] == rows[1][9] == "-"
    assert not any("control" in row[0] for row in rows)


def test_a_control_is_not_what_a_run_comes_to(tmp_path) -> None:
    """Not even while nothing has been adapted."""
    control = {"train": "control", "domains": ["source", "target"], **TRAINED}
    stages = {"source_only": STAGES["source_only"], "control": control, "adapt": STAGES["adapt"]}
    begun = read_run(draw_run(tmp_path / "begun", done=1, stages=stages))
    assert [stage.name for stage in begun.scored] == ["source_only", "control"]
    assert begun.outcome.name == begun.result.name == "source_only" and begun.final("adapted") is None
    adapting = read_run(draw_run(tmp_path / "adapting", done=2, stages=stages))
    assert adapting.outcome.name == adapting.result.name == "adapt"
    alone = read_run(draw_run(tmp_path / "alone", done=1, stages={"control": control}))
    assert alone.outcome is None and alone.result is None
