"""Bodies that come in OpenAI's chat format and leave in it: rewritten where a provider's quirks ask for it, and their
answers' streams looked at in passing, byte for byte as they are.

The gateway asks `can_relay` first; where that says no, the codec encodes anew. Knows nothing of connections.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

from diptych.protos.failures import Failure, FailureKind, ProviderFailure
from diptych.protos.replies import Usage

from .codec import JsonObject, Note, Outgoing
from .error_bodies import told_by
from .event_stream import MAX_EVENT_BYTES
from .failure_words import failure_of
from .openai_chat_requests import EXTENSIONS, FIXED, PATH
from .openai_chat_stream import BROKEN, REASONING_FIELDS
from .openai_chat_usage import read_usage
from .quirks import Quirks
from .request_fields import Frame, unsupported, with_options

# Said to this server, and done by it.
_OURS = frozenset(
    "explain first_token_timeout_s include_reasoning metadata priority provider_options schema_in_prompt structured "
    "timeout_s add_generation_prompt guided_decoding_backend guided_whitespace_pattern".split()
)
# Known here, and to providers only where `quirks.rename` names them.
_EXTENSIONS = frozenset(EXTENSIONS) | frozenset(
    "prompt_logprobs reasoning_budget guided_json guided_regex guided_choice guided_grammar structured_outputs "
    "chat_template_kwargs continue_final_message".split()
)
# Of these the codec says more than their names.
_CHANGED = ("structured_outputs", "guided_json", "continue_final_message", "chat_template_kwargs")
# What clients send back with a message for whom it concerns: one provider's extras are not for another to read.
_KEPT_HERE = ("provider_specific_fields", "parsed")
_EMPTY: tuple[object, ...] = (None, [], {}, "")
_WHOLE = (b"}\n\n", b"}\r\n\r\n", b"}\r\r")  # how an event ends that is not cut off within its JSON
# One line end is one, even where it could be read as two.
_BOUNDARY = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)")


def can_relay(fields: Mapping[str, Any], quirks: Quirks) -> bool:
    """Whether the client's body needs no more for this provider than other names of fields, or fewer, or more."""
    if fields.get("n") not in (None, 1) or fields.get("functions") or fields.get("function_call"):
        return False
    if any(fields.get(name) not in _EMPTY for name in _CHANGED if name not in quirks.rename):
        return False
    if fields.get("include_reasoning") is False or fields.get("structured") or fields.get("explain"):
        return False
    if fields.get("add_generation_prompt") is False:  # which no provider can be told: the codec says so
        return False
    stop = fields.get("stop")
    if isinstance(stop, list) and len(stop) > (4 if quirks.most_stops is None else quirks.most_stops):
        return False
    if fields.get("reasoning_effort") is not None and (
        quirks.effort_field != "reasoning_effort" or quirks.effort_values
    ):
        return False
    form = fields.get("response_format")
    is_schema = isinstance(form, dict) and form.get("type") == "json_schema"
    if is_schema and quirks.schema_dialect not in ("openai_strict", "openai"):
        return False
    if any("." in name and name.partition(".")[0] in fields for name in quirks.unsupported):
        return False
    if not _can_choose(fields, quirks):
        return False
    messages = fields.get("messages")
    return isinstance(messages, list) and all(_can_say(message, quirks) for message in messages)


def _can_choose(fields: Mapping[str, Any], quirks: Quirks) -> bool:
    choice = fields.get("tool_choice")
    if isinstance(choice, dict):
        return quirks.tool_choice in ("all", "no_required") and choice.get("type") == "function"
    if choice == "required":
        return quirks.tool_choice in ("all", "no_named")
    if choice == "none":
        return quirks.tool_choice != "auto_only"
    return quirks.parallel_tools or fields.get("parallel_tool_calls") in (None, True)


def _can_say(message: object, quirks: Quirks) -> bool:
    if not isinstance(message, dict):
        return False
    role, content = message.get("role"), message.get("content")
    if role == "function" or (role in ("system", "developer") and quirks.system_role == "first_user"):
        return False
    if any(message.get(name) for name in ("name", "refusal") if name in quirks.unsupported):
        return False
    if any(message.get(name) for name in _KEPT_HERE):
        return False
    if role == "assistant":
        has_reasoning = any(message.get(name) for name in REASONING_FIELDS)
        is_other = any(message.get(name) for name in REASONING_FIELDS if name != quirks.reasoning_field)
        if is_other and quirks.replay_reasoning != "strip":
            return False
        if (not has_reasoning and quirks.replay_reasoning == "required") or message.get("function_call"):
            return False
    if not isinstance(content, list):
        return True
    kinds = {str(part.get("type")) for part in content if isinstance(part, dict)}
    named = {"image_url": "image", "input_audio": "audio", "file": "file"}
    media = {named[kind] for kind in kinds & named.keys()}
    is_held_here = any(isinstance(part, dict) and "file_id" in (part.get("file") or ()) for part in content)
    return not quirks.flattens_content and media <= quirks.media and not is_held_here


