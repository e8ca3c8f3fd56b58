"""The events of a response, held against the machine that a client runs: it knows nothing but what events told it.

Guards against an item that is told before it began, an index or a number that is skipped, deltas that do not add up to
the whole, and a stream and a body that end differently.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.protos.errors import ContextTooLong, DiptychError, RateLimited
from diptych.protos.replies import Usage
from diptych.protos.responses_items import FIRST_OUTPUT, ITEM_ID, ItemIds, response_of
from diptych.protos.responses_replies import ResponseWriter, ended, error_event, item_list, usage
from diptych.protos.responses_testing import EventReader

ID = "resp_" + "0123456789ab" * 2
USE = usage(Usage(input_tokens=3, cache_read_tokens=1, output_tokens=5, reasoning_tokens=2))
Step = tuple[str, str]  # think, say, or call: a function's name; then its arguments


def written(
    steps: list[Step], cuts: int = 10_000, status: Any = "completed", is_queued: bool = False, **ends: Any
) -> tuple[EventReader, ResponseWriter]:
    """The steps in pieces of `cuts` characters, played to a client."""
    client, writer = EventReader(), ResponseWriter({"id": ID, "object": "response"}, ItemIds(ID, FIRST_OUTPUT))
    events = writer.created(is_queued=is_queued)
    events += writer.begun() if is_queued else []
    for number, (kind, text) in enumerate(steps):
        pieces = [text[at : at + cuts] for at in range(0, len(text), cuts)]
        if kind in ("think", "say"):
            for piece in pieces:
                events += writer.think(piece) if kind == "think" else writer.say(piece)
        else:
            events += writer.call(f"call_{number}", kind)
            for piece in pieces:
                events += writer.argue(piece)
            events += writer.end_call()
    events += writer.finish(status, use=USE, ended_at=7, **ends)
    for event in events:
        client.take(event)
    return client, writer


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("think"), st.text(min_size=1, max_size=20)),
        st.tuples(st.just("say"), st.text(min_size=1, max_size=20)),
        st.tuples(st.sampled_from(["f", "g"]), st.sampled_from(["{}", '{"a": [1, 2]}', "", "no object"])),
    ),
    max_size=6,
)


@given(STEPS, st.integers(1, 9), st.booleans(), st.sampled_from(["completed", "incomplete", "cancelled"]))
def test_any_chunking_ends_in_the_same_response(steps: list[Step], cuts: int, is_queued: bool, status: str) -> None:
    client, writer = written(steps, cuts, status, is_queued)
    assert client.last == writer.body
    _, at_once = written(steps, status=status)
    assert writer.body == at_once.body
    ids = [item["id"] for item in writer.output]
    assert len(set(ids)) == len(ids)
    assert all(ITEM_ID.fullmatch(name) and response_of(name) == ID for name in ids)


def test_what_is_said_in_turns_becomes_items_in_their_order() -> None:
    _, writer = written(
        [("think", "hm"), ("say", "I "), ("say", "call"), ("f", '{"a":1}'), ("think", "so"), ("say", "!")]
    )
    kinds = ["reasoning", "message", "function_call", "reasoning", "message"]
    assert [item["type"] for item in writer.body["output"]] == kinds
    assert writer.body["output"][1]["content"][0]["text"] == "I call"
    assert writer.body["output"][2]["arguments"] == '{"a":1}'
    assert writer.body["completed_at"] == 7
    assert writer.body["usage"]["total_tokens"] == 8


@pytest.mark.parametrize("status", ["completed", "incomplete"])
def test_an_answer_of_nothing_is_an_empty_message(status: str) -> None:
    """Clients take the first message's text without asking."""
    _, writer = written([], status=status)
    (item,) = writer.body["output"]
    assert (item["type"], item["content"][0]["text"], item["status"]) == ("message", "", status)


def test_a_cut_off_answer_says_so_in_its_last_item_alone() -> None:
    _, writer = written([("think", "a"), ("say", "b")], status="incomplete")
    assert [item["status"] for item in writer.body["output"]] == ["completed", "incomplete"]
    assert writer.body["incomplete_details"] == {"reason": "max_output_tokens"}
    assert writer.body["completed_at"] is None


def test_arguments_that_are_no_object_are_not_called_complete() -> None:
    """Sent back as complete, they could not be read."""
    _, writer = written([("f", '{"a":'), ("g", "{}")])
    assert [item["status"] for item in writer.body["output"]] == ["incomplete", "completed"]


def test_a_failure_tells_what_was_said_before_it() -> None:
    client, writer = written([("say", "I be")], status="failed", error=DiptychError("it broke"))
    assert client.last["error"] == {
        "code": "server_error",
        "message": "it broke",
        "param": None,
        "type": "internal_error",
    }
    assert writer.body["output"][0]["status"] == "incomplete"


def test_openais_codes_of_errors() -> None:
    body = {"id": ID, "status": "queued", "output": []}
    assert ended(body, "failed", RateLimited("slower"))["error"]["code"] == "rate_limit_exceeded"
    wrong = ended(body, "failed", ContextTooLong("too long", "input"))["error"]
    assert (wrong["code"], wrong["param"], wrong["type"]) == ("invalid_prompt", "input", "context_length_exceeded")
    assert ended(body, "cancelled")["error"] is None
    assert error_event(RateLimited("slower"), 4)["sequence_number"] == 4


def test_sealed_reasoning_is_told_when_it_is_whole() -> None:
    writer = ResponseWriter({"id": ID}, ItemIds(ID, FIRST_OUTPUT), seal=lambda text: f"<{text}>")
    events = [*writer.created(), *writer.think("a"), *writer.think("b"), *writer.say("c")]
    events += writer.finish("completed", use=None, ended_at=0)
    items = [event["item"] for event in events if "item" in event]
    assert [item.get("encrypted_content") for item in items] == [None, "<ab>", None, None]


def test_logprobs_stand_with_their_text() -> None:
    client, writer = EventReader(), ResponseWriter({"id": ID}, ItemIds(ID, FIRST_OUTPUT))
    events = [
        *writer.created(),
        *writer.say("a", [{"token": "a"}]),
        *writer.say("bc", [{"token": "b"}, {"token": "c"}]),
    ]
    for event in events + writer.finish("completed", use=None, ended_at=0):
        client.take(event)
    assert [entry["token"] for entry in client.output[0]["content"][0]["logprobs"]] == ["a", "b", "c"]


def test_pages_name_their_ends() -> None:
    assert item_list([{"id": "a"}, {"id": "b"}], has_more=True)["last_id"] == "b"
    assert item_list([], has_more=False)["first_id"] is None
