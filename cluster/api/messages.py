"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's wire format over the same road as chat.

An answer is a list of content blocks. They are opened, filled and closed by events; a whole answer is made of the same
events, so that both forms say the same. Bodies: protos/anthropic_*.py; the list of models: model_list.py.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from starlette.types import Receive, Scope, Send

from diptych.protos import anthropic_replies as replies
from diptych.protos.anthropic_messages import MessagesRequest, in_our_words, parse_count, parse_messages, renamed
from diptych.protos.deltas import CallArguments, CallBegin, CallEnd, Content, Reasoning, Refusal, Signature
from diptych.protos.errors import DiptychError, InvalidRequest, UnknownModel
from diptych.protos.messages import Reasoning as ReasoningPart
from diptych.protos.openai import GenerationRequest
from diptych.protos.openai_replies import JsonObject
from diptych.protos.replies import Usage
from diptych.protos.strict_json import printable

from .answer import Choice, Piece
from .answering import countable
from .body import header
from .endpoint import AnswerView, ChoiceView, Whole
from .generation import INLINE_BODY_BYTES
from .logprobs import Entry
from .prepared import Prepared, prepare_chat
from .reading import Said
from .served import ServedModel
from .sse import comment
from .text import TokenTable

if TYPE_CHECKING:
    from .routed import RoutedModels

ANY_ROOM = 2**31 - 1  # what is only counted need not fit
_VERSION = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_TEXT, _THINKING, _REDACTED, _CALL = "text", "thinking", "redacted_thinking", "tool_use"

Application = Callable[[Scope, Receive, Send], Awaitable[None]]


class Blocks:
    """The content blocks of one answer as they begin, grow and end, in events. Providers' signatures stay.

    With `is_omitted` what was thought is not told, but that it was.
    """

    def __init__(self, *, is_omitted: bool) -> None:
        self._is_omitted = is_omitted
        self.index = -1  # of the open block, or of the one that was closed last
        self._open = ""  # its type
        self._thought: list[str] = []  # what the open block holds of reasoning
        self._signature = ""  # that its maker gave it

    @property
    def is_in_text(self) -> bool:
        """Whether a text would go on with the open block."""
        return self._open == _TEXT

    def text(self, text: str) -> list[JsonObject]:
        """A piece of what the answer says."""
        if not text:
            return []
        return [*self._turn_to(_TEXT, {"type": _TEXT, "text": ""}), self._delta("text_delta", "text", text)]

    def said(self, said: Sequence[Said]) -> list[JsonObject]:
        """More of the answer."""
        events: list[JsonObject] = []
        for one in said:
            match one:
                case Content(text) | Refusal(text):
                    events += self.text(text)
                case Reasoning(text):
                    events += self._turn_to(_THINKING, {"type": _THINKING, "thinking": "", "signature": ""})
                    self._thought.append(text)
                    if not self._is_omitted:
                        events.append(self._delta("thinking_delta", "thinking", text))
                case Signature():
                    events += self._signed(one)
                case CallBegin(_, name, call_id):
                    call = {"id": _call_id(call_id), "name": name, "input": {}}
                    events += [*self.end(), *self._turn_to(_CALL, {"type": _CALL, **call})]
                case CallArguments(_, text):
                    events.append(self._delta("input_json_delta", "partial_json", text))
                case CallEnd():
                    events += self.end()
        return events

    def end(self) -> list[JsonObject]:
        """Of the open block, if one is open."""
        if not self._open:
            return []
        events: list[JsonObject] = []
        if self._open == _THINKING:
            ours = replies.signature_of("".join(self._thought), carries=self._is_omitted)
            events.append(self._delta("signature_delta", "signature", self._signature or ours))
            self._thought.clear()
            self._signature = ""
        self._open = ""
        return [*events, {"type": "content_block_stop", "index": self.index}]

    def _signed(self, proof: Signature) -> list[JsonObject]:
        if proof.is_redacted:
            block = {"type": _REDACTED, "data": proof.signature}
            return [*self.end(), *self._turn_to(_REDACTED, block), *self.end()]
        events: list[JsonObject] = []
        if proof.signature:
            events = self._turn_to(_THINKING, {"type": _THINKING, "thinking": "", "signature": ""})
            self._signature = proof.signature
        return events + (self.end() if self._open == _THINKING else [])

    def _turn_to(self, kind: str, block: JsonObject) -> list[JsonObject]:
        if self._open == kind:
            return []
        events = self.end()
        self._open = kind
        self.index += 1
        return [*events, {"type": "content_block_start", "index": self.index, "content_block": block}]

    def _delta(self, kind: str, field: str, text: str) -> JsonObject:
        return {"type": "content_block_delta", "index": self.index, "delta": {"type": kind, field: text}}


