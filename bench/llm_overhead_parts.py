"""The processes of llm_overhead.py: a provider that only repeats itself, and who asks it. Standard library but for the
one that is measured, so that it runs in the peers' environments too.

Run by llm_overhead.py: PYTHON llm_overhead_parts.py PART CORE [ADDRESS]. Parts: echo; bare, ours, instructor, mirascope
ask.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import resource
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

WARMUP = 40
KINDS = ("plain_sync", "typed_sync", "plain_aio", "typed_aio")
MODEL = "gpt-4o-mini"  # a name that each of them takes for a model of OpenAI's
KEY = "sk-proj-" + "Zq7-X_2mK9vR4tLw" * 9  # as long as real ones: texts are looked through for it
SAID = "It rained for three days, and the river rose by a metre in one night."
VALUE = {"title": "The flood", "score": 7, "tags": ["river", "rain"]}
PROMPT = "Tell me of the flood: what was seen there, how bad it was from 1 to 10, and some tags."

# As many as OpenAI sends.
_HEADERS = {
    "content-type": "application/json",
    "date": "Mon, 23 Nov 2026 20:00:00 GMT",
    "server": "cloudflare",
    "x-request-id": "req_1c9d0f4a7b3e4d21a5c6e8f90b1d2c3e",
    "openai-organization": "lab-1a2b3c",
    "openai-processing-ms": "412",
    "openai-version": "2020-10-01",
    "x-ratelimit-limit-requests": "10000",
    "x-ratelimit-limit-tokens": "2000000",
    "x-ratelimit-remaining-requests": "9999",
    "x-ratelimit-remaining-tokens": "1999959",
    "x-ratelimit-reset-requests": "6ms",
    "x-ratelimit-reset-tokens": "1ms",
    "strict-transport-security": "max-age=31536000; includeSubDomains; preload",
    "x-content-type-options": "nosniff",
    "cf-cache-status": "DYNAMIC",
    "cf-ray": "8f1b2c3d4e5f6a7b-FRA",
    "alt-svc": 'h3=":443"; ma=86400',
}

# One call: whether what it gave is what was said.
Ask = Callable[[], bool]
AskAio = Callable[[], Awaitable[bool]]
Asks = tuple[dict[str, Ask], dict[str, AskAio]]


def _answer_of(body: dict[str, Any]) -> dict[str, Any]:
    """Text; for a schema, or a tool that must be called, the value."""
    message: dict[str, Any] = {"role": "assistant", "content": SAID, "refusal": None}
    finish = "stop"
    if body.get("tools"):
        called = {"name": body["tools"][0]["function"]["name"], "arguments": json.dumps(VALUE)}
        message |= {"content": None, "tool_calls": [{"id": "call_1", "type": "function", "function": called}]}
        finish = "tool_calls"
    elif body.get("response_format"):
        message["content"] = json.dumps(VALUE)
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": MODEL,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": finish}],
        "usage": {"prompt_tokens": 30, "completion_tokens": 20, "total_tokens": 50},
    }


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    headers = "".join(f"{name}: {value}\r\n" for name, value in _HEADERS.items())
    head_of_answer = f"HTTP/1.1 200 OK\r\n{headers}content-length: %d\r\n\r\n".encode()
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            answer = json.dumps(_answer_of(json.loads(await reader.readexactly(length)))).encode()
            writer.write(head_of_answer % len(answer) + answer)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    writer.close()


async def echo() -> None:
    """Every answer the same."""
    server = await asyncio.start_server(_serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    ended = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await ended
    server.close()


def _verdict() -> Any:
    """The result's type."""
    from pydantic import BaseModel

    class Verdict(BaseModel):
        """Of a flood."""

        title: str
        score: int
        tags: list[str]

    return Verdict


def _is_value(found: Any) -> bool:
    return bool(found.title == VALUE["title"] and found.score == VALUE["score"] and found.tags == VALUE["tags"])


def ask_bare(address: str) -> Asks:
    """httpx2 and json; typed: the schema in the body, and pydantic reads the text. What everybody pays."""
    import httpx2

    verdict = _verdict()
    schema = {**verdict.model_json_schema(), "additionalProperties": False}
    url, headers = f"{address}/chat/completions", {"authorization": f"Bearer {KEY}"}
    plain = {"model": MODEL, "messages": [{"role": "user", "content": PROMPT}]}
    form = {"type": "json_schema", "json_schema": {"name": "Verdict", "schema": schema, "strict": True}}
    typed = {**plain, "response_format": form}
    client, aio = httpx2.Client(headers=headers), httpx2.AsyncClient(headers=headers)

    def text(response: Any) -> str:
        found: str = response.json()["choices"][0]["message"]["content"]
        return found

    async def plain_aio() -> bool:
        return text(await aio.post(url, json=plain)) == SAID

    async def typed_aio() -> bool:
        return _is_value(verdict.model_validate_json(text(await aio.post(url, json=typed))))

    sync: dict[str, Ask] = {
        "plain_sync": lambda: text(client.post(url, json=plain)) == SAID,
        "typed_sync": lambda: _is_value(verdict.model_validate_json(text(client.post(url, json=typed)))),
    }
    return sync, {"plain_aio": plain_aio, "typed_aio": typed_aio}


