"""Calls over real connections: kept, shared by threads, closed with their loop, forked, cut and asked again in time.

Guards against a connection for each call, a client of one loop that is used on another, sockets that outlive their
program, a child of a fork that takes the parent's loop along, and two tenants of one process that get one's key.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import pytest
from provider_wire import REPLY, SSE, Behaviour, Wire, answers, chunk, framed, head, sends, streams, wire

from diptych.agents import llm
from diptych.protos.deltas import Content


def registry_at(told: Wire, key: str = "sk-test-0123456789", **more: Any) -> llm.Registry:
    lab = {"base_url": f"http://127.0.0.1:{told.port}/v1", "api_key": "env:LAB_KEY"}
    return llm.Registry(providers={"lab": lab}, environ={"LAB_KEY": key}, **more)


def asking(registry: llm.Registry, **settings: Any) -> Any:
    @llm.call("lab/m", registry=registry, **{"retries": llm.Retries(attempts=1), **settings})
    def ask(topic: str) -> str:
        return f"Tell of {topic}"

    return ask


@asynccontextmanager
async def live(*behaviours: Behaviour, **more: Any) -> AsyncIterator[tuple[Wire, llm.Registry]]:
    async with wire(*behaviours) as told:
        registry = registry_at(told, **more)
        try:
            yield told, registry
        finally:
            await registry.close.aio()
            await asyncio.to_thread(registry.close)


async def test_one_connection_serves_many_calls_and_streams() -> None:
    whole, stream = answers(REPLY), streams(chunk({"content": "hello"}), chunk({}, "stop"), b"data: [DONE]\n\n")
    async with live(*[whole, stream] * 10) as (told, registry):
        ask = asking(registry)
        for _ in range(10):
            assert (await ask.aio("x")).text == "hello"
            assert (await ask.stream("x").reply.aio()).text == "hello"
        assert told.num_accepted == 1


async def test_32_threads_share_the_loop_of_synchronous_calls() -> None:
    async with live(answers(REPLY)) as (told, registry):
        ask = asking(registry)

        def all_of_them() -> list[str]:
            with ThreadPoolExecutor(32) as pool:
                return [reply.messages[0].content + reply.text for reply in pool.map(ask, map(str, range(200)))]

        found = await asyncio.to_thread(all_of_them)
        assert found == [f"Tell of {at}hello" for at in range(200)]
        assert told.num_accepted <= 32
        assert len(told.seen) == 200


async def test_two_event_loops_one_after_the_other() -> None:
    """Each has connections of its own, and takes them along when it ends."""
    async with live(answers(REPLY)) as (told, registry):
        ask = asking(registry)
        for number in (1, 2):
            reply = await asyncio.to_thread(lambda: asyncio.run(ask.aio("x")))
            assert reply.text == "hello"
            await told.all_closed()
            assert told.num_accepted == number


async def test_a_registry_that_was_closed_can_be_used_again() -> None:
    async with live(answers(REPLY)) as (told, registry):
        ask = asking(registry)
        for _ in range(2):
            await ask.aio("x")
            await registry.close.aio()
            await told.all_closed()
        await registry.close.aio()
        assert told.num_accepted == 2


def test_a_fork_leaves_both_sides_able_to_call() -> None:
    """The parent's loop waits at an epoll that the child shares: the child must not take it apart."""
    words = """
    import gc, json, os, sys, threading, warnings
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
    warnings.simplefilter("error")
    from diptych.agents import llm

    class Answering(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            choice = {"index": 0, "message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}
            body = json.dumps({"id": "c", "model": "m", "choices": [choice]}).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        def log_message(self, *_): pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    lab = {"base_url": f"http://127.0.0.1:{server.server_port}/v1", "api_key": "none"}
    registry = llm.Registry(providers={"lab": lab}, environ={})

    @llm.call("lab/m", registry=registry)
    def ask():
        return "x"

    assert ask().text == "hello"
    child = os.fork()
    if child == 0:
        gc.collect()
        code = 0 if ask().text == "hello" else 1
        gc.collect()
        os._exit(code)
    # the child asks this process's server, and then ends
    _, status = os.waitpid(child, 0)
    assert status == 0, status
    assert [ask().text for _ in range(3)] == ["hello"] * 3
    print("both")
    """
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(words)], capture_output=True, text=True, timeout=60, check=False
    )
    assert found.stdout.strip() == "both", found.stderr


