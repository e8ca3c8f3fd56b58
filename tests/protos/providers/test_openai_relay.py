"""Bodies and streams that go through in OpenAI's chat format: what is rewritten and seen, and that no byte is lost.

Guards against a stream that a relay holds back or alters, usage that the client did not ask for and gets, an error or a
broken stream that looks like an end, and a body that is passed on although the provider speaks another dialect.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from diptych.protos.errors import InvalidRequest
from diptych.protos.failures import FailureKind, ProviderFailure
from diptych.protos.openai import parse_chat
from diptych.protos.providers.event_stream import MAX_EVENT_BYTES
from diptych.protos.providers.openai_chat import ChatCodec
from diptych.protos.providers.openai_relay import RelayObserver, can_relay, relay, wants_usage
from diptych.protos.providers.quirks import Quirks
from diptych.protos.replies import Usage

USER = {"role": "user", "content": "hi"}
Q = Quirks()


def a_body(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"model": "route", "messages": list(messages) or [USER], **fields}


def an_event(delta: Any = None, finish: str | None = None, end: str = "\n\n", **more: Any) -> bytes:
    choices = [] if delta is None and finish is None else [{"index": 0, "delta": delta or {}, "finish_reason": finish}]
    return f"data: {json.dumps({'id': 'c', 'choices': choices, **more})}{end}".encode()


ROLE = an_event({"role": "assistant", "content": "", "refusal": None, "tool_calls": []})
TEXT = an_event({"content": 'say "error" and "usage":{'})
STOP = an_event({}, "stop")
USAGE = an_event(usage={"prompt_tokens": 3, "completion_tokens": 4})
DONE = b"data: [DONE]\n\n"


def seen(*pieces: bytes, drops_usage: bool = False) -> tuple[RelayObserver, bytes]:
    observer = RelayObserver(drops_usage=drops_usage)
    return observer, b"".join(observer.feed(piece) for piece in pieces)


@example([403], "\r\n\r\n", False)
@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 700), max_size=10), st.sampled_from(["\n\n", "\r\n\r\n", "\r\r"]), st.booleans())
def test_every_byte_goes_through_however_it_comes(cuts: list[int], end: str, drops: bool) -> None:
    mid = [an_event({"content": "\u00e9"}, end=end), b": ping" + end.encode(), an_event({"content": "b"}, end=end)]
    last = [an_event({}, "stop", end=end), b"data: [DONE]" + end.encode()]
    usage = an_event(end=end, usage={"prompt_tokens": 3, "completion_tokens": 4})
    body = b"".join([*mid, last[0], usage, last[1]])
    observer = RelayObserver(drops_usage=drops)
    passed, left = b"", body
    for cut in [*cuts, len(body)]:
        passed += observer.feed(left[:cut])
        left = left[cut:]
    assert passed == (b"".join([*mid, *last]) if drops else body)
    assert (observer.usage, observer.finish, observer.is_done) == (Usage(input_tokens=3, output_tokens=4), "stop", True)
    observer.end()


def test_an_event_goes_on_with_its_last_byte() -> None:
    observer = RelayObserver(drops_usage=True)
    assert observer.feed(TEXT[:-1]) == b""
    assert observer.feed(TEXT[-1:]) == TEXT


@pytest.mark.parametrize(
    ("delta", "has_content"),
    [
        ({"role": "assistant", "content": "", "refusal": None, "tool_calls": [], "reasoning": None}, False),
        ({"content": "x"}, True),
        ({"reasoning_content": "x"}, True),
        ({"thinking": "x"}, True),
        ({"refusal": "x"}, True),
        ({"tool_calls": [{"index": 0}]}, True),
        ({"function_call": {"name": "f"}}, True),
    ],
)
def test_content_is_whatever_a_client_would_miss(delta: dict[str, Any], has_content: bool) -> None:
    assert seen(an_event(delta))[0].has_content is has_content


def test_the_words_of_an_answer_are_taken_for_nothing_else() -> None:
    observer, passed = seen(ROLE, TEXT, TEXT, STOP, DONE, drops_usage=True)
    assert passed == ROLE + TEXT + TEXT + STOP + DONE
    assert (observer.usage, observer.finish, observer.num_events) == (Usage(), "stop", 5)


def test_usage_that_comes_with_content_is_read_and_stays() -> None:
    both = an_event({"content": "x"}, "stop", usage={"prompt_tokens": 3, "completion_tokens": 4})
    observer, passed = seen(TEXT, both, drops_usage=True)
    assert passed == TEXT + both
    assert observer.usage == Usage(input_tokens=3, output_tokens=4)


@pytest.mark.parametrize("before", [[], [ROLE], [ROLE, TEXT]])
@pytest.mark.parametrize(
    ("event", "kind"),
    [
        (b'data: {"error": {"message": "slow down", "code": 429}}\n\n', FailureKind.RATE_LIMITED),
        (b'event: error\ndata: {"message": "boom"}\n\n', FailureKind.SERVER),
        (
            b'data: {"id":"c","choices":[{"index":0,"delta":{},"error":{"message":"x","code":502}}]}\n\n',
            FailureKind.SERVER,
        ),
        (an_event({}, "error"), FailureKind.SERVER),
    ],
)
def test_an_error_within_the_stream_is_not_passed_on(before: list[bytes], event: bytes, kind: FailureKind) -> None:
    observer, passed = seen(*before, TEXT + event + TEXT, TEXT)
    assert passed == b"".join([*before, TEXT])
    assert observer.failure is not None
    assert observer.failure.failure.kind is kind
    with pytest.raises(ProviderFailure) as caught:
        observer.end()
    assert caught.value is observer.failure


@pytest.mark.parametrize("pieces", [[], [ROLE], [ROLE, TEXT], [ROLE, TEXT, DONE], [TEXT, STOP[:-1]]])
def test_a_stream_that_never_says_why_it_ends_has_broken_off(pieces: list[bytes]) -> None:
    observer, _ = seen(*pieces)
    with pytest.raises(ProviderFailure) as caught:
        observer.end()
    assert caught.value.failure.kind is FailureKind.SERVER


def test_before_content_what_is_no_json_is_left_out() -> None:
    observer, passed = seen(ROLE, b"data: {oops\n\n", TEXT, STOP)
    assert passed == ROLE + TEXT + STOP
    assert observer.skipped == 1


def test_an_event_without_an_end_is_a_failure() -> None:
    observer = RelayObserver(drops_usage=False)
    observer.feed(b"data: " + b"x" * (MAX_EVENT_BYTES - 6))
    assert observer.failure is None
    assert observer.feed(b"x") == b""
    assert "4 MiB" in str(observer.failure)


def test_a_body_is_rewritten_and_told() -> None:
    fields = a_body(
        max_tokens=5,
        temperature=0.5,
        seed=1,
        top_k=4,
        min_p=0,
        bad_words=[],
        timeout_s=9,
        stream=True,
        logprobs=True,
        n=1,
    )
    before = json.dumps(fields)
    quirks = Quirks(unsupported=frozenset({"seed"}), extra_body={"store": False}, headers={"x-a": "b"})
    outgoing = relay(fields, model="m", stream=True, quirks=quirks)
    assert outgoing.body == {
        "model": "m",
        "messages": [USER],
        "max_completion_tokens": 5,
        "temperature": 0.5,
        "logprobs": True,
        "n": 1,
        "stream": True,
        "stream_options": {"include_usage": True},
        "store": False,
    }
    assert {(note.kind, note.field) for note in outgoing.notes} == {
        ("renamed", "max_tokens"),
        ("unsupported", "seed"),
        ("unsupported", "top_k"),
    }
    assert (outgoing.path, outgoing.headers, json.dumps(fields)) == ("/chat/completions", {"x-a": "b"}, before)


def test_a_body_without_quirks_says_what_the_codec_would_say() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    fields = a_body(
        max_completion_tokens=5, stop=["x"], tools=[tool], tool_choice="required", user="u", reasoning_effort="low"
    )
    encoded = ChatCodec().encode(parse_chat(json.dumps(fields).encode()), model="m", stream=True, quirks=Q)
    assert relay(fields, model="m", stream=True, quirks=Q).body == encoded.body


def test_messages_are_as_the_codec_would_send_them() -> None:
    fields = a_body({"role": "developer", "content": "x"}, USER, THOUGHT, USER)
    before = json.dumps(fields)
    for quirks in (Q, Quirks(replay_reasoning="optional", system_role="developer")):
        assert can_relay(fields, quirks)
        encoded = ChatCodec().encode(parse_chat(before.encode()), model="m", stream=False, quirks=quirks)
        outgoing = relay(fields, model="m", stream=False, quirks=quirks)
        assert (outgoing.body, outgoing.notes) == (encoded.body, encoded.notes)
    assert json.dumps(fields) == before


def test_options_of_the_provider_go_along_and_the_others_do_not() -> None:
    options = {"fam": {"temperature": 1.5}, "other": {"secret": 1}}
    outgoing = relay(
        a_body(temperature=0.5, provider_options=options), model="m", stream=False, quirks=Quirks(family="fam")
    )
    assert outgoing.body == {"model": "m", "messages": [USER], "temperature": 1.5}
    with pytest.raises(InvalidRequest, match=r"provider_options\.fam\.model"):
        relay(a_body(provider_options={"fam": {"model": "x"}}), model="m", stream=False, quirks=Quirks(family="fam"))


def test_who_wants_usage_is_known() -> None:
    assert wants_usage(a_body(stream_options={"include_usage": True}))
    assert not wants_usage(a_body(stream_options={"include_usage": None}))
    assert not wants_usage(a_body(stream_options=None))


THOUGHT = {"role": "assistant", "content": "a", "reasoning_content": "hm"}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}}
NAMED = {"type": "function", "function": {"name": "f"}}
PICTURE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x/y.png"}}]}
HELD = {"role": "user", "content": [{"type": "file", "file": {"file_id": "file-1"}}]}


@pytest.mark.parametrize(
    ("body", "quirks", "can"),
    [
        (a_body(), Q, True),
        (a_body(n=2), Q, False),
        (a_body(functions=[{"name": "f"}]), Q, False),
        (a_body({"role": "developer", "content": "x"}), Quirks(system_role="first_user"), False),
        (a_body({"role": "developer", "content": "x"}), Quirks(system_role="developer"), True),
        (a_body({"role": "system", "content": "x"}), Quirks(system_role="first_user"), False),
        (a_body(stop=list("abcde")), Q, False),
        (a_body(response_format=SCHEMA), Q, True),
        (a_body(response_format=SCHEMA), Quirks(schema_dialect="strict_plain"), False),
        (a_body(tool_choice=NAMED), Quirks(tool_choice="no_named"), False),
        (a_body(tool_choice="required"), Quirks(tool_choice="no_required"), False),
        (a_body(tool_choice="none"), Quirks(tool_choice="auto_only"), False),
        (a_body(tool_choice={"type": "allowed_tools"}), Q, False),
        (a_body(parallel_tool_calls=False), Quirks(parallel_tools=False), False),
        (a_body(reasoning_effort="low"), Quirks(effort_field="reasoning.effort"), False),
        (a_body(USER, THOUGHT, USER), Q, True),
        (a_body(USER, THOUGHT, USER), Quirks(replay_reasoning="optional"), True),
        (a_body(USER, THOUGHT, USER), Quirks(replay_reasoning="optional", reasoning_field="reasoning"), False),
        (a_body(USER, {"role": "assistant", "content": "a"}, USER), Quirks(replay_reasoning="required"), False),
        (a_body(USER | {"name": "ann"}), Quirks(unsupported=frozenset({"name"})), False),
        (a_body(PICTURE), Q, True),
        (a_body(PICTURE), Quirks(media=frozenset()), False),
        (a_body(PICTURE), Quirks(flattens_content=True), False),
        (a_body(HELD), Quirks(media=frozenset({"file"})), False),
        (a_body(continue_final_message=True), Q, False),
        (
            a_body(continue_final_message=True),
            Quirks(rename={"continue_final_message": "continue_final_message"}),
            True,
        ),
        (a_body(add_generation_prompt=False), Q, False),
        (a_body(add_generation_prompt=True), Q, True),
        (a_body(chat_template_kwargs={"enable_thinking": False}), Q, False),
        (a_body(include_reasoning=False), Q, False),
        (a_body(include_reasoning=True), Q, True),
        (a_body(thinking={"type": "x"}), Quirks(unsupported=frozenset({"thinking.type"})), False),
    ],
)
def test_what_needs_more_than_other_names_is_encoded_anew(body: dict[str, Any], quirks: Quirks, can: bool) -> None:
    assert can_relay(body, quirks) is can
