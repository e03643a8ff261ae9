"""The page of one run, and the parts of every page: head, navigation, charts of stages, gallery."""

from __future__ import annotations

import base64
import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import cv2
import numpy as np

from jaxuda.data import encoding
from jaxuda.data.labels import IGNORE, LabelSpace
from jaxuda.report import charts, tables
from jaxuda.report.gallery import Gallery, Picture
from jaxuda.report.markup import Markup, data_uri, join, tag
from jaxuda.report.runs import Run, StageRun
from jaxuda.training import logs, pictures

JPEG_QUALITY = 85
SHADES = 32  # number of levels of an entropy map in a page: fewer compress better
NOT_CURVES = ("stage", "step", "time", "images_per_s", "input_wait", "log_wait", "loss", "share")
Section = tuple[str, str, Markup | None]  # its id, its heading, its content


def run_page(run: Run, gallery: Gallery | None, notes: Sequence[str] = ()) -> str:
    """The report of one run as HTML.

    Args:
      run: the run, as read from its work folder.
      gallery: its pictures, None if they could not be made.
      notes: further lines for the reader, such as why there are no pictures.
    """
    sections: list[Section] = [
        ("results", "Results", tables.results(run) if run.scored else tables.label_free(run)),
        ("pictures", "Pictures", gallery and run_gallery(run, gallery)),
        ("training", "What the training looks at", _training_sheets(run)),
        ("curves", "Curves", _curves(run)),
        ("classes", "Classes", _bars(run)),
        ("confusion", "Confusion", _confusions(run)),
        ("ran", "What ran", _what_ran(run)),
    ]
    return document(run.title, _headline(run), [*run.notes, *notes], sections)


def document(title: str, headline: Any, notes: Sequence[str], sections: Sequence[Section]) -> str:
    """A whole HTML file; sections without content are skipped."""
    shown = [section for section in sections if section[2]]
    script = Markup(_resource("page.js"))
    # Nothing is fetched, and no script but ours runs, whatever names in the data contain.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{policy}"/>'),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{title} | jaxuda"),
        charts.style(),
        tag("style", Markup(_resource("page.css"))),
    )
    links = [tag("li", tag("a", heading, href=f"#{name}")) for name, heading, _ in shown]
    body = tag(
        "body",
        tag("a", "Skip to the results", class_="skip", href="#content"),
        tag("header", tag("h1", title), headline, [tag("p", note, class_="note", role="note") for note in notes]),
        tag("nav", tag("ul", links), aria_label="Sections"),
        tag("main", [_section(*section) for section in shown], id="content"),
        tag("script", script),
    )
    return "<!doctype html>\n" + tag("html", head, body, lang="en")


def _section(name: str, heading: str, content: Markup) -> Markup:
    title = f"{name}-title"
    return tag("section", tag("h2", heading, id=title), content, id=name, aria_labelledby=title)


