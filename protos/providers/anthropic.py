"""The codec anthropic.messages: Anthropic's Messages API at Anthropic, Google's Vertex, and all who speak it.

Found by codecs.by_name. Requests: anthropic_requests.py; answers and streams: anthropic_stream.py. The base URL ends
with the API's version (https://api.anthropic.com/v1); a provider whose extra_body has an `anthropic_version` beginning
with `vertex-` is Google's, and its base URL ends with `publishers/anthropic/models`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from diptych.protos.failures import Failure, ProviderFailure
from diptych.protos.openai import ChatRequest
from diptych.protos.replies import Began, Reply, ReplyBuilder

from .anthropic_failures import broken, read_error, read_failure
from .anthropic_requests import Encoding
from .anthropic_stream import BlockEvents, MessagesDecoder, ends_of
from .codec import JsonObject, Outgoing
from .loose_values import object_in, text_in
from .quirks import Quirks


class MessagesCodec:
    """See codec.Codec."""

    name = "anthropic.messages"
    framing: Literal["sse", "aws"] = "sse"

    def encode(self, request: ChatRequest, *, model: str, stream: bool, quirks: Quirks) -> Outgoing:
        """Raises InvalidRequest."""
        return Encoding(request, model, quirks, self.name).outgoing(stream=stream)

    def reply(self, body: JsonObject, quirks: Quirks) -> Reply:
        """Raises ProviderFailure."""
        content = body.get("content")
        if body.get("type") == "error" or not isinstance(content, list):
            raise ProviderFailure(read_error(body)) if "error" in body else broken("it holds no content")
        family = quirks.family or self.name
        builder, blocks = ReplyBuilder(), BlockEvents(family)
        builder.add(Began(text_in(body.get("id")), text_in(body.get("model"))))
        for index, block in enumerate(content):
            if not isinstance(block, dict):
                raise broken("its content holds what is no block")
            for event in blocks.start(index, block) + blocks.stop():
                builder.add(event)
        counts = object_in(body.get("usage"))
        for event in ends_of(body, family, has_calls=blocks.num_calls > 0, usage=counts):
            builder.add(event)
        return builder.reply()

    def decoder(self, quirks: Quirks) -> MessagesDecoder:
        """For one stream."""
        return MessagesDecoder(quirks.family or self.name)

    def failure(self, status: int, headers: Mapping[str, str], body: bytes) -> Failure:
        """Never raises."""
        return read_failure(status, headers, body)
