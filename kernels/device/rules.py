"""Rules of requests on the device: one record for each slot that has some, in the words of the state.

record  | head | allowed tokens as bits | biased ids | their bias | stop ids | where bad words begin | their tokens |
head: prompt tokens, min_tokens, repetition, frequency and presence penalty (float32), whether there are bits, how many
are biased, stop ids, bad words, and the tokens of the longest bad word but its last.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from diptych.protos.constraint import mask_words
from diptych.protos.step import LogitRules

HEAD = 16  # words
_MOST = 2**31 - 1
_OF_SLOT = 256  # words of a record beside its bits that there is room for in every slot
_OF_ALL = 1 << 14  # and of one that takes more

Words = NDArray[np.int32]


def rule_words(*, max_slots: int, vocab: int) -> int:
    """Room for the rules of all slots, unless many have hundreds of bad words; 0 where no vocabulary is known."""
    return max_slots * (HEAD + mask_words(vocab) + _OF_SLOT) + _OF_ALL if vocab else 0


def record(rules: LogitRules, vocab: int) -> Words:
    """A request's rules as words. Ids that the vocabulary lacks are left out, as they have no effect."""
    allowed: Words = np.zeros(0, np.int32)
    if rules.allowed_token_ids is not None:
        bits = np.zeros(32 * mask_words(vocab), bool)
        bits[_within(rules.allowed_token_ids, vocab)] = True
        allowed = np.packbits(bits, bitorder="little").view(np.int32)
    biased: dict[int, np.float32] = {}
    for token, bias in rules.logit_bias:
        if 0 <= token < vocab:
            biased[token] = biased.get(token, np.float32(0)) + np.float32(bias)
    stops = _within(rules.stop_token_ids, vocab) if rules.min_tokens else []
    words = [word for word in rules.bad_words if word and all(0 <= token < vocab for token in word)]
    begins = list(accumulate(map(len, words), initial=0)) if words else []
    penalties = (rules.repetition_penalty, rules.frequency_penalty, rules.presence_penalty)
    head = np.zeros(HEAD, np.int32)
    head[:2] = rules.num_prompt, min(rules.min_tokens, _MOST)
    head[2:5] = np.array(penalties, np.float32).view(np.int32)
    head[5:10] = len(allowed) > 0, len(biased), len(stops), len(words), max(map(len, words), default=1) - 1
    lists = [list(biased), np.array(list(biased.values()), np.float32).view(np.int32)]
    lists += [stops, begins, [token for word in words for token in word]]
    return np.concatenate([head, allowed, *(np.array(part, np.int32) for part in lists)])


def _within(ids: Sequence[int], vocab: int) -> list[int]:
    return [token for token in ids if 0 <= token < vocab]


class RuleStore:
    """Which words of the store each slot's record has: the first hole that is large enough. The step thread's."""

    def __init__(self, words: int) -> None:
        self._size = words
        self._taken: dict[int, tuple[int, int]] = {}  # slot -> begin, end
        self._told: dict[int, LogitRules] = {}  # the very object

    def knows(self, slot: int, rules: LogitRules) -> bool:
        """Whether the slot's record is this request's already."""
        return self._told.get(slot) is rules

    def try_place(self, slot: int, rules: LogitRules, length: int) -> int | None:
        """Where the record goes, in place of the slot's last one. None: there is no room, and the slot has none."""
        self.forget(slot)
        begin = 0
        for taken, end in sorted(self._taken.values()):
            if taken - begin >= length:
                break
            begin = end
        if self._size - begin < length:
            return None
        self._taken[slot], self._told[slot] = (begin, begin + length), rules
        return begin

    def forget(self, slot: int) -> None:
        """The slot's record is nobody's; steps that were launched may still read it before it is written over."""
        if self._taken.pop(slot, None) is not None:
            del self._told[slot]
