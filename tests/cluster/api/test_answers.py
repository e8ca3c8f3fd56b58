"""Whole and streamed answers through the official client, usage, stop strings, disconnects and mid-stream failures."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import openai
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from diptych.cluster.api.testing import FrontDoor, front_door
from diptych.cluster.router.rig import until
from diptych.protos.errors import EngineError

ASK: list[Any] = [{"role": "user", "content": "hello world"}]


@pytest.fixture
async def client(door: FrontDoor) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=door.listener.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def rendered(door: FrontDoor) -> str:
    return "<|im_start|>user\nhello world<|im_end|>\n<|im_start|>assistant\n"


async def test_a_whole_chat_answer(client: openai.AsyncOpenAI, door: FrontDoor) -> None:
    reply = await client.chat.completions.create(model="echo", messages=ASK, seed=5, temperature=0, top_p=0.9)
    prompt = door.tokenizer.encode(rendered(door), add_special_tokens=False).ids
    end = prompt.index(door.end_token())
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].message.content == door.tokenizer.decode(prompt[:end])
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len(prompt)
    assert reply.usage.completion_tokens == end + 1
    assert reply.usage.total_tokens == len(prompt) + end + 1
    assert reply.usage.prompt_tokens_details is not None
    assert reply.usage.prompt_tokens_details.cached_tokens == len(prompt) // 16 * 16
    for order in (*door.prefill.orders, *door.decode.orders):
        assert list(order.request.prompt) == prompt
        sampling = order.request.sampling
        assert (sampling.seed, sampling.temperature, round(sampling.top_p, 6)) == (5, 0, 0.9)
        assert sampling.stop_token_ids == {door.end_token()}


async def test_a_streamed_chat_answer_equals_the_whole_one(client: openai.AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(model="echo", messages=ASK)
    stream = await client.chat.completions.create(
        model="echo", messages=ASK, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    first, *middle, last, counts = chunks
    assert first.choices[0].delta.role == "assistant"
    assert first.choices[0].delta.content == ""
    assert "".join(chunk.choices[0].delta.content or "" for chunk in middle) == whole.choices[0].message.content
    assert last.choices[0].finish_reason == "stop"
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert counts.choices == []
    assert counts.usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


async def test_a_stream_without_usage_has_no_usage_field_and_ends_with_done(http: httpx2.AsyncClient) -> None:
    body = {"model": "echo", "messages": ASK, "stream": True}
    response = await http.post("/v1/chat/completions", json=body)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = response.text.removesuffix("\n\n").split("\n\n")
    assert events[-1] == "data: [DONE]"
    assert "usage" not in response.text
    assert json.loads(events[-2][6:])["choices"][0]["finish_reason"] == "stop"
    assert response.headers["x-request-id"] == json.loads(events[0][6:])["id"]


async def test_text_completions_whole_and_streamed(client: openai.AsyncOpenAI) -> None:
    prompt = "the quick \u4f60\u597d fox"
    whole = await client.completions.create(model="echo", prompt=prompt, max_tokens=40)
    stream = await client.completions.create(model="echo", prompt=prompt, max_tokens=40, stream=True)
    pieces = [chunk.choices[0] async for chunk in stream]
    assert "".join(piece.text for piece in pieces) == whole.choices[0].text
    assert whole.choices[0].text.startswith(prompt)
    assert (whole.choices[0].finish_reason, pieces[-1].finish_reason) == ("length", "length")
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 40


async def test_token_ids_are_taken_as_they_are(client: openai.AsyncOpenAI, door: FrontDoor) -> None:
    ids = door.tokenizer.encode("hello").ids
    reply = await client.completions.create(model="echo", prompt=ids, max_tokens=len(ids))
    assert reply.choices[0].text == "hello"
    assert door.decode.orders[-1].request.prompt == tuple(ids)


async def test_a_continuation_keeps_the_space_before_its_first_word() -> None:
    """Decoders of sentencepiece's kind take it from the front of a text; an answer is not the front."""
    words = ["<unk>", *"\u2581hello \u2581world \u2581hel lo".split(), *"\u2581helowrdusaitn:\n"]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    hello, world = (tokenizer.token_to_id(word) for word in ("\u2581hello", "\u2581world"))
    async with front_door(tokenizer=tokenizer) as door:
        client = openai.AsyncOpenAI(base_url=f"{door.listener.url}/v1", api_key="none", max_retries=0)
        ids = [hello, world]
        for fields, text in (({}, " hello world"), ({"echo": True}, "hello world hello world")):
            body: dict[str, Any] = {"model": "echo", "prompt": ids, "max_tokens": 2, **fields}
            assert (await client.completions.create(**body)).choices[0].text == text
            stream = await client.completions.create(**body, stream=True)
            assert "".join([chunk.choices[0].text async for chunk in stream]) == text
        reply = await client.chat.completions.create(model="echo", messages=ASK, max_tokens=200)
        prompt = door.decode.orders[-1].request.prompt
        said = prompt[: prompt.index(door.end_token())]
        assert reply.choices[0].message.content == tokenizer.decode([*prompt, *said])[len(tokenizer.decode(prompt)) :]
        await client.close()


async def test_max_tokens_one_is_answered_by_the_prefill_engine_alone(client: openai.AsyncOpenAI) -> None:
    reply = await client.completions.create(model="echo", prompt="hello", max_tokens=1)
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 1
    assert reply.choices[0].finish_reason == "length"


