"""Exports a trained network as a program that labels images of any size, without jaxuda.

The program is one traced function: images as they are, resized as in training, normalised, the network, its scores
resized to the images. FILE.onnx has its operations as nodes of ONNX (`onnx_graph`): the package jax2onnx would do
this too, but its releases need another Orbax than ours. FILE.stablehlo is written by `jax.export`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxuda import files, methods
from jaxuda.data.transforms import OPENCV
from jaxuda.errors import UserError
from jaxuda.inference import onnx_graph
from jaxuda.inference.predictor import Predictor, load
from jaxuda.models.layers import compile_for
from jaxuda.sweeps.scores import kept_aspect, make_scores, probabilities, score_grid

PyTree = Any
SUFFIXES = (".onnx", ".stablehlo")
OUTPUTS = ("labels", "probabilities")
# Two classes are a tie if their probabilities differ by less than this.
TIE = 1e-3


def export(checkpoint: Path, path: Path, say: Callable[[str], None] = print) -> None:
    """Writes the last checkpoint of a stage as a program: the network that was evaluated.

    Its input `images` is (N, H, W, 3) uint8 RGB, any N, H and W; its outputs are `labels` (N, H, W) uint8, the train
    ids, and `probabilities` (N, H, W, C) float32. It computes in float32, whatever the network's compute type is.

    Args:
      checkpoint: the folder of a training stage, or one that `convert` wrote.
      path: FILE.onnx or FILE.stablehlo.
      say: called with lines of text: what was written, and the result of the check.

    Raises:
      UserError: there is no such stage, a layer has no form in ONNX, a package is missing, the file cannot be written,
        or onnxruntime labels an image otherwise than jaxuda.
    """
    predictor = load(str(checkpoint))
    write(predictor, path, say)
    if path.suffix == ".onnx":
        say(check(path, predictor))


def write(predictor: Predictor, path: Path, say: Callable[[str], None] = print) -> None:
    """As `export`, for a network that is loaded already, and without the check."""
    predictor = predictor._replace(model=predictor.model.clone(dtype="float32"))
    program = make_program(predictor)
    batch, height, width = jax.export.symbolic_shape("N, H, W")
    images = jax.ShapeDtypeStruct((batch, height, width, 3), jnp.uint8)
    with compile_for("any"):
        content = (_onnx if path.suffix == ".onnx" else _stablehlo)(predictor, program, images)
    try:
        files.write_bytes(path, content)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    names = ", ".join(predictor.classes or ("of unknown names",))
    say(
        f"{path}: {len(content) / 2**20:.1f} MiB, images (N, H, W, 3) uint8 -> {' and '.join(OUTPUTS)}; classes {names}"
    )


def make_program(predictor: Predictor) -> Callable[[PyTree, jax.Array], tuple[jax.Array, jax.Array]]:
    """`program(variables, images)`: (N, H, W, 3) uint8 of any size -> labels (N, H, W), probabilities (N, H, W, C).

    It computes what `Predictor.predict` does. N, H and W may be symbolic.
    """
    config = predictor.config
    method = methods.load(config.train, imported=True)
    scores = make_scores(predictor.model, method, config)
    grid = score_grid(scores, predictor.variables, config)
    width, height = config.evaluation.size
    kind = config.evaluation.get("interpolation", "bicubic")
    fit, highest = kept_aspect(config) is not None, lax.Precision.HIGHEST

    def program(variables: PyTree, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        own = jnp.asarray(images.shape[1], jnp.int32), jnp.asarray(images.shape[2], jnp.int32)
        shown = fitted(own, (height, width)) if fit else (jnp.int32(height), jnp.int32(width))
        whole = canvas(own, (height, width)) if fit else own
        across = resampling(kind, images.shape[2], own[1], width, shown[1])
        down = resampling(kind, images.shape[1], own[0], height, shown[0])
        # Columns first, as `transforms`; Pillow rounds to whole numbers after each axis, OpenCV once.
        x = jnp.einsum("Ww,nhwc->nhWc", across, images.astype(jnp.float32), precision=highest)
        x = x if kind == OPENCV else _whole(x)
        x = _whole(jnp.einsum("Hh,nhwc->nHwc", down, x, precision=highest))
        found = scores(variables, x)
        rows = bilinear(grid[0], images.shape[1], whole[0], config.align_corners)
        columns = bilinear(grid[1], images.shape[2], whole[1], config.align_corners)
        found = jnp.einsum("Ww,nhwc->nhWc", columns, found, precision=highest)
        found = probabilities(jnp.einsum("Hh,nhwc->nHwc", rows, found, precision=highest), method)
        return jnp.argmax(found, -1).astype(jnp.uint8), found

    return program


def resampling(kind: str, count: Any, length: jax.Array, places: int, shown: jax.Array) -> jax.Array:
    """The resize of images along one axis, as a matrix.

    Args:
      kind: "bicubic" or "bilinear", both antialiased as in Pillow; or "opencv", bilinear without antialiasing.
      count, length: the pixels of the image along this axis, as a size of an array and as a number.
      places: the pixels of the result.
      shown: how many of these show the image; the others are black.

    Returns:
      (places, count) float32.
    """
    scale = length.astype(jnp.float32) / shown.astype(jnp.float32)
    place = jnp.arange(places, dtype=jnp.int32)[:, None]
    centre = (place.astype(jnp.float32) + 0.5) * scale
    pixel = jnp.arange(count, dtype=jnp.int32)[None].astype(jnp.float32) + 0.5
    if kind == OPENCV:
        centre = jnp.clip(centre, 0.5, length - 0.5)  # beyond the border its pixels are repeated
    x = jnp.abs(pixel - centre) / (1.0 if kind == OPENCV else jnp.maximum(scale, 1.0))
    if kind == "bicubic":  # Keys' kernel with a = -0.5
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        weight = jnp.where(x < 1, near, jnp.where(x < 2, far, 0.0))
    else:
        weight = jnp.maximum(1 - x, 0.0)
    weight = weight / jnp.sum(weight, 1, keepdims=True)
    return jnp.where(place < shown, weight, 0.0)


def bilinear(places: int, count: Any, length: jax.Array, align_corners: bool) -> jax.Array:
    """`interpolation_matrix` for a result whose size is only known later.

    Args:
      places: the cells of the scores along one axis.
      count: the pixels of the image, as a size of an array.
      length: the pixels to which all cells are resized; the first `count` of them are kept.
      align_corners: as in `resize_bilinear`.

    Returns:
      (count, places) float32.
    """
    pixel, size = jnp.arange(count, dtype=jnp.int32).astype(jnp.float32), length.astype(jnp.float32)
    if align_corners:
        position = pixel * ((places - 1) / jnp.maximum(size - 1, 1.0))
    else:
        position = jnp.maximum((pixel + 0.5) * (places / size) - 0.5, 0.0)
    position = jnp.minimum(position, places - 1.0)
    cell = jnp.arange(places, dtype=jnp.float32)
    return jnp.maximum(1 - jnp.abs(position[:, None] - cell[None]), 0.0)


def fitted(size: tuple[jax.Array, jax.Array], within: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """`transforms.fitted_size` for a size that is only known later; all sizes are (height, width)."""
    (height, width), (rows, columns) = size, within
    wide = columns * height <= rows * width  # the width decides
    fitted_height = jnp.where(wide, _rounded(height * columns, width), rows)
    return jnp.maximum(fitted_height, 1), jnp.maximum(jnp.where(wide, columns, _rounded(width * rows, height)), 1)


def canvas(size: tuple[jax.Array, jax.Array], within: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """`scores.canvas` for a size that is only known later; all sizes are (height, width)."""
    (height, width), (rows, columns) = size, within
    tall = jnp.maximum(height, _rounded(width * rows, jnp.int32(columns)))
    return tall, jnp.maximum(width, _rounded(height * columns, jnp.int32(rows)))


def _rounded(number: jax.Array, divisor: jax.Array) -> jax.Array:
    """number / divisor as a whole number, halves to even, as Python rounds; both are positive int32."""
    twice = 2 * divisor
    down = lax.div(2 * number + divisor, twice)
    half = (lax.rem(2 * number + divisor, twice) == 0) & (lax.rem(down, jnp.int32(2)) == 1)
    return down - half.astype(jnp.int32)


def _whole(x: jax.Array) -> jax.Array:
    """Rounded to 0..255, as images of 8 bits are."""
    return jnp.clip(jnp.floor(x + 0.5), 0.0, 255.0)


def _onnx(predictor: Predictor, program: Callable, images: jax.ShapeDtypeStruct) -> bytes:
    variables = jax.device_get(predictor.variables)
    traced = jax.jit(program).trace(variables, images)
    model = onnx_graph.write(traced.jaxpr, jax.tree.leaves(variables), ("images",), OUTPUTS)
    for key, value in {
        "classes": json.dumps(predictor.classes),
        "input": "RGB in 0..255, any size; it is resized and normalised inside",
    }.items():
        model.metadata_props.add(key=key, value=value)
    model.producer_name = "jaxuda"
    return model.SerializeToString()


def _stablehlo(predictor: Predictor, program: Callable, images: jax.ShapeDtypeStruct) -> bytes:
    """The variables become constants of the program."""
    variables = jax.device_get(predictor.variables)
    exported = jax.export.export(jax.jit(lambda images: program(variables, images)), platforms=("cpu", "cuda"))
    return bytes(exported(images).serialize())


def check(path: Path, predictor: Predictor) -> str:
    """Compares onnxruntime's labels of two images with jaxuda's; returns what to report.

    Raises:
      UserError: they differ where the two most likely classes are no tie.
    """
    try:
        import onnxruntime
    except ImportError:
        return "not checked: pip install 'jaxuda[export]' brings onnxruntime, which compares its labels with jaxuda's"
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    width, height = predictor.config.evaluation.size
    rng, pixels, ties = np.random.default_rng(0), 0, 0
    for size in ((height, width), (height + 7, 2 * width // 3 + 1)):
        # Noise of several scales, so that there is more than one class.
        image = np.repeat(np.repeat(rng.integers(0, 256, (size[0] // 8 + 1, size[1] // 8 + 1, 3)), 8, 0), 8, 1)
        image = image[: size[0], : size[1]].astype(np.uint8)
        labels, found = predictor.predict(image)
        theirs = session.run(["labels"], {"images": image[None]})[0][0]
        first, second = -np.partition(-found, 1, -1)[..., :2].transpose(2, 0, 1)
        differs = labels != theirs
        if wrong := int((differs & (first - second >= TIE)).sum()):
            raise UserError(
                f"{path} is not what jaxuda computes: onnxruntime labels {wrong} of {labels.size} pixels of an image "
                "otherwise; do not use it, and report this with the versions of onnx and onnxruntime"
            )
        pixels, ties = pixels + labels.size, ties + int(differs.sum())
    return f"checked: onnxruntime's labels of two images are jaxuda's, but for {ties} ties of {pixels} pixels"
