"""Single pictures of a run, each as the content of a file; `python -m jaxuda.report.pictures` writes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxuda import data
from jaxuda.artifacts.arrays import load_arrays
from jaxuda.data import encoding
from jaxuda.data.labels import LabelSpace, colourise
from jaxuda.data.sheet import contact_sheet
from jaxuda.errors import UserError
from jaxuda.inference.restore import restore
from jaxuda.models.layers import normalise, resize_labels
from jaxuda.report import charts
from jaxuda.report.gallery import Gallery, Picture, make_gallery, open_domain
from jaxuda.report.page import stage_chart
from jaxuda.report.runs import Run, StageRun, open_split
from jaxuda.sweeps.scores import input_transform

POINTS = 40  # pixels per class, domain and stage in a picture of features


class Request(NamedTuple):
    """What to draw.

    stages: the chosen ones, or all trainings that have begun. count: number of images. projection: "pca" or "tsne",
    for features.
    """

    run: Run
    stages: list[StageRun]
    count: int
    projection: str


def predictions(request: Request) -> bytes:
    """Rows are images; columns are image, truth (if there is one) and stages."""
    gallery = make_gallery(request.run, request.count, request.stages)

    def columns(picture: Picture) -> dict[str, np.ndarray]:
        truth = {} if picture.truth is None else {"truth": picture.truth}
        return {name: colourise(ids, gallery.space) for name, ids in (truth | picture.labels).items()}

    return _sheet(gallery, columns)


def entropy(request: Request) -> bytes:
    """Rows are images; columns are the image and the entropy of each stage's prediction."""
    gallery = make_gallery(request.run, request.count, request.stages)
    return _sheet(gallery, lambda picture: {n: charts.colour_map(e) for n, e in picture.entropy.items()})


def _sheet(gallery: Gallery, columns: Callable[[Picture], dict[str, np.ndarray]]) -> bytes:
    """The images and the pictures that `columns` returns for each, with headings."""
    rows = [{"image": picture.image, **columns(picture)} for picture in gallery.pictures]
    return encoding.encode_image(contact_sheet(rows))


def features(request: Request) -> bytes:
    """The features of both domains for each stage, projected together."""
    run = request.run
    target, space = open_domain(run, "target")
    source = open_split(run.config, "source")
    rows = []
    for stage in request.stages:
        found = [stage_features(run, stage, records, request.count, space) for records in (source, target)]
        vectors = np.concatenate([vectors for vectors, _ in found])
        if request.projection == "tsne":
            points, told = neighbours(vectors), "t-SNE"
        else:
            points, shares = principal_axes(vectors)
            told = f"PCA, {100 * shares.sum():.0f}% of the variance"
        halves = np.split(points, [len(found[0][0])])
        clouds = [
            charts.Cloud(
                name,
                tuple(space.palette[index].tolist()),
                *(half[classes == index] for half, (_, classes) in zip(halves, found, strict=True)),
            )
            for index, name in enumerate(space.classes)
        ]
        rows.append((f"features of {stage.title}: {told}", clouds))
    headings = (f"source: {source.name}", f"target: {target.name}", "class means: source (ring), target (dot)")
    return charts.standalone(charts.clouds(rows, headings))


