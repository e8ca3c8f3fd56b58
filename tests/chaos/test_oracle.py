"""What the comparison of answers must not overlook, and what it must not blame."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import Verdict, judge

EXPECTED = list(range(100, 120))
DIFFERENT = st.lists(st.integers(0, 10**9), min_size=1, max_size=40, unique=True)


def test_the_expected_answer_is_right() -> None:
    assert judge(EXPECTED, EXPECTED, is_whole=True).is_right


def test_part_of_an_answer_is_right_unless_it_says_that_it_is_whole() -> None:
    assert judge(EXPECTED, EXPECTED[:7], is_whole=False).is_right
    assert judge(EXPECTED, [], is_whole=False).is_right
    assert judge(EXPECTED, EXPECTED[:7], is_whole=True) == Verdict(missing=13)


@pytest.mark.parametrize("number", [1, 2, 7])
@pytest.mark.parametrize("at", [7, 12, 20])
def test_repeated_tokens_are_doubled(at: int, number: int) -> None:
    got = EXPECTED[:at] + EXPECTED[at - number :]
    assert judge(EXPECTED, got, is_whole=True) == Verdict(doubled=number)


@pytest.mark.parametrize("at", [0, 5, 16])
def test_tokens_left_out_are_missing(at: int) -> None:
    assert judge(EXPECTED, EXPECTED[:at] + EXPECTED[at + 3 :], is_whole=True) == Verdict(missing=3)


@pytest.mark.parametrize("at", [0, 9, 19])
def test_another_token_is_wrong_once(at: int) -> None:
    got = list(EXPECTED)
    got[at] = 7
    assert judge(EXPECTED, got, is_whole=True) == Verdict(wrong=1)
    assert judge(EXPECTED, got, is_whole=False) == Verdict(wrong=1)


def test_tokens_beyond_the_end_are_wrong_or_doubled() -> None:
    assert judge(EXPECTED, [*EXPECTED, 7, 8], is_whole=True) == Verdict(wrong=2)
    assert judge(EXPECTED, [*EXPECTED, EXPECTED[-1]], is_whole=True) == Verdict(doubled=1)


def test_the_answer_to_another_prompt_is_wrong_in_every_token() -> None:
    assert judge(EXPECTED, list(range(500, 520)), is_whole=True) == Verdict(wrong=20)


def test_an_answer_from_the_start_in_the_middle_is_doubled() -> None:
    """A request that was placed again and told from token 0 on."""
    assert judge(EXPECTED, EXPECTED[:6] + EXPECTED, is_whole=True) == Verdict(doubled=6)


def test_texts_are_compared_as_ids_are() -> None:
    assert judge(["a", " b", " c"], ["a", " b", " b", " c"], is_whole=True) == Verdict(doubled=1)


@given(DIFFERENT, st.data())
def test_right_means_equal(expected: list[int], data: st.DataObject) -> None:
    got = data.draw(st.lists(st.sampled_from([*expected, -1]), max_size=50))
    assert judge(expected, got, is_whole=True).is_right == (got == expected)
    assert judge(expected, got, is_whole=False).is_right == (got == expected[: len(got)])


@given(DIFFERENT, st.data())
def test_any_repetition_in_a_whole_answer_is_counted_exactly(expected: list[int], data: st.DataObject) -> None:
    at = data.draw(st.integers(1, len(expected)))
    number = data.draw(st.integers(1, at))
    got = expected[:at] + expected[at - number :]
    assert judge(expected, got, is_whole=True) == Verdict(doubled=number)
