"""A conversation as every floor and every wire format knows it: who said what, in parts.

The readers of wire formats make these (openai_messages.py, responses_items.py, anthropic_messages.py); chat templates
and providers' wire formats are written from them. They say nothing of what a model can read: cluster/api asks for that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# By provider: what it said of a part that the part's fields cannot say, and wants back with it as it came.
ProviderData = Mapping[str, Mapping[str, Any]]

Role = Literal["system", "developer", "user", "assistant", "tool"]
Kind = Literal["image", "audio", "file"]
# How long the client asks a provider to keep the prompt up to the end of a part; empty: it does not ask. Own pools keep
# every prompt's beginning.
Kept = Literal["", "5m", "1h"]


@dataclass(frozen=True, slots=True)
class Text:
    """Words."""

    text: str
    provider_data: ProviderData = field(default_factory=dict)
    kept: Kept = ""


@dataclass(frozen=True, slots=True)
class Refusal:
    """What an assistant said in place of an answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """What an assistant thought before it answered. `signature`: its maker's proof, given back as it came; with
    `is_redacted` the text is such a proof, too, and nobody but its maker can read it.
    """

    text: str
    signature: str = ""
    is_redacted: bool = False
    provider_data: ProviderData = field(default_factory=dict)
    path: str = field(default="", compare=False)  # the place in the request, where an error may name it


@dataclass(frozen=True, slots=True, kw_only=True)
class Media:
    """An image, a sound or a file: one of `data` (base64, as it came), `url`, `file_id` (of /v1/files).

    `path` is the place in the request, for errors. `detail` is a wish about an image's resolution.
    """

    kind: Kind
    path: str = field(compare=False)
    media_type: str = ""
    data: str = field(default="", repr=False)
    url: str = ""
    file_id: str = ""
    name: str = ""
    detail: str = ""
    kept: Kept = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call that an assistant made. `arguments` is what `text`, the client's JSON, holds."""

    id: str
    name: str
    arguments: dict[str, Any]
    text: str
    provider_data: ProviderData = field(default_factory=dict)
    kept: Kept = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolResult:
    """What came of the call `call_id`; `name` is the function's."""

    call_id: str
    name: str
    parts: tuple[Text | Media, ...]
    is_error: bool = False
    kept: Kept = ""


Part = Text | Refusal | Reasoning | Media | ToolCall | ToolResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn. A tool's holds one ToolResult and nothing else. `name` is a participant's."""

    role: Role
    parts: tuple[Part, ...]
    name: str | None = None
    provider_data: ProviderData = field(default_factory=dict)

    @property
    def content(self) -> str:
        """The joined words, a refusal's and a result's included; empty where an assistant only called functions."""
        texts = []
        for part in self.parts:
            if isinstance(part, Text | Refusal):
                texts.append(part.text)
            elif isinstance(part, ToolResult):
                texts += [inner.text for inner in part.parts if isinstance(inner, Text)]
        return "".join(texts)

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The calls, in their order."""
        return tuple(part for part in self.parts if isinstance(part, ToolCall))

    @property
    def result(self) -> ToolResult | None:
        """A tool's."""
        for part in self.parts:
            if isinstance(part, ToolResult):
                return part
        return None

    @property
    def reasoning_content(self) -> str | None:
        """The joined reasoning that can be read; None where there is none at all."""
        found = [part.text for part in self.parts if isinstance(part, Reasoning) and not part.is_redacted]
        return "".join(found) if found else None

    @property
    def refusal(self) -> str | None:
        """The joined refusals; None where there is none."""
        found = [part.text for part in self.parts if isinstance(part, Refusal)]
        return "".join(found) if found else None

    @property
    def media(self) -> tuple[Media, ...]:
        """All parts that are no words, a result's included."""
        result = self.result
        parts: tuple[Part, ...] = self.parts if result is None else result.parts
        return tuple([part for part in parts if isinstance(part, Media)])


def said(role: Role, text: str) -> Message:
    """A turn of words alone."""
    return Message(role=role, parts=(Text(text),))
