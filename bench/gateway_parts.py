"""The processes of gateway.py: a provider that only repeats itself, and who asks it. Standard library but for the one
that is measured, so that it runs in LiteLLM's environment too.

Run by gateway.py: PYTHON gateway_parts.py PART CORE [ADDRESS]. Parts: echo, front; bare, gateway, relay, litellm ask.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

CHUNKS = 64
PACE_S = 0.002
WARMUP = 30
MESSAGES = [
    {"role": "system", "content": "You are helpful."},
    {"role": "user", "content": "Say hello, please, and count to ten."},
]
PARAMS = {"max_tokens": 50, "temperature": 0.5}
# Its name chooses the pace of its stream.
MODELS = {"whole": "fast", "stream": "fast", "paced": "paced"}

# A call that ran: milliseconds to the first content and to the end, and how many pieces brought text.
Timed = tuple[float, float, int]
Ask = Callable[[str], Awaitable[tuple[float, int]]]


def _sse(data: object) -> bytes:
    return b"data: %s\n\n" % (data if isinstance(data, bytes) else json.dumps(data).encode())


def _chunk(delta: dict[str, str], finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    told = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    return _sse(told)


_USAGE = {"prompt_tokens": 7, "completion_tokens": CHUNKS, "total_tokens": 7 + CHUNKS}
_FRAMES = [
    _chunk({"role": "assistant", "content": ""}),
    *[_chunk({"content": "word "}) for _ in range(CHUNKS)],
    _chunk({}, "stop"),
    _sse({"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [], "usage": _USAGE}),
    _sse(b"[DONE]"),
]
_CHOICE = {"index": 0, "message": {"role": "assistant", "content": "hello there"}, "finish_reason": "stop"}
_WHOLE = json.dumps(
    {"id": "c1", "object": "chat.completion", "created": 1, "model": "m", "choices": [_CHOICE], "usage": _USAGE}
).encode()
_STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_WHOLE_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            body = json.loads(await reader.readexactly(length))
            if not body.get("stream"):
                writer.write(_WHOLE_HEAD % len(_WHOLE) + _WHOLE)
                await writer.drain()
                continue
            writer.write(_STREAM_HEAD)
            pace_s = PACE_S if body["model"] == "paced" else 0
            for frame in _FRAMES:
                writer.write(b"%x\r\n%s\r\n" % (len(frame), frame))
                await writer.drain()
                await asyncio.sleep(pace_s)
            writer.write(b"0\r\n\r\n")
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    writer.close()


async def echo() -> None:
    """Every answer the same: one of text, or CHUNKS pieces, as fast as they are taken or one each PACE_S."""
    server = await asyncio.start_server(_answer, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    ended = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await ended
    server.close()


def ask_bare(address: str) -> Ask:
    """httpx2 and json, nothing else: what everybody pays."""
    import httpx2

    client = httpx2.AsyncClient()

    async def ask(what: str) -> tuple[float, int]:
        url, body = f"{address}/chat/completions", {"model": MODELS[what], "messages": MESSAGES, **PARAMS}
        if what == "whole":
            found = (await client.post(url, json=body)).json()
            return time.perf_counter(), len(found["choices"])
        first, pieces = 0.0, 0
        async with client.stream("POST", url, json={**body, "stream": True}) as response:
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                choices = json.loads(line[6:])["choices"]
                if choices and choices[0]["delta"].get("content"):
                    first, pieces = first or time.perf_counter(), pieces + 1
        return first, pieces

    return ask


def _configured(address: str) -> tuple[Any, Any]:
    """Two targets and one behind them, budgets and cache off, as LiteLLM's below."""
    from diptych.cluster.gateway.settings import GatewaySettings
    from diptych.cluster.providers.settings import ProviderSettings

    names = ("one", "two", "spare")
    providers = {name: ProviderSettings(base_url=address, api_key="none", auth="none") for name in names}
    routes = {
        model: {"targets": [f"one/{model}", f"two/{model}"], "fallback": [f"spare/{model}"], "retries": 2}
        for model in ("fast", "paced")
    }
    return GatewaySettings.model_validate({"routes": routes}), providers


def ask_gateway(address: str) -> Ask:
    """`Gateway` in this process, its answers as events."""
    from diptych.cluster.gateway.gateway import Gateway
    from diptych.cluster.providers.registry import Registry
    from diptych.protos.deltas import Content

    settings, providers = _configured(address)
    gateway = Gateway(settings, Registry.load(providers, {}))

    async def ask(what: str) -> tuple[float, int]:
        if what == "whole":
            reply = await gateway.chat(MODELS[what], MESSAGES, **PARAMS)
            return time.perf_counter(), len(reply.message.parts)
        first, pieces = 0.0, 0
        async with gateway.stream(MODELS[what], MESSAGES, **PARAMS) as events:
            async for event in events:
                if isinstance(event, Content):
                    first, pieces = first or time.perf_counter(), pieces + 1
        return first, pieces

    return ask