def relay(fields: Mapping[str, Any], *, model: str, stream: bool, quirks: Quirks) -> Outgoing:
    """The body of a client's chat request, checked by protos/openai.py and parsed, for this provider; `fields` stay as
    they are. Where `stream_options` of it asks for usage and the client did not, an observer with `drops_usage` takes
    the chunk out. Raises InvalidRequest for provider_options that may not be set.
    """
    messages, notes = _messages(fields["messages"], quirks)
    body: JsonObject = {"model": model, "messages": messages}
    for name, value in fields.items():
        if name in FIXED or name in _OURS or name == "stream_options" or value is None:
            continue
        if name in quirks.unsupported:
            notes.append(unsupported(name, "the provider does not take it"))
        elif name in _EXTENSIONS and name not in quirks.rename:
            if value not in (*EXTENSIONS.get(name, ()), *_EMPTY):
                notes.append(unsupported(name, "this provider's format has no such field"))
        else:
            _put(body, name, value, quirks, notes)
    if "max_tokens" not in body and "max_completion_tokens" not in body and quirks.default_max_tokens is not None:
        _put(body, "max_completion_tokens", quirks.default_max_tokens, quirks, [])
    if stream:
        body["stream"] = True
        if quirks.stream_usage:
            body["stream_options"] = {"include_usage": True}
    family = quirks.family or "openai.chat"
    options = fields.get("provider_options") or {}
    body, more = with_options(body, options, quirks, Frame(family=family, fixed=FIXED))
    return Outgoing(path=PATH, body=body, headers=dict(quirks.headers), notes=(*notes, *more))


def _messages(messages: list[JsonObject], quirks: Quirks) -> tuple[list[JsonObject], list[Note]]:
    notes: list[Note] = []
    found = []
    for i, message in enumerate(messages):
        changed = message
        if message["role"] == "developer" and quirks.system_role == "system":
            changed = message | {"role": "system"}
            notes.append(Note("renamed", f"messages[{i}].role", "system"))
        elif quirks.replay_reasoning == "strip" and any(name in message for name in REASONING_FIELDS):
            changed = {name: value for name, value in message.items() if name not in REASONING_FIELDS}
        found.append(changed)
    return found, notes


def wants_usage(fields: Mapping[str, Any]) -> bool:
    """Whether the client's body asks for the chunk with token counts."""
    options = fields.get("stream_options")
    return isinstance(options, dict) and options.get("include_usage") is True


def _put(body: JsonObject, name: str, value: object, quirks: Quirks, notes: list[Note]) -> None:
    # The old name of the limit is what some providers alone know, and others no more.
    wire = "max_completion_tokens" if name == "max_tokens" else name
    other = quirks.rename.get(wire, wire)
    if wire in quirks.unsupported:
        notes.append(unsupported(name, "the provider does not take it"))
        return
    body[other] = value
    if other != name:
        notes.append(Note("renamed", name, other))


