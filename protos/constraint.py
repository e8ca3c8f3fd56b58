"""What an answer must match, as it crosses the wire, and the guide that follows one request's tokens in an engine.

The router writes a Constraint; each engine that samples for the request makes a Guide of it (cluster/engine/guides.py).
Workers and runners know guides by this Protocol alone: a mask before each sampled token, and tokens that are certain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, runtime_checkable

from .errors import DiptychError

MAX_GRAMMAR_BYTES = 256 << 10  # of one constraint; a schema of 64 KiB with what is written around it


MAX_PREFIX_BYTES = 256 << 10  # of an answer's beginning that a request brings


class Backend(StrEnum):
    """Which library reads the grammar."""

    LLGUIDANCE = "llguidance"  # Lark in its dialect, or its JSON form
    XGRAMMAR = "xgrammar"  # a JSON schema


@dataclass(frozen=True, slots=True)
class Reasoning:
    """The answer may think before it keeps to the grammar. Both are token ids; everything between them is free, and at
    most `budget` tokens of the answer, where one is given: then `end` is what follows.
    """

    start: int
    end: int
    is_open: bool = False  # the prompt ends inside it; else the answer may begin with `start`, or not think at all
    budget: int | None = None  # at least 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraint:
    """The answer's text, after its reasoning, matches `grammar`, and ends where the grammar can end.

    `prefix`: the beginning of the text, which the prompt ends with already.
    """

    grammar: str
    backend: Backend = Backend.LLGUIDANCE
    prefix: str = ""
    reasoning: Reasoning | None = None


def mask_words(vocab_size: int) -> int:
    """32-bit words of a mask: bit t % 32 of word t // 32 is set where token t may come next."""
    return -(-vocab_size // 32)


class Guide(Protocol):
    """What may come next in one request's answer. Of one thread, the step thread, once it is made.

    Positions are those of the sequence: the answer's first token has position len(prompt). A guide that fails allows
    nothing and tells why in `error`: it never raises, and no other request notices.
    """

    error: DiptychError | None

    def accept(self, position: int, token: int) -> tuple[int, ...]:
        """`token` is the sequence's at `position`. Returns the tokens that are certain to follow, possibly none: it has
        taken them, too. A position that it knows already brings nothing new.
        """

    def fill(self, position: int, mask: memoryview) -> None:
        """Set all words of `mask` (writable, contiguous, 4 * mask_words bytes) to what may come at `position`.

        Where it does not know the token before, everything may; at a position that it knows, that token alone.
        """


@runtime_checkable
class FillsTogether(Protocol):
    """A guide that can make the masks of several of its kind faster than one after another."""

    def fill_all(self, guided: Sequence[tuple[Guide, int]], masks: memoryview) -> None:
        """Guide.fill of each at its position, one mask after another in `masks`."""


def fill_masks(guided: Sequence[tuple[Guide, int]], masks: memoryview) -> None:
    """Guide.fill of each at its position, one mask after another in `masks`."""
    kind = type(guided[0][0]) if guided else None
    if guided and isinstance(guided[0][0], FillsTogether) and all(type(guide) is kind for guide, _ in guided):
        guided[0][0].fill_all(guided, masks)
        return
    size = len(masks) // max(1, len(guided))
    for at, (guide, position) in enumerate(guided):
        guide.fill(position, masks[at * size : (at + 1) * size])
