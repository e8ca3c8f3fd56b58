"""n choices: who goes when and where, what is counted, and how they end together."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import openai
import pytest

from diptych.cluster.api.sampling import of_choice
from diptych.cluster.api.testing import FrontDoor, front_door
from diptych.cluster.router.rig import until
from diptych.protos.errors import EngineError
from diptych.protos.types import SamplingParams

TEXT = "/v1/completions"
ASK: dict[str, Any] = {"model": "echo", "prompt": "the quick brown fox", "max_tokens": 6, "n": 3, "seed": 7}


@pytest.fixture
async def client(door: FrontDoor) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=door.listener.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def seeds(door: FrontDoor) -> list[int]:
    return [order.request.sampling.seed for order in door.decode.orders]


async def test_every_choice_has_its_index_and_the_prompt_is_counted_once(client: openai.AsyncOpenAI) -> None:
    one = await client.completions.create(**{**ASK, "n": 1})
    three = await client.completions.create(**ASK)
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    assert {choice.text for choice in three.choices} == {one.choices[0].text}
    assert {choice.finish_reason for choice in three.choices} == {"length"}
    assert one.usage is not None
    assert three.usage is not None
    assert three.usage.prompt_tokens == one.usage.prompt_tokens
    assert three.usage.completion_tokens == 18


async def test_choice_0_keeps_the_seed_and_the_others_have_their_own_each_time(
    http: httpx2.AsyncClient, door: FrontDoor
) -> None:
    await http.post(TEXT, json={**ASK, "n": 1})
    await http.post(TEXT, json=ASK)
    await http.post(TEXT, json={**ASK, "n": 2})
    alone, *three = seeds(door)[:4]
    assert alone == three[0] == 7
    assert len(set(three)) == 3
    assert seeds(door)[4:] == three[:2]
    assert of_choice(SamplingParams(max_tokens=1, seed=8), 1).seed not in three


async def test_the_others_wait_for_a_token_from_the_decode_engine_and_take_the_same_engines() -> None:
    async with front_door() as door, httpx2.AsyncClient(base_url=door.listener.url, timeout=20) as http:
        door.decode.faults.silent = True
        task = asyncio.create_task(http.post(TEXT, json=ASK))
        await until(lambda: len(door.prefill.orders) == 1 and door.prefill.open_orders == 0)
        assert len(door.decode.orders) == 1  # token 0 came from prefill: the prompt's KV is not at decode for sure
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await until(lambda: door.router.in_flight == {})
        door.decode.faults.silent = False
        answer = (await http.post(TEXT, json={**ASK, "explain": True})).json()
        told = answer["diptych"]["choices"]
        assert [entry["policy"] == "pin" for entry in told] == [False, True, True]
        assert len({(entry["prefill_engine"], entry["decode_engine"]) for entry in told}) == 1


async def test_a_choice_that_is_over_with_its_first_token_lets_the_others_go(client: openai.AsyncOpenAI) -> None:
    reply = await client.completions.create(**{**ASK, "max_tokens": 1})
    assert len(reply.choices) == 3


@pytest.mark.parametrize("chat", [True, False])
async def test_streamed_choices_join_to_the_whole_ones(client: openai.AsyncOpenAI, chat: bool) -> None:
    more: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}, "extra_body": {"explain": True}}
    texts, ends, roles = [""] * 3, [""] * 3, [0] * 3
    if chat:
        ask: dict[str, Any] = {"model": "echo", "messages": [{"role": "user", "content": "hello"}], "n": 3}
        wanted = [c.message.content for c in (await client.chat.completions.create(**ask)).choices]
        chunks: list[Any] = [chunk async for chunk in await client.chat.completions.create(**ask, **more)]
    else:
        wanted = [c.text for c in (await client.completions.create(**ASK)).choices]
        chunks = [chunk async for chunk in await client.completions.create(**ASK, **more)]
    for chunk in chunks:
        for choice in chunk.choices:
            assert not ends[choice.index]  # nothing follows a choice's end
            roles[choice.index] += chat and choice.delta.role == "assistant"
            texts[choice.index] += (choice.delta.content or "") if chat else choice.text
            ends[choice.index] = choice.finish_reason or ""
    assert texts == wanted
    assert all(ends)
    assert roles == [int(chat)] * 3
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert len(chunks[-1].model_extra["diptych"]["choices"]) == 3
    assert all("diptych" not in (chunk.model_extra or {}) for chunk in chunks[:-1])


async def test_choices_are_streamed_side_by_side() -> None:
    async with front_door(step_s=0.002) as door, httpx2.AsyncClient(base_url=door.listener.url, timeout=20) as http:
        body = {**ASK, "max_tokens": 60, "stream": True}
        events = [json.loads(line[6:]) for line in (await http.post(TEXT, json=body)).text.split("\n\n") if "{" in line]
        order = [event["choices"][0]["index"] for event in events]
        assert order[0] == 0
        assert max(order[: order.index(1) + 20]) > 0
        assert order.index(1) < len(order) - 1 - order[::-1].index(0), "choice 1 began before choice 0 was over"


@pytest.mark.parametrize("stream", [False, True])
async def test_one_failing_choice_fails_the_answer_and_cancels_the_rest(stream: bool) -> None:
    async with front_door(step_s=0.003) as door, httpx2.AsyncClient(base_url=door.listener.url, timeout=20) as http:
        door.decode.faults.error = EngineError("the engine gives up")
        door.decode.faults.error_at = 20
        door.decode.faults.error_count = 1
        body = {**ASK, "max_tokens": 1000, "stream": stream}
        response = await http.post(TEXT, json=body)
        if stream:
            assert response.status_code == 200
            last = response.text.removesuffix("\n\n").split("\n\n")[-1]
            assert json.loads(last[6:])["error"]["message"] == "the engine gives up"
        else:
            assert response.status_code == 500
            assert response.json()["error"]["message"] == "the engine gives up"
        await until(lambda: door.decode.open_orders == 0 and door.router.in_flight == {})
        assert len(door.decode.cancels) >= 2


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_cancels_all_choices(stream: bool) -> None:
    async with front_door(step_s=0.005) as door, httpx2.AsyncClient(base_url=door.listener.url, timeout=20) as http:
        task = asyncio.create_task(http.post(TEXT, json={**ASK, "max_tokens": 1000, "stream": stream}))
        await until(lambda: len(door.decode.orders) == 3 and door.decode.open_orders == 3)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await until(lambda: door.decode.open_orders == 0 and door.router.in_flight == {})
        assert len(set(door.decode.cancels)) == 3
        assert all(session.in_flight == 0 for session in door.router.view.sessions())


async def test_each_choice_ends_at_its_own_stop_string(http: httpx2.AsyncClient) -> None:
    answer = (await http.post(TEXT, json={**ASK, "max_tokens": 200, "stop": "brown"})).json()
    assert [(c["text"], c["finish_reason"]) for c in answer["choices"]] == [("the quick ", "stop")] * 3


PROMPTS = ["the quick brown fox", "jumps over", "the lazy dog and more"]


async def test_several_prompts_are_answered_as_if_each_came_alone(client: openai.AsyncOpenAI, door: FrontDoor) -> None:
    alone = [await client.completions.create(**{**ASK, "prompt": prompt, "n": 2}) for prompt in PROMPTS]
    seeds_alone = seeds(door)
    together = await client.completions.create(**{**ASK, "prompt": PROMPTS, "n": 2})
    assert [choice.index for choice in together.choices] == [0, 1, 2, 3, 4, 5]
    assert [c.text for c in together.choices] == [c.text for answer in alone for c in answer.choices]
    assert sorted(seeds(door)[6:]) == sorted(seeds_alone)
    assert together.usage is not None
    assert together.usage.completion_tokens == 36
    assert together.usage.prompt_tokens == sum(a.usage.prompt_tokens for a in alone if a.usage is not None)


async def test_streamed_prompts_join_to_the_whole_ones(client: openai.AsyncOpenAI) -> None:
    ask = {**ASK, "prompt": PROMPTS, "n": 2, "echo": True, "logprobs": 1}
    whole = await client.completions.create(**ask)
    texts, ends = [""] * 6, []
    async for event in await client.completions.create(**ask, stream=True):
        for choice in event.choices:
            texts[choice.index] += choice.text
            ends += [choice.index] if choice.finish_reason else []
    assert texts == [choice.text for choice in whole.choices]
    assert sorted(ends) == list(range(6))
    for choice, prompt in zip(whole.choices, (p for p in PROMPTS for _ in range(2)), strict=True):
        assert choice.text.startswith(prompt)


async def test_the_logprobs_of_a_prompt_stand_at_its_own_choices(http: httpx2.AsyncClient) -> None:
    answer = (await http.post(TEXT, json={**ASK, "prompt": PROMPTS, "prompt_logprobs": 0})).json()
    alone = [(await http.post(TEXT, json={**ASK, "prompt": p, "prompt_logprobs": 0})).json() for p in PROMPTS]
    told = [choice.get("prompt_logprobs") for choice in answer["choices"]]
    assert told == [choice.get("prompt_logprobs") for one in alone for choice in one["choices"]]
    assert len({json.dumps(entry) for entry in told}) == 3


async def test_one_prompt_that_is_too_long_refuses_all_before_any_starts(
    http: httpx2.AsyncClient, door: FrontDoor
) -> None:
    answer = await http.post(TEXT, json={**ASK, "prompt": ["short", "long " * 100_000]})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert door.decode.orders == []
