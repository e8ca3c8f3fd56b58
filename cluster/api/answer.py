"""One choice of an answer, from the router's tokens to pieces of text; and all choices of one request at once.

Of each prompt the first choice leads. The others follow it to the same engines as soon as the decode engine has the
prompt, so that they find its blocks in both prefix caches:   0 ---token from decode---+--> 1, 2, ... n-1 (interleaved)
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from diptych.cluster.router.call import Explanation, GenerateCall, TokenDelta
from diptych.cluster.router.placement import Placement
from diptych.cluster.router.router import Router
from diptych.protos.deltas import Content
from diptych.protos.errors import EngineFault
from diptych.protos.openai import GenerationRequest
from diptych.protos.openai_replies import JsonObject
from diptych.protos.replies import Usage
from diptych.protos.types import FinishReason, TokenLogprobs

from .logprobs import Entry
from .prepared import Header, Prepared
from .reading import AnswerReader, Said
from .served import ServedModel
from .text import TextStream

MAX_PENDING = 64  # pieces of several choices that wait for a slow client


class Piece(NamedTuple):
    """Text that is settled, and the tokens that begin in it where logprobs are wanted. Either may be empty."""

    text: str
    entries: Sequence[Entry] = ()
    num_tokens: int = 0  # of the answer so far


@dataclass(slots=True)
class Choice:
    """One choice on its way from tokens to text."""

    index: int
    call: GenerateCall
    text: TextStream
    reader: AnswerReader | None = None  # of a chat answer that may hold more than content
    leads: bool = True  # the first one of its prompt
    keep_end: bool = False  # an end token's own text is shown
    is_cut: bool = False  # see ChoiceView
    is_scoring: bool = False  # its one token is made for the prompt's logprobs only and is not part of the answer
    echoed: int = 0  # characters of the prompt that are shown before the text
    num_tokens: int = 0
    reasoning_tokens: int = 0  # of them
    finish_reason: str = ""
    explanation: Explanation | None = None
    placement: Placement | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    _waiting: list[Entry] = field(default_factory=list)  # tokens whose first character is not shown yet

    @property
    def is_rooted(self) -> bool:
        """Whether the decode engine has the prompt's KV: a token came from it, or the choice is over."""
        if self.explanation is not None:
            return True
        return self.placement is not None and self.num_tokens > (self.placement.prefill is not None)

    async def pieces(self, deltas: AsyncGenerator[TokenDelta, bool | None]) -> AsyncIterator[Piece]:
        """As text settles, possibly empty; after the last one `finish_reason` and `explanation` are set."""
        delta = await anext(deltas)
        self._check_prompt(delta)
        while delta.finish is None:
            self.placement = delta.placement
            for part in self._parts(delta):
                self.num_tokens += len(part.tokens)
                yield Piece("") if self.is_scoring else self._feed(part)
                if self.text.stopped:
                    break
            delta = await deltas.asend(True) if self.text.stopped else await anext(deltas)
        self.explanation = delta.finish
        tail = "" if self.text.stopped or self.is_scoring else self.text.flush()
        ended = self.text.stopped or delta.finish.reason is FinishReason.STOP
        self.finish_reason = "stop" if ended and not self.is_scoring else "length"
        rest = self._shown(is_whole=not self.text.stopped)
        if tail or rest:
            yield Piece(tail, rest, self.num_tokens)
        if self.is_scoring:
            self.num_tokens = 0

    def read(self, piece: Piece) -> list[Said]:
        """What a piece settles; its text where nobody reads that."""
        if self.reader is None:
            return [Content(piece.text)] if piece.text else []
        said = self.reader.feed(piece.text)
        if self.reader.is_reasoning:
            self.reasoning_tokens = piece.num_tokens
        return said

    @property
    def end_reason(self) -> str:
        """OpenAI's word for why the answer ended."""
        return self.finish_reason if self.reader is None else self.reader.finish_reason(self.finish_reason)

    @property
    def stop_text(self) -> str | None:
        """The stop string that ended it."""
        return self.text.found_stop

    @property
    def has_calls(self) -> bool:
        """Whether it called functions."""
        return self.reader is not None and bool(self.reader.calls)

    @property
    def carried(self) -> JsonObject | None:
        """Nothing: an own model's text says it all."""
        return None

    def _check_prompt(self, first: TokenDelta) -> None:
        if self.call.sampling.prompt_logprobs is None:
            return
        self.prompt_logprobs = first.prompt_logprobs or []
        if len(self.prompt_logprobs) != len(self.call.prompt) - 1:
            raise EngineFault("the engine did not tell the logprobs of the whole prompt")

    def _parts(self, delta: TokenDelta) -> Iterator[TokenDelta]:
        """Token by token where it counts to what each belongs, or whether the text ended before it: nothing told of an
        answer depends on how many tokens arrived at once.
        """
        counts = self.call.sampling.logprobs is not None or self.text.watches
        if len(delta.tokens) == 1 or not (counts or (self.reader is not None and self.reader.may_reason)):
            yield delta
            return
        for i, token in enumerate(delta.tokens):
            yield TokenDelta([token], logprobs=delta.logprobs and delta.logprobs[i : i + 1])

    def _feed(self, delta: TokenDelta) -> Piece:
        tokens = delta.tokens
        if tokens[-1] in self.call.sampling.stop_token_ids and not self.keep_end:
            tokens = tokens[:-1]  # an end token ends the answer and is no text, special or not
        if self.call.sampling.logprobs is None:
            return Piece(self.text.feed(tokens), (), self.num_tokens)
        text, own = "", delta.logprobs[0] if delta.logprobs is not None else None
        for token in tokens:  # one at most, see _parts
            if own is None:
                raise EngineFault("the engine did not tell the logprobs of a token")
            self._waiting.append(Entry(token, own, self.text.num_settled))
            text = self.text.feed([token])
        return Piece(text, self._shown(is_whole=False), self.num_tokens)

    def _shown(self, *, is_whole: bool) -> list[Entry]:
        """The waiting tokens that begin in text that is out: a stop string can cut them off no more."""
        count = 0
        while count < len(self._waiting) and (is_whole or self._waiting[count].offset < self.text.num_shown):
            count += 1
        shown, self._waiting = self._waiting[:count], self._waiting[count:]
        return shown


