"""An order of source images in which rare classes appear more often."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxuda.data.records import class_pixels
from jaxuda.data.transforms import Record
from jaxuda.errors import UserError

SUB_EPOCH = 3000


def order(labelled: Any, unlabelled: Any, count: int, config: Any, artifacts: Any) -> np.ndarray:
    """See `data.orders`; the classes are those of the records' label space."""
    present = classes_of_images(labelled, labelled.label_space.num_classes)
    return class_balanced_order(present, count, config.seed)


def classes_of_images(records: Sequence[Record], num_classes: int) -> np.ndarray:
    """The classes that each labelled record shows: (n, C) bool."""
    return class_pixels(records, num_classes)[:, :-1] > 0


def class_balanced_order(present: np.ndarray, draws: int, seed: int, sub_epoch: int = SUB_EPOCH) -> np.ndarray:
    """Indices of the images to draw, in order, so that rare classes appear often.

    Draws come in sub-epochs. In a sub-epoch, share_c = (images with class c drawn so far) / (sum over classes), 0 at
    its start; a class is drawn with probability proportional to 1 / ln(1.01 + share_c), the next image of that
    class's own shuffled list is taken (the list continues through the sub-epochs and is shuffled again when used up),
    and every class in that image is counted. The finished list of a sub-epoch is shuffled.

    The arguments alone decide the order, and a longer order begins with the shorter one: a run that resumes computes
    it again and continues in the middle. 160,000 draws take seconds.

    Args:
      present: (n, C) bool, as `classes_of_images` makes it. Images without any class are never drawn, nor are
        classes without images.
      draws: the number of indices.
      seed: of the random generator.
      sub_epoch: draws per sub-epoch.

    Returns:
      (draws,) int32 indices in 0..n-1.

    Raises:
      UserError: no image shows any class.
    """
    images_of = [np.flatnonzero(column) for column in np.asarray(present, bool).T]
    drawable = np.array([len(images) > 0 for images in images_of])
    if not drawable.any():
        raise UserError("class-balanced sampling: no image of the source has a labelled pixel; check its label table")
    rng = np.random.default_rng(np.random.SeedSequence([seed, sub_epoch]))
    lists = [rng.permutation(images) for images in images_of]
    used = np.zeros(len(lists), np.int64)
    counted = np.asarray(present, np.int64)

    parts = []
    for _ in range(-(-draws // sub_epoch)):
        seen = np.zeros(len(lists), np.int64)
        part = np.empty(sub_epoch, np.int32)
        for position, uniform in enumerate(rng.random(sub_epoch)):
            share = seen / max(seen.sum(), 1)
            edges = np.cumsum(np.where(drawable, 1 / np.log(1.01 + share), 0))
            # "right" skips classes of probability 0, also at 0.
            chosen = np.searchsorted(edges, uniform * edges[-1], side="right")
            if used[chosen] == len(lists[chosen]):
                lists[chosen], used[chosen] = rng.permutation(lists[chosen]), 0
            part[position] = lists[chosen][used[chosen]]
            used[chosen] += 1
            seen += counted[part[position]]
        parts.append(rng.permutation(part))
    return np.concatenate(parts)[:draws] if parts else np.zeros(0, np.int32)
