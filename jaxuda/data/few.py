"""A few labelled images of the target, which are learned from like those of the source."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxuda.data import orders
from jaxuda.data.input import Draws, draw_order
from jaxuda.data.joined import FEW
from jaxuda.data.transforms import Record


class FewLabels(Sequence):
    """The records of the source, then the labelled ones of the target, whose ids get the prefix `FEW`.

    In the place of the source's there may be pseudo-labelled records of the target. Records have depth if both have it.

    Args:
      source: the source's records.
      few: those of the target, in the same label space.

    Attributes:
      source, few: the same, without depth if one of them has none.
    """

    labelled = True

    def __init__(self, source: Any, few: Any):
        self.has_depth = all(getattr(records, "has_depth", False) for records in (source, few))
        self.source, self.few = (source, few) if self.has_depth else map(_without_depth, (source, few))
        self.name, self.label_space = f"{source.name} + {len(few)} of {few.name}", source.label_space

    @property
    def fingerprint(self) -> str:
        """As that of `Records`."""
        return hashlib.sha256(f"{self.source.fingerprint} {self.few.fingerprint}".encode()).hexdigest()[:32]

    def __len__(self) -> int:
        return len(self.source) + len(self.few)

    def __getitem__(self, index: int) -> Record:
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {self.name}, which has {len(self)}")
        index %= len(self)
        if index < len(self.source):
            return self.source[index]
        record = self.few[index - len(self.source)]
        return {**record, "id": FEW + record["id"]}

    def ids(self) -> list[str]:
        """Ids of all records in the order of their index."""
        return [*self.source.ids(), *(FEW + id_ for id_ in self.few.ids())]

    def class_pixels(self) -> np.ndarray:
        """As `Records.class_pixels`."""
        return np.concatenate([self.source.class_pixels(), self.few.class_pixels()])

    def labels_only(self) -> FewLabels:
        """The same records without images and depth."""
        return FewLabels(self.source.labels_only(), self.few.labels_only())

    def order(self, order: Any, count: int, share: float, seed: int) -> Draws:
        """Which records are drawn: those of the source in their order, and in between those of the target, shuffled.

        Args:
          order: that of the source, see `data.orders`.
          count: how many records are drawn; a longer result begins with the shorter one.
          share: of the draws that are of the target; they are spread evenly.
          seed: decides the order of the target's.
        """
        if order is None:
            order = draw_order(len(self.source), count, seed, "source")
        draws = order if isinstance(order, Draws) else Draws(np.asarray(order))
        place = np.arange(count + 1)
        of_target = np.diff(np.floor(place * share + 1e-9)) > 0
        shuffled = draw_order(len(self.few), count, seed, "target")
        ranks = np.cumsum(of_target) - 1
        indices = np.where(of_target, len(self.source) + shuffled[ranks], np.asarray(draws.indices)[:count])
        if draws.classes is None:
            return Draws(indices)
        # Any crop of a target's image shows more than -1 pixels of a class.
        return Draws(indices, draws.classes[:count], np.where(of_target, -1.0, draws.pixels[:count]))


def source_order(labelled: Any, unlabelled: Any, count: int, config: Any, artifacts: Mapping[str, Path]) -> Any:
    """The order of `config.order` (see `data.orders`), with draws of `FewLabels` of the target in between."""
    order = orders.load(config.order).order
    if not isinstance(labelled, FewLabels):
        return order(labelled, unlabelled, count, config, artifacts)
    own = order(labelled.source, unlabelled, count, config, artifacts)
    return labelled.order(own, count, config.source.few.labelled_share, config.seed)


def _without_depth(records: Any) -> Any:
    return records.without_depth() if getattr(records, "has_depth", False) else records