@dataclass(frozen=True, slots=True)
class Answer:
    """What all choices of one answer of an own model share. See AnswerView."""

    request: GenerationRequest
    is_chat: bool
    model: ServedModel
    choices: list[Choice]
    prepared: Prepared
    id: str
    created: int  # Unix seconds
    tenant: str

    def named(self, name: str) -> Answer:
        """The same under another id, before it begins."""
        return replace(self, id=name)

    def first_of(self, choice: Choice) -> Choice:
        """The first choice of the same prompt."""
        return self.choices[choice.index - choice.index % self.request.num_choices]

    @property
    def fingerprint(self) -> str:
        """The model's."""
        return self.model.fingerprint

    @property
    def sampling(self) -> tuple[float | None, float | None]:
        """Temperature and top_p."""
        sampling = self.choices[0].call.sampling
        return sampling.temperature, sampling.top_p

    @property
    def headers(self) -> list[Header]:
        """Of the HTTP answer."""
        return self.prepared.headers

    @property
    def prompt_tokens(self) -> int:
        """Each prompt once."""
        return sum(len(first.call.prompt) for first in self._firsts)

    @property
    def _firsts(self) -> list[Choice]:
        return self.choices[:: self.request.num_choices]

    def used(self) -> Usage:
        """Found in a cache is what the first choice of a prompt found there; prefixes are kept without a price."""
        return Usage(
            input_tokens=self.prompt_tokens,
            output_tokens=sum(choice.num_tokens for choice in self.choices),
            cache_read_tokens=sum(one.explanation.cached_tokens for one in self._firsts if one.explanation is not None),
            cache_write_tokens=0,
            reasoning_tokens=sum(choice.reasoning_tokens for choice in self.choices) if self.is_chat else None,
        )

    def explanation(self) -> JsonObject | None:
        """How each choice was answered, if the client asked."""
        if not self.request.explain:
            return None
        told = [choice.explanation for choice in self.choices]
        return {"choices": [dataclasses.asdict(entry) for entry in told if entry is not None]}


async def run(router: Router, choices: Sequence[Choice]) -> AsyncGenerator[tuple[Choice, Piece | None]]:
    """The pieces of all choices as they come, each with its choice; None after a choice's last.

    Closing it cancels all of them, and so does the failure of one, which is raised.
    """
    if len(choices) > 1:
        async with aclosing(_run_several(router, choices)) as events:
            async for event in events:
                yield event
        return
    (choice,) = choices
    async with aclosing(router.generate(choice.call)) as deltas:
        async for piece in choice.pieces(deltas):
            yield choice, piece
    yield choice, None


async def _run_several(router: Router, choices: Sequence[Choice]) -> AsyncGenerator[tuple[Choice, Piece | None]]:
    queue: asyncio.Queue[tuple[Choice, Piece | Exception | None]] = asyncio.Queue(MAX_PENDING)
    tasks = [asyncio.create_task(_pour(router, choice, queue)) for choice in choices if choice.leads]
    waiting = _followers(choices)
    num_open = len(choices)
    try:
        while num_open:
            choice, event = await queue.get()
            if isinstance(event, Exception):
                raise event
            num_open -= event is None
            if choice.index in waiting and choice.is_rooted:
                for other in waiting.pop(choice.index):
                    other.call = replace(other.call, pin=choice.placement)
                    tasks.append(asyncio.create_task(_pour(router, other, queue)))
            yield choice, event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _followers(choices: Sequence[Choice]) -> dict[int, list[Choice]]:
    """By the index of the choice that leads them."""
    found: dict[int, list[Choice]] = {}
    for choice in choices:
        if choice.leads:
            behind = found.setdefault(choice.index, [])
        else:
            behind.append(choice)
    return found


async def _pour(router: Router, choice: Choice, queue: asyncio.Queue[tuple[Choice, Piece | Exception | None]]) -> None:
    try:
        async with aclosing(router.generate(choice.call)) as deltas:
            async for piece in choice.pieces(deltas):
                await queue.put((choice, piece))
        await queue.put((choice, None))
    except Exception as exc:  # raised by the reader of the queue
        await queue.put((choice, exc))
