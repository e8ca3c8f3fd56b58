"""Answers of Anthropic's and Bedrock's formats in which, at each place in turn, stands something else.

Guards against an exception of ours where a provider, or a proxy before it, sends what the format does not have: the
only way to fail is a ProviderFailure, which attempts and breakers understand.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest

from diptych.protos.failures import Failure, ProviderFailure
from diptych.protos.providers.anthropic import MessagesCodec
from diptych.protos.providers.bedrock import ConverseCodec
from diptych.protos.providers.codec import Codec, ServerEvent
from diptych.protos.providers.quirks import Quirks
from diptych.protos.replies import ReplyBuilder

JUNK: tuple[Any, ...] = (None, True, 7, -1.5, "", "x", [], [1], [{}], {}, {"type": 1}, {"text": [1]})
COUNTS = {"input_tokens": 1, "cache_read_input_tokens": 1, "output_tokens_details": {"thinking_tokens": 1}}
MESSAGE = {
    "type": "message",
    "id": "m",
    "model": "c",
    "content": [
        {"type": "thinking", "thinking": "a", "signature": "b"},
        {"type": "redacted_thinking", "data": "b"},
        {"type": "text", "text": "a", "citations": [{"type": "c"}]},
        {"type": "server_tool_use", "id": "s", "name": "n", "input": {"a": 1}},
        {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}, "caller": {"type": "direct"}},
    ],
    "stop_reason": "end_turn",
    "stop_sequence": "x",
    "stop_details": {"type": "refusal"},
    "usage": COUNTS,
}
MESSAGE_STREAM = [
    {"type": "message_start", "message": {"id": "m", "model": "c", "usage": COUNTS}},
    {"type": "content_block_start", "index": 0, "content_block": {"type": "thinking", "thinking": "", "signature": ""}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "a"}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "signature_delta", "signature": "a"}},
    {"type": "content_block_stop", "index": 0},
    {"type": "content_block_start", "index": 1, "content_block": {"type": "text", "text": "", "citations": []}},
    {"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": "a"}},
    {"type": "content_block_delta", "index": 1, "delta": {"type": "citations_delta", "citation": {"type": "c"}}},
    {"type": "content_block_stop", "index": 1},
    {
        "type": "content_block_start",
        "index": 2,
        "content_block": {"type": "tool_use", "id": "t", "name": "f", "input": {}},
    },
    {"type": "content_block_delta", "index": 2, "delta": {"type": "input_json_delta", "partial_json": "{}"}},
    {"type": "content_block_stop", "index": 2},
    {"type": "message_delta", "delta": {"stop_reason": "tool_use", "stop_sequence": None}, "usage": COUNTS},
    {"type": "message_stop"},
]
CONVERSE = {
    "output": {
        "message": {
            "role": "assistant",
            "content": [
                {"reasoningContent": {"reasoningText": {"text": "a", "signature": "b"}}},
                {"reasoningContent": {"redactedContent": "b"}},
                {"text": "a"},
                {"citationsContent": {"content": [{"text": "a"}], "citations": [{"title": "t"}]}},
                {"toolUse": {"toolUseId": "t", "name": "f", "input": {"a": 1}}},
                {"toolUse": {"toolUseId": "s", "name": "f", "input": {"a": 1}, "type": "server_tool_use"}},
            ],
        }
    },
    "stopReason": "end_turn",
    "additionalModelResponseFields": {"stop_sequence": "x"},
    "usage": {"inputTokens": 1, "outputTokens": 1, "cacheReadInputTokens": 1},
    "trace": {"guardrail": {}},
}
CONVERSE_STREAM = [
    {"event": "messageStart", "role": "assistant"},
    {"event": "contentBlockDelta", "contentBlockIndex": 0, "delta": {"reasoningContent": {"text": "a"}}},
    {"event": "contentBlockDelta", "contentBlockIndex": 0, "delta": {"reasoningContent": {"signature": "a"}}},
    {"event": "contentBlockDelta", "contentBlockIndex": 1, "delta": {"reasoningContent": {"redactedContent": "a"}}},
    {"event": "contentBlockDelta", "contentBlockIndex": 2, "delta": {"text": "a"}},
    {"event": "contentBlockDelta", "contentBlockIndex": 2, "delta": {"citation": {"title": "t"}}},
    {"event": "contentBlockStart", "contentBlockIndex": 3, "start": {"toolUse": {"toolUseId": "t", "name": "f"}}},
    {"event": "contentBlockDelta", "contentBlockIndex": 3, "delta": {"toolUse": {"input": "{}"}}},
    {"event": "contentBlockStop", "contentBlockIndex": 3},
    {"event": "contentBlockStart", "contentBlockIndex": 4, "start": {"toolResult": {"toolUseId": "t", "type": "r"}}},
    {"event": "contentBlockDelta", "contentBlockIndex": 4, "delta": {"toolResult": [{"json": {}}]}},
    {"event": "messageStop", "stopReason": "tool_use", "additionalModelResponseFields": {"stop_sequence": "x"}},
    {"event": "metadata", "usage": {"inputTokens": 1, "outputTokens": 1}, "trace": {}},
]
CASES = [(MessagesCodec(), MESSAGE, MESSAGE_STREAM), (ConverseCodec(), CONVERSE, CONVERSE_STREAM)]


def others(value: Any) -> Iterator[Any]:
    """`value` with something else, or nothing, at each of its places."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, found in inner:
        for junk in JUNK:
            changed = copy.copy(value)
            changed[key] = junk
            yield changed
        if isinstance(value, dict):
            yield {name: one for name, one in value.items() if name != key}
        for deeper in others(found):
            changed = copy.copy(value)
            changed[key] = deeper
            yield changed


def read(codec: Codec, events: list[Any]) -> None:
    decoder, builder = codec.decoder(Quirks()), ReplyBuilder()
    for told in events:
        kind = told.get("event", "") if isinstance(told, dict) else ""
        for made in decoder.feed(ServerEvent(json.dumps(told), kind if isinstance(kind, str) else "")):
            builder.add(made)
    for made in decoder.finish():
        builder.add(made)
    builder.reply()


@pytest.mark.parametrize(("codec", "body", "stream"), CASES, ids=lambda case: getattr(case, "name", ""))
def test_nothing_but_a_provider_failure_comes_of_any_answer(codec: Codec, body: Any, stream: list[Any]) -> None:
    codec.reply(body, Quirks())
    read(codec, stream)
    for changed in others(body):
        try:
            codec.reply(changed, Quirks())
        except ProviderFailure:
            pass
    for at, event in enumerate(stream):
        for told in (*JUNK, *others(event)):
            try:
                read(codec, [*stream[:at], told, *stream[at + 1 :]])
            except ProviderFailure:
                pass


@pytest.mark.parametrize("codec", [MessagesCodec(), ConverseCodec()], ids=lambda codec: codec.name)
def test_every_error_is_a_failure(codec: Codec) -> None:
    told = {"type": "error", "error": {"type": "api_error", "message": "a\nb"}, "message": "c", "__type": "d"}
    for status in (0, 200, 400, 404, 429, 500, 599, 999):
        for body in (*JUNK, *others(told)):
            for header in ("", "7", "x", "Mon, 99 Nov"):
                headers = {"retry-after": header, "x-amzn-errortype": header}
                failed = codec.failure(status, headers, json.dumps(body).encode())
                assert isinstance(failed, Failure)
                assert failed.message
                assert failed.message.isprintable()
