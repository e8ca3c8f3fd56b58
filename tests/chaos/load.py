"""Requests whose answers are known beforehand, sent over HTTP/1.1; when each token came. Standard library only."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

from oracle import Verdict, judge

TIMEOUT_S = 60.0  # of one request, everything included
_MAX_REPLY_BYTES = 1 << 24
_WORD = re.compile(r"\s*(?:t(\d+)(?=\s|$)|(\S+))")

Expect = Callable[[Sequence[int], int], list[Any]]


@dataclass(frozen=True, slots=True)
class Ask:
    """A request and its only right answer. `leave_after`: tokens after which the client goes away.

    `beside`: further prompts of the same request, each with its answer, of the same length; `n` answers to each prompt.
    """

    prompt: tuple[int, ...]
    expected: tuple[Any, ...]
    tenant: str = "a"
    leave_after: int | None = None
    leave_after_s: float | None = None
    n: int = 1
    beside: tuple[tuple[tuple[int, ...], tuple[Any, ...]], ...] = ()

    def expected_of(self, choice: int) -> tuple[Any, ...]:
        """The answer of one of the choices, which are counted prompt by prompt."""
        return (self.expected, *(answer for _, answer in self.beside))[choice // self.n]

    @property
    def num_choices(self) -> int:
        """Over all prompts."""
        return self.n * (1 + len(self.beside))


@dataclass(slots=True)
class Answer:
    """How a request went. Times are those of time.monotonic."""

    ask: Ask
    sent: float
    tokens: list[Any] = field(default_factory=list)  # of the first choice
    others: dict[int, list[Any]] = field(default_factory=dict)  # of the other ones
    times: list[float] = field(default_factory=list)  # of each of `tokens`
    ended: float = 0.0
    failure: str = ""  # an error code, a status, or what the connection did; empty when whole or left
    is_whole: bool = False  # finished as it should, with its end mark
    has_left: bool = False  # the client went away
    told: dict[str, Any] = field(default_factory=dict)  # the router's explanation

    @property
    def verdict(self) -> Verdict:
        """Of what came, whether or not it is whole."""
        found = judge(self.ask.expected, self.tokens, is_whole=self.is_whole)
        for choice in range(1, self.ask.num_choices):
            tokens = self.others.get(choice, [])
            found += judge(self.ask.expected_of(choice), tokens, is_whole=self.is_whole)
        return found

    @property
    def moves(self) -> int:
        """How often the answer went on elsewhere after its first token."""
        return int(self.told.get("migrations", 0))

    @property
    def engines(self) -> set[str]:
        """Those of the last attempt."""
        return {str(self.told[key]) for key in ("prefill_engine", "decode_engine") if self.told.get(key)}

    def gaps(self) -> Iterator[tuple[float, float]]:
        """(when a token came, seconds since the one before), from the second token on."""
        for before, now in zip(self.times, self.times[1:], strict=False):
            yield now, now - before

    def silence_after(self, moment: float) -> float | None:
        """Seconds from `moment` to the next token or the end; None when the request was not in work then."""
        if not self.sent <= moment <= self.ended:
            return None
        return next((at for at in self.times if at >= moment), self.ended) - moment


class Asks:
    """Requests without end, from a seed. `expect` knows the answers; `different` bounds how many prompts there are.

    A third of the prompts begin with one of four shared prefixes, so that prefix caches have something to find.
    """

    def __init__(
        self,
        expect: Expect,
        *,
        seed: int,
        vocab: int = 32_000,
        prompt_tokens: tuple[int, int] = (4, 200),
        max_tokens: tuple[int, int] = (16, 64),
        different: int | None = None,
    ) -> None:
        self._expect = expect
        self._random = random.Random(seed)
        self._vocab = vocab
        self._sizes = prompt_tokens, max_tokens
        self._shared = [self._words(self._random.randint(16, 64)) for _ in range(4)]
        self._kept = [self._fresh() for _ in range(different)] if different else []

    def next(self) -> Ask:
        """One more."""
        return self._random.choice(self._kept) if self._kept else self._fresh()

    def take(self, number: int) -> list[Ask]:
        """So many."""
        return [self.next() for _ in range(number)]

    def broad(self) -> Ask:
        """One with several prompts, several answers to each, or both."""
        ask, n = self.next(), self._random.choice((1, 2, 3))
        number = self._random.choice((1, 2) if n == 1 else (0, 1, 2))
        prompts = [self._words(self._random.randint(*self._sizes[0])) for _ in range(number)]
        answers = [tuple(self._expect(prompt, len(ask.expected))) for prompt in prompts]
        return replace(ask, n=n, beside=tuple(zip(prompts, answers, strict=True)))

    def _words(self, number: int) -> tuple[int, ...]:
        return tuple(self._random.randrange(self._vocab) for _ in range(number))

    def _fresh(self) -> Ask:
        prompts, answers = self._sizes
        prompt = self._words(self._random.randint(*prompts))
        if self._random.random() < 1 / 3:
            prompt = (*self._random.choice(self._shared), *prompt)
        expected = tuple(self._expect(prompt, self._random.randint(*answers)))
        return Ask(prompt, expected, self._random.choice("ab"))


@dataclass(frozen=True, slots=True)
class Target:
    """Where the API listens, and how its answers are told apart."""

    url: str
    model: str
    headers: dict[str, dict[str, str]]  # by tenant
    is_echo: bool = True

    def request(self, ask: Ask) -> bytes:
        """Head and body of a streamed completion."""
        parts = urlsplit(self.url)
        prompts = [ask.prompt, *(prompt for prompt, _ in ask.beside)]
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": [list(prompt) for prompt in prompts] if ask.beside else list(ask.prompt),
            "n": ask.n,
            "max_tokens": len(ask.expected),
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "explain": True,
        }
        if not self.is_echo:  # texts do not tell how many tokens they are
            body["logprobs"] = 0
        data = json.dumps(body).encode()
        lines = [
            "POST /v1/completions HTTP/1.1",
            f"host: {parts.netloc}",
            "connection: close",
            "content-type: application/json",
            f"content-length: {len(data)}",
            *(f"{name}: {value}" for name, value in self.headers.get(ask.tenant, {}).items()),
        ]
        return "\r\n".join([*lines, "", ""]).encode() + data


async def send(target: Target, ask: Ask, on_token: Callable[[Answer], None] | None = None) -> Answer:
    """Send it and read the stream to its end. Never raises for what the network or the server does.

    `on_token` is called after each event that brought tokens.
    """
    answer = Answer(ask, time.monotonic())
    limit_s = TIMEOUT_S if ask.leave_after_s is None else ask.leave_after_s
    try:
        async with asyncio.timeout(limit_s):
            await _exchange(target, answer, on_token)
    except TimeoutError:
        answer.has_left = ask.leave_after_s is not None
        if not answer.has_left:
            answer.failure = "no_end"
    except (OSError, EOFError, ValueError, KeyError, TypeError) as exc:
        answer.failure = answer.failure or f"connection:{type(exc).__name__}"
    answer.ended = time.monotonic()
    return answer


async def _exchange(target: Target, answer: Answer, on_token: Callable[[Answer], None] | None) -> None:
    parts = urlsplit(target.url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=_MAX_REPLY_BYTES)
    try:
        writer.write(target.request(answer.ask))
        head = await reader.readuntil(b"\r\n\r\n")
        status = int(head.split(b" ", 2)[1])
        lowered = head.lower()
        body = _chunks(reader) if b"transfer-encoding: chunked" in lowered else _until_close(reader)
        if status != 200:
            answer.failure = _code_of(b"".join([piece async for piece in body]), status)
            return
        rest = b""
        async for piece in body:
            now = time.monotonic()
            *lines, rest = (rest + piece).split(b"\n")
            before = len(answer.tokens)
            for line in lines:
                if line.startswith(b"data: "):
                    _event(target, answer, line[6:].strip(), now)
            if on_token is not None and len(answer.tokens) > before:
                on_token(answer)
            if answer.ask.leave_after is not None and len(answer.tokens) >= answer.ask.leave_after:
                answer.has_left = not answer.is_whole
                return
            if answer.is_whole or answer.failure:
                return
        answer.failure = "stream_ended_early"
    finally:
        writer.transport.abort()


async def _chunks(reader: asyncio.StreamReader) -> Any:
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        piece = await reader.readexactly(size + 2)
        yield piece[:-2]


async def _until_close(reader: asyncio.StreamReader) -> Any:
    while piece := await reader.read(1 << 16):
        yield piece


def _event(target: Target, answer: Answer, data: bytes, now: float) -> None:
    if data == b"[DONE]":
        answer.is_whole = not answer.failure
        return
    event = json.loads(data)
    if "error" in event:
        answer.failure = str(event["error"].get("code") or "error_event")
        return
    if told := event.get("diptych"):
        answer.told = told["choices"][0]
    for choice in event["choices"]:
        if target.is_echo:
            tokens: list[Any] = [int(word) if word else other for word, other in _WORD.findall(choice["text"])]
        else:
            tokens = list((choice.get("logprobs") or {}).get("tokens") or [])
        if choice["index"]:
            answer.others.setdefault(choice["index"], []).extend(tokens)
        else:
            answer.tokens += tokens
            answer.times += [now] * len(tokens)


def _code_of(body: bytes, status: int) -> str:
    try:
        return str(json.loads(body)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return f"status_{status}"


async def burst(
    target: Target, asks: Sequence[Ask], *, over_s: float = 0.0, on_token: Callable[[Answer], None] | None = None
) -> list[Answer]:
    """Send them at even distances over so many seconds, and wait for all."""

    async def one(at: int, ask: Ask) -> Answer:
        await asyncio.sleep(over_s * at / max(len(asks), 1))
        return await send(target, ask, on_token)

    return await asyncio.gather(*(one(at, ask) for at, ask in enumerate(asks)))


async def steady(target: Target, asks: Asks, *, rate: float, for_s: float, seed: int) -> list[Answer]:
    """Requests at random moments, `rate` a second on average, whether or not the ones before are answered."""
    dice = random.Random(seed)
    began = time.monotonic()
    due = began
    tasks: list[asyncio.Task[Answer]] = []
    while (due := due + dice.expovariate(rate)) < began + for_s:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        tasks.append(asyncio.create_task(send(target, asks.next())))
    return await asyncio.gather(*tasks)