def stage_features(
    run: Run, stage: StageRun, records: data.Records, count: int, space: LabelSpace
) -> tuple[np.ndarray, np.ndarray]:
    """Features (n, A) of at most `POINTS` pixels per class of `count` images, and their classes (n,).

    Classes are those of the labels, or the predicted ones if the records have no labels.
    """
    model, variables, config = restore(str(run.folder / stage.name), space.num_classes)
    transform = input_transform(config)

    @jax.jit
    def forward(variables: dict, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        outputs = model.apply(variables, normalise(image[None], config.preprocess), train=False)
        return outputs.features[0], jnp.argmax(outputs.main[0], -1).astype(jnp.uint8)

    vectors, classes = [], []
    for index in np.unique(np.linspace(0, len(records) - 1, count).astype(int)).tolist():
        record = transform(records[index], np.random.default_rng(index))
        maps, predicted = map(np.asarray, forward(variables, record["image"]))
        ids = resize_labels(record["label"], maps.shape[:2]) if "label" in record else predicted
        vectors.append(maps.reshape(-1, maps.shape[-1]))
        classes.append(np.asarray(ids).reshape(-1))
    vectors, classes = np.concatenate(vectors), np.concatenate(classes)
    rng = np.random.default_rng(0)
    chosen = [rng.permutation(np.flatnonzero(classes == c))[:POINTS] for c in range(space.num_classes)]
    chosen = np.concatenate(chosen)
    return vectors[chosen], classes[chosen]


def principal_axes(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (n, 2) of vectors (n, A) on their two main axes, and the share of the variance on each."""
    centred = vectors - vectors.mean(0)
    left, lengths, _ = np.linalg.svd(centred, full_matrices=False)
    shares = lengths**2 / max((lengths**2).sum(), 1e-30)
    return left[:, :2] * lengths[:2], shares[:2]


def neighbours(vectors: np.ndarray) -> np.ndarray:
    """t-SNE of vectors (n, A) in two dimensions, (n, 2); the same at every call."""
    from sklearn.manifold import TSNE  # here: slow to import, and only this picture needs it

    perplexity = min(30, (len(vectors) - 1) / 3)
    return TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(vectors)


def curves(request: Request) -> bytes:
    """Loss and mIoU over the training steps of all stages, one above the other."""
    run = request.run
    scores = f"mIoU in % on {run.validation}"
    found = [stage_chart(run, "loss", "Loss, as each stage defines it"), stage_chart(run, "val/miou", scores, 100)]
    drawn = [chart for chart in found if chart is not None]
    if not drawn:
        raise UserError(f"{run.folder} has logged nothing yet: there are no curves")
    return charts.standalone(charts.stacked(drawn))


def statistics(request: Request) -> bytes:
    """Cosine between the mean features of the classes."""
    arrays, names = _arrays(request.run, "class_statistics.npz", ["features_mean"])
    alike = cosine(arrays["features_mean"], arrays["features_mean"])
    return _matrix(alike, names, "class statistics: cosine of the mean features")


def prototypes(request: Request) -> bytes:
    """Cosine between the prototypes of the source (rows) and the target (columns)."""
    arrays, names = _arrays(request.run, "prototypes.npz", ["source", "target"])
    alike = cosine(arrays["source"], arrays["target"])
    return _matrix(alike, names, "prototypes: cosine of source (rows) and target (columns)")


def _matrix(alike: np.ndarray, names: Sequence[str], title: str) -> bytes:
    low = np.nanmin(alike) if np.isfinite(alike).any() else 0.0
    return charts.standalone(charts.heat_map(names, names, alike, title, (min(low, 0.99), 1.0)))


def cosine(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Cosine of every row of (n, A) with every row of (m, A); NaN where a row is zero (a class that was never seen)."""
    with np.errstate(invalid="ignore"):
        ours, theirs = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (ours, theirs))
    return ours @ theirs.T


def _arrays(run: Run, name: str, wanted: Sequence[str]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Arrays of the file `name` that a stage of the run wrote, and the names of the classes."""
    paths = [run.folder / stage.name / "artifacts" / name for stage in run.stages]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        raise UserError(f"no stage in {run.folder} has written {name}: this picture needs a recipe that writes it")
    arrays, classes = load_arrays(path, path.stem.replace("_", " "), wanted)
    return arrays, list(classes)


KINDS = {
    "curves": (curves, ".svg"),
    "predictions": (predictions, ".png"),
    "entropy": (entropy, ".png"),
    "features": (features, ".svg"),
    "statistics": (statistics, ".svg"),
    "prototypes": (prototypes, ".svg"),
}
