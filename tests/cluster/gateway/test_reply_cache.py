"""Kept answers: equal requests of one tenant alone, whole answers alone, in bounded memory for a bounded time."""

from __future__ import annotations

import json
from typing import Any

import pytest
from journeys import HELLO, gateway, read, run, text_of
from prometheus_client import CollectorRegistry, generate_latest

from diptych.cluster.gateway.cache import _UNASKED, CachedRoute, ResponseCache
from diptych.cluster.gateway.money import cache_of
from diptych.cluster.gateway.money_metrics import MoneyMetrics
from diptych.cluster.gateway.money_settings import CacheSettings, RouteCacheSettings
from diptych.cluster.gateway.ports import Context, Ports
from diptych.cluster.gateway.requests import read_request
from diptych.cluster.gateway.settings import GatewaySettings
from diptych.cluster.gateway.testing import ScriptedTarget, says
from diptych.protos.anthropic_messages import parse_messages
from diptych.protos.deltas import CallArguments, CallBegin, CallEnd, Content, Reasoning, Signature
from diptych.protos.errors import StartupError
from diptych.protos.openai import ChatRequest
from diptych.protos.openai_output import FORM_FIELDS
from diptych.protos.openai_template import TEMPLATE_FIELDS
from diptych.protos.openai_tools import TOOL_FIELDS
from diptych.protos.replies import Began, Ended, Event, Reply, ReplyBuilder, Usage
from diptych.protos.responses import parse_responses


def cache(clock: Any = lambda: 0.0, *, always: bool = False, targets: tuple[str, ...] = ("p/a",), **given: Any) -> Any:
    settings = CacheSettings.model_validate(given)
    route = CachedRoute(settings=RouteCacheSettings(ttl_s=60, always=always), targets=targets)
    return ResponseCache(settings, {"chat": route}, clock=clock)


def asked(text: str = "hello", **params: Any) -> Any:
    return read_request("chat", [{"role": "user", "content": text}], {"temperature": 0, **params})


def reply(*events: Event) -> Reply:
    builder = ReplyBuilder()
    for event in events or (Began(), Content("fine"), Usage(input_tokens=1, output_tokens=1), Ended("stop")):
        builder.add(event)
    return builder.reply()


async def test_equal_means_everything_that_an_answer_depends_on() -> None:
    """Another tenant's, another seed's, another schema's answer is a wrong answer; another deadline's is not."""
    found = cache()
    mine = Context(tenant="a")
    await found.keep(asked(), mine, reply())
    for same in ({}, {"stream": True}, {"timeout_s": 5}, {"user": "me"}, {"temperature": 0.0}):
        assert await found.find(asked(**same), mine) == reply(), same
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    tools = [{"type": "function", "function": {"name": "f"}}]
    others: list[dict[str, Any]] = [
        {"seed": 1},
        {"max_tokens": 5},
        {"stop": ["x"]},
        {"response_format": form},
        {"tools": tools},
        {"reasoning_effort": "low"},
        {"provider_options": {"p": {"x": 1}}},
    ]
    for other in others:
        assert await found.find(asked(**other), mine) is None, other
    assert await found.find(asked("hello "), mine) is None
    assert await found.find(asked(), Context(tenant="b")) is None
    moved = cache(targets=("p/a", "p/b"))
    moved._kept = found._kept
    assert await moved.find(asked(), mine) is None


SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "string"}}}


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": SCHEMA, **function}}


def form(**more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, **more}}


def of_two(**fields: Any) -> dict[str, Any]:
    return {"tools": [tool(), tool(name="g")], **fields}


