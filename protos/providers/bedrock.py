"""The codec bedrock.converse: Amazon Bedrock's Converse and ConverseStream, for the models of all makers there.

Found by codecs.by_name. Requests: bedrock_requests.py; answers and streams: bedrock_stream.py, whose framing is
aws_stream.py. The base URL is the region's (https://bedrock-runtime.us-east-1.amazonaws.com); who signs, signs the path
as it stands.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from diptych.protos.failures import Failure, ProviderFailure
from diptych.protos.openai import ChatRequest
from diptych.protos.replies import Began, Reply, ReplyBuilder

from .bedrock_failures import broken, read_error, read_failure
from .bedrock_requests import Encoding
from .bedrock_stream import BlockEvents, ConverseDecoder, check_end, ends_of
from .codec import JsonObject, Outgoing
from .quirks import Quirks


class ConverseCodec:
    """See codec.Codec."""

    name = "bedrock.converse"
    framing: Literal["sse", "aws"] = "aws"

    def encode(self, request: ChatRequest, *, model: str, stream: bool, quirks: Quirks) -> Outgoing:
        """Raises InvalidRequest."""
        return Encoding(request, model, quirks, self.name).outgoing(stream=stream)

    def reply(self, body: JsonObject, quirks: Quirks) -> Reply:
        """Raises ProviderFailure."""
        output = body.get("output")
        message = output.get("message") if isinstance(output, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, list):
            if "message" in body or "__type" in body:
                raise ProviderFailure(read_error(str(body.get("__type", "")), body))
            raise broken("it holds no content")
        check_end(body)
        family = quirks.family or self.name
        builder, blocks = ReplyBuilder(), BlockEvents(family)
        builder.add(Began())
        for block in content:
            if not isinstance(block, dict):
                raise broken("its content holds what is no block")
            for event in blocks.whole(block):
                builder.add(event)
        for event in ends_of(body, family, has_calls=blocks.num_calls > 0):
            builder.add(event)
        return builder.reply()

    def decoder(self, quirks: Quirks) -> ConverseDecoder:
        """For one stream."""
        return ConverseDecoder(quirks.family or self.name)

    def failure(self, status: int, headers: Mapping[str, str], body: bytes) -> Failure:
        """Never raises."""
        return read_failure(status, headers, body)