def ask_ours(address: str) -> Asks:
    """`llm.call` of a provider; the function runs at each call."""
    from diptych import llm

    registry = llm.Registry(
        environ={}, providers={"openai": {"base_url": address, "api_key": "env:KEY"}}, keys={"openai": KEY}
    )

    @llm.call(f"openai/{MODEL}", registry=registry)
    def plain(prompt: str) -> str:
        return prompt

    @llm.call(f"openai/{MODEL}", output=_verdict(), registry=registry)
    def typed(prompt: str) -> str:
        return prompt

    async def plain_aio() -> bool:
        return (await plain.aio(PROMPT)).value == SAID

    async def typed_aio() -> bool:
        return _is_value((await typed.aio(PROMPT)).value)

    sync: dict[str, Ask] = {
        "plain_sync": lambda: plain(PROMPT).value == SAID,
        "typed_sync": lambda: _is_value(typed(PROMPT).value),
    }
    return sync, {"plain_aio": plain_aio, "typed_aio": typed_aio}


def ask_instructor(address: str) -> Asks:
    """OpenAI's client patched by Instructor, in its default mode, which asks for a call of a tool; plain: without a
    response_model, so that nearly all of it is OpenAI's client.
    """
    import instructor
    import openai

    verdict = _verdict()
    client = instructor.from_openai(openai.OpenAI(base_url=address, api_key=KEY))
    aio = instructor.from_openai(openai.AsyncOpenAI(base_url=address, api_key=KEY))
    words: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": PROMPT}]}

    def text(answer: Any) -> bool:
        return bool(answer.choices[0].message.content == SAID)

    async def plain_aio() -> bool:
        return text(await aio.chat.completions.create(response_model=None, **words))

    async def typed_aio() -> bool:
        return _is_value(await aio.chat.completions.create(response_model=verdict, **words))

    sync: dict[str, Ask] = {
        "plain_sync": lambda: text(client.chat.completions.create(response_model=None, **words)),
        "typed_sync": lambda: _is_value(client.chat.completions.create(response_model=verdict, **words)),
    }
    return sync, {"plain_aio": plain_aio, "typed_aio": typed_aio}


def ask_mirascope(address: str) -> Asks:
    """Mirascope's `llm.call` of Chat Completions, its result's type in its default mode."""
    from mirascope import llm  # type: ignore[import-not-found,unused-ignore]

    llm.register_provider("openai:completions", scope="openai/", base_url=address, api_key=KEY)
    verdict = _verdict()

    @llm.call(f"openai/{MODEL}:completions")
    def plain(prompt: str) -> str:
        return prompt

    @llm.call(f"openai/{MODEL}:completions", format=verdict)
    def typed(prompt: str) -> str:
        return prompt

    @llm.call(f"openai/{MODEL}:completions")
    async def plain_async(prompt: str) -> str:
        return prompt

    @llm.call(f"openai/{MODEL}:completions", format=verdict)
    async def typed_async(prompt: str) -> str:
        return prompt

    async def plain_aio() -> bool:
        return bool((await plain_async(PROMPT)).text() == SAID)

    async def typed_aio() -> bool:
        return _is_value((await typed_async(PROMPT)).parse())

    sync: dict[str, Ask] = {
        "plain_sync": lambda: bool(plain(PROMPT).text() == SAID),
        "typed_sync": lambda: _is_value(typed(PROMPT).parse()),
    }
    return sync, {"plain_aio": plain_aio, "typed_aio": typed_aio}


ASKS = {"bare": ask_bare, "ours": ask_ours, "instructor": ask_instructor, "mirascope": ask_mirascope}


def obey(asks: Asks) -> None:
    """A line `KIND COUNT` on the input: so many calls, one after the other; a line of JSON on the output tells them.
    CPU is that of all threads, the kernel's share included.
    """
    sync, aio = asks
    with asyncio.Runner() as runner:

        async def several(ask: AskAio, count: int) -> int:
            return sum([not await ask() for _ in range(count)])

        def run(kind: str, count: int) -> int:
            """How many answers were wrong."""
            if kind in aio:
                return runner.run(several(aio[kind], count))
            return sum(not sync[kind]() for _ in range(count))

        for kind in KINDS:
            run(kind, WARMUP)
        gc.collect()
        print(json.dumps({"rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)}), flush=True)
        for line in sys.stdin:
            kind, count = line.split()
            cpu, clock = time.process_time(), time.perf_counter()
            wrong = run(kind, int(count))
            cpu, clock = time.process_time() - cpu, time.perf_counter() - clock
            told = {"cpu_ms": cpu / int(count) * 1e3, "wall_ms": clock / int(count) * 1e3, "wrong": wrong}
            print(json.dumps(told), flush=True)


def main() -> None:
    """See above."""
    part, core, *address = sys.argv[1:]
    os.sched_setaffinity(0, {int(core)})
    if part == "echo":
        asyncio.run(echo())
    else:
        obey(ASKS[part](address[0]))


if __name__ == "__main__":
    main()
