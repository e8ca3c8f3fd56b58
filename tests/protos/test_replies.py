"""A whole answer told as events and put together again is the same answer.

Guards against parts that run into one another, proofs and providers' extras that end up at another part or get lost,
and counts of two reports of one answer that are added where the later one replaces the earlier.
"""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.protos.deltas import CallArguments, CallBegin, CallEnd, Content, Extras
from diptych.protos.messages import Message, Reasoning, Refusal, Text, ToolCall
from diptych.protos.replies import Began, Ended, Reply, ReplyBuilder, Usage

WORDS = st.text("ab {}\n", max_size=4)
DATA = st.dictionaries(
    st.sampled_from(["one", "other"]), st.dictionaries(WORDS, WORDS, min_size=1, max_size=2), max_size=2
)
ARGUMENTS = st.dictionaries(WORDS, st.integers() | WORDS, max_size=2)


def a_call(call_id: str, arguments: dict[str, int | str], data: dict[str, dict[str, str]]) -> ToolCall:
    return ToolCall(id=call_id, name="f", arguments=arguments, text=json.dumps(arguments), provider_data=data)


PARTS = st.one_of(
    st.builds(Text, WORDS, DATA),
    st.builds(Refusal, WORDS),
    st.builds(Reasoning, WORDS, WORDS, st.just(False), DATA),
    st.builds(Reasoning, WORDS, st.just(""), st.just(True), DATA),
    st.builds(a_call, WORDS, ARGUMENTS, DATA),
)
COUNTS = st.none() | st.integers(0, 9)
REPLIES = st.builds(
    Reply,
    message=st.builds(
        Message, role=st.just("assistant"), parts=st.lists(PARTS, max_size=5).map(tuple), provider_data=DATA
    ),
    ended=st.builds(
        Ended, st.sampled_from(["stop", "length", "tool_calls", "content_filter"]), WORDS, st.none() | WORDS
    ),
    usage=st.builds(Usage, input_tokens=COUNTS, output_tokens=COUNTS, reasoning_tokens=COUNTS),
    began=st.builds(Began, WORDS, WORDS),
)


@settings(max_examples=60)
@given(REPLIES)
def test_the_events_of_a_reply_make_the_reply(reply: Reply) -> None:
    builder = ReplyBuilder()
    for event in reply.events():
        builder.add(event)
    assert builder.reply() == reply


@settings(max_examples=30)
@given(REPLIES)
def test_calls_are_told_one_after_the_other(reply: Reply) -> None:
    begun: list[int] = []
    is_open = False
    for event in reply.events():
        match event:
            case CallBegin(index):
                assert not is_open
                assert index == len(begun)
                begun.append(index)
                is_open = True
            case CallArguments(index):
                assert is_open
                assert index == begun[-1]
            case CallEnd(index):
                assert is_open
                assert index == begun[-1]
                is_open = False
    assert not is_open
    assert isinstance(reply.events()[0], Began)
    assert isinstance(reply.events()[-1], Ended)


def test_the_later_report_of_usage_has_the_last_word_on_what_it_tells() -> None:
    first, later = Usage(input_tokens=5, output_tokens=1, cache_read_tokens=4), Usage(output_tokens=7)
    assert first.merged(later) == Usage(input_tokens=5, output_tokens=7, cache_read_tokens=4)


def test_an_answer_that_broke_off_is_what_there_is_of_it() -> None:
    builder = ReplyBuilder()
    for event in (Content("half"), CallBegin(0, "f"), CallArguments(0, '{"a"')):
        builder.add(event)
    reply = builder.reply()
    assert reply.ended == Ended("length")
    call = reply.message.tool_calls[0]
    assert (reply.message.content, call.text, call.arguments) == ("half", '{"a"', {})


def test_extras_before_any_part_are_the_messages() -> None:
    builder = ReplyBuilder()
    for event in (Extras("p", {"a": 1}), Extras("p", {"b": 2}), Content("x"), Extras("p", {"c": 3})):
        builder.add(event)
    message = builder.reply().message
    assert message.provider_data == {"p": {"a": 1, "b": 2}}
    assert message.parts == (Text("x", {"p": {"c": 3}}),)
