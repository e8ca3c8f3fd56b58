"""What an answer says, piece by piece, in its order: of an engine's text, of a provider's stream.

Parsers and decoders make them, wire formats are written from them. They know neither formats nor wire shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the reader of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """Text that says why there is no answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text of the model's reasoning, without its markers."""

    text: str


@dataclass(frozen=True, slots=True)
class Signature:
    """The maker's proof of the reasoning before it, which is over with it. `is_redacted`: there was none to read, and
    the proof is all there is.
    """

    signature: str
    is_redacted: bool = False


@dataclass(frozen=True, slots=True)
class CallBegin:
    """Call `index` (from 0) of the answer begins; it is a call of the tool `name`. `id` as a provider gave it; empty:
    who tells the client of the call makes one.
    """

    index: int
    name: str
    id: str = ""


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next piece of the JSON text of a call's arguments, as the model wrote it; it need not be valid JSON."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """No more comes of call `index`. Each CallBegin has exactly one, and no call lies inside another."""

    index: int


@dataclass(frozen=True, slots=True)
class Extras:
    """What `provider` said of the part before it that no other delta can say, and wants back with it; before any part,
    of the whole message. The part is over with it, also where there is nothing in `data`.
    """

    provider: str
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Logprobs:
    """How likely tokens were, in OpenAI's shape: `content` has an entry (token, logprob, bytes, top_logprobs) for each
    token of what comes next, as choices[].logprobs.content has them. `prompt` has those of the prompt's tokens as
    vLLM's prompt_logprobs has them, once and before everything else, where they were asked for.
    """

    content: Sequence[dict[str, Any]] = ()
    prompt: Sequence[dict[str, Any] | None] | None = None


@dataclass(frozen=True, slots=True)
class Structured:
    """Which parts of the JSON that the contents say are complete now, told behind the content that completed them:
    events of closed_paths.py. It adds nothing to the answer. Of a Diptych cluster that was asked for it, alone.
    """

    parts: Sequence[dict[str, Any]]


Delta = Content | Refusal | Reasoning | Signature | CallBegin | CallArguments | CallEnd | Extras | Logprobs | Structured
