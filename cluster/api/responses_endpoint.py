"""One response on its way from an answer's pieces to OpenAI's events and body: what generation.py asks of an endpoint.

Made by responses.py for each request. Whole answers are written by the steps of a stream that nobody reads. The last
event is not sent from here: before it the response is stored.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from diptych.protos.deltas import CallArguments, CallBegin, CallEnd, Content, Reasoning, Refusal, Signature
from diptych.protos.errors import Cancelled, DiptychError, RequestError
from diptych.protos.openai import ChatRequest, GenerationRequest
from diptych.protos.openai_replies import JsonObject
from diptych.protos.responses import ResponsesRequest
from diptych.protos.responses_items import FIRST_OUTPUT, ItemIds
from diptych.protos.responses_replies import End, Event, ResponseWriter, usage

from .answer import Choice, Piece
from .endpoint import AnswerView, ChoiceView, Whole
from .logprobs import Entry, chat_logprobs
from .prepared import Prepared, prepare_chat
from .reading import Said
from .responses_kept import frame_of
from .responses_seal import Seal
from .served import ServedModel
from .sse import comment
from .text import TokenTable

# Fields of chat's constructors by the names that they have here.
_NAMES = {"messages": "input", "max_completion_tokens": "max_output_tokens", "reasoning_effort": "reasoning.effort"}
# OpenAI's words for why a response is incomplete, by chat's for why an answer ended.
_INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}


class ResponseEndpoint:
    """`error`: what broke the answer after its first event."""

    is_chat = True
    id_prefix = "resp_"
    relays = False
    default_max_tokens: int | None = None

    def __init__(self, request: ResponsesRequest, seal: Seal | None, *, records: bool) -> None:
        """`seal` None: no reasoning is sealed. `records`: events are taken, not sent."""
        self.request = request
        self.error: DiptychError | None = None
        self._frames: list[tuple[int, str]] = []
        self._seal = seal
        self._records = records
        self._writer: ResponseWriter | None = None
        self._is_told = False  # the first events are out
        self._end_reason = "stop"
        self._faults: Sequence[str] = ()

    def open(self, answer: AnswerView) -> ResponseWriter:
        """The writer of the answer's response."""
        if self._writer is None:
            temperature, top_p = answer.sampling
            head: JsonObject = {"id": answer.id, "object": "response", "created_at": answer.created}
            head |= {**self.request.told(), "temperature": temperature, "top_p": top_p}
            seal = None if self._seal is None else self._seal.close
            ids = ItemIds(answer.id, FIRST_OUTPUT)
            self._writer = ResponseWriter(head, ids, seal=seal, seals=self.request.seals)
        return self._writer

    def announce(self, answer: AnswerView) -> list[Event]:
        """The first events of a response that waits, before anything is said."""
        self._is_told = True
        return self.open(answer).created(is_queued=True)

    def emit(self, events: Sequence[Event]) -> bytes:
        """The events as they are sent. Nothing is of whole answers; recorded ones leave a sign that there is more."""
        if self._records:
            if self.request.streams:
                self._frames += [(event["sequence_number"], frame_of(event)) for event in events]
            return b"." if events else b""
        return "".join([frame_of(event) for event in events]).encode() if self.request.streams else b""

    def take(self) -> list[tuple[int, str]]:
        """The recorded events since the last time."""
        frames, self._frames = self._frames, []
        return frames

    def conclude(self, answer: AnswerView, error: DiptychError | None = None) -> tuple[JsonObject, list[Event]]:
        """The whole body and the last events; `error`: what ended it."""
        error = error or self.error
        use = usage(answer.used())
        more: JsonObject = {"schema_errors": list(self._faults)} if self._faults else {}
        if (explanation := answer.explanation()) is not None:
            more["diptych"] = explanation
        writer, now = self.open(answer), int(time.time())
        reason = _INCOMPLETE.get(self._end_reason, "")
        status: End = "incomplete" if reason else "completed"
        if error is not None:
            status = "cancelled" if isinstance(error, Cancelled) else "failed"
        failure = error if status == "failed" else None
        events = writer.finish(status, use=use, ended_at=now, error=failure, more=more, reason=reason)
        return writer.body, events

    # -- the protocol Endpoint

    def parse(self, body: bytes) -> GenerationRequest:
        """Its request was read before it was made."""
        raise AssertionError("a response's request is read with what it goes on from")

    async def prepare(self, request: GenerationRequest, model: ServedModel, room: int) -> Prepared:
        """As chat."""
        assert isinstance(request, ChatRequest)
        return await prepare_chat(request, model, room)

    def max_tokens(self, request: GenerationRequest) -> tuple[str, int] | None:
        """Of `max_output_tokens`."""
        wanted = self.request.fields.max_output_tokens
        return None if wanted is None else ("max_output_tokens", wanted)

    def logprobs(self, request: GenerationRequest) -> int | None:
        """`top_logprobs`, where they are included."""
        assert isinstance(request, ChatRequest)
        return request.wanted_logprobs

    def prompt_logprobs(self, request: GenerationRequest) -> int | None:
        """None: OpenAI's field does not exist here."""
        return None

    def echo(self, request: GenerationRequest, choice: Choice, table: TokenTable) -> Piece | None:
        """A conversation is not repeated."""
        return None

    def shape_logprobs(self, entries: Sequence[Entry], table: TokenTable) -> JsonObject:
        """As in chat; the encoder takes the list out."""
        return chat_logprobs(entries, table)

    def answer(self, answer: AnswerView, choices: list[Whole]) -> JsonObject:
        """Whole answers are written by `conclude`."""
        raise AssertionError("a response is written by the steps of its stream")

    def encoder(self, answer: AnswerView, index: int) -> ResponseEncoder:
        """Of the one choice."""
        return ResponseEncoder(self, self.open(answer))

    def end(self, answer: AnswerView) -> bytes:
        """Nothing: see `conclude`."""
        return b""

    def failed(self, answer: AnswerView, error: DiptychError) -> bytes:
        """The same."""
        self.error = error
        return b""

    def worded(self, error: DiptychError) -> DiptychError:
        """With the names that this endpoint has for chat's fields."""
        return renamed(error) if isinstance(error, RequestError) else error

    def remark(self, words: str) -> bytes:
        """A comment, to who reads the stream as it is made."""
        return comment(words) if self.request.streams and not self._records else b""

    def begin(self) -> list[Event]:
        """The first events; where those are out, that a queued response goes on."""
        assert self._writer is not None
        return self._writer.begun() if self._is_told else self._writer.created()

    def begin_again(self) -> None:
        """What was told is void; of a response whose events nobody sees."""
        self._writer = None
        self._end_reason, self._faults = "stop", ()

    def ends(self, reason: str, faults: Sequence[str]) -> None:
        """Why the answer ended, and how it fails its form."""
        self._end_reason, self._faults = reason, faults


