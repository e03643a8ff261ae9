"""HTML and SVG as text; everything is escaped unless it is markup already."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable
from typing import Any

VOID = frozenset({"br", "circle", "img", "input", "line", "link", "meta", "path", "polyline", "rect"})


class Markup(str):
    """Text that is HTML or SVG already; any other text is escaped when it is inserted."""

    __slots__ = ()


def tag(name: str, /, *content: Any, **attributes: Any) -> Markup:
    """One element.

    Args:
      name: that of the element; those in `VOID` have no content.
      *content: `Markup` as it is, iterables piece by piece, None as nothing, and anything else as escaped text.
      **attributes: escaped; `class_` and `aria_label` stand for `class` and `aria-label`; True gives an attribute
        without a value, False and None give no attribute.
    """
    words = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{html.escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    # SVG needs the slash to close the element; HTML ignores it.
    return Markup(f"<{name}{words}/>" if name in VOID else f"<{name}{words}>{join(*content)}</{name}>")


def join(*content: Any) -> Markup:
    """Pieces one after the other, escaped as `tag` does."""
    return Markup("".join(_pieces(content)))


def _pieces(content: Iterable[Any]) -> Iterable[str]:
    for piece in content:
        if isinstance(piece, Markup):
            yield piece
        elif isinstance(piece, str):
            yield html.escape(piece)
        elif isinstance(piece, Iterable):
            yield from _pieces(piece)
        elif piece is not None:
            yield html.escape(str(piece))


def data_uri(content: bytes, kind: str) -> str:
    """A URI that holds the bytes of a picture; `kind` is "image/png" or similar."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
