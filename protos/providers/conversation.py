"""A conversation as formats want it that know users and assistants who take turns: shared by their codecs.

Neighbouring messages of one who speaks become one turn, results of tools stand before what the user says, texts that
are blank are no blocks, ids of calls are made such as the format takes. It knows no format's blocks.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from diptych.protos.errors import InvalidRequest
from diptych.protos.messages import Message, ProviderData, Reasoning, ToolCall
from diptych.protos.openai import ChatRequest

from .codec import JsonObject, Note
from .quirks import Quirks
from .request_fields import unsupported

# A proof is base64. The signatures of answers that were made here are not: they prove nothing to anybody else.
_PROOF = re.compile(r"[A-Za-z0-9+/_=-]+")


@dataclass(slots=True)
class Said:
    """One message's blocks; `results` of tools apart."""

    role: Literal["user", "assistant"]
    blocks: list[JsonObject] = field(default_factory=list)
    results: list[JsonObject] = field(default_factory=list)


def turns(said: Iterable[Said]) -> list[JsonObject]:
    """Messages with role and content; those without a block are none."""
    merged: list[Said] = []
    for message in said:
        if not message.blocks and not message.results:
            continue
        if merged and merged[-1].role == message.role:
            merged[-1].blocks += message.blocks
            merged[-1].results += message.results
        else:
            merged.append(Said(message.role, list(message.blocks), list(message.results)))
    return [{"role": turn.role, "content": turn.results + turn.blocks} for turn in merged]


class Blocks:
    """The blocks of one message in the making. `of_text` makes a format's block of a text. With `keeps` texts stay the
    blocks that they were, as an answer's must, of which its maker said where they end.
    """

    def __init__(self, of_text: Callable[[str], JsonObject], *, keeps: bool = False) -> None:
        self._of_text = of_text
        self._keeps = keeps
        self._found: list[JsonObject] = []
        self._text = ""

    def text(self, text: str, extra: Mapping[str, Any] | None = None) -> None:
        """Words; those with `extra` fields are a block of their own, others are one with their neighbours."""
        if extra or (self._keeps and text.strip() and self._text.strip()):
            self._flush({})
        self._text += text
        if extra:
            self._flush(extra)

    def add(self, *blocks: JsonObject) -> None:
        """Blocks of other kinds."""
        if blocks:
            self._flush({})
            self._found += blocks

    def done(self) -> list[JsonObject]:
        """All of them. Formats refuse texts without a letter, so there are none."""
        self._flush({})
        return self._found

    def _flush(self, extra: Mapping[str, Any]) -> None:
        text, self._text = self._text, ""
        if text.strip():
            self._found.append({**self._of_text(text), **extra})


class CallIds:
    """The ids of a conversation's calls as a format takes them: of the right letters, and no two the same."""

    def __init__(self, allowed: re.Pattern[str], most_chars: int) -> None:
        self._allowed = allowed
        self._most = most_chars
        self._latest: dict[str, str] = {}
        self._used: set[str] = set()
        self.renamed = 0

    def of_call(self, call_id: str) -> str:
        """The id of a call that begins here."""
        found = call_id
        if len(call_id) > self._most or not self._allowed.fullmatch(call_id):
            found = "call_" + hashlib.sha256(call_id.encode("utf-8", "replace")).hexdigest()[:24]
        base, number = found, 1
        while found in self._used:
            number += 1
            ending = f"_{number}"
            found = base[: self._most - len(ending)] + ending
        self.renamed += found != call_id
        self._used.add(found)
        self._latest[call_id] = found
        return found

    def of_result(self, call_id: str) -> str:
        """The id of the latest call that had `call_id`."""
        return self._latest.get(call_id, call_id)

    def notes(self) -> list[Note]:
        """What was renamed."""
        told = f"{self.renamed} that this format does not take have others, with their results"
        return [Note("renamed", "messages[].tool_calls[].id", told)] if self.renamed else []


def input_of(call: ToolCall) -> JsonObject:
    """A call's arguments as the object that formats demand; a text that is no JSON, as of a call that was cut off,
    stands in it under the name that Anthropic's documentation has for that.
    """
    if call.arguments or not call.text.strip():
        return call.arguments
    try:
        is_object = isinstance(json.loads(call.text), dict)
    except (ValueError, RecursionError):
        is_object = False
    return call.arguments if is_object else {"INVALID_JSON": call.text}


def own_data(data: ProviderData, family: str) -> Mapping[str, Any]:
    """What this provider, or one of its family, said of a part; what others said stays here."""
    return data.get(family, {})


def own_blocks(data: ProviderData, family: str) -> list[JsonObject]:
    """Blocks of kinds that no part can say, which came behind a part (or first) and go back there."""
    found = own_data(data, family).get("blocks", [])
    return [dict(block) for block in found if isinstance(block, Mapping)] if isinstance(found, list | tuple) else []


def goes_back(part: Reasoning, family: str, quirks: Quirks, *, needs_proof: bool) -> bool:
    """Whether the provider wants this reasoning, or would refuse it. What is signed goes back to where it came from, as
    far as can be told; what is not, where the provider takes that, and the model does not want a proof of it.
    """
    if part.provider_data and family not in part.provider_data:
        return False
    proof = part.text if part.is_redacted else part.signature
    if proof:
        return _PROOF.fullmatch(proof) is not None
    return bool(part.text) and not needs_proof and quirks.replay_reasoning != "strip"


def begun(request: ChatRequest, *, can: bool, format_name: str) -> tuple[ChatRequest, list[Note]]:
    """A request whose conversation can be answered: the last message is a user's, or one that is gone on with, where
    that `can` be, and left out, with a note, where it cannot. Raises InvalidRequest.
    """
    messages = request.messages
    last, path = messages[-1], f"messages[{len(messages) - 1}]"
    if last.role != "assistant":
        return request, []
    if not request.template.continue_final:
        told = f"is the assistant's, and the last: {format_name} answers a user. End with a user's message"
        told += ", or send continue_final_message: true to have it gone on with" if can else ""
        if last.tool_calls:
            told = "ends the conversation with calls: send their results behind it"
        raise InvalidRequest(f"{path} {told}", path)
    if can:
        return request, []
    told = "this model begins its answers itself: what the last message begins is not sent"
    left = request.model_copy(update={"messages": messages[:-1]})
    return left, [unsupported("continue_final_message", told)]


def earlier_calls(messages: Sequence[Message]) -> list[ToolCall]:
    """The first call of each function, in the order of the conversation."""
    found: dict[str, ToolCall] = {}
    for message in messages:
        for call in message.tool_calls:
            found.setdefault(call.name, call)
    return list(found.values())