def ask_relay(address: str) -> Ask:
    """The same, its streams as the provider's bytes, as the HTTP front has them where both sides speak one format."""
    from diptych.cluster.gateway.gateway import Gateway
    from diptych.cluster.gateway.relay import Relayed, Verbatim
    from diptych.cluster.providers.registry import Registry
    from diptych.protos.openai import parse_chat

    settings, providers = _configured(address)
    gateway = Gateway(settings, Registry.load(providers, {}))

    async def ask(what: str) -> tuple[float, int]:
        body = {"model": MODELS[what], "messages": MESSAGES, "stream": True, **PARAMS}
        verbatim = Verbatim(body=body, id="chatcmpl-1", model=MODELS[what])
        first, pieces = 0.0, 0
        async with gateway.relay(parse_chat(json.dumps(body).encode()), verbatim) as items:
            async for item in items:
                if isinstance(item, Relayed) and item.has_content:
                    first, pieces = first or time.perf_counter(), pieces + item.data.count(b"word ")
        return first, pieces

    return ask


async def front(address: str) -> None:
    """The HTTP front over a gateway: prints its address, then at each line its CPU seconds."""
    from diptych.cluster.api.testing import front_door

    settings, providers = _configured(address)
    loop = asyncio.get_running_loop()
    async with front_door(gateway=settings, providers=providers) as door:
        print(json.dumps(door.listener.url + "/v1"), flush=True)
        while await loop.run_in_executor(None, sys.stdin.readline):
            print(time.process_time(), flush=True)


def ask_litellm(address: str) -> Ask:
    """LiteLLM's Router in this process: two deployments and a model group to fall back to, callbacks and cache off."""
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    import litellm  # type: ignore[import-not-found,unused-ignore]

    litellm.telemetry = False
    litellm.suppress_debug_info = True
    deployments = [
        {
            "model_name": f"{model}{ending}",
            "litellm_params": {"model": f"openai/{model}", "api_base": address, "api_key": "none"},
            "model_info": {"id": f"{model}-{number}"},
        }
        for model in ("fast", "paced")
        for number, ending in enumerate(("", "", "-spare"))
    ]
    spare = [{"fast": ["fast-spare"]}, {"paced": ["paced-spare"]}]
    router = litellm.Router(model_list=deployments, fallbacks=spare, num_retries=2)

    async def ask(what: str) -> tuple[float, int]:
        if what == "whole":
            answer = await router.acompletion(MODELS[what], MESSAGES, **PARAMS)
            return time.perf_counter(), len(answer.choices)
        first, pieces = 0.0, 0
        async for chunk in await router.acompletion(MODELS[what], MESSAGES, stream=True, **PARAMS):
            if chunk.choices and chunk.choices[0].delta.content:
                first, pieces = first or time.perf_counter(), pieces + 1
        return first, pieces

    return ask


async def _timed(ask: Ask, what: str) -> Timed:
    began = time.perf_counter()
    first, pieces = await ask(what)
    return (first - began) * 1e3, (time.perf_counter() - began) * 1e3, pieces


async def obey(ask: Ask, kinds: tuple[str, ...]) -> None:
    """A line `WHAT COUNT` on the input: so many calls, one after the other; a line of JSON on the output tells them."""
    loop = asyncio.get_running_loop()
    for what in kinds:
        for _ in range(WARMUP):
            await ask(what)
    print(json.dumps({"rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)}), flush=True)
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        what, count = line.split()
        cpu = time.process_time()
        calls = [await _timed(ask, what) for _ in range(int(count))]
        # What a router does behind its answer is of the answer: a last look at the loop before the clock is read.
        await asyncio.sleep(0.05)
        cpu = time.process_time() - cpu
        wanted = 1 if what == "whole" else CHUNKS
        told: dict[str, Any] = {
            "cpu_ms": cpu / len(calls) * 1e3,
            "first_ms": [first for first, _, _ in calls],
            "total_ms": [total for _, total, _ in calls],
            "wrong": sum(pieces != wanted for _, _, pieces in calls),
        }
        print(json.dumps(told), flush=True)


def main() -> None:
    part, core, *address = sys.argv[1:]
    os.sched_setaffinity(0, {int(core)})
    asks = {"bare": ask_bare, "gateway": ask_gateway, "relay": ask_relay, "litellm": ask_litellm}
    if part == "front":
        import uvloop  # as routers have it

        uvloop.run(front(address[0]))
    elif part == "echo":
        asyncio.run(echo())
    else:
        asyncio.run(obey(asks[part](address[0]), ("stream", "paced") if part == "relay" else tuple(MODELS)))


if __name__ == "__main__":
    main()
