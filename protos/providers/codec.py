"""What every codec towards a provider can do: a request out, an answer, a stream or an error in. Pure: no IO, no clock.

openai_chat.py, openai_responses.py, anthropic.py, gemini.py and bedrock.py are the codecs; `by_name` finds one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from diptych.protos.failures import Failure
from diptych.protos.openai import ChatRequest
from diptych.protos.replies import Event, Reply

from .quirks import Quirks

JsonObject = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Note:
    """A change that an encoding made to what the client asked for.

    kind         renamed: sent under another name; moved: said in another place or way; adapted: a schema in the
                 provider's dialect; unsupported: the provider has no such thing, and it is not sent; omitted: the
                 same of what is no instruction to the model, so that the answer is none the worse for it
    field        the path in the canonical request, as its reader names it in errors (`seed`, `tools[0].parameters`)
    words        to what, or why; a phrase
    """

    kind: Literal["renamed", "moved", "adapted", "unsupported", "omitted"]
    field: str
    words: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """A request to send with POST. `path` is appended to the provider's base URL. An encoding with notes of the kind
    `unsupported` may only be sent where the caller's policy says so.
    """

    path: str
    body: JsonObject
    headers: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[Note, ...] = ()

    @property
    def unsupported(self) -> tuple[Note, ...]:
        """What the provider would never learn."""
        return tuple(note for note in self.notes if note.kind == "unsupported")


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """One event of a text/event-stream: its data lines joined, its `event` field or empty. Of Bedrock's binary stream:
    the payload, and its `:event-type` or `:exception-type`.
    """

    data: str
    event: str = ""


class StreamDecoder(Protocol):
    """One stream's state. Events come in the order of replies.py: Began first, Ended last, Usage before Ended."""

    def feed(self, event: ServerEvent) -> list[Event]:
        """What the event says. Raises ProviderFailure for an error that came as an event, and for an event that breaks
        the answer; one that cannot be read at all and need not be is counted in `skipped`.
        """

    def finish(self) -> list[Event]:
        """What the stream's end settles. Raises ProviderFailure (SERVER) where the answer had not ended."""

    skipped: int


class Codec(Protocol):
    """A provider's wire format."""

    name: str
    framing: Literal["sse", "aws"]

    def encode(self, request: ChatRequest, *, model: str, stream: bool, quirks: Quirks) -> Outgoing:
        """`request` for the provider's `model`. Raises InvalidRequest that names the field for what the format cannot
        say at all (a message that it has no words for), never for a parameter, which becomes a note.
        """

    def reply(self, body: JsonObject, quirks: Quirks) -> Reply:
        """A whole answer. Raises ProviderFailure: an error inside a 200, an answer that is none."""

    def decoder(self, quirks: Quirks) -> StreamDecoder:
        """For one stream."""

    def failure(self, status: int, headers: Mapping[str, str], body: bytes) -> Failure:
        """What an answer with an error status says; `headers` in lower case. Never raises, whatever the body holds."""
