"""Random and fixed transforms of records on the host, described by a small mapping in the config.

Geometric transforms change image, reference image, label and depth together; photometric ones change only the image.
All randomness comes from the generator that is passed in, so that equal generators give equal records.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageEnhance

from jaxuda.data.encoding import count_ids
from jaxuda.data.labels import IGNORE
from jaxuda.errors import UserError

Record = dict[str, Any]
Transform = Callable[[Record, np.random.Generator], Record]

_INTERPOLATION = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
OPENCV = "opencv"
# How often a crop is drawn again. In the published code of class-balanced crops, and of rare class sampling, the crop
# after the last refusal is used whatever it shows.
_REFUSALS = 10
# Fill values of a window that is larger than the image: black, ignore, and no depth (infinitely far). mmsegmentation
# pads normalised images with 0, the mean colour; the recipes that follow it have no crop larger than its image.
_PADDING = {"image": 0, "reference": 0, "label": IGNORE, "depth": 0, "trusted": 0}
_IMAGES = ("image", "reference")


@dataclass(frozen=True)
class TransformSpec:
    """Fields of a transform, applied in this order; None and 0 mean "off". Sizes are (width, height).

    At most one of `resize`, `within`, `fit`, `short_side` and `scale` may be set.
    """

    resize: tuple[int, int] | None = None  # to this size; the aspect may change
    within: tuple[int, int] | None = None  # to the largest size inside this one, aspect kept, sides rounded half up
    fit: tuple[int, int] | None = None  # to fit into this size, aspect kept, at the top left; the rest is padding
    short_side: tuple[int, int] | None = None  # the short side uniform in lo..hi (integers, both included)
    scale: tuple[float, float] | None = None  # to a uniform factor in lo..hi of `base`
    base: tuple[int, int] | None = None  # size that `scale` refers to; default: the image's own
    margins: tuple[int, int, int, int] | None = None  # rows at top and bottom, columns at left and right: not trusted
    crop: tuple[int, int] | None = None  # random window; smaller images are padded at the right and bottom
    balanced: float | None = None  # crops show two classes or more, none on this share of the labelled pixels or more
    flip: float = 0.0  # probability of a mirror image
    jitter: tuple[float, float, float, float] | None = None  # brightness, contrast, saturation, hue
    grey: float = 0.0  # probability of a grey image
    blur: tuple[float, float] | None = None  # 3x3 Gaussian with sigma uniform in lo..hi
    # "bicubic" or "bilinear": images antialiased, labels by the pixel at the centre, as Pillow. "opencv": bilinear
    # without antialiasing, labels by pixel floor(i * in / out), as OpenCV and the recipes of mmsegmentation.
    interpolation: str = "bicubic"

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        """Transforms a record: "image" (H, W, 3) uint8 and, where present, "reference", "label" and "depth" (H, W).

        Its entry "wanted", (class, pixels), is removed: the crop should show more pixels of the class than that.
        `margins` adds "trusted" (H, W) uint8: 0 in the margins of the resized image and in padding, 1 elsewhere.
        `balanced` and "wanted" look at the label, which must be there, after the resize; a crop is drawn at most eleven
        times for each, and the last one is used whatever it shows.
        """
        record = dict(record)
        wanted = record.pop("wanted", None)
        size = self._target_size(record["image"].shape, rng)
        if size is not None:
            record = _resize(record, size, self.interpolation)
        if self.margins:
            record["trusted"] = _inside(record["image"].shape, *self.margins)
        if self.fit:
            record = _window(record, 0, 0, self.fit)
        if self.crop:
            record = _random_crop(record, self.crop, rng, self.balanced, wanted)
        if self.flip and rng.random() < self.flip:
            for key in _PADDING.keys() & record.keys():
                record[key] = np.ascontiguousarray(record[key][:, ::-1])
        if self.jitter:
            record["image"] = _colour_jitter(record["image"], self.jitter, rng)
        if self.grey and rng.random() < self.grey:
            record["image"] = np.asarray(Image.fromarray(record["image"]).convert("L").convert("RGB"))
        if self.blur:
            record["image"] = cv2.GaussianBlur(record["image"], (3, 3), rng.uniform(*self.blur))
        return record

    def _target_size(self, shape: tuple[int, ...], rng: np.random.Generator) -> tuple[int, int] | None:
        height, width = shape[:2]
        if self.fit:
            return fitted_size((width, height), self.fit)
        if self.within:
            factor = min(self.within[0] / width, self.within[1] / height)
            return max(1, int(width * factor + 0.5)), max(1, int(height * factor + 0.5))
        if self.short_side:
            factor = rng.integers(self.short_side[0], self.short_side[1] + 1) / min(width, height)
        elif self.scale:
            factor = rng.uniform(*self.scale)
            width, height = self.base or (width, height)
        else:
            return self.resize
        return max(1, round(width * factor)), max(1, round(height * factor))


def fitted_size(size: tuple[int, int], within: tuple[int, int]) -> tuple[int, int]:
    """The largest size (width, height) of the same aspect as `size` that fits into another size."""
    factor = min(within[0] / size[0], within[1] / size[1])
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def build_transform(spec: Mapping[str, Any] | None) -> Transform:
    """Makes a picklable transform from a mapping with the fields of `TransformSpec`; None or {} does nothing.

    Raises:
      UserError: a field is unknown, or its value is invalid.
    """
    spec = {key: tuple(v) if isinstance(v, list) else v for key, v in dict(spec or {}).items() if v is not None}
    known = [field.name for field in fields(TransformSpec)]
    unknown = sorted(set(spec) - set(known))
    if unknown:
        raise UserError(f"unknown transform field {', '.join(unknown)}; known: {', '.join(known)}")
    for key, value in spec.items():
        problem = _problem(key, value)
        if problem:
            raise UserError(f"transform field {key}={value!r}: {problem}")
    if len(several := [key for key in ("resize", "within", "fit", "short_side", "scale") if key in spec]) > 1:
        raise UserError(
            f"a transform takes one of resize, within, fit, short_side and scale, not several: unset {several[0]} "
            f"({several[0]}=None) or {several[1]}"
        )
    if "base" in spec and "scale" not in spec:
        raise UserError("transform field base is the size that scale refers to, but scale is not set")
    if spec.get("balanced") and "crop" not in spec:
        raise UserError("transform field balanced says which crops are taken, but crop is not set")
    return TransformSpec(**spec)


def _problem(key: str, value: Any) -> str:
    """What is wrong with the value of a field; "" if nothing is."""
    if key == "interpolation":
        known = (*_INTERPOLATION, OPENCV)
        return "" if value in known else f"choose {', '.join(known[:-1])} or {known[-1]}"
    if key == "balanced":
        return "" if _numbers((value,)) and 0 <= value < 1 else "must be a share below 1"
    if key in ("flip", "grey"):
        return "" if _numbers((value,)) and 0 <= value <= 1 else "must be a probability"
    length = 4 if key in ("jitter", "margins") else 2
    if not isinstance(value, tuple) or len(value) != length or not _numbers(value):
        return f"must be {length} numbers, or None"
    if key == "margins":
        return "" if all(isinstance(v, int) and v >= 0 for v in value) else "must be integers, none negative"
    integers = key in ("resize", "within", "fit", "base", "crop", "short_side")
    if integers and not all(isinstance(v, int) and v > 0 for v in value):
        return "must be positive integers"
    if key in ("short_side", "scale", "blur") and not 0 < value[0] <= value[1]:
        return "must be 0 < low <= high"
    if key == "jitter" and (min(value) < 0 or value[3] > 0.5):
        return "must not be negative, and the hue at most 0.5"
    return ""


def _numbers(values: tuple) -> bool:
    return all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)


def resize_image(image: np.ndarray, size: tuple[int, int], interpolation: str = "bicubic") -> np.ndarray:
    """Resizes (H, W, 3) uint8 to `size` (width, height); see `TransformSpec.interpolation`."""
    return _resize({"image": image}, size, interpolation)["image"]


def resize_nearest(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes (H, W, ...) of any dtype to `size` (width, height) by the nearest pixel.

    Output i takes input floor((i + 0.5) * in / out): Pillow's rule for NEAREST, to the bit.
    """
    rows, columns = (_nearest(*lengths) for lengths in zip(array.shape, size[::-1], strict=False))
    return array[rows[:, None], columns]


