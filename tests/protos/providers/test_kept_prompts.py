"""What Anthropic's clients mark with cache_control reaches the providers that keep prompts when they are asked to.

Without the marks every turn of a coding agent pays for its whole prompt: ten times the price.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from diptych.protos.anthropic_messages import parse_messages
from diptych.protos.messages import Text
from diptych.protos.openai import parse_chat
from diptych.protos.providers.codecs import CODECS, by_name
from diptych.protos.providers.openai_relay import relay
from diptych.protos.providers.quirks import Quirks

MARK = {"type": "ephemeral"}
HOUR = {"type": "ephemeral", "ttl": "1h"}
CALL = {"type": "tool_use", "id": "t1", "name": "f", "input": {}}
BODY: dict[str, Any] = {
    "model": "m",
    "max_tokens": 9,
    "system": [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "cache_control": HOUR}],
    "tools": [{"name": "f", "input_schema": {"type": "object"}, "cache_control": MARK}],
    "messages": [
        {
            "role": "user",
            "content": [{"type": "text", "text": "c", "cache_control": MARK}, {"type": "text", "text": "d"}],
        },
        {"role": "assistant", "content": [CALL]},
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "e", "cache_control": MARK}],
        },
    ],
}


def encoded(codec: str, model: str, **changes: Any) -> dict[str, Any]:
    request = parse_messages(json.dumps(BODY | changes).encode())
    return by_name(codec).encode(request, model=model, stream=False, quirks=Quirks(media=frozenset({"image"}))).body


def test_marks_stand_where_they_stood_in_anthropics_format() -> None:
    body = encoded("anthropic.messages", "claude-sonnet-4-5")
    assert body["system"][-1] == {"type": "text", "text": "b", "cache_control": HOUR}
    assert "cache_control" not in body["system"][0]
    assert body["tools"][0]["cache_control"] == MARK
    first, _, last = body["messages"]
    assert first["content"][0] == {"type": "text", "text": "c", "cache_control": MARK}
    assert "cache_control" not in first["content"][1]
    assert last["content"][0]["cache_control"] == MARK
    assert json.dumps(body).count("cache_control") == 4


def test_a_mark_of_the_request_is_one_of_its_last_block() -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
    for content, kind in (("x", "text"), ([{"type": "text", "text": "x"}, image], "image")):
        messages = [{"role": "user", "content": content}]
        body = encoded("anthropic.messages", "claude-sonnet-4-5", messages=messages, cache_control=MARK)
        assert body["messages"][0]["content"][-1]["cache_control"] == MARK
        assert body["messages"][0]["content"][-1]["type"] == kind
    body = encoded("anthropic.messages", "claude-sonnet-4-5", cache_control=HOUR)
    assert body["messages"][-1]["content"][0]["cache_control"] == MARK  # the block's own


def test_marks_are_points_behind_their_blocks_in_converse_for_claudes_alone() -> None:
    body = encoded("bedrock.converse", "anthropic.claude-sonnet-4-5-20250929-v1:0")
    assert body["system"][-1] == {"cachePoint": {"type": "default", "ttl": "1h"}}
    assert body["toolConfig"]["tools"][1] == {"cachePoint": {"type": "default"}}
    assert [next(iter(block)) for block in body["messages"][0]["content"]] == ["text", "cachePoint", "text"]
    assert [next(iter(block)) for block in body["messages"][2]["content"]] == ["toolResult", "cachePoint"]
    assert "cachePoint" not in json.dumps(encoded("bedrock.converse", "amazon.nova-lite-v1:0"))


@pytest.mark.parametrize("codec", CODECS)
def test_a_key_of_the_cache_is_sent_where_it_is_known_and_else_told(codec: str) -> None:
    """It was left out in silence, and refused by providers where bodies pass as they come."""
    fields = {"model": "m", "messages": [{"role": "user", "content": "q"}], "prompt_cache_key": "k"}
    request, known = parse_chat(json.dumps(fields).encode()), Quirks(rename={"prompt_cache_key": "prompt_cache_key"})
    for quirks in (Quirks(), known):
        made = [by_name(codec).encode(request, model="m", stream=False, quirks=quirks)]
        made += [relay(fields, model="m", stream=False, quirks=quirks)] if codec == "openai.chat" else []
        is_sent = codec == "openai.responses" or (codec == "openai.chat" and quirks is known)
        for outgoing in made:
            assert outgoing.body.get("prompt_cache_key") == ("k" if is_sent else None)
            assert not outgoing.unsupported
            told = [note.kind for note in outgoing.notes if note.field == "prompt_cache_key"]
            assert told == ([] if is_sent else ["omitted"])


def test_other_formats_and_own_pools_do_not_see_them() -> None:
    for codec in ("openai.chat", "openai.responses", "gemini.generate"):
        assert "cache" not in json.dumps(encoded(codec, "m"))
    request = parse_messages(json.dumps(BODY).encode())
    assert request.messages[0].content == "a\n\nb"
    assert Text("a", kept="1h").text == "a"