class RelayObserver:
    """What a relayed stream tells, found without reading most of it.

    has_content     something was said: from here on the client has seen a part of the answer
    usage           token counts as far as they were told
    finish          the provider's word for why the answer ended; empty: not told yet
    is_done         the stream said that it is over
    num_events      of them, usage and end included
    failure         an error that came as an event, or an event of more than 4 MiB
    skipped         events before the first content that are no JSON, and are not passed on
    """

    def __init__(self, *, drops_usage: bool, rewrite: Callable[[bytes], bytes] | None = None) -> None:
        """`rewrite` gives what is passed on in place of an event, which may be nothing."""
        self.has_content = False
        self.usage = Usage()
        self.finish = ""
        self.is_done = False
        self.failure: ProviderFailure | None = None
        self.num_events = 0
        self.skipped = 0
        self._drops_usage = drops_usage
        self._rewrite = rewrite
        self._rest = bytearray()

    def feed(self, piece: bytes) -> bytes:
        """What of the stream may be passed on now: whole events, as they came, up to one that makes a `failure`, which
        is not passed on, and nothing behind it.
        """
        if self.failure is not None:
            return b""
        blocks = self._blocks(piece)
        passed: list[bytes] = []
        try:
            for block in blocks:
                if self._sees(block):
                    passed.append(block if self._rewrite is None else self._rewrite(block))
            if len(self._rest) > MAX_EVENT_BYTES:
                raise _failed(f"the answer's stream holds an event of more than {MAX_EVENT_BYTES >> 20} MiB")
        except ProviderFailure as exc:
            self.failure = exc
        return passed[0] if len(passed) == 1 else b"".join(passed)

    def _blocks(self, piece: bytes) -> list[bytes]:
        """The events that are complete with `piece`."""
        if not self._rest and piece.endswith(b"\n\n") and piece.find(b"\n\n") == len(piece) - 2 and b"\r" not in piece:
            return [piece]
        begin = max(0, len(self._rest) - 3)
        self._rest += piece
        ends = [0]
        for boundary in _BOUNDARY.finditer(self._rest, begin):
            if boundary[0] != b"\r\n\r" or boundary.end() < len(self._rest):  # else the last byte of it is to come
                ends.append(boundary.end())
        blocks = [bytes(self._rest[a:b]) for a, b in pairwise(ends)]
        del self._rest[: ends[-1]]
        return blocks

    def end(self) -> None:
        """The stream is over. Raises its `failure`, and ProviderFailure (SERVER) where the answer had not ended."""
        if self.failure is not None:
            raise self.failure
        if not self.finish:
            said = "broke off" if self.has_content else "ended before it said anything"
            raise _failed(f"the provider's stream {said}: it never told why the answer ends")

    def _sees(self, block: bytes) -> bool:
        """Whether the client shall see it, too."""
        if self.has_content and not _is_worth_a_look(block):
            self.num_events += 1
            return True
        name, data = _event(block)
        if not data:
            return True
        self.num_events += 1
        if data == b"[DONE]":
            self.is_done = True
            return True
        try:
            chunk = json.loads(data)
        except (ValueError, RecursionError):
            self.skipped += 1
            return False
        return not isinstance(chunk, dict) or self._reads(chunk, name)

    def _reads(self, chunk: JsonObject, name: bytes) -> bool:
        if chunk.get("error") or name == b"error" or chunk.get("object") == "error":
            raise ProviderFailure(failure_of(0, {}, told_by(chunk)))
        choices = chunk.get("choices")
        choices = [choice for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []
        first: JsonObject = choices[0] if choices else {}
        if (usage := read_usage(chunk, first)) is not None:
            self.usage = self.usage.merged(usage)
        for choice in choices:
            self._reads_choice(choice)
        return not (self._drops_usage and not choices and usage is not None)

    def _reads_choice(self, choice: JsonObject) -> None:
        if isinstance(error := choice.get("error"), dict | str) and error:
            raise ProviderFailure(failure_of(0, {}, told_by({"error": error})))
        delta = choice.get("delta") or choice.get("message")
        if isinstance(delta, dict) and any(value for key, value in delta.items() if key != "role"):
            self.has_content = True
        native = choice.get("finish_reason")
        if isinstance(native, str) and native:
            if native.lower() in BROKEN:
                raise _failed(f"the provider broke the answer off and says no more than {native[:40]}")
            self.finish = native


def _is_worth_a_look(block: bytes) -> bool:
    """Once content was seen. Within texts of JSON these quotes would have a backslash before them."""
    if not block.endswith(_WHOLE):
        return True
    if b'"finish_reason":null' not in block and b'"finish_reason": null' not in block:
        return True
    if b'"usage"' in block and b'"usage":null' not in block and b'"usage": null' not in block:
        return True
    return b'"error"' in block or b'"x_groq"' in block or b"event:" in block


def _event(block: bytes) -> tuple[bytes, bytes]:
    """The name and the data of an event."""
    name, data = b"", []
    for line in block.splitlines():
        if line.startswith(b"data:"):
            data.append(line[5:].strip())
        elif line.startswith(b"event:"):
            name = line[6:].strip()
    return name, b"\n".join(data)


def _failed(words: str) -> ProviderFailure:
    return ProviderFailure(Failure(kind=FailureKind.SERVER, message=words))
