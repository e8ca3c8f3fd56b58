"""Keys, prompts and what clients write into fields stay out of logs and metrics, and nothing of the inside reaches a
client, whatever fails (exam row S29).

It guards against an error message that repeats a secret, and against a log that a client can write lines into.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from opentelemetry import trace

from diptych.cluster.api import chat, completions, messages
from diptych.cluster.api import responses as responses_module
from diptych.cluster.api.testing import FrontDoor, front_door
from diptych.cluster.key_file import key_line
from diptych.cluster.keys import ApiKeys, make_key
from diptych.cluster.observability.logs import JsonLines, TextLines
from diptych.cluster.router.rig import until
from diptych.protos.errors import EngineFault

CANARY = "canary-7f3a9c51"
SECRET = "sk-" + CANARY * 3
BREAKS = [
    f"{CANARY}\r\nERROR diptych: forged",
    f"{CANARY}\x1b[31mred\x1b[0m",
    f'{CANARY}"}}\n{{"level": "INFO", "message": "forged',
    f"{CANARY}\u2028forged",
    f"{CANARY}%s%n{{}}",
    f"{CANARY}' OR 1=1 --",
    f"{CANARY}{{{{7*7}}}}${{jndi:ldap://x}}",
]
# What tells of the machine behind: addresses, files, Python.
INSIDE = ("Traceback", 'File "', "0x7", "/tmp/", "unix:", "site-packages", "sqlite", "SELECT ", ".py", "object at")


@pytest.fixture
async def guarded(tmp_path: Path) -> AsyncIterator[tuple[FrontDoor, httpx2.AsyncClient, str]]:
    key, made = make_key("a")
    path = tmp_path / "keys"
    path.touch(mode=0o600)
    path.write_text(key_line(made))
    async with (
        front_door(keys=ApiKeys(path)) as door,
        httpx2.AsyncClient(base_url=door.listener.url, timeout=30) as http,
    ):
        yield door, http, key


def bodies(text: str) -> list[tuple[str, dict[str, Any]]]:
    """The text in every kind of place of every wire format."""
    said = [{"role": "user", "content": text}]
    return [
        ("/v1/chat/completions", {"model": "echo", "messages": said, "user": text}),
        ("/v1/chat/completions", {"model": text, "messages": said}),
        ("/v1/chat/completions", {"model": "echo", "messages": said, text: 1}),
        ("/v1/chat/completions", {"model": "echo", "messages": [{"role": text, "content": "x"}]}),
        ("/v1/chat/completions", {"model": "echo", "messages": said, "guided_regex": f"({text}"}),
        ("/v1/chat/completions", {"model": "echo", "messages": said, "guided_grammar": text}),
        ("/v1/chat/completions", {"model": "echo", "messages": said, "chat_template_kwargs": {text: 1}}),
        ("/v1/chat/completions", {"model": "echo", "messages": said, "tools": [{"type": text}]}),
        ("/v1/completions", {"model": "echo", "prompt": text, "stop": [text], "bad_words": [text[:200]]}),
        ("/v1/completions", {"model": "echo", "prompt": text, "logit_bias": {text: 1}}),
        ("/v1/messages", {"model": "echo", "max_tokens": 4, "messages": said, "metadata": {"user_id": text}}),
        ("/v1/messages", {"model": text, "max_tokens": 4, "messages": said}),
        ("/v1/responses", {"model": "echo", "input": text, "metadata": {"a": text}, "instructions": text}),
        ("/v1/responses", {"model": "echo", "input": "x", "previous_response_id": text}),
        ("/v1/tokenize", {"prompt": text, text: 1}),
        ("/v1/embeddings", {"model": text, "input": text}),
        ("/v1/batches", {"input_file_id": text, "endpoint": text, "completion_window": text}),
    ]


async def say_all(http: httpx2.AsyncClient, headers: dict[str, str]) -> list[httpx2.Response]:
    answers = []
    for text in [CANARY, *BREAKS]:
        for path, body in bodies(text):
            answers.append(await http.post(path, json=body, headers=headers))
        plain = text.encode("ascii", "ignore").decode()
        printable = "".join(c for c in plain if c.isprintable())
        answers += [
            await http.get(f"/v1/files/{httpx2.QueryParams({'x': text})}", headers=headers),
            await http.get("/v1/requests", params={"state": text}, headers=headers),
            await http.get("/v1/responses/" + httpx2.QueryParams({"x": text})["x"].encode().hex(), headers=headers),
            await http.get("/v1/models", headers={**headers, "x-session-id": printable}),
            await http.request("PUT", "/v1/models", headers=headers),
            await http.post("/v1/files", files={"file": (text, b"x")}, data={"purpose": text}, headers=headers),
        ]
    return answers


def lines(caplog: pytest.LogCaptureFixture) -> str:
    """The log as the two formatters write it; each record is a line."""
    told = []
    for record in caplog.records:
        for formatter in (JsonLines(), TextLines()):
            line = formatter.format(record)
            assert len(line.splitlines()) == 1, line
            assert "\x1b" not in line
            told.append(line)
    return "\n".join(told)


def clean(answer: httpx2.Response) -> None:
    """Nothing of the inside is in an answer."""
    told = answer.text + str(dict(answer.headers))
    assert not [word for word in INSIDE if word in told], told[:500]
    assert SECRET not in told


async def test_what_clients_write_is_in_no_log_and_no_metric(
    guarded: tuple[FrontDoor, httpx2.AsyncClient, str], caplog: pytest.LogCaptureFixture
) -> None:
    door, http, key = guarded
    caplog.set_level(logging.DEBUG, logger="diptych")
    answers = await say_all(http, {"authorization": f"Bearer {key}"})
    assert {answer.status_code for answer in answers} >= {200, 400, 404, 405}
    for shown in ({"authorization": f"Bearer {SECRET}"}, {"x-api-key": SECRET}, {"authorization": f"Basic {SECRET}"}):
        answers.append(await http.get("/v1/models", headers=shown))
        assert answers[-1].status_code == 401
    for answer in answers:
        assert answer.status_code < 500, answer.text
        clean(answer)
        assert key not in answer.text
    log = lines(caplog)
    metrics = door.router.metrics.render().decode()
    for secret in (CANARY, SECRET, key, "forged"):
        assert secret not in log
        assert secret not in metrics
    assert isinstance(trace.get_current_span(), trace.Span)


@pytest.mark.parametrize(
    ("module", "name", "path"),
    [
        (chat, "parse_chat", "/v1/chat/completions"),
        (chat, "prepare_chat", "/v1/chat/completions"),
        (completions, "parse_completion", "/v1/completions"),
        (messages, "parse_messages", "/v1/messages"),
        (responses_module, "parse_responses", "/v1/responses"),
    ],
)
async def test_a_defect_in_any_layer_tells_a_client_nothing(
    http: httpx2.AsyncClient,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    module: Any,
    name: str,
    path: str,
) -> None:
    def broken(*args: object, **more: object) -> None:
        raise RuntimeError(f"{SECRET} at unix:/tmp/x 0x7f00\r\nforged")

    monkeypatch.setattr(module, name, broken)
    body = dict(next(body for at, body in bodies("hello") if at == path))
    answer = await http.post(path, json=body)
    assert answer.status_code == 500
    clean(answer)
    told = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(told) == 1
    assert json.loads(JsonLines().format(told[0]))["trace"]


async def test_what_an_engine_says_of_itself_stays_inside(
    http: httpx2.AsyncClient, door: FrontDoor, caplog: pytest.LogCaptureFixture
) -> None:
    door.prefill.faults.error = door.decode.faults.error = EngineFault("a step failed", f"detail {SECRET} /tmp/x")
    for path, body in (
        ("/v1/chat/completions", {"model": "echo", "messages": [{"role": "user", "content": CANARY}]}),
        ("/v1/completions", {"model": "echo", "prompt": CANARY, "stream": True}),
        ("/v1/messages", {"model": "echo", "max_tokens": 4, "messages": [{"role": "user", "content": CANARY}]}),
        ("/v1/responses", {"model": "echo", "input": CANARY}),
    ):
        answer = await http.post(path, json=body)
        assert answer.status_code >= 500 or answer.status_code == 422  # kept away from engines after two faults
        clean(answer)
    assert CANARY not in lines(caplog)


async def test_a_store_that_fails_tells_a_client_that_and_no_more(http: httpx2.AsyncClient, door: FrontDoor) -> None:
    async def broken(job: object) -> None:
        raise OSError(f"{SECRET}: disk /dev/sda1 at /tmp/diptych.db")

    door.store.read = door.store.write = broken  # type: ignore[method-assign, assignment]
    for method, path, body in (
        ("GET", "/v1/files", None),
        ("GET", "/v1/batches", None),
        ("GET", "/v1/responses/resp_" + "0" * 24, None),
        ("POST", "/v1/responses", {"model": "echo", "input": "hello"}),
    ):
        answer = await http.request(method, path, json=body)
        assert answer.status_code in (500, 503), (path, answer.status_code)
        clean(answer)
    del door.store.read, door.store.write


async def test_the_ledger_of_clients_is_what_metrics_and_pages_tell(http: httpx2.AsyncClient, door: FrontDoor) -> None:
    """Exam row R29: what clients counted is what the router counted, and what it counts is no wish."""
    ask = {"model": "echo", "prompt": "hello", "max_tokens": 4}
    ledger: dict[str, int] = {}
    tokens = 0

    def note(outcome: str) -> None:
        ledger[outcome] = ledger.get(outcome, 0) + 1

    for at in range(12):
        answer = await http.post("/v1/completions", json={**ask, "stream": at % 3 == 0})
        assert answer.status_code == 200
        note("ok")
        tokens += 4
    for _ in range(3):
        assert (await http.post("/v1/completions", json={**ask, "foo": 1})).status_code == 400
    door.prefill.faults.silent = door.decode.faults.silent = True
    for _ in range(2):
        answer = await http.post("/v1/completions", json={**ask, "timeout_s": 0.2})
        assert answer.json()["error"]["code"] == "deadline_exceeded"
        note("deadline_exceeded")
    gone = [asyncio.create_task(http.post("/v1/completions", json=ask)) for _ in range(3)]
    await until(lambda: door.router.admission.running == 3)
    for task in gone:
        task.cancel()
        note("cancelled")
    await asyncio.gather(*gone, return_exceptions=True)
    await until(lambda: door.router.admission.running == 0)
    told = (await http.get("/metrics")).text
    counted = {}
    for line in told.splitlines():
        if line.startswith("diptych_requests_total{"):
            outcome = line.partition('outcome="')[2].partition('"')[0]
            counted[outcome] = counted.get(outcome, 0) + int(float(line.rpartition(" ")[2]))
    assert counted == ledger
    assert f'diptych_output_tokens_sum{{model="echo"}} {float(tokens)}' in told
    assert 'diptych_requests_in_flight{model="echo"} 0.0' in told
    entries = (await http.get("/v1/requests", params={"limit": "100"})).json()["data"]
    states = [entry["state"] for entry in entries]
    assert states.count("finished") == 12
    assert states.count("cancelled") == 3
    assert states.count("refused") == 3
    assert states.count("failed") == 2
    assert (await http.get("/ready")).status_code == 200
    door.directory.set([])
    await until(lambda: not door.router.is_ready("echo"))
    assert (await http.get("/ready")).status_code == 503