@pytest.mark.parametrize(
    ("behaviour", "settings"),
    [
        (sends(then="hang"), {"timeout": 0.05}),
        (sends(head(content_type="application/json", content_length="9"), then="hang"), {"timeout": 0.05}),
    ],
)
async def test_a_whole_answer_that_does_not_come_ends_in_time(behaviour: Behaviour, settings: dict[str, Any]) -> None:
    async with live(behaviour) as (told, registry):
        with pytest.raises(llm.ProviderError) as caught:
            await asking(registry, **settings).aio("x")
        assert caught.value.failure.kind.value.startswith("timeout")
        await told.all_closed()


async def test_a_stream_whose_first_token_does_not_come_ends_in_time_and_one_that_has_begun_goes_on() -> None:
    silent = sends(head(**SSE), framed(chunk({"role": "assistant"})), then="hang")
    async with live(silent) as (told, registry):
        with pytest.raises(llm.ProviderError) as caught:
            await asking(registry, first_token_timeout=0.05).stream("x").reply.aio()
        assert caught.value.failure.kind == "timeout_first_token"
        await told.all_closed()
    async with live(streams(chunk({"content": "hello"}), chunk({}, "stop"), b"data: [DONE]\n\n")) as (_, registry):
        assert (await asking(registry, first_token_timeout=5.0).stream("x").reply.aio()).text == "hello"


async def test_a_target_that_says_when_is_asked_then_and_not_before() -> None:
    refused = answers({"error": {"message": "slow down"}}, "429 Too Many Requests", retry_after="0.2")
    async with live(refused, answers(REPLY)) as (_, registry):
        reply = await asking(registry, retries=llm.Retries(base_s=0.0)).aio("x")
        assert reply.text == "hello"
        error = reply.attempts[0].error
        assert isinstance(error, llm.ProviderError)
        assert error.failure.retry_after_s == pytest.approx(0.2)


async def test_a_cancelled_call_and_a_stream_that_is_left_are_seen_by_the_server() -> None:
    async with live(sends(then="hang")) as (told, registry):
        task = asyncio.create_task(asking(registry).aio("x"))
        await told.asked()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await told.all_closed()
    hangs = sends(head(**SSE), framed(chunk({"content": "hello"})), then="hang")
    async with live(hangs) as (told, registry):
        async with asking(registry).stream("x") as stream:
            async for event in stream:
                if isinstance(event, Content):
                    break
        await told.all_closed()

        def plain() -> str:
            for piece in asking(registry).stream("x").text():
                return str(piece)
            return ""

        assert await asyncio.to_thread(plain) == "hello"
        await told.all_closed()


async def test_two_tenants_of_one_process_use_their_own_keys_and_share_no_answer() -> None:
    def answer(number: int) -> Behaviour:
        return answers(
            {**REPLY, "choices": [{"index": 0, "message": {"role": "assistant", "content": f"answer {number}"}}]}
        )

    cache = llm.Cache()
    async with wire(*(answer(number) for number in range(4))) as told:
        registries = [registry_at(told, key, cache=cache) for key in ("sk-anne-0123456789", "sk-bert-0123456789")]
        asks = [asking(registry, temperature=0.0) for registry in registries]
        texts = [(await ask.aio("x")).text for ask in (*asks, *asks)]
        for registry in registries:
            await registry.close.aio()
    assert texts == ["answer 0", "answer 1", "answer 0", "answer 1"]
    assert [seen.headers["authorization"] for seen in told.seen] == [
        "Bearer sk-anne-0123456789",
        "Bearer sk-bert-0123456789",
    ]


async def test_what_is_traced_reaches_a_cluster_and_no_provider() -> None:
    from opentelemetry.sdk.trace import TracerProvider

    provider = TracerProvider()
    async with live(answers(REPLY), tracing=llm.Tracing(tracer_provider=provider)) as (told, registry):
        await asking(registry).aio("x")
        cluster = llm.Registry(
            environ={},
            clusters={"lab": llm.Cluster(f"http://127.0.0.1:{told.port}", tenant="anne")},
            tracing=llm.Tracing(tracer_provider=provider),
        )
        await asking(cluster, session="s1").aio("x")
        await cluster.close.aio()
        outside, own = told.seen
        assert "traceparent" not in outside.headers
        assert own.headers["traceparent"].startswith("00-")
        assert (own.headers["x-tenant"], own.headers["x-session-id"]) == ("anne", "s1")
        assert "session" not in json.loads(own.body)
    provider.shutdown()
