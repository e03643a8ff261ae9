"""Pictures of associated pixels: a source pixel, its target pixel, and the source pixel to which that one returns.

    python experiments/association_pictures.py --config configs/plca.py --stage runs/plca-streets-seed0/adapt \
        --pairs 3 --class car --out pictures

Pairs of a source and a target image are spread evenly over the datasets. Each gets three pictures, source left and
target right: pairN_one.png, the most likely positive cycle that returns to another pixel; pairN_CLASS.png, every
positive cycle of one class; pairN_all.png, the ends of all positive cycles, without lines. A cross marks the start, a
dot the target, a ring the return, in the colour of the class; rejected cycles are not drawn. It prints how many cycles
are positive, and which classes are predicted in the target image but missing in the source image.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jaxuda import files
from jaxuda.cli import parse
from jaxuda.data import encoding
from jaxuda.data.labels import IGNORE, LabelSpace
from jaxuda.data.transforms import resize_image
from jaxuda.errors import UserError
from jaxuda.inference.restore import restore
from jaxuda.losses.association import METRICS, cycle, positive
from jaxuda.models.layers import normalise, resize_labels
from jaxuda.pipeline import domains

GAP = 12


class Pair(NamedTuple):
    """Two images of one size, the grid (h, w) of their cycles, and the positive cycles as indices of its positions.

    images: (2, H, W, 3) uint8, source and target.
    cycles: (K, 3) start, target and return, the most likely first.
    classes: (K,) train id of each.
    labelled: how many positions have a label.
    missing: train ids that are predicted in the target but missing in the source.
    """

    images: np.ndarray
    grid: tuple[int, int]
    cycles: np.ndarray
    classes: np.ndarray
    labelled: int
    missing: list[int]


@partial(jax.jit, static_argnames=("model", "preprocess", "metric", "aggregation"))
def associate(variables, images, *, model, preprocess, metric, aggregation):
    """Cycles from the first image to the second, and the classes predicted in the second (h, w)."""
    outputs = model.apply(variables, normalise(images, preprocess), train=False)
    maps = outputs.features if metric == "cosine" else jax.nn.softmax(outputs.main)
    return cycle(maps[:1], maps[1:], metric, aggregation), outputs.main[1].argmax(-1)


def make_pair(source: dict, target: dict, variables: dict, *, model, config, metric: str) -> Pair:
    """Associates two records, at the size of the evaluation."""
    images = np.stack([resize_image(record["image"], config.evaluation.size) for record in (source, target)])
    found, predicted = jax.device_get(
        associate(
            variables,
            images,
            model=model,
            preprocess=config.preprocess,
            metric=metric,
            aggregation=config.get("aggregation", 0.5),
        )
    )
    label = resize_labels(source["label"], predicted.shape).astype(np.int32).reshape(1, -1)
    kept = np.flatnonzero(np.asarray(positive(found, label))[0])
    kept = kept[np.argsort(-found.log_likelihood[0][kept], kind="stable")]
    cycles = np.stack([kept, found.target[0][kept], found.source[0][kept]], axis=1)
    missing = sorted(set(np.unique(predicted).tolist()) - set(np.unique(label).tolist()))
    return Pair(images, predicted.shape, cycles, label[0][kept], int(np.sum(label != IGNORE)), missing)


def draw(pair: Pair, chosen: np.ndarray, space: LabelSpace, *, scale: int, lines: bool) -> np.ndarray:
    """Both images side by side, darker, with the `chosen` cycles (indices into `pair.cycles`)."""
    height, width = pair.images.shape[1:3]
    size = (width * scale, height * scale)
    gap = np.full((size[1], GAP, 3), 255, np.uint8)
    source, target = (cv2.resize(image // 2 + 40, size, interpolation=cv2.INTER_LINEAR) for image in pair.images)
    sheet = np.ascontiguousarray(np.concatenate([source, gap, target], axis=1))

    def pixel(position: int, right: bool) -> tuple[int, int]:
        row, column = divmod(int(position), pair.grid[1])
        x, y = (column + 0.5) / pair.grid[1] * size[0], (row + 0.5) / pair.grid[0] * size[1]
        return round(x) + right * (size[0] + GAP), round(y)

    mark = 4 * scale
    for (start, middle, end), label in zip(pair.cycles[chosen], pair.classes[chosen], strict=True):
        colour = tuple(int(value) for value in space.palette[label])
        a, b, c = pixel(start, False), pixel(middle, True), pixel(end, False)
        if lines:
            cv2.line(sheet, a, b, colour, 1, cv2.LINE_AA)
            cv2.line(sheet, b, c, colour, 1, cv2.LINE_AA)
        cv2.drawMarker(sheet, a, colour, cv2.MARKER_TILTED_CROSS, mark, max(1, scale // 2), cv2.LINE_AA)
        cv2.circle(sheet, b, mark // 2, colour, -1, cv2.LINE_AA)
        cv2.circle(sheet, c, mark // 2, colour, max(1, scale // 2), cv2.LINE_AA)
    return sheet


def choices(pair: Pair, train_id: int) -> dict[str, np.ndarray]:
    """Which cycles each picture shows: "one", "class" and "all"."""
    elsewhere = np.flatnonzero(pair.cycles[:, 0] != pair.cycles[:, 2])
    everything = np.arange(len(pair.cycles))
    one = elsewhere[:1] if len(elsewhere) else everything[:1]
    return {"one": one, "class": np.flatnonzero(pair.classes == train_id), "all": everything}


def main() -> None:
    """Reads the command line and writes the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="config:benchmark of the two domains")
    parser.add_argument("--stage", required=True, help="folder of a finished training stage")
    parser.add_argument("--pairs", default=3, type=int, help="number of pairs")
    parser.add_argument("--class", default="road", dest="name", help="class whose cycles are drawn on their own")
    parser.add_argument("--metric", default="cosine", choices=METRICS, help="kl: predictions instead of features")
    parser.add_argument("--scale", default=3, type=int, help="enlargement of the pictures")
    parser.add_argument("--out", required=True, type=Path, help="folder to write to")
    args, overrides = parser.parse_known_args()
    config = parse(["association_pictures", f"--config={args.config}", *overrides]).config
    opened = domains.load_domains(config)
    space = opened.source.label_space
    if args.name not in space.classes:
        raise UserError(f"--class {args.name}: the classes are {', '.join(space.classes)}")
    args.out.mkdir(parents=True, exist_ok=True)
    model, variables, trained = restore(args.stage, space.num_classes)
    for number in range(args.pairs):
        source, target = (
            records[number * len(records) // args.pairs] for records in (opened.source, opened.target.images_only())
        )
        pair = make_pair(source, target, variables, model=model, config=trained, metric=args.metric)
        for kind, chosen in choices(pair, space.classes.index(args.name)).items():
            sheet = draw(pair, chosen, space, scale=args.scale, lines=kind != "all")
            name = f"pair{number}_{args.name if kind == 'class' else kind}.png"
            files.write_bytes(args.out / name, encoding.encode_image(sheet))
        missing = ", ".join(space.classes[index] for index in pair.missing) or "none"
        print(
            f"pair {number}: {source['id']} -> {target['id']}, {len(pair.cycles)} of {pair.labelled} cycles positive; "
            f"predicted in the target, absent from the source: {missing}"
        )
    print(f"pictures in {args.out}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
