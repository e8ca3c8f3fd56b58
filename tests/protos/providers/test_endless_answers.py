"""Answers that no honest provider sends: without an end, with counts that no sum can hold, with what JSON or UTF-8
cannot say. A router shares its one core among all tenants: one such answer must neither stop it nor break a client's
reader.
"""

from __future__ import annotations

import json
from collections import deque
from typing import Any

import pytest

from diptych.protos.failures import ProviderFailure
from diptych.protos.providers.codec import ServerEvent
from diptych.protos.providers.codecs import by_name
from diptych.protos.providers.loose_values import MAX_COUNT, MAX_KEPT, read_json
from diptych.protos.providers.quirks import Quirks

BLOCK = {"type": "content_block_start", "content_block": {"type": "later"}}
CITATION = {"type": "content_block_delta", "index": 0, "delta": {"type": "citations_delta", "citation": {"a": 1}}}
ITEM = {"type": "response.output_item.done", "item": {"type": "later"}}
NOTED = {"id": "c", "choices": [{"index": 0, "delta": {"content": "a", "annotations": [{"url": "u"}]}}]}
RESULT = {"contentBlockIndex": 0, "delta": {"citation": {"title": "t"}}}
RAW = {"candidates": [{"content": {"parts": [{"later": 1}]}}]}
WHOLE: dict[str, Any] = {
    "openai.chat": {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "a"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": "COUNT", "completion_tokens": 1},
    },
    "openai.responses": {"status": "completed", "output": [], "usage": {"input_tokens": "COUNT", "output_tokens": 1}},
    "anthropic.messages": {"content": [], "stop_reason": "end_turn", "usage": {"input_tokens": "COUNT"}},
    "gemini.generate": {
        "candidates": [{"content": {"parts": [{"text": "a"}]}, "finishReason": "STOP"}],
        "usageMetadata": {"promptTokenCount": "COUNT", "candidatesTokenCount": 1},
    },
    "bedrock.converse": {
        "output": {"message": {"content": []}},
        "stopReason": "end_turn",
        "usage": {"inputTokens": "COUNT", "outputTokens": 1},
    },
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_count_that_no_answer_has_is_not_told(name: str) -> None:
    """Money multiplied it by a price and raised OverflowError."""
    for count, expected in ((7, 7), (MAX_COUNT + 1, None), (10**400, None), (-1, None), (True, None)):
        body = json.loads(json.dumps(WHOLE[name]).replace('"COUNT"', json.dumps(count)))
        assert by_name(name).reply(body, Quirks()).usage.input_tokens == expected


@pytest.mark.parametrize(
    ("name", "event"),
    [
        ("anthropic.messages", BLOCK),
        ("anthropic.messages", CITATION),
        ("openai.responses", ITEM),
        ("openai.chat", NOTED),
        ("gemini.generate", RAW),
        ("bedrock.converse", RESULT),
    ],
)
def test_what_is_kept_of_an_answer_has_an_end(name: str, event: dict[str, Any]) -> None:
    """All that was kept was told anew with each piece: 32 000 of them cost seconds, in which nobody else was served."""
    decoder = by_name(name).decoder(Quirks())
    decoder.feed(ServerEvent('{"type": "content_block_start", "index": 0, "content_block": {"type": "text"}}'))
    kind = "contentBlockDelta" if name == "bedrock.converse" else str(event.get("type", ""))
    told = (json.dumps({"index": i, "output_index": i} | event) for i in range(MAX_KEPT + 2))
    with pytest.raises(ProviderFailure, match="blocks"):
        deque((decoder.feed(ServerEvent(data, kind)) for data in told), maxlen=0)


def test_a_whole_answer_of_a_million_items_is_none() -> None:
    """Each of them looked at all others."""
    body = {"status": "completed", "output": [{"type": "message"}] * 100_000}
    with pytest.raises(ProviderFailure, match="blocks"):
        by_name("openai.responses").reply(body, Quirks())


@pytest.mark.parametrize("name", ["anthropic.messages", "bedrock.converse"])
def test_a_signature_in_pieces_is_one(name: str) -> None:
    decoder, is_bedrock = by_name(name).decoder(Quirks()), name == "bedrock.converse"
    told = []
    for piece in ("YWJj", "ZGVm", "Z2hp"):
        if is_bedrock:
            event: dict[str, Any] = {"contentBlockIndex": 0, "delta": {"reasoningContent": {"signature": piece}}}
        else:
            delta = {"type": "signature_delta", "signature": piece}
            event = {"type": "content_block_delta", "index": 0, "delta": delta}
            decoder.feed(ServerEvent(json.dumps(BLOCK | {"content_block": {"type": "thinking"}, "index": 0})))
        told += decoder.feed(ServerEvent(json.dumps(event), "contentBlockDelta" if is_bedrock else ""))
    end = '{"contentBlockIndex": 0, "index": 0, "type": "content_block_stop"}'
    told += decoder.feed(ServerEvent(end, "contentBlockStop"))
    assert [event.signature for event in told if hasattr(event, "signature")] == ["YWJjZGVmZ2hp"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r'"a\ud83d\ude00b"', "a\U0001f600b"),
        (r'"a\ud83db"', "a\ufffdb"),
        (r'"\uDE00\ud83d"', "\ufffd\ufffd"),
        (r'"\\ud83d"', "\\ud83d"),
        (r'"\\\ud83d\\ude00"', "\\\ufffd\\ude00"),
        ('["NaN", NaN, -Infinity, 1e999, 1.5]', ["NaN", None, None, None, 1.5]),
    ],
)
def test_what_is_read_can_be_written(text: str, value: object) -> None:
    """Half of a character ended a client's stream with an internal error: no UTF-8 can carry it."""
    found = read_json(text)
    assert found == value
    assert json.loads(json.dumps(found, ensure_ascii=False, allow_nan=False).encode()) == value


def test_values_of_other_types_make_no_error_of_ours() -> None:
    for odd in ([1], {"a": 1}):
        body = {"status": "completed", "output": [{"type": "message", "id": odd, "content": [{"type": odd}]}]}
        by_name("openai.responses").reply(body, Quirks())
        delta = {"content": [{"type": odd, "text": "a"}]}
        chunk = {"id": "c", "choices": [{"delta": delta}]}
        by_name("openai.chat").decoder(Quirks()).feed(ServerEvent(json.dumps(chunk)))