# What may stand in a chat body, with values that each ask for something else; beside which other fields.
ASKED_FOR: dict[str, list[dict[str, Any]]] = {
    "model": [{}],
    "messages": [
        {"messages": [{"role": role, "content": text, **more}]}
        for role, text, more in (
            ("user", "a", {}),
            ("user", "b", {}),
            ("system", "a", {}),
            ("user", "a", {"name": "x"}),
        )
    ]
    + [
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a/"} | more}]}]}
        for more in ({}, {"detail": "low"})
    ]
    + [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **more}]}
        for more in ({}, {"reasoning_content": "c"}, {"refusal": "no"})
    ],
    "tools": [
        {"tools": [one]}
        for one in (tool(), tool(strict=True), tool(strict=False), tool(description="d"), tool(parameters={}))
    ],
    "tool_choice": [
        of_two(tool_choice=choice) for choice in ("none", "required", {"type": "function", "function": {"name": "f"}})
    ],
    "parallel_tool_calls": [of_two(), of_two(parallel_tool_calls=False)],
    "functions": [{"functions": [{"name": "f"}]}],
    "function_call": [{"functions": [{"name": "f"}], "function_call": {"name": "f"}}],
    "response_format": [
        {"response_format": one}
        for one in (form(), form(strict=True), form(strict=False), form(description="d"), {"type": "json_object"})
    ],
    "guided_json": [{"guided_json": SCHEMA}],
    "guided_regex": [{"guided_regex": "a"}],
    "guided_choice": [{"guided_choice": ["a"]}],
    "guided_grammar": [{"guided_grammar": "a"}],
    "structured_outputs": [{"structured_outputs": {"regex": "b"}}],
    "reasoning_effort": [{"reasoning_effort": one} for one in ("low", "high", "xhigh", "max")],
    "chat_template_kwargs": [{"chat_template_kwargs": {"x": True}}, {"chat_template_kwargs": {"x": 1}}],
    "add_generation_prompt": [{"add_generation_prompt": False}],
    "continue_final_message": [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}], **more}
        for more in ({}, {"continue_final_message": True})
    ],
    "logit_bias": [{"logit_bias": {"5": 1}}, {"logit_bias": {"5": 2}}],
    "provider_options": [{"provider_options": {"p": {"x": 1}}}, {"provider_options": {"p": {"x": True}}}],
    "structured": [{"stream": True, "structured": True, "response_format": form(name="y")}],
    "top_logprobs": [{"logprobs": True, "top_logprobs": 2}],
    "stop": [{"stop": "a"}, {"stop": ["a", "b"]}],
    "bad_words": [{"bad_words": ["a"]}],
    "stop_token_ids": [{"stop_token_ids": [1]}],
    "allowed_token_ids": [{"allowed_token_ids": [1]}],
    "prompt_cache_key": [{"prompt_cache_key": "a"}],
    **{
        name: [{name: 1}]
        for name in "temperature top_k seed presence_penalty frequency_penalty min_tokens prompt_logprobs n".split()
    },
    **{name: [{name: 0.5}] for name in ("top_p", "min_p", "repetition_penalty")},
    **{name: [{name: 3}] for name in ("max_tokens", "max_completion_tokens", "reasoning_budget")},
    **{name: [{name: True}] for name in ("include_stop_str_in_output", "ignore_eos", "logprobs")},
    **{name: [{name: False}] for name in ("include_reasoning", "schema_in_prompt")},
}


def test_no_two_requests_that_ask_for_something_else_have_one_key() -> None:
    """Bytes that are passed on say `strict` and an effort of `max`, which the canonical request did not know: an answer
    made without them was given for one with them. A field that is new in bodies has to be added to the table.
    """
    known = {*ChatRequest.model_fields, *TOOL_FIELDS, *TEMPLATE_FIELDS, *FORM_FIELDS} - ChatRequest.made - {*_UNASKED}
    assert ASKED_FOR.keys() == known
    found, keys = cache(), dict[bytes, str]()
    for bodies in ASKED_FOR.values():
        for body in bodies:
            said = json.dumps(body)
            given = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0, **body}
            key = found._key(read_request("chat", given.pop("messages"), given), Context())
            assert keys.setdefault(key, said) == said
    assert len(keys) > 70


def test_other_wire_formats_have_keys_too() -> None:
    """A request to /v1/messages of a route with a cache was an internal error: no JSON was made of its `thinking`."""
    anthropic: dict[str, Any] = {"max_tokens": 2000, "messages": [{"role": "user", "content": "hi"}]}
    theirs = {"name": "f", "input_schema": SCHEMA}
    responses: dict[str, Any] = {"input": "hi"}
    text = {"type": "json_schema", "name": "x", "schema": SCHEMA}
    flat = {"type": "function", "name": "f", "parameters": SCHEMA}
    bodies: list[Any] = [
        (
            {**anthropic, **more}
            for more in (
                {},
                {"thinking": {"type": "disabled"}},
                {"thinking": {"type": "enabled", "budget_tokens": 1024}},
                {"output_config": {"effort": "high"}},
                {"output_config": {"effort": "max"}},
                {"system": "x"},
                {"tools": [theirs]},
                {"tools": [{**theirs, "strict": True}]},
            )
        ),
        (
            {**responses, **more}
            for more in (
                {},
                {"reasoning": {"effort": "high"}},
                {"reasoning": {"effort": "max"}},
                {"instructions": "x"},
                {"tools": [flat]},
                {"tools": [{**flat, "strict": False}]},
                {"text": {"format": text}},
                {"text": {"format": {**text, "strict": False}}},
            )
        ),
    ]
    found, keys = cache(), set()
    for body in bodies[0]:
        keys.add(found._key(parse_messages(json.dumps({"model": "chat", **body}).encode()), Context()))
    for body in bodies[1]:
        read = parse_responses(json.dumps({"model": "chat", **body}).encode())
        keys.add(found._key(read.as_chat(asked("hi").messages), Context()))
    assert len(keys) == 15  # `instructions` become a message behind the reader


