"""diptych.connect against a front door of echo engines: answers, streams, errors of the tree, both flavours."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

import diptych
from diptych.cluster.api.testing import FrontDoor, front_door
from diptych.cluster.client import AsyncClient, Client, ServerUnreachable
from diptych.cluster.client.wire import error_of
from diptych.cluster.router.rig import until
from diptych.protos.errors import (
    CapacityError,
    ContextTooLong,
    DeadlineExceeded,
    DiptychError,
    EngineError,
    InvalidRequest,
    Overloaded,
    StartupError,
    UnknownModel,
)

ASK: dict[str, Any] = {"max_tokens": 6, "seed": 7}


async def on_thread(door: FrontDoor, work: Callable[[Client], Any]) -> Any:
    """The plain client blocks, so it runs beside the loop that serves it."""

    def run() -> Any:
        with diptych.connect(door.listener.url, timeout_s=20) as client:
            return work(client)

    return await asyncio.to_thread(run)


async def test_both_clients_get_the_same_answers_whole_and_streamed() -> None:
    async with front_door() as door, diptych.connect_async(door.listener.url + "/v1/") as asynchronous:

        def work(client: Client) -> list[Any]:
            return [
                client.models(),
                client.chat("hello", **ASK).text,
                client.complete("hello world", n=2, **ASK).choices,
                "".join(delta.text for delta in client.stream_chat("hello", **ASK)),
                list(client.stream_complete("hello world", explain=True, **ASK))[-1].usage,
            ]

        plain = await on_thread(door, work)
        assert plain == [
            await asynchronous.models(),
            (await asynchronous.chat("hello", **ASK)).text,
            (await asynchronous.complete("hello world", n=2, **ASK)).choices,
            "".join([delta.text async for delta in asynchronous.stream_chat("hello", **ASK)]),
            [delta async for delta in asynchronous.stream_complete("hello world", explain=True, **ASK)][-1].usage,
        ]
        assert plain[0][0].name == "echo"
        assert plain[1] == plain[3]
        assert [choice.index for choice in plain[2]] == [0, 1]
        assert plain[4]["completion_tokens"] == 6


async def test_an_answer_says_all_that_was_asked() -> None:
    async with front_door() as door, diptych.connect_async(door.listener.url, tenant="team-a") as client:
        messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
        answer = await client.chat(messages, session="s1", logprobs=True, explain=True, **ASK)
        assert str(answer) == answer.text == answer.choices[0].text
        assert (answer.choices[0].finish_reason, answer.completion_tokens, answer.model) == ("length", 6, "echo")
        assert answer.choices[0].logprobs is not None
        assert len(answer.choices[0].logprobs["content"]) == 6
        assert answer.explanation is not None
        assert answer.explanation["choices"][0]["decode_engine"] == "decode-0"
        assert answer.prompt_tokens == len(door.decode.orders[-1].request.prompt)
        assert door.decode.orders[-1].request.tenant == "team-a"
        deltas = [delta async for delta in client.stream_chat(messages, logprobs=True, explain=True, **ASK)]
        assert deltas[-2].finish_reason == "length"
        assert deltas[-1].explanation is not None
        assert "".join(map(str, deltas)) == answer.text
        assert sum(len(delta.logprobs["content"]) for delta in deltas if delta.logprobs) == 6


async def test_token_ids_are_a_prompt() -> None:
    async with front_door() as door, diptych.connect_async(door.listener.url) as client:
        ids = tuple(door.tokenizer.encode("hello").ids)
        assert (await client.complete(ids, max_tokens=len(ids))).text == "hello"


async def test_the_servers_refusals_are_the_exceptions_of_the_tree_with_its_words() -> None:
    async with front_door() as door, diptych.connect_async(door.listener.url) as client:
        with pytest.raises(InvalidRequest, match="temperature") as wrong:
            await client.complete("hello", temperature=9)
        assert wrong.value.param == "temperature"
        with pytest.raises(UnknownModel, match="gpt-99"):
            await client.chat("hello", model="gpt-99")
        with pytest.raises(ContextTooLong, match="2048"):
            await client.complete("hello", max_tokens=10_000)
        with pytest.raises(InvalidRequest, match="nonsense"):
            _ = [delta async for delta in client.stream_chat("hello", nonsense=1)]
        with pytest.raises(InvalidRequest, match="chosen by the method"):
            await client.chat("hello", stream=True)
        await door.decode_alone()  # else the failure may come first, and the stream has status 500
        door.decode.faults.error = EngineError("the engine gives up")
        door.decode.faults.error_at = 3
        with pytest.raises(EngineError, match="the engine gives up"):
            await client.complete("hello", **ASK)
        stream = client.stream_complete("hello", **ASK)
        assert (await anext(stream)).text
        with pytest.raises(EngineError, match="the engine gives up"):
            _ = [delta async for delta in stream]


@pytest.mark.parametrize(
    ("status", "code", "cls"),
    [
        (400, "invalid_request", InvalidRequest),
        (404, "not_found", InvalidRequest),
        (503, "overloaded", CapacityError),
        (504, "deadline_exceeded", DeadlineExceeded),
        (500, "something_new", DiptychError),
    ],
)
def test_codes_become_their_classes(status: int, code: str, cls: type[DiptychError]) -> None:
    error = error_of(status, code, "words", "field", "7")
    assert isinstance(error, cls)
    assert str(error) == "words"
    if isinstance(error, CapacityError):
        assert error.retry_after_s == 7
        assert error.http_status == Overloaded.http_status


async def test_closing_a_stream_stops_the_engines() -> None:
    async with front_door(step_s=0.005) as door:

        def work(client: Client) -> None:
            deltas = client.stream_complete("hello", max_tokens=1000)
            next(deltas)
            deltas.close()

        await on_thread(door, work)
        await until(lambda: door.router.in_flight == {} and bool(door.decode.cancels))
        async with diptych.connect_async(door.listener.url) as client:
            stream = client.stream_complete("hello", max_tokens=1000)
            await anext(stream)
            await stream.aclose()
            await until(lambda: door.router.in_flight == {} and len(door.decode.cancels) == 2)


@pytest.mark.parametrize("url", ["nonsense", "ftp://example", ""])
async def test_what_is_no_address_is_told_as_such(url: str) -> None:
    with pytest.raises(ServerUnreachable, match="is not a server's address"):
        async with diptych.connect_async(url) as client:
            await client.chat("hello")


async def test_no_server_silence_and_strangers_are_told_apart() -> None:
    async with diptych.connect_async("http://127.0.0.1:9") as client:
        with pytest.raises(ServerUnreachable, match=r"no server answers at http://127\.0\.0\.1:9"):
            await client.chat("hello")
    async with front_door() as door, diptych.connect_async(door.listener.url, timeout_s=0.05) as client:
        door.prefill.faults.silent = door.decode.faults.silent = True
        with pytest.raises(DeadlineExceeded, match="timeout_s"):
            await client.complete("hello", model="echo")
    stranger = httpx2.MockTransport(lambda request: httpx2.Response(502, text="<html>"))
    async with AsyncClient("http://x", transport=stranger) as client:
        with pytest.raises(ServerUnreachable, match="status 502"):
            await client.chat("hello", model="m")
    for body in ({"choices": [{}]}, [], {"data": 1}):
        other = httpx2.MockTransport(lambda request, body=body: httpx2.Response(200, json=body))
        with Client("http://x", transport=other) as plain:
            with pytest.raises(ServerUnreachable, match="not a server of this API"):
                plain.complete("p", model="m")
            with pytest.raises(ServerUnreachable, match="not a server of this API"):
                plain.models()
    for url in ("nonsense", "ftp://x", "http://"):
        with pytest.raises(ServerUnreachable), Client(url) as plain:
            plain.models()


def test_separators_that_are_no_line_feed_and_split_events_are_text() -> None:
    odd = "a\u2028b\x85c\x0bd"
    event = json.dumps({"choices": [{"index": 0, "text": odd}]}, ensure_ascii=False).encode()
    stream = b"data: " + event + b"\n\ndata: [DONE]\n\n"
    pieces = [stream[i : i + 3] for i in range(0, len(stream), 3)]
    transport = httpx2.MockTransport(lambda request: httpx2.Response(200, content=iter(pieces)))
    with Client("http://x", transport=transport) as client:
        assert [delta.text for delta in client.stream_complete("p", model="m")] == [odd]


def test_a_stream_without_its_end_is_broken() -> None:
    event = json.dumps({"choices": [{"index": 0, "text": "half"}]}).encode()
    transport = httpx2.MockTransport(lambda request: httpx2.Response(200, content=b"data: " + event + b"\n\n"))
    with Client("http://x", transport=transport) as client:
        stream = client.stream_complete("p", model="m")
        assert next(stream).text == "half"
        with pytest.raises(ServerUnreachable, match="broke off"):
            next(stream)


def test_without_an_url_the_cluster_of_this_machine_is_meant(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("diptych.cluster.config.default_run_dir", lambda: tmp_path)
    with pytest.raises(StartupError, match="diptych serve"):
        diptych.connect()
    folder = tmp_path / str(os.getpid())
    folder.mkdir()
    from diptych.cluster.control import state

    monkeypatch.setattr(state, "_lives", lambda pid: True)
    fields = dict.fromkeys(state.ClusterState.__dataclass_fields__, "")
    known = {"pid": os.getpid(), "url": "http://127.0.0.1:7", "token_path": None, "models": []}
    (folder / state.STATE_FILE).write_text(json.dumps({**fields, **known}))
    with diptych.connect() as client:
        assert client.url == "http://127.0.0.1:7"


def test_importing_the_package_loads_nothing_of_weight() -> None:
    code = (
        "import sys, typing, os; before = set(sys.modules); import diptych; print(*set(sys.modules) - before); "
        "client = diptych.connect('http://127.0.0.1:9'); "
        "print(sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    loaded, heavy = done.stdout.splitlines()
    assert loaded == "diptych"
    assert heavy == "[]"
