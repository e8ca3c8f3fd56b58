"""Requests' rules as words on the device, and where they lie."""

from __future__ import annotations

import random

import numpy as np
import pytest

from diptych.kernels.device.rules import HEAD, RuleStore, record, rule_words
from diptych.protos.constraint import mask_words
from diptych.protos.step import LogitRules


def test_a_record_says_what_its_rules_say_and_leaves_out_what_no_vocabulary_has() -> None:
    rules = LogitRules(
        num_prompt=7,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=0.25,
        logit_bias=((3, 1.0), (3, 0.5), (-1, 9.0), (70, 9.0), (69, -2.0)),
        bad_words=((1, 2, 3), (), (5,), (4, 70), (2**32 - 1, 4)),
        allowed_token_ids=(0, 31, 32, 69, 70, -3),
        min_tokens=4,
        stop_token_ids=(2, 70),
    )
    words = record(rules, 70)
    assert words.dtype == np.int32
    assert words[:2].tolist() == [7, 4]
    assert words[2:5].view(np.float32).tolist() == [1.5, 0.25, -0.5]
    assert words[5:10].tolist() == [1, 2, 1, 2, 2]
    bits = np.unpackbits(words[HEAD : HEAD + mask_words(70)].view(np.uint8), bitorder="little")
    assert bits.nonzero()[0].tolist() == [0, 31, 32, 69]
    rest = words[HEAD + mask_words(70) :]
    assert rest[:2].tolist() == [3, 69]
    assert rest[2:4].view(np.float32).tolist() == [1.5, -2.0]
    assert rest[4:].tolist() == [2, 0, 3, 4, 1, 2, 3, 5]


def test_a_record_of_hardly_any_rules_is_short() -> None:
    assert len(record(LogitRules(num_prompt=3, presence_penalty=1.0), 128_256)) == HEAD
    nothing = record(LogitRules(num_prompt=3, allowed_token_ids=()), 40)
    assert nothing[5] == 1
    assert record(LogitRules(num_prompt=3, min_tokens=2**32), 40)[1] == 2**31 - 1
    assert not nothing[HEAD:].any()


def test_a_record_is_told_once_for_the_same_object_only() -> None:
    store = RuleStore(100)
    rules = LogitRules(num_prompt=1, presence_penalty=1.0)
    assert not store.knows(0, rules)
    assert store.try_place(0, rules, 10) == 0
    assert store.knows(0, rules)
    assert not store.knows(1, rules)
    assert not store.knows(0, LogitRules(num_prompt=1, presence_penalty=1.0))
    store.forget(0)
    assert not store.knows(0, rules)
    store.forget(0)


def test_records_never_overlap_and_holes_are_used() -> None:
    """Random requests come and go; a bug here would give one request another's rules."""
    rng, store, size = random.Random(5), RuleStore(1000), 1000
    held: dict[int, tuple[int, int]] = {}
    refused = 0
    for _ in range(3000):
        slot, length = rng.randrange(12), rng.randint(1, 200)
        held.pop(slot, None)
        if rng.random() < 0.3:
            store.forget(slot)
            continue
        begin = store.try_place(slot, LogitRules(num_prompt=1), length)
        others = sorted(held.values())
        if begin is None:
            refused += 1
            ends = [0, *(end for _, end in others)]
            assert all(after - end < length for end, after in zip(ends, [*(b for b, _ in others), size], strict=True))
            continue
        assert begin + length <= size
        assert all(begin + length <= first or begin >= end for first, end in others)
        held[slot] = begin, begin + length
    assert refused > 10


@pytest.mark.parametrize("vocab", [97, 49_152, 151_936])
def test_every_slot_may_have_a_list_of_allowed_tokens_and_a_hundred_ids_beside(vocab: int) -> None:
    rules = LogitRules(
        num_prompt=1, allowed_token_ids=(1,), logit_bias=tuple((at, 1.0) for at in range(100)), presence_penalty=1.0
    )
    store, length = RuleStore(rule_words(max_slots=64, vocab=vocab)), len(record(rules, vocab))
    assert all(store.try_place(slot, rules, length) is not None for slot in range(64))


def test_without_a_vocabulary_there_is_no_room() -> None:
    assert rule_words(max_slots=64, vocab=0) == 0
    assert RuleStore(0).try_place(0, LogitRules(num_prompt=1), HEAD) is None
