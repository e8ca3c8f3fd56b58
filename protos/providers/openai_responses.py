"""The codec openai.responses: OpenAI's /v1/responses, at OpenAI, xAI and others that speak it.

Found by codecs.by_name. Requests are made by openai_responses_requests.py and openai_responses_input.py, answers read
by openai_responses_stream.py. The side that this server serves is another one: protos/responses.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from diptych.protos.failures import Failure
from diptych.protos.openai import ChatRequest
from diptych.protos.replies import Reply, ReplyBuilder

from .codec import JsonObject, Outgoing, StreamDecoder
from .error_bodies import told_in
from .failure_words import failure_of
from .openai_responses_requests import NAME, encode
from .openai_responses_stream import ResponsesDecoder
from .quirks import Quirks


class ResponsesCodec:
    """See Codec."""

    name: str = NAME
    framing: Literal["sse", "aws"] = "sse"

    def encode(self, request: ChatRequest, *, model: str, stream: bool, quirks: Quirks) -> Outgoing:
        """See Codec."""
        return encode(request, model=model, stream=stream, quirks=quirks)

    def reply(self, body: JsonObject, quirks: Quirks) -> Reply:
        """See Codec."""
        builder = ReplyBuilder()
        for event in ResponsesDecoder(quirks.family or self.name).whole(body):
            builder.add(event)
        return builder.reply()

    def decoder(self, quirks: Quirks) -> StreamDecoder:
        """See Codec."""
        return ResponsesDecoder(quirks.family or self.name)

    def failure(self, status: int, headers: Mapping[str, str], body: bytes) -> Failure:
        """See Codec."""
        return failure_of(status, headers, told_in(body))
