"""Compares an answer with the one that an undisturbed cluster gives, token for token; tells what is wrong with it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

_LOOK_AHEAD = 3  # tokens that must agree before a difference counts as a repetition or a gap


@dataclass(frozen=True, slots=True)
class Verdict:
    """Tokens by what is wrong with them. All 0: the answer is the expected one, or as much of it as there was to be."""

    wrong: int = 0
    doubled: int = 0
    missing: int = 0

    @property
    def is_right(self) -> bool:
        """Nothing is wrong."""
        return self == Verdict()

    def __add__(self, other: Verdict) -> Verdict:
        return Verdict(self.wrong + other.wrong, self.doubled + other.doubled, self.missing + other.missing)


def judge(expected: Sequence[Hashable], got: Sequence[Hashable], *, is_whole: bool) -> Verdict:
    """`is_whole`: the answer says that it is finished; what lacks at its end is missing then, and otherwise not.

    Tokens that were there before are doubled, tokens left out in the middle are missing, all else is wrong.
    """
    if list(expected[: len(got)]) == list(got):
        return Verdict(missing=len(expected) - len(got) if is_whole else 0)
    wrong = doubled = missing = at = 0
    here = 0  # in what was expected
    while at < len(got):
        if here < len(expected) and got[at] == expected[here]:
            at, here = at + 1, here + 1
        elif back := _repeated(expected, got[at:], here):
            doubled += back
            at += back
        elif ahead := _left_out(expected, got[at:], here):
            missing += ahead
            here += ahead
        else:
            wrong += 1
            at, here = at + 1, min(here + 1, len(expected))
    return Verdict(wrong, doubled, missing + (len(expected) - here if is_whole else 0))


def _repeated(expected: Sequence[Hashable], rest: Sequence[Hashable], here: int) -> int:
    """How many of the first tokens of `rest` are the last ones before `here` once more."""
    for back in range(1, here + 1):
        again = expected[here - back : here]
        if _agree(again, rest) and (len(rest) <= back or _agree(expected[here:], rest[back:])):
            return min(back, len(rest))
    return 0


def _left_out(expected: Sequence[Hashable], rest: Sequence[Hashable], here: int) -> int:
    """How many expected tokens `rest` passes over."""
    for ahead in range(1, len(expected) - here):
        if _agree(expected[here + ahead :], rest):
            return ahead
    return 0


def _agree(one: Sequence[Hashable], other: Sequence[Hashable]) -> bool:
    """Whether they begin alike, as far as both go and a few tokens are to be seen."""
    number = min(len(one), len(other), _LOOK_AHEAD)
    return number > 0 and list(one[:number]) == list(other[:number])