async def test_only_whole_answers_of_words_are_kept() -> None:
    """A cut answer, one that a filter ended, a call, nothing: each would be given again as if it were the answer."""
    found = cache()
    call = (CallBegin(0, "f", "1"), CallArguments(0, "{}"), CallEnd(0))
    wrong: list[tuple[Event, ...]] = [
        (Content("half"), Ended("length")),
        (Content("x"), Ended("content_filter")),
        (*call, Ended("tool_calls")),
        (Content("x"), *call, Ended("stop")),
        (Ended("stop"),),
        (Content("never ended"),),
    ]
    for events in wrong:
        await found.keep(asked(), Context(), reply(*events))
        assert await found.find(asked(), Context()) is None, events
    await found.keep(asked(), Context(), reply(Reasoning("hm"), Signature("s"), Content("x"), Ended("stop")))
    assert await found.find(asked(), Context()) is not None


async def test_who_asks_decides() -> None:
    """Temperature 0, or a wish; no-store forbids, no-cache asks anew and keeps that."""
    found, always = cache(), cache(always=True)
    assert not found.takes(asked(temperature=0.5), Context())
    assert not found.takes(read_request("chat", HELLO, {}), Context())
    assert found.takes(asked(temperature=0.5), Context(cache="always"))
    assert always.takes(asked(temperature=0.5), Context())
    assert not always.takes(asked(), Context(cache="no-store"))
    assert not found.takes(asked(logprobs=True), Context())
    assert not found.takes(read_request("other", HELLO, {"temperature": 0}), Context(cache="always"))
    await found.keep(asked(), Context(), reply())
    assert await found.find(asked(), Context(cache="no-cache")) is None
    fresh = reply(Content("new"), Ended("stop"))
    await found.keep(asked(), Context(cache="no-cache"), fresh)
    assert await found.find(asked(), Context()) == fresh


async def test_memory_and_time_are_bounded() -> None:
    """The one that was not used longest goes; a long answer is not kept; an old one is none."""
    time = 0.0
    registry = CollectorRegistry()
    settings = CacheSettings(max_mib=1, max_answer_kib=300)
    route = CachedRoute(settings=RouteCacheSettings(ttl_s=60), targets=("p/a",))
    found = ResponseCache(settings, {"chat": route}, metrics=MoneyMetrics(registry), clock=lambda: time)
    big = reply(Content("x" * 100_000), Ended("stop"))
    for number in range(12):
        await found.keep(asked(str(number)), Context(), big)
        await found.find(asked("0"), Context())
    assert found.num_bytes <= 1 << 20
    assert await found.find(asked("0"), Context()) is not None
    assert await found.find(asked("1"), Context()) is None
    await found.keep(asked("huge"), Context(), reply(Content("x" * 400_000), Ended("stop")))
    assert await found.find(asked("huge"), Context()) is None
    time = 60.0
    assert await found.find(asked("0"), Context()) is None
    told = generate_latest(registry).decode()
    assert 'diptych_gateway_cache_total{outcome="hit"} 13.0' in told
    found.clear()
    assert found.num_bytes == 0
    assert "diptych_gateway_cache_bytes 0.0" in generate_latest(registry).decode()


def test_a_gateway_asks_its_target_once_and_says_so() -> None:
    """A stream is given again as events, and what was kept of a stream serves a whole answer."""

    async def job() -> None:
        target = ScriptedTarget("p/a", [says("fine", " day")])
        route = {"targets": ["p/a"], "cache": {"ttl_s": 60}}
        settings = GatewaySettings.model_validate({"routes": {"chat": route}})
        gate = gateway(target, cache={"ttl_s": 60}, ports={"cache": cache_of(settings, metrics=None, ports=Ports())})
        items, _, record = await read(gate, temperature=0)
        assert (text_of(items), record.cache) == ("fine day", "miss")
        again, _, record = await read(gate, temperature=0)
        assert text_of(again) == "fine day"
        assert isinstance(again[-1], Ended)
        assert (record.cache, record.outcome) == ("hit", "cached")
        whole, record = await gate.answer(asked("hello"))
        assert (whole.message.content, record.cache) == ("fine day", "hit")
        _, _, record = await read(gate)
        assert record.cache == ""
        _, _, record = await read(gate, temperature=0, context=Context(cache="no-store"))
        assert record.cache == ""
        assert len(target.requests) == 3

    run(job())


def test_a_route_with_a_cache_needs_one() -> None:
    """A key of the configuration that does nothing is a lie."""

    async def job() -> None:
        with pytest.raises(StartupError, match=r"gateway\.routes\.chat\.cache"):
            gateway(ScriptedTarget("p/a"), cache={"ttl_s": 60})

    run(job())
