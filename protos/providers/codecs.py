"""The codecs by their names, as the providers' registry and diptych.yaml say them.

Each is loaded when it is first asked for, so that who speaks one format pays for one.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import cast

from .codec import Codec

_PLACES = {
    "openai.chat": ("openai_chat", "ChatCodec"),
    "openai.responses": ("openai_responses", "ResponsesCodec"),
    "anthropic.messages": ("anthropic", "MessagesCodec"),
    "gemini.generate": ("gemini", "GenerateCodec"),
    "bedrock.converse": ("bedrock", "ConverseCodec"),
}
CODECS = tuple(_PLACES)


@cache
def by_name(name: str) -> Codec:
    """The codec `name`, one of CODECS. Raises ValueError that names them all."""
    if name not in _PLACES:
        raise ValueError(f"there is no codec {name[:64]!r}; those that are: {', '.join(CODECS)}")
    module, cls = _PLACES[name]
    return cast("Codec", getattr(import_module(f"{__package__}.{module}"), cls)())
