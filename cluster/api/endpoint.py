"""What differs between the endpoints that generate: how a body is read, and how an answer is written.

generation.py and routed.py are what they share, of own models and of gateway routes; chat.py, completions.py,
messages.py and responses.py are the endpoints. An answer is written from what its views tell, wherever it comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from diptych.protos.deltas import Content
from diptych.protos.errors import DiptychError
from diptych.protos.openai import GenerationRequest
from diptych.protos.openai_replies import JsonObject
from diptych.protos.replies import Usage

from .answer import Choice, Piece
from .logprobs import Entry
from .prepared import Prepared
from .reading import Said
from .served import ServedModel
from .text import TokenTable

Void = Callable[[], None]  # what is called when all that an answer said is void, for it begins again


class ChoiceView(Protocol):
    """One choice of an answer, for who writes it. All but `index` is known at its end."""

    @property
    def index(self) -> int:
        """Its place, from 0."""

    @property
    def end_reason(self) -> str:
        """OpenAI's word for why it ended."""

    @property
    def stop_text(self) -> str | None:
        """The stop string that ended it; None where none did, or nobody told which."""

    @property
    def is_cut(self) -> bool:
        """Whether it might have as many tokens as fit, which are fewer than the request asked for."""

    @property
    def has_calls(self) -> bool:
        """Whether it called functions."""

    @property
    def carried(self) -> JsonObject | None:
        """What a provider wants back with the message, for OpenAI's clients; see protos/openai_carried.py."""


class AnswerView(Protocol):
    """What all choices of one answer share, for who writes it."""

    @property
    def request(self) -> GenerationRequest:
        """What was asked."""

    @property
    def is_chat(self) -> bool:
        """Whether a conversation was."""

    @property
    def id(self) -> str:
        """The answer's."""

    @property
    def created(self) -> int:
        """Unix seconds."""

    @property
    def tenant(self) -> str:
        """Whose it is."""

    @property
    def fingerprint(self) -> str | None:
        """OpenAI's system_fingerprint; None where nobody knows."""

    @property
    def sampling(self) -> tuple[float | None, float | None]:
        """Temperature and top_p; None where they are a provider's own."""

    @property
    def prompt_tokens(self) -> int:
        """Before the answer ends: as counted, or as many as it probably has."""

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """Of the HTTP answer, as far as is known now."""

    def used(self) -> Usage:
        """The tokens so far, of all choices; None: nobody told."""

    def explanation(self) -> JsonObject | None:
        """How each choice was answered, if the client asked."""


@dataclass(frozen=True, slots=True)
class Whole:
    """A finished choice. `said`: all of it, in its order. `faults`: see Prepared.faults."""

    choice: ChoiceView
    said: Sequence[Said]
    logprobs: JsonObject | None
    faults: list[str]
    prompt_logprobs: object = None

    @property
    def text(self) -> str:
        """What it says, without reasoning and calls."""
        return "".join([one.text for one in self.said if isinstance(one, Content)])


class StreamEncoder(Protocol):
    """The events of one choice, as bytes to send."""

    def begin(self) -> bytes:
        """What comes before the first text; sent with it."""

    def text(self, text: str, logprobs: JsonObject | None = None) -> bytes:
        """A piece of an answer that nobody reads, and the logprobs of its tokens where they are wanted."""

    def said(self, said: Sequence[Said], logprobs: JsonObject | None = None) -> bytes:
        """Pieces of a chat answer, and logprobs."""

    def finish(self, choice: ChoiceView, faults: Sequence[str]) -> bytes:
        """The end of the choice, and how it fails its form, if it does."""


class Endpoint(Protocol):
    """What differs between the endpoints."""

    is_chat: bool
    id_prefix: str
    relays: bool  # whether its streams are OpenAI's chat format, which many providers speak
    default_max_tokens: int | None  # where the client named none, cut to what fits; None: the router's default

    def parse(self, body: bytes) -> GenerationRequest:
        """The checked body. Raises InvalidRequest."""

    async def prepare(self, request: GenerationRequest, model: ServedModel, room: int) -> Prepared:
        """The prompts in token ids, `room` being the context's size, and what is known of the answers."""

    def max_tokens(self, request: GenerationRequest) -> tuple[str, int] | None:
        """The field by which the client asked for a number of tokens, and the number; None where it named none."""

    def logprobs(self, request: GenerationRequest) -> int | None:
        """Alternatives told with each generated token; None: no logprobs."""

    def prompt_logprobs(self, request: GenerationRequest) -> int | None:
        """The same for the prompt's tokens."""

    def echo(self, request: GenerationRequest, choice: Choice, table: TokenTable) -> Piece | None:
        """The prompt as the beginning of the answer, where the client wants that."""

    def shape_logprobs(self, entries: Sequence[Entry], table: TokenTable) -> JsonObject:
        """The `logprobs` of a choice."""

    def answer(self, answer: AnswerView, choices: list[Whole]) -> JsonObject:
        """The whole answer's body."""

    def encoder(self, answer: AnswerView, index: int) -> StreamEncoder:
        """For the events of choice `index`."""

    def end(self, answer: AnswerView) -> bytes:
        """What a stream ends with, behind the ends of its choices."""

    def failed(self, answer: AnswerView, error: DiptychError) -> bytes:
        """What a broken stream ends with instead."""

    def worded(self, error: DiptychError) -> DiptychError:
        """An error of behind the reader, of the field as it is called here."""

    def remark(self, words: str) -> bytes:
        """A line of a stream that clients do not read."""
