"""Every wire format through the real client: the address, the framing and the headers are the provider's own."""

from __future__ import annotations

import json
import struct
from typing import Any
from zlib import crc32

import provider_wire as w
import pytest

from diptych.cluster.providers.clients import Clients
from diptych.cluster.providers.registry import Registry
from diptych.cluster.providers.settings import ProviderSettings
from diptych.protos.deltas import Content
from diptych.protos.failures import ProviderFailure
from diptych.protos.openai import ChatRequest
from diptych.protos.providers.codecs import by_name
from diptych.protos.replies import Ended, Usage

REQUEST = ChatRequest.model_validate(
    {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 9, "stream": True}
)


def sse(*events: dict[str, Any], named: bool = False) -> w.Behaviour:
    lines = []
    for event in events:
        name = f"event: {event['type']}\n" if named else ""
        lines.append(f"{name}data: {json.dumps(event)}\n\n".encode())
    return w.streams(*lines)


def aws(*events: tuple[str, dict[str, Any]], is_cut: bool = False) -> w.Behaviour:
    messages = []
    for name, body in events:
        payload = json.dumps(body).encode()
        headers = b"".join(
            bytes([len(key)]) + key + b"\x07" + struct.pack(">H", len(value)) + value
            for key, value in (
                (b":message-type", b"event"),
                (b":event-type", name.encode()),
                (b":content-type", b"application/json"),
            )
        )
        prelude = struct.pack(">II", 16 + len(headers) + len(payload), len(headers))
        message = prelude + struct.pack(">I", crc32(prelude)) + headers + payload
        messages.append(message + struct.pack(">I", crc32(message)))
    whole = b"".join(messages)
    whole = whole[:-7] if is_cut else whole
    told = {"content_type": "application/vnd.amazon.eventstream", "content_length": str(len(whole))}
    return w.sends(w.head(**told), *(whole[at : at + 50] for at in range(0, len(whole), 50)))


CONVERSE = (
    ("messageStart", {"role": "assistant"}),
    ("contentBlockDelta", {"delta": {"text": "hel"}, "contentBlockIndex": 0}),
    ("contentBlockDelta", {"delta": {"text": "lo"}, "contentBlockIndex": 0}),
    ("contentBlockStop", {"contentBlockIndex": 0}),
    ("messageStop", {"stopReason": "end_turn"}),
    ("metadata", {"usage": {"inputTokens": 3, "outputTokens": 1, "totalTokens": 4}}),
)
MESSAGE = {"id": "m1", "type": "message", "role": "assistant", "model": "m", "content": [], "stop_reason": None}
STREAMS = {
    "openai.chat": (w.streams(*w.WHOLE_STREAM), "POST /v1/chat/completions HTTP/1.1"),
    "anthropic.messages": (
        sse(
            {"type": "message_start", "message": {**MESSAGE, "usage": {"input_tokens": 3, "output_tokens": 1}}},
            {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
            {"type": "ping"},
            {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "hello"}},
            {"type": "content_block_stop", "index": 0},
            {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 1}},
            {"type": "message_stop"},
            named=True,
        ),
        "POST /v1/messages HTTP/1.1",
    ),
    "gemini.generate": (
        sse(
            {"candidates": [{"content": {"role": "model", "parts": [{"text": "hel"}]}}]},
            {
                "candidates": [{"content": {"role": "model", "parts": [{"text": "lo"}]}, "finishReason": "STOP"}],
                "usageMetadata": {"promptTokenCount": 3, "candidatesTokenCount": 1},
            },
        ),
        "POST /v1/models/m:streamGenerateContent?alt=sse HTTP/1.1",
    ),
    "bedrock.converse": (aws(*CONVERSE), "POST /v1/model/m/converse-stream HTTP/1.1"),
}


async def stream(told: w.Wire, codec: str) -> tuple[str, list[object]]:
    lab = ProviderSettings(
        base_url=f"http://127.0.0.1:{told.port}/v1", codec=codec, api_key="env:K", region="eu-west-1"
    )
    registry = Registry.load({"lab": lab}, {"K": w.KEY})
    clients = Clients(registry)
    provider = registry.provider("lab")
    try:
        outgoing = by_name(codec).encode(REQUEST, model="m", stream=True, quirks=provider.quirks)
        events = [event async for event in clients.of(provider).stream(outgoing, w.terms())]
    finally:
        await clients.close()
    return "".join(event.text for event in events if isinstance(event, Content)), list(events)


@pytest.mark.parametrize("codec", STREAMS)
async def test_a_stream_of_each_format_arrives(codec: str) -> None:
    behaviour, line = STREAMS[codec]
    async with w.wire(behaviour) as told:
        text, events = await stream(told, codec)
        assert text == "hello"
        assert isinstance(events[-1], Ended)
        assert codec == "openai.chat" or Usage(input_tokens=3, output_tokens=1) in events
        assert told.seen[0].line == line
        assert sum(w.KEY in value for value in told.seen[0].headers.values()) == 1


async def test_a_binary_stream_that_is_cut_in_a_message_has_not_ended() -> None:
    async with w.wire(aws(*CONVERSE[:4], is_cut=True)) as told:
        with pytest.raises(ProviderFailure):
            await stream(told, "bedrock.converse")
