"""One choice of an answer, from the router's tokens to pieces of text; and all choices of one request at once.

Of each prompt the first choice leads. The others follow it to the same engines as soon as the decode engine has the
prompt, so that they find its blocks in both prefix caches:   0 ---token from decode---+--> 1, 2, ... n-1 (interleaved)
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from diptych.cluster.router.call import Explanation, GenerateCall, TokenDelta
from diptych.cluster.router.placement import Placement
from diptych.cluster.router.router import Router
from diptych.protos.errors import EngineFault
from diptych.protos.openai_replies import JsonObject
from diptych.protos.types import FinishReason, TokenLogprobs

from .logprobs import Entry
from .reading import AnswerReader
from .text import TextStream

MAX_PENDING = 64  # pieces of several choices that wait for a slow client


class Piece(NamedTuple):
    """Text that is settled, and the tokens that begin in it where logprobs are wanted. Either may be empty."""

    text: str
    entries: Sequence[Entry] = ()


@dataclass(slots=True)
class Choice:
    """One choice on its way from tokens to text."""

    index: int
    call: GenerateCall
    text: TextStream
    reader: AnswerReader | None = None  # of a chat answer that may hold more than content
    leads: bool = True  # the first one of its prompt
    keep_end: bool = False  # an end token's own text is shown
    is_scoring: bool = False  # its one token is made for the prompt's logprobs only and is not part of the answer
    echoed: int = 0  # characters of the prompt that are shown before the text
    num_tokens: int = 0
    reasoning_tokens: int = 0  # of them; counted in the router's pieces, an engine's step each
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
        stops = self.call.sampling.stop_token_ids
        delta = await anext(deltas)
        self._check_prompt(delta)
        while delta.finish is None:
            self.placement = delta.placement
            self.num_tokens += len(delta.tokens)
            tokens = delta.tokens
            if tokens[-1] in stops and not self.keep_end:  # an end token ends the answer and is no text, special or not
                tokens = tokens[:-1]
            yield Piece("") if self.is_scoring else self._feed(tokens, delta.logprobs)
            delta = await deltas.asend(True) if self.text.stopped else await anext(deltas)
        self.explanation = delta.finish
        tail = "" if self.text.stopped or self.is_scoring else self.text.flush()
        ended = self.text.stopped or delta.finish.reason is FinishReason.STOP
        self.finish_reason = "stop" if ended and not self.is_scoring else "length"
        rest = self._shown(is_whole=not self.text.stopped)
        if tail or rest:
            yield Piece(tail, rest)
        if self.is_scoring:
            self.num_tokens = 0

    def read(self, piece: Piece) -> list[JsonObject]:
        """The deltas of OpenAI's shape that a piece settles; none where nobody reads the text."""
        if self.reader is None:
            return []
        deltas = self.reader.feed(piece.text)
        if self.reader.is_reasoning:
            self.reasoning_tokens = self.num_tokens
        return deltas

    def _check_prompt(self, first: TokenDelta) -> None:
        if self.call.sampling.prompt_logprobs is None:
            return
        self.prompt_logprobs = first.prompt_logprobs or []
        if len(self.prompt_logprobs) != len(self.call.prompt) - 1:
            raise EngineFault("the engine did not tell the logprobs of the whole prompt")

    def _feed(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs | None] | None) -> Piece:
        if self.call.sampling.logprobs is None:
            return Piece(self.text.feed(tokens))
        text = ""
        for i, token in enumerate(tokens):
            own = logprobs[i] if logprobs is not None else None
            if own is None:
                raise EngineFault("the engine did not tell the logprobs of a token")
            self._waiting.append(Entry(token, own, self.text.num_settled))
            text += self.text.feed([token])
            if self.text.stopped:
                break
        return Piece(text, self._shown(is_whole=False))

    def _shown(self, *, is_whole: bool) -> list[Entry]:
        """The waiting tokens that begin in text that is out: a stop string can cut them off no more."""
        count = 0
        while count < len(self._waiting) and (is_whole or self._waiting[count].offset < self.text.num_shown):
            count += 1
        shown, self._waiting = self._waiting[:count], self._waiting[count:]
        return shown


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