def _nearest(length: int, new_length: int) -> np.ndarray:
    # Pillow adds up the step in double precision; if (i + 0.5) * in / out is a whole number, its rounding
    # decides.
    step = length / new_length
    positions = np.cumsum(np.r_[0.5 * step, np.full(new_length - 1, step)])
    return np.minimum(positions.astype(np.int64), length - 1)


def _resize(record: Record, size: tuple[int, int], interpolation: str) -> Record:
    if record["image"].shape[1::-1] == tuple(size):
        return record
    maps = {key: record[key] for key in ("label", "depth") if key in record}
    images = {key: record[key] for key in _IMAGES if key in record}
    if interpolation == OPENCV:
        resized = {key: cv2.resize(each, size, interpolation=cv2.INTER_NEAREST) for key, each in maps.items()}
        resized |= {key: cv2.resize(each, size, interpolation=cv2.INTER_LINEAR) for key, each in images.items()}
    else:
        resized = {key: resize_nearest(each, size) for key, each in maps.items()}
        resized |= {key: _by_pillow(each, size, _INTERPOLATION[interpolation]) for key, each in images.items()}
    return {**record, **resized}


def _by_pillow(image: np.ndarray, size: tuple[int, int], kind: Image.Resampling) -> np.ndarray:
    """Columns, then rows. Pillow from 13.0 on does it the other way around for some sizes, and rounds otherwise."""
    picture = Image.fromarray(image)
    return np.asarray(picture.resize((size[0], picture.height), kind).resize(size, kind))