def _call_id(name: str) -> str:
    return name if name.startswith("toolu_") else "toolu_" + name.removeprefix("call_")


def event(value: JsonObject) -> bytes:
    """One server-sent event, named by its type."""
    data = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return f"event: {value['type']}\ndata: {data}\n\n".encode()


class MessageStream:
    """The events of one answer. See StreamEncoder."""

    def __init__(self, answer: AnswerView, index: int) -> None:
        self._answer = answer
        self._blocks = Blocks(is_omitted=_is_omitted(answer.request))
        self._around = b"", b"", -1  # a piece of text in the block of this index

    def begin(self) -> bytes:
        """How much of the prompt a cache had is not known yet: the last event but one tells it."""
        use = replies.usage(_begun(self._answer.prompt_tokens))
        begun = replies.message(id=self._answer.id, model=self._answer.request.model, content=[], end={}, use=use)
        return event({"type": "message_start", "message": begun}) + event({"type": "ping"})

    def text(self, text: str, logprobs: JsonObject | None = None) -> bytes:
        """There are no logprobs in this wire format."""
        if not self._blocks.is_in_text:
            return b"".join(map(event, self._blocks.text(text)))
        before, after, index = self._around
        if index != self._blocks.index:
            (made,) = self._blocks.text("\x00")
            before, after = event(made).split(rb"\u0000")
            self._around = before, after, self._blocks.index
        return before + json.dumps(text, ensure_ascii=False)[1:-1].encode() + after

    def said(self, said: Sequence[Said], logprobs: JsonObject | None = None) -> bytes:
        """One event for each piece, and those that begin and end blocks."""
        if len(said) == 1 and isinstance(said[0], Content):
            return self.text(said[0].text)
        return b"".join(map(event, self._blocks.said(said)))

    def finish(self, choice: ChoiceView, faults: Sequence[str]) -> bytes:
        """The end of the open block; why the answer ended, and all token counts."""
        end = _end(self._answer, choice, faults)
        told = {"type": "message_delta", "delta": end, "usage": _usage(self._answer)}
        return b"".join(map(event, [*self._blocks.end(), told]))


class MessagesEndpoint:
    """See Endpoint."""

    is_chat = True
    id_prefix = "msg_"
    relays = False
    default_max_tokens: int | None = None

    def parse(self, body: bytes) -> MessagesRequest:
        """The checked body."""
        return parse_messages(body)

    async def prepare(self, request: GenerationRequest, model: ServedModel, room: int) -> Prepared:
        """As chat's, with errors in the words of this wire format."""
        assert isinstance(request, MessagesRequest)
        return await _prepared(request, model, room)

    def max_tokens(self, request: GenerationRequest) -> tuple[str, int] | None:
        """It is never missing; where fewer fit, the answer may have so many."""
        assert isinstance(request, MessagesRequest)
        return "max_tokens", request.max_tokens

    def logprobs(self, request: GenerationRequest) -> int | None:
        """There are none."""
        return None

    def prompt_logprobs(self, request: GenerationRequest) -> int | None:
        """There are none."""
        return None

    def echo(self, request: GenerationRequest, choice: Choice, table: TokenTable) -> Piece | None:
        """A conversation is not repeated."""
        return None

    def shape_logprobs(self, entries: Sequence[Entry], table: TokenTable) -> JsonObject:
        """Never called."""
        raise NotImplementedError

    def answer(self, answer: AnswerView, choices: list[Whole]) -> JsonObject:
        """The whole answer."""
        (whole,) = choices
        end = _end(answer, whole.choice, whole.faults)
        blocks = Blocks(is_omitted=_is_omitted(answer.request))
        content = replies.content_of([*blocks.said(whole.said), *blocks.end()])
        return replies.message(id=answer.id, model=answer.request.model, content=content, end=end, use=_usage(answer))

    def encoder(self, answer: AnswerView, index: int) -> MessageStream:
        """See Endpoint."""
        return MessageStream(answer, index)

    def end(self, answer: AnswerView) -> bytes:
        """What every whole stream ends with."""
        return event({"type": "message_stop"})

    def failed(self, answer: AnswerView, error: DiptychError) -> bytes:
        """What a broken stream ends with instead."""
        return event(replies.error_body(error, answer.id))

    def worded(self, error: DiptychError) -> DiptychError:
        """With Anthropic's names of fields."""
        return in_our_words(error) if type(error) is InvalidRequest else error

    def remark(self, words: str) -> bytes:
        """A comment."""
        return comment(words)


