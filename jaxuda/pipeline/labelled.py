"""`config.target.labelled`: a few target images whose labels are learned from, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxuda.data.few import FewLabels
from jaxuda.data.records import Domains, Subset
from jaxuda.errors import UserError

# Fields of a domain; they only enter a stage's settings if they are used.
FIELDS = ("labelled", "labelled_share")
_STREAM = 7  # of random numbers: the choice of images


def with_few_labels(config: ConfigDict, domains: Domains) -> Domains:
    """The domains, with the labelled images of `config.target.labelled` among those of the source.

    The field is a number of images, chosen by `config.seed` (a smaller number is a part of a larger one), or a file
    with one id per line. All images of the target stay unlabelled ones, too.

    Raises:
      UserError: the target has no labels, or not so many; the list cannot be read, names an image that the target does
        not have, or one twice; or networks would be scored on one of these images.
    """
    asked = config.target.get("labelled")
    if not asked:
        return domains
    where, target = f"config.target.labelled={asked!r}", domains.target
    if domains.source is None or target is None:
        raise UserError(f"{where} needs a source and a target: name both")
    if not target.labelled:
        raise UserError(f"{where}: {target.name} has no labels")
    share = config.target.labelled_share
    if not isinstance(share, int | float) or not 0 < share <= 1:
        raise UserError(
            f"config.target.labelled_share={share!r} must be a share of the labelled images, above 0 up to 1"
        )
    few = Subset(target, _chosen(asked, where, domains, config.seed))
    for records in domains.validation:
        if records.name == target.name and (both := set(records.ids()) & set(few.ids())):
            raise UserError(
                f"{where}: networks would be scored on {len(both)} of these images, such as {min(both)!r}: set "
                "config.evaluation.split to other images than config.target.split"
            )
    return domains._replace(source=FewLabels(domains.source, few))


def _chosen(asked: Any, where: str, domains: Domains, seed: int) -> list[str]:
    """The ids of the labelled images."""
    ids = domains.target.ids()
    if type(asked) is int:
        if not 0 < asked <= len(ids):
            raise UserError(f"{where}: {domains.target.name} has {len(ids)} images; give a number from 1 to that")
        order = np.random.default_rng([seed, _STREAM]).permutation(len(ids))
        return [ids[index] for index in order[:asked]]
    if not isinstance(asked, str):
        raise UserError(f"{where} must be a number of images, or a file with one id per line")
    try:
        chosen = [line for line in map(str.strip, Path(asked).expanduser().read_text("utf-8").splitlines()) if line]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where} cannot be read as a list of ids: {error}") from error
    known = set(ids)
    if not chosen or len(set(chosen)) < len(chosen):
        raise UserError(f"{where} names {'an image twice' if chosen else 'no image'}: it needs one id per line")
    for name in chosen:
        if name in known:
            continue
        scored = next((records.name for records in domains.validation if name in records.ids()), "")
        hint = f"; it is an image of {scored}, on which networks are scored" if scored else f", such as {ids[0]!r}"
        raise UserError(f"{where} names {name!r}, but {domains.target.name} has no such image{hint}")
    return chosen


def move_fields(resolved: ConfigDict, learned: bool) -> None:
    """Takes `FIELDS` out of the target of a stage's settings, where they would change every stage.

    Args:
      resolved: the settings; changed in place.
      learned: the stage learns from the source's labels or from pseudo-labels. If the fields are set, its source then
        has the section `few`: the target's transform, for the labelled images of the target, and their share.
    """
    source, target = resolved.source, resolved.target
    values = {name: target[name] for name in FIELDS if name in target}
    with source.unlocked(), target.unlocked():
        for name in values:
            del target[name]
        if learned and values.get("labelled"):
            source.few = {**target.to_dict(), "labelled_share": values["labelled_share"]}
