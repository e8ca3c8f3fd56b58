"""The codec gemini.generate: Google's generateContent, at AI Studio and at Vertex.

Found by codecs.by_name. Requests are made by gemini_contents.py and gemini_generation.py, answers read by
gemini_stream.py. Auth and the project's folder before the path are known elsewhere.
Format: ai.google.dev/api/generate-content and the types of google-genai 3.4, read 2026-11-23.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

from diptych.protos.errors import InvalidRequest
from diptych.protos.failures import Failure, FailureKind, ProviderFailure
from diptych.protos.openai import ChatRequest
from diptych.protos.replies import Reply, ReplyBuilder

from .codec import JsonObject, Outgoing, StreamDecoder
from .conversation import begun
from .gemini_contents import write_messages
from .gemini_failures import read_failure
from .gemini_generation import FIELDS, write_generation, write_tools
from .gemini_models import generation, path
from .gemini_stream import GenerateDecoder
from .quirks import Quirks
from .request_fields import Frame, finished

_FIXED: Final = frozenset({"model", "contents", "systemInstruction", "system_instruction", "stream"})
_SAID_AS: Final = {f"generationConfig.{theirs}": name for name, theirs in FIELDS.items()} | {
    "generationConfig.stopSequences": "stop",
    "generationConfig.maxOutputTokens": "max_tokens",
    "generationConfig.thinkingConfig": "reasoning_effort",
    "generationConfig.responseSchema": "response_format",
    "generationConfig.responseJsonSchema": "response_format",
    "generationConfig.responseMimeType": "response_format",
    "toolConfig": "tool_choice",
}


class GenerateCodec:
    """See Codec."""

    name: str = "gemini.generate"
    framing: Literal["sse", "aws"] = "sse"

    def encode(self, request: ChatRequest, *, model: str, stream: bool, quirks: Quirks) -> Outgoing:
        """See Codec."""
        family = quirks.family or self.name
        rules = generation(model)
        asked, notes = begun(request, can=quirks.prefill, format_name="Gemini")
        said = write_messages(asked.messages, rules, quirks, family)
        config, of_config = write_generation(request, rules, quirks)
        tools, of_tools = write_tools(request, rules, quirks)
        body: JsonObject = {"contents": said.contents}
        if said.system:
            body["systemInstruction"] = {"parts": said.system}
        body |= tools
        if config:
            body["generationConfig"] = config
        body, more = finished(body, request, quirks, Frame(family=family, fixed=_FIXED, said_as=_SAID_AS))
        _check_pieces(body, family)
        every = (*notes, *said.notes, *of_config, *of_tools, *more)
        return Outgoing(path=path(model, stream=stream), body=body, headers=dict(quirks.headers), notes=every)

    def reply(self, body: JsonObject, quirks: Quirks) -> Reply:
        """See Codec."""
        decoder = GenerateDecoder(quirks.family or self.name)
        builder = ReplyBuilder()
        for event in decoder.read(body):
            builder.add(event)
        if not body.get("candidates"):
            words = "the provider's answer holds no candidate"
            raise ProviderFailure(Failure(kind=FailureKind.SERVER, message=words))
        for event in decoder.finish():
            builder.add(event)
        return builder.reply()

    def decoder(self, quirks: Quirks) -> StreamDecoder:
        """See Codec."""
        return GenerateDecoder(quirks.family or self.name)

    def failure(self, status: int, headers: Mapping[str, str], body: bytes) -> Failure:
        """See Codec."""
        return read_failure(status, headers, body)


def _check_pieces(body: JsonObject, family: str) -> None:
    """Arguments of calls are read whole: a part of them is no JSON."""
    config = body.get("toolConfig")
    inner = config.get("functionCallingConfig") if isinstance(config, dict) else None
    if isinstance(inner, dict) and inner.get("streamFunctionCallArguments"):
        place = f"provider_options.{family}.toolConfig.functionCallingConfig.streamFunctionCallArguments"
        raise InvalidRequest(f"{place}: arguments of calls are read whole: leave it out", place)
