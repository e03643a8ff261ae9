"""Several datasets, or configs of one, as a single domain: "gta5+synthia", "camvid/day+camvid/dusk"."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from jaxuda.data.transforms import Record, Transform, build_transform
from jaxuda.errors import UserError

# Fields of a domain that do not describe a transform.
_NO_TRANSFORM = ("name", "path", "split", "parts", "reference", "labelled", "labelled_share")
PLUS = "+"  # between the names of the parts, and between a part and the id of one of its images


class Joined(Sequence):
    """The records of several datasets, one dataset after the other; nothing is stored twice.

    An image of "camvid/day" with the id 0001TP_9 gets the id camvid-day+0001TP_9, so that ids stay unique. Records have
    labels, and depth, if all parts have them.

    Args:
      parts: name -> `Records`, all in one label space.

    Raises:
      UserError: two parts would give their images the same ids.
    """

    def __init__(self, parts: Mapping[str, Any]):
        self._parts = dict(parts)
        self.labelled = all(part.labelled for part in parts.values())
        if not self.labelled:
            self._parts = {name: part.images_only() for name, part in parts.items()}
        elif not all(part.has_depth for part in parts.values()):
            self._parts = {name: part.without_depth() for name, part in parts.items()}
        self.name = " + ".join(part.name for part in parts.values())
        self.label_space = next(iter(parts.values())).label_space
        identity = [(prefix(name), part.fingerprint) for name, part in parts.items()]
        self.fingerprint = hashlib.sha256(str(identity).encode()).hexdigest()[:32]
        self._starts = [0, *accumulate(map(len, parts.values()))]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Record:
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {self.name}, which has {len(self)}")
        index %= len(self)
        place = int(np.searchsorted(self._starts, index, side="right")) - 1
        name, part = list(self._parts.items())[place]
        record = part[index - self._starts[place]]
        return {**record, "id": prefix(name) + record["id"]}

    def ids(self) -> list[str]:
        """Ids of all records in the order of their index."""
        return [prefix(name) + id_ for name, part in self._parts.items() for id_ in part.ids()]

    def class_pixels(self) -> np.ndarray:
        """As `Records.class_pixels`."""
        return np.concatenate([part.class_pixels() for part in self._parts.values()])

    @property
    def has_depth(self) -> bool:
        """Whether records have a "depth"."""
        return all(part.has_depth for part in self._parts.values())

    def without_depth(self) -> "Joined":
        """The same records without depth."""
        return Joined({name: part.without_depth() for name, part in self._parts.items()})

    def images_only(self) -> "Joined":
        """The same records without labels and depth."""
        return Joined({name: part.images_only() for name, part in self._parts.items()})

    def with_reference(self) -> "Joined":
        """As `Records.with_reference`; every part must have reference images."""
        return Joined({name: part.with_reference() for name, part in self._parts.items()})

    def labels_only(self) -> "Joined":
        """The same records without images and depth."""
        return Joined({name: part.labels_only() for name, part in self._parts.items()})


def parts_of(records: Any) -> list[Any]:
    """The datasets that are joined, in their order; of others the dataset itself."""
    return list(records._parts.values()) if isinstance(records, Joined) else [records]


def part_names(name: str) -> list[str]:
    """The datasets that a domain's name joins; raises UserError if it names one twice."""
    names = name.split(PLUS)
    if len({prefix(part) for part in names}) < len(names):
        raise UserError(f"{name!r} joins the same dataset twice")
    return names


def prefix(name: str) -> str:
    """The prefix of the ids of a part."""
    return name.replace("/", "-") + PLUS


@dataclass(frozen=True)
class TransformByPart:
    """Transforms each record of a joined domain with the transform of its part, found by the id's prefix."""

    transforms: Mapping[str, Transform]

    @property
    def balanced(self) -> bool:
        """Whether a part's crops depend on its labels."""
        return any(transform.balanced for transform in self.transforms.values())

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        """See `transforms.TransformSpec`."""
        part = record["id"].partition(PLUS)[0]
        return self.transforms[part + PLUS](record, rng)


# The ids of the labelled target images among those of the source begin with it; no dataset has such a name.
FEW = "labelled target" + PLUS


@dataclass(frozen=True)
class TransformByDomain:
    """Transforms source images with the source's transform, and labelled target images with the target's."""

    source: Transform
    target: Transform

    @property
    def balanced(self) -> bool:
        """Whether crops depend on labels."""
        return any(getattr(transform, "balanced", None) for transform in (self.source, self.target))

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        """See `transforms.TransformSpec`."""
        own = str(record["id"]).removeprefix(FEW)
        if own == record["id"]:
            return self.source(record, rng)
        return {**self.target({**record, "id": own}, rng), "id": record["id"]}


def domain_transform(domain: Mapping[str, Any]) -> Transform:
    """The transform of a domain of a config, from its fields and, if it has `parts`, from what differs per dataset.

    Args:
      domain: such as {"name": "gta5+synthia", "resize": (1280, 720), ..., "parts": {"synthia": {"resize": (1280,
        760)}}}. A key of `parts` is a part's name, or its dataset's name for all of its configs; for a module of the
        user, the last word of its path. `few`: the domain of further images, those whose ids begin with `FEW`.

    Raises:
      UserError: a field is wrong, or `parts` names a dataset that the domain does not have.
    """
    if few := domain.get("few"):
        own = {key: value for key, value in domain.items() if key != "few"}
        return TransformByDomain(domain_transform(own), domain_transform(few))
    shared = {key: value for key, value in domain.items() if key not in _NO_TRANSFORM}
    own = dict(domain.get("parts", {}))
    if not own:
        return build_transform(shared)
    transforms, used = {}, set()
    for name in part_names(domain["name"]):
        dataset, slash, config = name.partition("/")
        word = dataset.rpartition(".")[2]
        key = word + slash + config if word + slash + config in own else word
        used.add(key)
        transforms[prefix(name)] = build_transform(shared | dict(own.get(key, {})))
    if unknown := own.keys() - used:
        raise UserError(f"parts.{min(unknown)} is not a part of {domain['name']!r}")
    return TransformByPart(transforms)
