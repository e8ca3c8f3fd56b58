"""Whatever the order of events, a request gets each token once, in order, and one end."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.cluster.router.merge import TokenMerge
from diptych.protos.errors import Disagreement, EngineFault, EngineLost, InvalidRequest, NoBlocks
from diptych.protos.types import GENERATING, Finish, FinishReason, Role, TokenLogprobs, TransferKey

KEY = TransferKey(b"k" * 16)


def finish(role: Role, reason: FinishReason, num_tokens: int = 0, code: str = "") -> Finish:
    return Finish(key=KEY, role=role, reason=reason, num_tokens=num_tokens, error_code=code, error_message="said")


def taken(merge: TokenMerge) -> list[int]:
    merge.settle()
    return merge.take()


@settings(max_examples=300)
@given(st.data())
def test_any_interleaving_of_both_engines_gives_the_tokens_in_order_and_one_end(data: st.DataObject) -> None:
    total = data.draw(st.integers(2, 12))
    recomputes = data.draw(st.booleans())
    prefill: list[tuple[str, int]] = [("token", 0), ("handoff", 0)]
    decode = [("token", i) for i in range(0 if recomputes else 1, total)] + [("end", total)]
    if data.draw(st.booleans()):
        decode = [*data.draw(st.permutations(decode[:-1])), decode[-1]]
    merge, out = TokenMerge(has_prefill=True), list[int]()
    while prefill or decode:
        source = prefill if prefill and (not decode or data.draw(st.booleans())) else decode
        kind, number = source.pop(0)
        if kind == "token":
            merge.token(number, 100 + number)
        elif kind == "handoff":
            merge.end(Role.PREFILL, finish(Role.PREFILL, FinishReason.HANDOFF, 1))
        else:
            merge.end(Role.DECODE, finish(Role.DECODE, FinishReason.LENGTH, number))
        if data.draw(st.booleans()):
            out += taken(merge)
    out += taken(merge)
    assert out == [100 + i for i in range(total)]
    assert merge.error is None
    assert merge.finish is not None
    assert merge.finish.reason is FinishReason.LENGTH
    assert taken(merge) == []


@settings(max_examples=200)
@given(st.data())
def test_an_answer_that_goes_on_elsewhere_gives_out_its_rest_and_nothing_twice(data: st.DataObject) -> None:
    total = data.draw(st.integers(1, 10))
    begin = data.draw(st.integers(0, total - 1))
    answer = [100 + i for i in range(total)]
    merge, out = TokenMerge(has_prefill=True, emitted=answer[:begin]), list[int]()
    assert not merge.has_begun
    repeats = data.draw(st.integers(0, begin))
    indexes = data.draw(st.permutations(range(begin - repeats, total)))
    for index in indexes:
        merge.token(index, answer[index])
        out += taken(merge)
    merge.end(Role.DECODE, finish(Role.DECODE, FinishReason.LENGTH, total))
    out += taken(merge)
    assert out == answer[begin:]
    assert merge.finish is not None
    assert merge.finish.num_tokens == total


def test_an_engine_that_contradicts_what_the_client_has_costs_an_attempt() -> None:
    merge = TokenMerge(has_prefill=False, emitted=[5, 6])
    merge.token(1, 7)
    merge.token(2, 8)
    assert isinstance(merge.error, Disagreement)
    assert merge.error.retryable
    assert merge.blame is None
    assert taken(merge) == []


def test_a_next_token_lost_with_its_engine_after_the_handoff_is_the_prefill_engines_fault() -> None:
    merge = TokenMerge(has_prefill=True, emitted=[5, 6])
    merge.token(3, 8)
    merge.end(Role.PREFILL, finish(Role.PREFILL, FinishReason.HANDOFF, 3))
    assert taken(merge) == []
    assert isinstance(merge.error, EngineLost)
    assert merge.blame is Role.PREFILL


@pytest.mark.parametrize("decode_first", [False, True])
def test_a_final_first_token_ends_the_request_whenever_decode_retires(decode_first: bool) -> None:
    merge = TokenMerge(has_prefill=True)
    if decode_first:
        merge.end(Role.DECODE, finish(Role.DECODE, FinishReason.CANCELLED))
        merge.settle()
        assert not merge.is_over
    merge.token(0, 7)
    merge.end(Role.PREFILL, finish(Role.PREFILL, FinishReason.STOP, 1))
    assert taken(merge) == [7]
    assert merge.finish is not None
    assert merge.finish.role is Role.PREFILL


def test_a_lost_prefill_engine_leaves_the_answer_to_decode() -> None:
    merge = TokenMerge(has_prefill=True)
    merge.end(Role.PREFILL, EngineLost("gone"))
    merge.settle()
    assert not merge.is_over
    for index in range(3):
        merge.token(index, index)
    merge.end(Role.DECODE, finish(Role.DECODE, FinishReason.STOP, 3))
    assert taken(merge) == [0, 1, 2]
    assert merge.finish is not None


def test_a_first_token_lost_with_its_engine_after_the_handoff_is_a_retryable_error() -> None:
    merge = TokenMerge(has_prefill=True)
    merge.token(1, 11)
    merge.settle()
    assert not merge.is_over
    merge.end(Role.PREFILL, EngineLost("gone"))
    assert taken(merge) == []
    assert merge.error is not None
    assert merge.error.retryable


def test_a_handoff_without_a_first_token_is_an_error_at_once() -> None:
    merge = TokenMerge(has_prefill=True)
    merge.end(Role.PREFILL, finish(Role.PREFILL, FinishReason.HANDOFF, 1))
    merge.settle()
    assert isinstance(merge.error, EngineLost)


def test_decodes_error_is_the_requests_error_by_its_code() -> None:
    merge = TokenMerge(has_prefill=True)
    merge.end(Role.DECODE, finish(Role.DECODE, FinishReason.ERROR, code="no_kv_blocks"))
    merge.settle()
    assert isinstance(merge.error, NoBlocks)
    assert str(merge.error) == "said"


def test_when_both_give_up_the_prefill_engines_reason_is_told() -> None:
    merge = TokenMerge(has_prefill=True)
    merge.end(Role.DECODE, finish(Role.DECODE, FinishReason.CANCELLED))
    merge.end(Role.PREFILL, finish(Role.PREFILL, FinishReason.ERROR, code="engine_fault"))
    merge.settle()
    assert isinstance(merge.error, EngineFault)


@pytest.mark.parametrize("early", [False, True])
def test_two_engines_that_disagree_about_a_token_never_reach_the_client_as_an_answer(early: bool) -> None:
    merge = TokenMerge(has_prefill=True)
    index = 1 if early else 0
    merge.token(index, 5)
    merge.token(index, 6)
    assert isinstance(merge.error, EngineFault)


def test_an_end_that_names_fewer_tokens_than_arrived_wins() -> None:
    merge = TokenMerge(has_prefill=False)
    for index in range(5):
        merge.token(index, index)
    merge.end(Role.DECODE, finish(Role.DECODE, FinishReason.STOP, 3))
    assert taken(merge) == [0, 1, 2]


def test_an_end_before_its_tokens_is_an_error_not_a_short_answer() -> None:
    merge = TokenMerge(has_prefill=False)
    merge.token(0, 1)
    merge.end(Role.DECODE, finish(Role.DECODE, FinishReason.LENGTH, 3))
    assert taken(merge) == [1]
    assert isinstance(merge.error, EngineLost)


def test_only_the_first_end_of_a_role_counts() -> None:
    merge = TokenMerge(has_prefill=False)
    merge.end(Role.PREFILL, EngineLost("not part of this attempt"))
    merge.token(0, 1)
    merge.end(Role.DECODE, finish(Role.DECODE, FinishReason.LENGTH, 1))
    merge.end(Role.DECODE, EngineLost("late"))
    assert taken(merge) == [1]
    assert merge.error is None


def test_nothing_of_what_follows_a_disagreement_reaches_the_client() -> None:
    merge = TokenMerge(has_prefill=True)
    merge.token(0, 5)
    assert taken(merge) == [5]
    for index, token in enumerate((6, 7, 8)):  # the decode engine computed the prompt itself and went another way
        merge.token(index, token)
    assert taken(merge) == []
    assert isinstance(merge.error, EngineFault)


def told(number: int) -> TokenLogprobs:
    return TokenLogprobs(-float(number), number)


@settings(max_examples=200)
@given(st.data())
def test_logprobs_stay_beside_their_tokens_in_any_order_and_each_is_given_out_once(data: st.DataObject) -> None:
    events = data.draw(st.permutations([(index, role) for index in range(6) for role in GENERATING]))
    merge, tokens, logprobs = TokenMerge(has_prefill=True), list[int](), list[TokenLogprobs | None]()
    for index, _ in events:
        merge.token(index, 100 + index, told(index))
        if data.draw(st.booleans()):
            new = merge.take()
            tokens += new
            logprobs += merge.take_logprobs(len(new))
    new = merge.take()
    assert tokens + new == [100 + i for i in range(6)]
    assert logprobs + merge.take_logprobs(len(new)) == [told(i) for i in range(6)]
    assert not merge._logprobs


def test_a_token_without_logprobs_does_not_shift_those_of_others() -> None:
    merge = TokenMerge(has_prefill=False)
    for index in range(3):
        merge.token(index, index, None if index == 1 else told(index))
    assert merge.take_logprobs(len(merge.take())) == [told(0), None, told(2)]


def test_no_token_is_given_out_before_the_prompts_logprobs_are_whole() -> None:
    merge = TokenMerge(has_prefill=True, prompt_logprobs=4)
    merge.token(0, 7)
    merge.end(Role.PREFILL, finish(Role.PREFILL, FinishReason.STOP, 1))
    merge.prompt(3, (told(3), told(4), told(5)))  # one more than there is
    assert taken(merge) == []
    assert not merge.is_over
    merge.prompt(1, (told(1), told(2), told(99)))  # position 3 again
    assert taken(merge) == [7]
    assert merge.prompt_logprobs == [told(1), told(2), told(3), told(4)]
    assert merge.finish is not None


def test_an_answer_whose_prompt_logprobs_never_came_is_a_retryable_error() -> None:
    merge = TokenMerge(has_prefill=True, prompt_logprobs=2)
    merge.token(0, 7)
    merge.end(Role.PREFILL, EngineLost("gone"))
    merge.token(1, 8)
    merge.settle()
    assert not merge.is_over
    merge.end(Role.DECODE, finish(Role.DECODE, FinishReason.STOP, 2))
    assert taken(merge) == []
    assert merge.error is not None
    assert merge.error.retryable


def test_a_handoff_before_the_prompts_logprobs_are_whole_is_an_error_at_once() -> None:
    merge = TokenMerge(has_prefill=True, prompt_logprobs=2)
    merge.prompt(1, (told(1),))
    merge.token(0, 7)
    merge.end(Role.PREFILL, finish(Role.PREFILL, FinishReason.HANDOFF, 1))
    merge.settle()
    assert isinstance(merge.error, EngineLost)


def test_a_cancel_that_nobody_here_asked_for_can_be_tried_elsewhere() -> None:
    merge = TokenMerge(has_prefill=True)
    merge.end(Role.DECODE, finish(Role.DECODE, FinishReason.ERROR, code="cancelled"))
    merge.settle()
    assert merge.error is not None
    assert merge.error.retryable


def test_an_engines_refusal_names_the_field() -> None:
    """What an engine said of `bad_words` reached the client without the field's name."""
    refused = Finish(
        key=KEY,
        role=Role.DECODE,
        reason=FinishReason.ERROR,
        error_code=InvalidRequest.code,
        error_message="said",
        error_param="bad_words",
    )
    merge = TokenMerge(has_prefill=False)
    merge.end(Role.DECODE, refused)
    merge.settle()
    assert isinstance(merge.error, InvalidRequest)
    assert merge.error.param == "bad_words"