class ResponseEncoder:
    """See StreamEncoder. Logprobs are told of what a message says; those of other tokens are dropped."""

    def __init__(self, endpoint: ResponseEndpoint, writer: ResponseWriter) -> None:
        self._endpoint = endpoint
        self._writer = writer
        self._logprobs: list[JsonObject] = []  # of tokens of which nothing was settled yet

    def begin(self) -> bytes:
        """With the first of what is said."""
        return self._endpoint.emit(self._endpoint.begin())

    def text(self, text: str, logprobs: JsonObject | None = None) -> bytes:
        """An answer that nobody reads is one message."""
        self._logprobs += _listed(logprobs)
        return self._endpoint.emit(self._writer.say(text, self._taken())) if text else b""

    def said(self, said: Sequence[Said], logprobs: JsonObject | None = None) -> bytes:
        """Items as they come."""
        self._logprobs += _listed(logprobs)
        events: list[Event] = []
        for one in said:
            match one:
                case Content(text):
                    events += self._writer.say(text, self._taken())
                case Reasoning(text):
                    events += self._writer.think(text)
                case Signature() if one.signature:
                    events += self._writer.prove(one)
                case Refusal(text):
                    events += self._writer.refuse(text)
                case CallBegin(_, name, call_id):
                    events += self._writer.call(call_id, name)
                case CallArguments(_, text):
                    events += self._writer.argue(text)
                case CallEnd(_):
                    events += self._writer.end_call()
        if said:
            self._logprobs.clear()
        return self._endpoint.emit(events)

    def finish(self, choice: ChoiceView, faults: Sequence[str]) -> bytes:
        """Noted: the last events tell it."""
        self._endpoint.ends(choice.end_reason, faults)
        return b""

    def _taken(self) -> list[JsonObject]:
        taken, self._logprobs = self._logprobs, []
        return taken


def _listed(logprobs: JsonObject | None) -> list[JsonObject]:
    return [] if logprobs is None else logprobs["content"]


def renamed(error: RequestError) -> RequestError:
    """An error of chat's constructors, of the field as it is called here."""
    for old, new in _NAMES.items():
        if error.param is not None and (error.param == old or error.param.startswith((f"{old}.", f"{old}["))):
            message = error.message
            if message.startswith(old):
                message = new + message.removeprefix(old)
            return type(error)(message, new + error.param.removeprefix(old), error.detail)
    return error
