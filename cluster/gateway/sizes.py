"""How many tokens a request has, where nobody has counted them: for reserving and limits, before it is sent.

From the bytes of its texts. A byte-level vocabulary never makes more tokens than bytes; in practice a token has four
bytes of English, three of code or Chinese, seldom less than two. What is sent is settled by what the provider counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from diptych.protos.messages import Media, Part, Reasoning, Refusal, Text, ToolCall, ToolResult
from diptych.protos.openai import ChatRequest
from diptych.protos.wire_checks import compact

TURN_TOKENS: Final = 8  # for the markers around a turn
IMAGE_TOKENS: Final = 1600  # of one of 1.15 megapixels at Anthropic, more than OpenAI and Gemini count for it
AUDIO_BYTES_PER_TOKEN: Final = 160  # of base64; ten tokens are a second of telephone quality, of others it is less
FILE_BYTES_PER_TOKEN: Final = 8
USUAL_BYTES: Final = 4  # of a token
LEAST_BYTES: Final = 2
_LONG: Final = "1h"


@dataclass(frozen=True, slots=True)
class Size:
    """Of a request's prompt: bytes of text, and tokens of what is no text. `is_kept_long`: it asks a provider's cache
    to keep some of it for an hour, which costs more.
    """

    text_bytes: int
    other_tokens: int
    is_kept_long: bool = False

    @property
    def usual_tokens(self) -> int:
        """What it probably has."""
        return -(-self.text_bytes // USUAL_BYTES) + self.other_tokens

    @property
    def most_tokens(self) -> int:
        """What it has at most, but for texts in writing that the model hardly knows."""
        return -(-self.text_bytes // LEAST_BYTES) + self.other_tokens


def size_of(request: ChatRequest) -> Size:
    """Of the prompt."""
    text_bytes, other = 0, 0
    for message in request.messages:
        other += TURN_TOKENS
        for part in message.parts:
            more = _of_part(part)
            text_bytes += more.text_bytes
            other += more.other_tokens
    if request.tool_use is not None:
        text_bytes += len(compact([tool.told() for tool in request.tool_use.tools]))
    if request.output_form is not None and isinstance(request.output_form.value, str):
        text_bytes += len(request.output_form.value)
    return Size(text_bytes, other, _is_kept_long(request))


def answer_tokens(text_chars: int) -> int:
    """Of a part of an answer that nobody counted."""
    return -(-text_chars // USUAL_BYTES)


def _is_kept_long(request: ChatRequest) -> bool:
    marked: list[object] = [part for message in request.messages for part in message.parts]
    if request.tool_use is not None:
        marked += request.tool_use.tools
    if any(getattr(one, "kept", "") == _LONG for one in marked):
        return True
    options = [given.get("cache_control") for given in request.provider_options.values()]
    return any(isinstance(one, Mapping) and one.get("ttl") == _LONG for one in options)


def _of_part(part: Part) -> Size:
    match part:
        case Text(text=text) | Refusal(text=text) | Reasoning(text=text):
            return Size(_bytes(text), 0)
        case ToolCall():
            return Size(_bytes(part.name) + _bytes(part.text), TURN_TOKENS)
        case ToolResult():
            inner = [_of_part(one) for one in part.parts]
            return Size(sum(one.text_bytes for one in inner), sum(one.other_tokens for one in inner))
        case Media(kind="image"):
            return Size(0, IMAGE_TOKENS)
        case Media(kind="audio"):
            return Size(0, len(part.data) // AUDIO_BYTES_PER_TOKEN)
        case Media():
            return Size(0, max(len(part.data) // FILE_BYTES_PER_TOKEN, IMAGE_TOKENS))


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))
