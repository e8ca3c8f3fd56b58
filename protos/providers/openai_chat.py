"""The codec `openai.chat`: OpenAI's Chat Completions, which nearly every provider speaks, each with an accent (quirks).

Found by codecs.py. Bodies that come in this format and leave in it need no codec: openai_relay.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from diptych.protos.failures import Failure, FailureKind, ProviderFailure
from diptych.protos.openai import ChatRequest
from diptych.protos.replies import Reply, ReplyBuilder

from .codec import JsonObject, Outgoing
from .error_bodies import told_in
from .failure_words import failure_of
from .openai_chat_requests import encode
from .openai_chat_stream import ChatDecoder
from .quirks import Quirks


class ChatCodec:
    """See codec.Codec."""

    name = "openai.chat"
    framing: Literal["sse", "aws"] = "sse"

    def encode(self, request: ChatRequest, *, model: str, stream: bool, quirks: Quirks) -> Outgoing:
        """For POST BASE/chat/completions. Raises InvalidRequest."""
        return encode(request, model=model, stream=stream, quirks=quirks)

    def reply(self, body: JsonObject, quirks: Quirks) -> Reply:
        """Of a whole answer. Raises ProviderFailure. One that does not say why it ends has ended."""
        decoder, builder = ChatDecoder(quirks), ReplyBuilder()
        events = decoder.read(body)
        choices = body.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        if not isinstance(choice, dict) or not isinstance(choice.get("message"), dict):
            words = "the provider's answer has no choice with a message"
            raise ProviderFailure(Failure(kind=FailureKind.SERVER, message=words))
        if not choice.get("finish_reason"):
            events += decoder.read({"choices": [{"finish_reason": "stop"}]})
        for event in [*events, *decoder.finish()]:
            builder.add(event)
        return builder.reply()

    def decoder(self, quirks: Quirks) -> ChatDecoder:
        """For one stream."""
        return ChatDecoder(quirks)

    def failure(self, status: int, headers: Mapping[str, str], body: bytes) -> Failure:
        """Of an answer with an error status. Never raises."""
        return failure_of(status, headers, told_in(body))
