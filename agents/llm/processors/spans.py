"""Places in a text, and the text with something else in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """From `begin` to before `end`; `kind` says what is there."""

    begin: int
    end: int
    kind: str


def apart(spans: Iterable[Span]) -> list[Span]:
    """In the order of the text, those left out that begin inside one before them."""
    found: list[Span] = []
    for span in sorted(spans, key=lambda one: (one.begin, -one.end)):
        if not found or span.begin >= found[-1].end:
            found.append(span)
        elif span.end > found[-1].end:
            found[-1] = Span(found[-1].begin, span.end, found[-1].kind)
    return found


def replaced(text: str, spans: Iterable[Span], by: Callable[[Span], str]) -> str:
    """`text` with what `by` gives in place of each span; the text itself where there are none."""
    pieces: list[str] = []
    at = 0
    for span in apart(spans):
        pieces += (text[at : span.begin], by(span))
        at = span.end
    return text if not pieces else "".join((*pieces, text[at:]))
