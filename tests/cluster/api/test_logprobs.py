"""Logprobs in OpenAI's and vLLM's shapes, aligned with the text that is sent, whole and streamed; echo and scoring.

The echo engine gives every token logprob -0.25 and names the ids after it as its alternatives.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx2
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.cluster.api import generation
from diptych.cluster.api.answer import Choice, Piece
from diptych.cluster.api.generation import Generator
from diptych.cluster.api.logprobs import LEAST, Entry, chat_logprobs, text_logprobs
from diptych.cluster.api.reading import AnswerReader, Reading
from diptych.cluster.api.testing import FrontDoor, byte_level_tokenizer
from diptych.cluster.api.text import TextStream, TokenTable
from diptych.cluster.formats.format import REASONING_FORMATS, Format
from diptych.cluster.router.call import GenerateCall, TokenDelta
from diptych.protos.types import FinishReason, SamplingParams, TokenLogprobs

ASK: list[Any] = [{"role": "user", "content": "hello \u4f60\u597d world"}]
TABLE = TokenTable(byte_level_tokenizer())


@pytest.fixture
async def client(door: FrontDoor) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=door.listener.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


async def test_a_chat_answer_tells_every_token_of_its_text(client: openai.AsyncOpenAI, door: FrontDoor) -> None:
    reply = await client.chat.completions.create(
        model="echo", messages=ASK, logprobs=True, top_logprobs=3, max_tokens=60, stop=["\nzzz"]
    )
    choice = reply.choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    spelled = b"".join(bytes(token.bytes or ()) for token in choice.logprobs.content)
    assert spelled.decode().removeprefix("<|im_start|>") == choice.message.content
    for token in choice.logprobs.content:
        assert token.logprob == -0.25
        assert [top.logprob for top in token.top_logprobs] == [-0.25, -1.25, -2.25]
        assert token.top_logprobs[0].bytes == token.bytes
        assert token.token == bytes(token.bytes or ()).decode(errors="replace")
    sampling = door.decode.orders[-1].request.sampling
    assert (sampling.logprobs, sampling.prompt_logprobs) == (3, None)


async def test_without_being_asked_nothing_is_told(client: openai.AsyncOpenAI, door: FrontDoor) -> None:
    reply = await client.chat.completions.create(model="echo", messages=ASK, max_tokens=4)
    assert reply.choices[0].logprobs is None
    assert door.decode.orders[-1].request.sampling.logprobs is None
    bare = await client.chat.completions.create(model="echo", messages=ASK, max_tokens=4, logprobs=True)
    assert bare.choices[0].logprobs is not None
    assert [token.top_logprobs for token in bare.choices[0].logprobs.content or ()] == [[]] * 4


@pytest.mark.parametrize("stop", [None, ["o w"], ["\u597d"], ["hello"]])
async def test_streamed_logprobs_are_the_whole_ones_and_never_ahead_of_their_text(
    client: openai.AsyncOpenAI, stop: list[str] | None
) -> None:
    ask: dict[str, Any] = {
        "model": "echo",
        "prompt": "say \u4f60\u597d hello world \u4f60 now",
        "max_tokens": 30,
        "logprobs": 2,
        "stop": stop,
    }
    whole = (await client.completions.create(**ask)).choices[0]
    assert whole.logprobs is not None
    text, tokens, offsets = "", [], []
    async for chunk in await client.completions.create(**ask, stream=True):
        choice = chunk.choices[0]
        text += choice.text
        if choice.logprobs is not None:
            tokens += choice.logprobs.tokens or []
            offsets += choice.logprobs.text_offset or []
            assert all(offset < len(text) for offset in choice.logprobs.text_offset or ())
    assert text == whole.text
    assert (tokens, offsets) == (whole.logprobs.tokens, whole.logprobs.text_offset)
    assert offsets == sorted(offsets)
    if stop is not None:
        assert stop[0] not in text


async def test_completions_have_columns_of_equal_length(client: openai.AsyncOpenAI) -> None:
    choice = (await client.completions.create(model="echo", prompt="hello", max_tokens=4, logprobs=0)).choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs == [-0.25] * 4
    assert choice.logprobs.tokens is not None
    assert choice.logprobs.top_logprobs == [{token: -0.25} for token in choice.logprobs.tokens]
    assert "".join(choice.logprobs.tokens) == choice.text


async def test_echo_begins_with_the_prompt_and_counts_on_from_it(client: openai.AsyncOpenAI, door: FrontDoor) -> None:
    prompt = "hello w\u4f60"
    ids = door.tokenizer.encode(prompt).ids
    choice = (
        await client.completions.create(model="echo", prompt=prompt, max_tokens=3, logprobs=1, echo=True)
    ).choices[0]
    generated = door.tokenizer.decode(ids[:3])
    assert choice.text == prompt + generated
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs == [None] + [-0.25] * (len(ids) + 2)
    assert choice.logprobs.text_offset is not None
    assert choice.logprobs.text_offset[len(ids)] == len(prompt)
    assert choice.logprobs.tokens is not None
    assert len(choice.logprobs.tokens) == len(choice.logprobs.text_offset) == len(ids) + 3
    pieces = [
        chunk.choices[0]
        async for chunk in await client.completions.create(
            model="echo", prompt=ids, max_tokens=3, logprobs=1, echo=True, stream=True
        )
    ]
    assert "".join(piece.text for piece in pieces) == choice.text
    told = [offset for piece in pieces if piece.logprobs for offset in piece.logprobs.text_offset or ()]
    assert told == choice.logprobs.text_offset


async def test_a_prompt_is_scored_without_generating(http: httpx2.AsyncClient, door: FrontDoor) -> None:
    ask = {"model": "echo", "prompt": "hello world", "max_tokens": 0, "echo": True, "logprobs": 1}
    answer = (await http.post("/v1/completions", json=ask)).json()
    ids = door.tokenizer.encode("hello world").ids
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("hello world", "length")
    assert choice["logprobs"]["token_logprobs"] == [None] + [-0.25] * (len(ids) - 1)
    assert answer["usage"]["completion_tokens"] == 0
    assert {order.request.sampling.max_tokens for order in door.prefill.orders} == {1}


@pytest.mark.parametrize("n", [1, 2])
async def test_prompt_logprobs_are_told_as_vllm_tells_them(http: httpx2.AsyncClient, door: FrontDoor, n: int) -> None:
    ids = door.tokenizer.encode("hello world").ids
    ask = {"model": "echo", "prompt": ids, "max_tokens": 2, "prompt_logprobs": 2, "n": n}
    choices = (await http.post("/v1/completions", json=ask)).json()["choices"]
    assert len(choices) == n
    for choice in choices:
        first, *told = choice["prompt_logprobs"]
        assert first is None
        assert [next(iter(entry)) for entry in told] == [str(token) for token in ids[1:]]
        for token, entry in zip(ids[1:], told, strict=True):
            own, other = entry[str(token)], entry[str(token + 1)]
            assert (own["logprob"], own["rank"], own["decoded_token"]) == (-0.25, 1, TABLE.spelling(token).decode())
            assert (other["logprob"], other["rank"]) == (-1.25, 2)
    asked = [order.request.sampling.prompt_logprobs for order in door.prefill.orders]
    assert asked == [2] + [None] * (n - 1)  # the others read the prompt from the cache
    chat = (
        await http.post("/v1/chat/completions", json={"model": "echo", "messages": ASK, "prompt_logprobs": 0})
    ).json()
    assert chat["prompt_logprobs"][0] is None
    assert all(len(entry) == 1 for entry in chat["prompt_logprobs"][1:])


async def test_logprobs_that_an_engine_does_not_tell_are_an_error(http: httpx2.AsyncClient, door: FrontDoor) -> None:
    door.prefill.faults.no_prompt_logprobs = door.decode.faults.no_prompt_logprobs = True
    ask = {"model": "echo", "prompt": "hello", "max_tokens": 2, "prompt_logprobs": 1}
    response = await http.post("/v1/completions", json=ask)
    assert response.status_code >= 500
    assert "logprobs" in response.json()["error"]["message"]


def test_an_infinite_logprob_is_told_as_a_number() -> None:
    entries = [Entry(5, TokenLogprobs(-float("inf"), 9, ((6, -float("inf")),)), 0)]
    for shape in (chat_logprobs(entries, TABLE), text_logprobs(entries, TABLE)):
        assert str(LEAST) in json.dumps(shape, allow_nan=False)


def test_tokens_that_are_no_text_stay_apart() -> None:
    parts = TABLE.tokenizer.encode("\u4f60\u597d").ids
    top = tuple((token, -1.0 - i) for i, token in enumerate(parts))
    shape = text_logprobs([Entry(parts[0], TokenLogprobs(-0.5, 1, top), 0)], TABLE)
    assert len(shape["top_logprobs"][0]) == len(set(parts))
    assert shape["tokens"][0] == "bytes:\\xe4"


def deltas_of(tokens: list[int], cuts: list[int]) -> AsyncGenerator[TokenDelta, bool | None]:
    """The tokens in as many deltas as there are cuts among them, and one more."""
    end: Any = SimpleNamespace(reason=FinishReason.LENGTH)

    async def deltas() -> AsyncGenerator[TokenDelta, bool | None]:
        begin = 0
        for cut in [*sorted({c for c in cuts if 0 < c < len(tokens)}), len(tokens)]:
            piece = tokens[begin:cut]
            if piece and (yield TokenDelta(piece, logprobs=[TokenLogprobs(-float(t), 1) for t in piece])):
                break
            begin = cut
        yield TokenDelta([], end)

    return deltas()


async def play(
    tokens: list[int], cuts: list[int], stops: list[str], *, include: bool = False
) -> tuple[str, list[Entry], list[tuple[int, int]]]:
    """Text, entries, and (characters, entries) that are out after each piece."""
    sampling = SamplingParams(max_tokens=len(tokens) + 1, logprobs=0)
    text = TextStream(TABLE, stops, include_stop=include)
    choice = Choice(0, GenerateCall(model="m", prompt=(1,), sampling=sampling), text)
    pieces: list[Piece] = [piece async for piece in choice.pieces(deltas_of(tokens, cuts))]
    out, entries, steps = "", [], []
    for piece in pieces:
        out += piece.text
        entries += piece.entries
        steps.append((len(out), len(entries)))
    return out, entries, steps


TEXTS = st.text("ab \u4f60\u00e9\U0001f600\n", max_size=12)


@settings(deadline=None, max_examples=200)
@given(TEXTS, st.lists(st.integers(1, 40)), st.lists(st.text("ab \u4f60", min_size=1, max_size=3), max_size=2))
def test_however_tokens_arrive_logprobs_end_where_the_text_ends(text: str, cuts: list[int], stops: list[str]) -> None:
    tokens = TABLE.tokenizer.encode(text).ids if text else []
    if not tokens:
        return
    out, entries, steps = asyncio.run(play(tokens, cuts, stops))
    alone, once, _ = asyncio.run(play(tokens, [], stops))
    assert (out, entries) == (alone, once)
    assert [entry.token for entry in entries] == tokens[: len(entries)]
    assert all(entry.logprobs == TokenLogprobs(-float(entry.token), 1) for entry in entries)
    joined = b"".join(TABLE.spelling(entry.token) for entry in entries).decode(errors="replace")
    if out == text:
        assert len(entries) == len(tokens)
    else:
        assert joined.startswith(out)  # the last token may reach beyond the cut, none begins there
        assert all(entry.offset < len(out) for entry in entries)
        if entries:
            rest = b"".join(TABLE.spelling(entry.token) for entry in entries[:-1]).decode(errors="ignore")
            assert len(rest) <= len(out)
    for characters, count in steps[:-1]:
        assert all(entry.offset < characters for entry in entries[:count])


@pytest.mark.parametrize("logprobs", [0, None])
@settings(max_examples=50)
@given(st.lists(st.integers(1, 40)))
def test_however_tokens_arrive_each_belongs_to_the_thought_or_to_the_words(
    logprobs: int | None, cuts: list[int]
) -> None:
    """A busy router gets several at once: the end of a thought and the first word among them."""
    tokens = TABLE.tokenizer.encode("<think>\nhm \u4f60\n</think>\n\nSure. I do.").ids

    async def told(cuts: list[int]) -> tuple[list[tuple[str, list[int]]], int]:
        reader = AnswerReader(Reading(format=Format(None, REASONING_FORMATS["think"])))
        sampling = SamplingParams(max_tokens=len(tokens) + 1, logprobs=logprobs)
        call = GenerateCall(model="m", prompt=(1,), sampling=sampling)
        choice, found = Choice(0, call, TextStream(TABLE, []), reader), []
        async for piece in choice.pieces(deltas_of(tokens, cuts)):
            entries = [entry.token for entry in piece.entries]
            found += [(type(said).__name__, entries) for said in choice.read(piece) if logprobs is not None]
        return found, choice.reasoning_tokens

    assert asyncio.run(told(cuts)) == asyncio.run(told(list(range(1, len(tokens)))))


@pytest.mark.parametrize("size", [1, 2, 5, 100])
async def test_tokens_behind_a_stop_string_are_not_counted(size: int) -> None:
    tokens = TABLE.tokenizer.encode("one two three four").ids
    call = GenerateCall(model="m", prompt=(1,), sampling=SamplingParams(max_tokens=50))
    choice = Choice(0, call, TextStream(TABLE, [" th"]))
    out = [piece.text async for piece in choice.pieces(deltas_of(tokens, list(range(0, len(tokens), size))))]
    known = next(n for n in range(len(tokens)) if " th" in TABLE.tokenizer.decode(tokens[:n]))
    assert ("".join(out), choice.num_tokens, choice.finish_reason) == ("one two", known, "stop")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_many_logprobs_are_shaped_in_a_thread_and_are_the_same(
    http: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """Guards against an answer of ten megabytes that holds everybody's streams while it is made."""
    is_chat = path.endswith("chat/completions")
    ask: dict[str, Any] = {"model": "echo", "max_tokens": 40, "n": 2, "ignore_eos": True, "prompt_logprobs": 2}
    ask |= {"messages": ASK, "logprobs": True, "top_logprobs": 3} if is_chat else {"prompt": "hello", "logprobs": 3}
    threads = []
    shaped = Generator._shaped

    def watched(self: Generator, *given: Any) -> Any:
        threads.append(threading.current_thread())
        return shaped(self, *given)

    monkeypatch.setattr(Generator, "_shaped", watched)
    bodies = []
    for inline in (generation.INLINE_LOGPROBS, 10):
        monkeypatch.setattr(generation, "INLINE_LOGPROBS", inline)
        monkeypatch.setattr(generation, "INLINE_BODY_BYTES", 100 * inline)
        bodies.append((await http.post(path, json=ask)).json() | {"id": "", "created": 0})
    assert bodies[0]["choices"] == bodies[1]["choices"]
    assert bodies[0] == bodies[1]
    assert [thread is threading.main_thread() for thread in threads] == [True, False]
