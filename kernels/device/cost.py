"""How long a step takes, from a few that were timed at start. Implements ports.StepCost; arithmetic alone.

Asked by schedulers, which want to know how many prompt tokens fit into a step of so many milliseconds.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, slots=True)
class Timed:
    """A step of prompts alike, or of rows of one token."""

    num_tokens: int
    each: int  # tokens of a prompt; 1: rows that decode
    seconds: float
    behind: int = 0  # computed positions before each prompt


@dataclass(frozen=True, slots=True)
class MeasuredCost:
    """A step's time is that of its tokens, plus what they read of their sequences."""

    base: tuple[tuple[int, float], ...]  # (tokens, seconds without any context), neither ever falls
    kv_token_s: float  # a position that a decoding row reads
    pair_s: float  # a prompt's token and a position of the same step that it reads
    earlier_s: float  # the same with a position of an earlier step, whose KV lies in blocks

    def seconds(self, *, decode_rows: int, prompt_tokens: int, kv_tokens: int, prompt_kv: int) -> float:
        """See ports.StepCost."""
        read = prompt_tokens / 2 * self.pair_s + prompt_kv * self.earlier_s
        return self._base_s(decode_rows + prompt_tokens) + kv_tokens * self.kv_token_s + prompt_tokens * read

    def _base_s(self, tokens: int) -> float:
        """Between two measured sizes on the line through them; beyond the largest at its own rate."""
        at = bisect_left(self.base, (tokens, 0.0))
        if at == 0:
            return self.base[0][1]
        before, seconds = self.base[at - 1]
        if at == len(self.base):
            return seconds * tokens / before
        behind, more = self.base[at]
        return seconds + (more - seconds) * (tokens - before) / (behind - before)


def fit(
    steps: Iterable[Timed], *, whole: Timed, parted: Timed, near: Timed, far: Timed, kv_token_s: float
) -> MeasuredCost:
    """`whole` and `parted`: as many tokens as one prompt and as several, which tells what context of the same step
    costs. `near` and `far`: one prompt from position 0 on, and the same behind others.
    """
    pairs = whole.num_tokens * (whole.each - parted.each) / 2
    pair_s = max(0.0, whole.seconds - parted.seconds) / pairs if pairs > 0 else 0.0
    earlier = far.num_tokens * far.behind
    earlier_s = max(pair_s, (far.seconds - near.seconds) / earlier) if earlier else pair_s
    found = sorted(
        (one.num_tokens, max(0.0, one.seconds - pair_s * one.num_tokens * (one.each if one.each > 1 else 0) / 2))
        for one in steps
    )
    rising = accumulate((seconds for _, seconds in found), max)  # single measurements may say otherwise
    return MeasuredCost(tuple(zip((tokens for tokens, _ in found), rising, strict=True)), kv_token_s, pair_s, earlier_s)
