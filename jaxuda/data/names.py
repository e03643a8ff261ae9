"""Finds the label of each image by the names of their files, also where these differ by a beginning or an ending."""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from typing import NamedTuple

_MOST_AFFIXES = 20  # the most common ones, which are tried with each other
_SPLIT_WORDS = {
    *("tr", "trn", "learn", "learning", "val", "vals", "valset", "minival", "xval", "tune", "tuning", "dev", "devset"),
    *("test", "tests", "testing", "testset", "xtest", "te", "ts", "tst", "eval", "evaluation", "holdout"),
}
_SPLIT_STEM = re.compile("^x?train|^minitrain|^valid")
_KINDS_OF_FILES = {
    *("label", "labels", "mask", "masks", "gt", "gtfine", "seg", "segmentation", "ann", "anno", "annotation", "ids"),
    *("truth", "target", "depth", "image", "images", "img", "imgs", "leftimg", "rgb", "photo", "frame", "input"),
}


def plain(name: str) -> str:
    """A name in one form: macOS writes "é" as two characters (NFD), other systems as one (NFC)."""
    return unicodedata.normalize("NFC", name)


def looks_like_split(name: str) -> bool:
    """Whether a folder's name has a word for a split, such as "train2017", "Val" or "test_images"."""
    return any(word in _SPLIT_WORDS or _SPLIT_STEM.search(word) for word in _words(name))


def _words(name: str) -> list[str]:
    """The words of "_gtFine_labelIds": gt, fine, label, ids, and also gtfine, labelids."""
    return [word.lower() for pattern in (r"[A-Z]?[a-z]+|[A-Z]+", r"[A-Za-z]+") for word in re.findall(pattern, name)]


class Pairing(NamedTuple):
    """Names that differ by an affix of the image's ("_leftImg8bit") and one of its partner's ("_gtFine_labelIds").

    before: whether the affixes are beginnings, as in img_1 and mask_1; otherwise they are endings.
    partners: the image's name -> its partner's name.
    """

    image: str
    partner: str
    before: bool
    partners: dict[str, str]


def pairings(images: Collection[str], others: Collection[str]) -> list[Pairing]:
    """How names without a partner of the same name belong together; several if this is not clear; [] if they do not.

    Affixes begin or end at one of "_-. ", or between a letter and a digit, and have a letter: numbers tell images
    apart. At least two images must agree, unless there is only one. Where both have an affix, one must have a word such
    as "mask" or "image": rome_1 and oslo_1 are different things.

    Args:
      images: names, "/" between folders, without the files' suffixes.
      others: those of labels or depth, none of which is in `images`.
    """
    found = []
    for before in (False, True):
        ours, theirs = _by_affix(images, before), _by_affix(others, before)
        for one, cores in ours.items():
            for other, partners in theirs.items():
                pairs = {cores[core]: partners[core] for core in cores.keys() & partners.keys()}
                found.append(Pairing(one, other, before, pairs))
    found = [pairing for pairing in found if len(pairing.partners) >= min(2, len(images)) and _meant(pairing)]
    most = max((len(pairing.partners) for pairing in found), default=0)
    best: list[Pairing] = []
    for pairing in sorted(found, key=lambda p: len(p.image) + len(p.partner)):
        if len(pairing.partners) == most and all(pairing.partners != known.partners for known in best):
            best.append(pairing)
    return best


def _meant(pairing: Pairing) -> bool:
    both = pairing.image and pairing.partner
    return not both or not _KINDS_OF_FILES.isdisjoint(_words(f"{pairing.image} {pairing.partner}"))


def _by_affix(names: Collection[str], before: bool) -> dict[str, dict[str, str]]:
    """Affix -> name without it -> name, for the most common affixes."""
    cut = defaultdict(dict)
    for name in sorted(names):
        for affix, core in _affixes(name, before):
            cut[affix][core] = name
    common = Counter({affix: len(cores) for affix, cores in cut.items()}).most_common(_MOST_AFFIXES)
    return {affix: cut[affix] for affix, _ in common}


def _affixes(name: str, before: bool) -> Iterator[tuple[str, str]]:
    """(affix, name without it) for every affix of the last part of a name, and for ""."""
    folder, slash, last = name.rpartition("/")
    yield "", name
    for place in range(1, len(last)):
        if before:
            between = last[place - 1] in "_-. " or (last[place - 1].isalpha() and last[place].isdigit())
            affix, core = last[:place], last[place:]
        else:
            between = last[place] in "_-. " or (last[place - 1].isdigit() and last[place].isalpha())
            affix, core = last[place:], last[:place]
        if between and any(map(str.isalpha, affix)):
            yield affix, f"{folder}{slash}{core}"


def is_derived(name: str, known: Collection[str]) -> bool:
    """Whether a name is one of the known ones with an ending, as "00001_labelTrainIds" of "00001"."""
    return any(core in known for affix, core in _affixes(name, before=False) if affix)