def _inside(shape: tuple[int, ...], top: int, bottom: int, left: int, right: int) -> np.ndarray:
    """(H, W) uint8 of an image of this shape: 0 in its margins, 1 elsewhere."""
    height, width = shape[:2]
    inside = np.zeros((height, width), np.uint8)
    inside[top : max(height - bottom, 0), left : max(width - right, 0)] = 1
    return inside


def _random_crop(
    record: Record,
    size: tuple[int, int],
    rng: np.random.Generator,
    largest: float | None,
    wanted: tuple[int, float] | None,
) -> Record:
    """A random window; `largest` and `wanted` are `TransformSpec.balanced` and the record's entry."""
    width, height = size
    rows, columns = record["image"].shape[:2]

    def draw() -> tuple[int, int]:
        return rng.integers(max(rows - height, 0) + 1), rng.integers(max(columns - width, 0) + 1)

    def accepts(rule: Callable[[np.ndarray], bool], corner: tuple[int, int]) -> bool:
        top, left = corner
        return rule(count_ids(record["label"][top : top + height, left : left + width]))

    if largest:
        draw = partial(_redrawn, draw, partial(accepts, partial(_is_balanced, largest)))
    if wanted:
        draw = partial(_redrawn, draw, partial(accepts, lambda pixels: pixels[wanted[0]] > wanted[1]))
    return _window(record, *draw(), size)


def _redrawn(draw: Callable[[], Any], accepts: Callable[[Any], bool]) -> Any:
    """The first draw that is accepted; after ten refusals the next one, unseen."""
    for _ in range(_REFUSALS):
        if accepts(drawn := draw()):
            return drawn
    return draw()


def _is_balanced(largest: float, pixels: np.ndarray) -> bool:
    """Whether a label with so many pixels of each id (256,) has several classes, each on less than this share."""
    valid = pixels[:IGNORE]
    return np.count_nonzero(valid) > 1 and valid.max() / valid.sum() < largest


def _window(record: Record, top: int, left: int, size: tuple[int, int]) -> Record:
    """A window of `size` (width, height), padded at the right and bottom where it leaves the image."""
    width, height = size
    cropped = {}
    for key in _PADDING.keys() & record.keys():
        window = record[key][top : top + height, left : left + width]
        missing = [(0, height - window.shape[0]), (0, width - window.shape[1]), (0, 0)][: window.ndim]
        cropped[key] = np.pad(window, missing, constant_values=_PADDING[key])
    return {**record, **cropped}


def _colour_jitter(
    image: np.ndarray, strength: tuple[float, float, float, float], rng: np.random.Generator
) -> np.ndarray:
    """Random brightness, contrast, saturation and hue in random order; torchvision's ranges and formulas."""
    *strengths, hue = strength
    picture = Image.fromarray(image)
    order = rng.permutation(4)
    factors = [rng.uniform(max(0.0, 1 - s), 1 + s) for s in strengths]
    shift = rng.uniform(-hue, hue)
    for index in order:
        if index == 3:
            picture = _shift_hue(picture, shift) if hue else picture
        elif strengths[index]:
            enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[index]
            picture = enhance(picture).enhance(factors[index])
    return np.asarray(picture)


def _shift_hue(picture: Image.Image, shift: float) -> Image.Image:
    """Rotates the hue by `shift` of a full circle."""
    hsv = np.array(picture.convert("HSV"))
    hsv[..., 0] += np.uint8(int(shift * 255) % 256)  # wraps around, as hues do
    return Image.fromarray(hsv, "HSV").convert("RGB")