async def test_without_max_tokens_a_chat_gets_the_default_or_what_fits(
    client: openai.AsyncOpenAI, door: FrontDoor
) -> None:
    await client.chat.completions.create(model="echo", messages=ASK)
    assert door.decode.orders[-1].request.sampling.max_tokens == door.router.settings.default_max_tokens
    long = "q" * 1500
    await client.chat.completions.create(model="echo", messages=[{"role": "user", "content": long}])
    order = door.decode.orders[-1].request
    assert order.sampling.max_tokens == 2048 - len(order.prompt)


async def test_ignore_eos_goes_on_after_an_end_token(client: openai.AsyncOpenAI, door: FrontDoor) -> None:
    reply = await client.chat.completions.create(
        model="echo", messages=ASK, max_tokens=50, extra_body={"ignore_eos": True}
    )
    assert reply.choices[0].finish_reason == "length"
    assert door.decode.orders[-1].request.sampling.stop_token_ids == frozenset()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_ends_the_answer_and_the_work(http: httpx2.AsyncClient, stream: bool) -> None:
    async with front_door(step_s=0.002) as door, httpx2.AsyncClient(base_url=door.listener.url, timeout=20) as http:
        body = {"model": "echo", "prompt": "say hello world now", "max_tokens": 1000, "stop": ["o w", "zzz"]}
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        response = await http.post("/v1/completions", json=body)
        if stream:
            events = [json.loads(line[6:]) for line in response.text.split("\n\n") if line[6:7] == "{"]
            text = "".join(event["choices"][0]["text"] for event in events if event["choices"])
            reason, use = events[-2]["choices"][0]["finish_reason"], events[-1]["usage"]
        else:
            choice = response.json()["choices"][0]
            text, reason, use = choice["text"], choice["finish_reason"], response.json()["usage"]
        assert (text, reason) == ("say hell", "stop")
        assert use["completion_tokens"] < 20
        await until(lambda: len(door.decode.cancels) > 0 and door.decode.open_orders == 0)
        assert b'outcome="ok",tenant="other"} 1.0' in door.router.metrics.render()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_cancels_on_both_engines(stream: bool) -> None:
    async with front_door(step_s=0.01) as door, httpx2.AsyncClient(base_url=door.listener.url, timeout=20) as http:
        door.prefill.faults.silent = True  # still at work when the client leaves
        door.decode.faults.also_first_token = True
        body = {"model": "echo", "prompt": "hello", "max_tokens": 1000, "stream": stream}
        task = asyncio.create_task(http.post("/v1/completions", json=body))
        await until(lambda: door.decode.status().steps > 3)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await until(lambda: bool(door.prefill.cancels) and bool(door.decode.cancels))
        await until(lambda: door.decode.open_orders == 0 and door.router.in_flight == {})
        assert all(session.in_flight == 0 for session in door.router.view.sessions())
        assert b'outcome="cancelled",tenant="other"} 1.0' in door.router.metrics.render()


async def test_a_failure_before_the_first_token_has_its_status(http: httpx2.AsyncClient, door: FrontDoor) -> None:
    door.prefill.faults.silent = True
    door.decode.faults.error = EngineError("the engine gives up")
    for stream in (False, True):
        body = {"model": "echo", "prompt": "hello", "max_tokens": 9, "stream": stream}
        response = await http.post("/v1/completions", json=body)
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "engine_error"


async def test_a_failure_in_mid_stream_is_an_error_event_and_no_done(
    client: openai.AsyncOpenAI, http: httpx2.AsyncClient, door: FrontDoor
) -> None:
    await door.decode_alone()
    door.decode.faults.error = EngineError("the engine gives up")
    door.decode.faults.error_at = 5
    body = {"model": "echo", "prompt": "hello", "max_tokens": 9, "stream": True}
    text = (await http.post("/v1/completions", json=body)).text
    *_, before, last = text.removesuffix("\n\n").split("\n\n")
    assert json.loads(last[6:])["error"]["code"] == "engine_error"
    assert json.loads(before[6:])["choices"][0]["finish_reason"] is None
    assert "[DONE]" not in text
    stream = await client.completions.create(model="echo", prompt="hello", max_tokens=9, stream=True)
    with pytest.raises(openai.APIError, match="the engine gives up"):
        async for _ in stream:
            pass


async def test_an_engine_stream_that_drops_is_an_error_event(http: httpx2.AsyncClient, door: FrontDoor) -> None:
    await door.decode_alone()
    door.decode.faults.drop_stream_at = 4
    body = {"model": "echo", "prompt": "hello", "max_tokens": 9, "stream": True}
    text = (await http.post("/v1/completions", json=body)).text
    assert '"code":"engine_lost"' in text
    assert "[DONE]" not in text
    door.decode.faults.drop_stream_at = None
    await until(lambda: door.router.is_ready("echo"))
    assert (await http.post("/v1/completions", json={**body, "stream": False})).status_code == 200


async def test_64_streams_at_once_each_get_their_own_text(door: FrontDoor) -> None:
    async with httpx2.AsyncClient(
        base_url=door.listener.url, timeout=30, limits=httpx2.Limits(max_connections=64)
    ) as http:

        async def ask(number: int) -> None:
            prompt = f"number {number} says hello"
            size = len(door.tokenizer.encode(prompt).ids)
            body = {"model": "echo", "prompt": prompt, "max_tokens": size, "stream": True}
            lines = (await http.post("/v1/completions", json=body)).text.split("\n\n")
            assert "".join(json.loads(x[6:])["choices"][0]["text"] for x in lines if x[6:7] == "{") == prompt

        await asyncio.gather(*(ask(number) for number in range(64)))
    assert door.router.in_flight == {}