def _resource(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text()


def _headline(run: Run) -> Markup | None:
    parts = [join(f"{stage.title} ", tag("strong", tables.percent(stage.last["miou"]))) for stage in run.compared]
    if not parts:
        return None
    arrows = [part for pair in zip(parts, [", "] * len(parts), strict=True) for part in pair][:-1]
    return tag("p", "mIoU in %: ", arrows, f" on {run.validation}, last checkpoints.", class_="headline")


def colours(stages: Sequence[StageRun]) -> dict[str, int]:
    """Stage -> the number of its colour in all charts of a page."""
    return {stage.name: index for index, stage in enumerate(stages)}


def stage_curves(run: Run, metric: str, title: str, scale: float = 1) -> Markup | None:
    """A metric over the training steps of all stages, one after the other; None if it was never logged."""
    series, _ = _stage_series(run, metric, scale)
    if not series:
        return None
    chart = charts.fitted(lambda width: stage_chart(run, metric, title, scale, width))
    return tag("figure", chart, tag("figcaption", charts.legend(series)))


def stage_chart(run: Run, metric: str, title: str, scale: float = 1, width: int = charts.WIDTH) -> Markup | None:
    """The chart of `stage_curves` alone, at one width."""
    series, marks = _stage_series(run, metric, scale)
    x_label = "training step, one stage after the other"
    return charts.line_chart(series, title, x_label, marks, width) if series else None


def _stage_series(run: Run, metric: str, scale: float) -> tuple[list[charts.Series], list[charts.Mark]]:
    numbers, offset, series, marks = colours(run.trainings), 0, [], []
    for stage in run.trainings:
        networks = stage.networks if metric.startswith("val/") else ("",)
        for place, network in enumerate(networks):
            if points := stage.curve(metric, network):
                values = [(offset + step, scale * value) for step, value in points]
                colour = numbers[stage.name] + place * charts.COLOURS  # a further network has the same colour, dashed
                series.append(charts.Series(stage.titled(network), colour, values))
        if stage.rows or stage.evaluations:
            marks.append(charts.Mark(offset, stage.title))
            offset += max(stage.steps, *(row["step"] for row in stage.rows + stage.evaluations))
    return series, marks


def _curves(run: Run) -> Markup | None:
    main = [
        stage_curves(run, "loss", "Loss, as each stage defines it"),
        stage_curves(run, "val/miou", f"mIoU in % on {run.validation}", 100),
        stage_curves(run, "share", f"{logs.TITLES['share'].capitalize()}, in %", 100),
    ]
    free = [stage_curves(run, f"val/{name}", f"{name}: {text}") for name, text in tables.FIGURES.items()]
    logged = dict.fromkeys(name for stage in run.trainings for row in stage.rows for name in row)
    names = [name for name in logged if name not in NOT_CURVES and "/" not in name]
    terms = [stage_curves(run, name, logs.TITLES.get(name, name)) for name in names]
    if not any([*main, *free]):
        return None
    return join(
        tag("div", main, class_="charts"),
        _folded("Label-free figures", free, is_open=not run.scored),
        _folded("Terms of the losses, and what else the methods log", terms),
    )


def _training_sheets(run: Run) -> Markup | None:
    """The sheets that stages wrote while they trained: the newest of each, and two earlier ones."""
    figures = []
    for stage in run.trainings:
        found = pictures.sheets(run.folder / stage.name, pictures.TRAINING)
        steps = sorted(found)
        for step in {steps[place]: None for place in (-1, (len(steps) - 1) // 2, 0)} if steps else ():
            text = f"{stage.title}, step {step}"
            # A file that was cut off or removed in the meantime is not worth the page.
            with contextlib.suppress(OSError, ValueError):
                sheet = _jpeg(encoding.decode_image(found[step].read_bytes()))
                image = tag("img", src=data_uri(sheet, "image/jpeg"), alt=f"pictures of {text}", class_="sheet")
                figures.append(tag("figure", image, tag("figcaption", text)))
    if not figures:
        return None
    how = "Labels have the colours of the classes, black where they are ignored; weights are black for 0, white for 1."
    return join(tag("p", how, class_="faint"), figures)


def _folded(title: str, content: Sequence[Markup | None], is_open: bool = False) -> Markup | None:
    if not any(content):
        return None
    return tag("details", tag("summary", title), tag("div", content, class_="charts"), open=is_open)


def _bars(run: Run) -> Markup | None:
    numbers = colours(run.trainings)
    bars = {stage.title: (numbers[stage.name], stage) for stage in run.compared}
    return iou_bars(run.classes, bars) if bars else None


def iou_bars(classes: Sequence[str], stages: Mapping[str, tuple[int, StageRun]]) -> Markup:
    """IoU per class of some stages, which are given as name -> (number of the colour, stage)."""
    series = [
        charts.Series(name, number, [float("nan") if v is None else 100 * v for v in stage.last["iou"]])
        for name, (number, stage) in stages.items()
    ]
    highest = max([value for s in series for value in s.values if value == value], default=1)
    title = "IoU in % per class, last checkpoint"
    chart = charts.fitted(lambda width: charts.bar_chart(classes, series, title, max(highest, 1), width))
    order = "Bars of a class from top to bottom:"
    return tag("figure", tag("figcaption", order, charts.legend(series)), chart)


def _confusions(run: Run) -> Markup | None:
    return join(
        tag("details", tag("summary", stage.title), tables.confusion(run, stage), open=stage is run.result)
        for stage in run.scored
    )


def _what_ran(run: Run) -> Markup:
    free = tables.label_free(run) if run.scored else None
    return join(
        tag("p", f"Work folder {run.folder.absolute()}", class_="faint"),
        tables.stages(run),
        tables.data(run),
        tables.versions(run),
        tag("details", tag("summary", "Label-free figures"), free) if free else None,
        tag("details", tag("summary", "All settings"), tables.settings(run.config)) if run.config else None,
    )


def run_gallery(run: Run, gallery: Gallery) -> Markup:
    """Image, truth, the prediction of each stage and network, and the entropy of the final one, under one slider."""
    last = run.outcome
    first = {stage.name: stage.titled(next(iter(stage.networks))) for stage in run.trainings}

    def title(name: str) -> str:
        return first.get(name, name.replace("_", " "))

    def layers(picture: Picture) -> dict[str, Markup]:
        found = picture_layers(picture, {title(name): ids for name, ids in picture.labels.items()}, gallery.space)
        if last is not None and last.name in picture.entropy:
            found[f"entropy of {last.title}"] = entropy_image(picture, last)
        return found

    return slider(gallery, [layers(picture) for picture in gallery.pictures])


def picture_layers(picture: Picture, predicted: Mapping[str, np.ndarray], space: LabelSpace) -> dict[str, Markup]:
    """Layer name -> picture: the image, the truth and the predictions."""
    layers = {"image": _image(_jpeg(picture.image), "image/jpeg", f"image {picture.id}", picture)}
    truth = {} if picture.truth is None else {"truth": picture.truth}
    for name, ids in (truth | dict(predicted)).items():
        spoken = f"{name} of image {picture.id}: {_most(ids, space)}"
        layers[name] = _image(encoding.encode_indexed(ids, space.palette), "image/png", spoken, picture)
    return layers


def entropy_image(picture: Picture, stage: StageRun) -> Markup:
    """The entropy of a stage's prediction: dark is sure, bright is unsure."""
    levels = (picture.entropy[stage.name].astype(int) * SHADES // 256).astype(np.uint8)
    palette = charts.colour_map(np.linspace(0, 255, SHADES).astype(np.uint8)[None])[0]
    mean = picture.entropy[stage.name].mean() / 255
    spoken = f"entropy of {stage.title} on image {picture.id}: mean {mean:.2f}"
    return _image(encoding.encode_indexed(levels, palette), "image/png", spoken, picture)


def _jpeg(image: np.ndarray) -> bytes:
    return cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes()


def _image(content: bytes, kind: str, spoken: str, picture: Picture) -> Markup:
    height, width = picture.image.shape[:2]
    return tag("img", src=data_uri(content, kind), alt=spoken, title=None, width=width, height=height)


def _most(ids: np.ndarray, space: LabelSpace) -> str:
    """The classes that cover most of a map, for screen readers."""
    counts = np.bincount(ids.ravel(), minlength=IGNORE + 1)[: space.num_classes]
    order = [c for c in np.argsort(-counts, kind="stable")[:3] if counts[c]]
    return ", ".join(f"{space.classes[c]} {100 * counts[c] / ids.size:.0f}%" for c in order) or "nothing labelled"


def slider(gallery: Gallery, pictures: Sequence[Mapping[str, Markup]]) -> Markup:
    """All pictures with one slider over their layers; on paper and without scripts the layers are side by side."""
    names = list(pictures[0])
    control = tag(
        "input",
        type="range",
        min=0,
        max=len(names) - 1,
        step=0.01,
        value=0,
        aria_label="layer that is shown",
        autocomplete="off",
    )
    buttons = [tag("button", name, type="button") for name in names]
    frames = [
        tag(
            "figure",
            tag("div", [tag("div", i, tag("small", n), class_="layer") for n, i in layers.items()], class_="frame"),
            tag("figcaption", picture.id),
        )
        for picture, layers in zip(gallery.pictures, pictures, strict=True)
    ]
    swatches = [
        tag("li", tag("span", class_="swatch", style=f"background:rgb({r},{g},{b})"), f" {name}")
        for name, (r, g, b) in zip(gallery.space.classes, gallery.space.palette.tolist(), strict=True)
    ]
    how = " Drag the slider, or use the arrow keys (Page Up and Page Down for whole layers)."
    shades = " Entropy: dark is sure, bright is not." if any(name.startswith("entropy") for name in names) else None
    return tag(
        "div",
        tag("p", f"{gallery.name}: {', '.join(names)}.", tag("span", how, class_="how"), shades, class_="faint"),
        tag("ul", swatches, class_="palette", aria_label="colours of the classes"),
        tag(
            "div",
            tag("div", buttons, class_="layers", role="group", aria_label="layers"),
            control,
            tag("p", class_="shown", aria_hidden="true"),
            class_="controls",
        ),
        tag("div", frames, class_="frames"),
        class_="gallery",
    )