class TokenCounter:
    """The answers of /v1/messages/count_tokens."""

    def __init__(self, models: dict[str, ServedModel], routes: RoutedModels | None = None) -> None:
        self._models = models
        self._routes = routes

    async def __call__(self, body: bytes) -> JsonObject:
        """The tokens that /v1/messages would compute for the same conversation. Raises RequestError."""
        if len(body) <= INLINE_BODY_BYTES:
            request = parse_count(body)
        else:
            request = await asyncio.to_thread(parse_count, body)
        model = self._models.get(countable(request, self._models, self._routes).model)
        if model is None:
            known = ", ".join(sorted({*self._models, *(() if self._routes is None else self._routes.names)}))
            raise UnknownModel(f"the model {printable(request.model)} is not served; there is: {known}", "model")
        prepared = await _prepared(request, model, ANY_ROOM)
        return {"input_tokens": len(prepared.prompts[0])}


class Versioned:
    """An application behind a look at the header anthropic-version: all versions there were are one here."""

    def __init__(self, app: Application) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI. Raises InvalidRequest."""
        version = header(scope, b"anthropic-version")
        if version and not _VERSION.fullmatch(version):
            raise InvalidRequest("the header anthropic-version must be a date, such as 2023-06-01; or leave it out")
        await self._app(scope, receive, send)


async def _prepared(request: MessagesRequest, model: ServedModel, room: int) -> Prepared:
    for message in request.messages:
        for part in message.parts:
            if isinstance(part, ReasoningPart) and part.is_redacted:
                told = "was redacted by another server, and nobody else can read it: leave the block out"
                raise InvalidRequest(f"{part.path} {told}", part.path)
    try:
        prepared = await prepare_chat(request, model, room)
    except InvalidRequest as exc:
        raise in_our_words(exc) from exc
    return replace(prepared, asked=renamed(prepared.asked))


def _is_omitted(request: GenerationRequest) -> bool:
    assert isinstance(request, MessagesRequest)
    return request.thinking.is_omitted


def _end(answer: AnswerView, choice: ChoiceView, faults: Sequence[str]) -> JsonObject:
    """`schema_errors`: how the answer fails its form, where it does."""
    reason, stop = "end_turn", choice.stop_text
    if stop is not None:
        reason = "stop_sequence"
    elif choice.end_reason == "length":
        reason = "model_context_window_exceeded" if choice.is_cut else "max_tokens"
    elif choice.end_reason == "content_filter":
        reason = "refusal"
    elif choice.has_calls:
        reason = "tool_use"
    end: JsonObject = {"stop_reason": reason, "stop_sequence": stop}
    return end | {"schema_errors": [renamed(fault) for fault in faults]} if faults else end


def _begun(prompt_tokens: int) -> Usage:
    return Usage(
        input_tokens=prompt_tokens, output_tokens=0, cache_read_tokens=0, cache_write_tokens=0, reasoning_tokens=0
    )


def _usage(answer: AnswerView) -> JsonObject:
    return replies.usage(answer.used())
