"""With keys every route but liveness and readiness asks for one, however its path is spelt; the tenant is the key's."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.routing import Route

import diptych
from diptych.cluster.api.access import GuardedRoute
from diptych.cluster.api.app import create_app
from diptych.cluster.api.testing import FrontDoor, front_door
from diptych.cluster.bench.serve import _first_model
from diptych.cluster.bench.stream import Target, stream
from diptych.cluster.chat import chat
from diptych.cluster.client import Client
from diptych.cluster.keys import ApiKeys, Caller, key_line, make_key
from diptych.cluster.model_list import served
from diptych.cluster.status import fetch_info
from diptych.protos.errors import Forbidden, StartupError, Unauthorized

ASK: dict[str, Any] = {"model": "echo", "prompt": "hello world", "max_tokens": 3}
KEYS = {name: make_key() for name in ("a", "a2", "b", "admin")}
OPEN = {"/health", "/ready"}
FOR_ADMINS = {"/info", "/metrics"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.jsonl"
    lines = [
        key_line(key, Caller(name[:1] if name != "admin" else name, name == "admin")) for name, key in KEYS.items()
    ]
    path.write_text("\n".join(lines))
    path.chmod(0o600)
    return path


@pytest.fixture
async def door(file: Path) -> AsyncIterator[FrontDoor]:
    async with front_door(keys=ApiKeys(file)) as door:
        yield door


@pytest.fixture
async def http(door: FrontDoor) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(base_url=door.listener.url, timeout=20) as client:
        yield client


def bearer(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {KEYS[name]}"}


async def raw(door: FrontDoor, line: bytes, headers: bytes = b"", body: bytes = b"") -> tuple[int, bytes]:
    """Status and the rest, for a request line that no client would send."""
    reader, writer = await asyncio.open_connection(door.listener.host, door.listener.port)
    length = b"content-type: application/json\r\ncontent-length: %d\r\n" % len(body) if body else b""
    writer.write(line + b" HTTP/1.1\r\nhost: x\r\nconnection: close\r\n" + headers + length + b"\r\n" + body)
    async with asyncio.timeout(10):
        answer = await reader.read()
    writer.close()
    return int(answer.split(b" ", 2)[1]), answer


async def test_every_route_says_who_may_call_it_and_asks(http: httpx2.AsyncClient, door: FrontDoor, file: Path) -> None:
    """The routes are those of the app, so that a new one without a row here is seen."""
    routes = create_app(door.router, [door.served], ApiKeys(file)).routes
    assert all(type(route) is GuardedRoute for route in routes)
    paths = {route.path.replace("{name:path}", "echo"): route for route in routes if isinstance(route, Route)}
    tenants = {"/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/echo"}
    assert set(paths) == OPEN | FOR_ADMINS | tenants
    for path, route in paths.items():
        assert route.methods
        method = "POST" if "POST" in route.methods else "GET"
        asked = {"json": ASK | {"messages": []}} if method == "POST" else {}

        async def status(headers: dict[str, str], method: str = method, path: str = path, asked: Any = asked) -> int:
            return (await http.request(method, path, headers=headers, **asked)).status_code

        nobody, tenant, admin = await status({}), await status(bearer("a")), await status(bearer("admin"))
        if path in OPEN:
            assert (nobody, tenant, admin) == (200, 200, 200)
        elif path in FOR_ADMINS:
            assert (nobody, tenant, admin) == (401, 403, 200)
        else:
            assert nobody == 401
            assert tenant == admin
            assert tenant in (200, 400)  # the body of the POST is one of each endpoint's, and wrong for both


SPELLINGS = r"""
//v1/models /v1/./models /v1/../info /./info /info/ /info/. //info /info; /info;a=b /info%2f /%69nfo
/i%6efo /INFO /Info /info%00 /info%20 /info?x /info#x /health/../info /health%2f..%2finfo
/health/info /ready;/info /ready/..;/info /health%3b/info /metrics/ //metrics /%2fmetrics
/metrics%3f /METRICS /v1/models/ /v1%2fmodels /V1/models /v1/models/..%2f..%2finfo
/v1/models/../../info /\info http://x/info http://x/health/../info /%c0%ae%c0%ae/info /admin /docs
/openapi.json /v1/ / * /v1/completions/ //v1/completions /v1/completions; /v1/keys /debug/pprof
/.env /health//info
""".split()


@pytest.mark.parametrize("key", [None, "a"])
async def test_no_spelling_of_a_path_leads_around_the_key(door: FrontDoor, key: str | None) -> None:
    """Each with each method: nobody gets in, and a tenant does not get to the pages of an admin."""
    shown = b"" if key is None else f"authorization: Bearer {KEYS[key]}\r\n".encode()
    for spelling in SPELLINGS:
        for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"):
            status, answer = await raw(door, f"{method} {spelling}".encode(), shown)
            reached = b"membership_version" in answer or b"diptych_requests" in answer
            assert not reached, (method, spelling)
            allowed = {400, 401, 404} if key is None else {400, 401, 403, 404, 405, 200}
            assert status in allowed, (method, spelling, status)
            if status == 200:
                assert b'"object"' in answer or method == "HEAD", (method, spelling, answer)
    assert door.decode.orders == []


WRONG: dict[str, list[tuple[str, str]]] = {
    "nothing": [],
    "an empty one": [("authorization", "")],
    "only the scheme": [("authorization", "Bearer")],
    "an unknown one": [("authorization", "Bearer " + make_key())],
    "another scheme": [("authorization", "Basic " + KEYS["a"])],
    "no scheme": [("authorization", KEYS["a"])],
    "a prefix": [("authorization", "Bearer " + KEYS["a"][:-1])],
    "more than it": [("authorization", f"Bearer {KEYS['a']}x")],
    "SQL": [("authorization", "Bearer ' OR 1=1 --")],
    "a long one": [("authorization", "Bearer " + "k" * 20_000)],
    "bytes": [("authorization", "Bearer \xff\xfe")],
    "two different ones": [("authorization", "Bearer " + KEYS["a"]), ("authorization", "Bearer " + KEYS["b"])],
    "one in each header": [("authorization", "Bearer " + KEYS["a"]), ("x-api-key", KEYS["b"])],
    "a good one and rubbish": [("authorization", "Bearer " + KEYS["a"]), ("x-api-key", "")],
    "its hash": [("x-api-key", json.loads(key_line(KEYS["a"], Caller("a")))["sha256"])],
}


async def test_all_wrong_keys_get_the_same_answer(http: httpx2.AsyncClient) -> None:
    """Unknown and malformed ones, on routes that exist, that do not, and with other methods."""
    answers = set()
    for headers in WRONG.values():
        encoded = [(name.encode(), value.encode("latin-1")) for name, value in headers]
        for method, path in (("POST", "/v1/completions"), ("GET", "/info"), ("GET", "/none"), ("PUT", "/v1/models")):
            response = await http.request(method, path, headers=encoded, content=b"")
            answers.add((response.status_code, response.content, response.headers["www-authenticate"]))
    ((status, body, challenge),) = answers
    assert (status, challenge) == (401, "Bearer")
    error = json.loads(body)["error"]
    assert (error["code"], error["type"], error["param"]) == ("unauthorized", "authentication_error", None)


async def test_a_key_in_the_query_or_the_body_is_none(http: httpx2.AsyncClient) -> None:
    assert (await http.get(f"/v1/models?api_key={KEYS['a']}&key={KEYS['a']}")).status_code == 401
    assert (await http.post("/v1/completions", json=ASK | {"api_key": KEYS["a"]})).status_code == 401


async def test_both_headers_and_any_spelling_of_the_scheme_are_taken(http: httpx2.AsyncClient) -> None:
    key = KEYS["a"]
    for headers in (
        {"authorization": f"Bearer {key}"},
        {"Authorization": f"bearer {key}"},
        {"authorization": f"BEARER  {key}"},
        {"x-api-key": key},
        {"X-Api-Key": key, "authorization": f"Bearer {key}"},
    ):
        assert (await http.get("/v1/models", headers=headers)).status_code == 200


async def test_the_tenant_is_the_key_s_and_no_header_changes_it(http: httpx2.AsyncClient, door: FrontDoor) -> None:
    for name, tenant in (("a", "a"), ("a2", "a"), ("b", "b"), ("admin", "admin")):
        assert (await http.post("/v1/completions", json=ASK, headers=bearer(name))).status_code == 200
        order = door.decode.orders[-1].request
        assert (order.tenant, order.salt) == (tenant, tenant.encode())
    orders = len(door.decode.orders)
    for name in ("a", "admin"):  # an admin looks at the cluster and does not ask for others
        response = await http.post("/v1/completions", json=ASK, headers=bearer(name) | {"x-tenant": "b"})
        assert (response.status_code, response.json()["error"]["code"]) == (403, "forbidden")
    twice = [(k.encode(), v.encode()) for k, v in [*bearer("a").items(), ("x-tenant", "a"), ("x-tenant", "b")]]
    assert (await http.post("/v1/completions", json=ASK, headers=twice)).status_code == 400
    assert len(door.decode.orders) == orders
    same = bearer("a") | {"x-tenant": "a"}
    assert (await http.post("/v1/completions", json=ASK, headers=same)).status_code == 200


async def test_a_body_without_a_key_is_not_read(door: FrontDoor, caplog: pytest.LogCaptureFixture) -> None:
    """Neither parsed nor waited for: the answer comes when the headers have."""
    reader, writer = await asyncio.open_connection(door.listener.host, door.listener.port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100000000\r\n\r\n{")
    async with asyncio.timeout(1.5):
        head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 401 ")
    assert b"connection: close" in head
    writer.close()
    status, _ = await raw(door, b"POST /v1/completions", body=b"\x80\x05garbage" * 1000)
    assert status == 401
    assert door.decode.orders == []


async def test_refusals_are_counted_and_told_once_and_no_key_is_ever_shown(
    http: httpx2.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    unknown = make_key()
    for _ in range(20):
        await http.get("/v1/models", headers={"x-api-key": unknown})
    await http.get("/info", headers=bearer("b"))
    await http.post("/v1/completions", json={"model": KEYS["a"], "prompt": 1}, headers=bearer("a"))
    page = (await http.get("/metrics", headers=bearer("admin"))).text
    assert 'diptych_listener_refused_total{code="unauthorized"} 20.0' in page
    assert 'diptych_listener_refused_total{code="forbidden"} 1.0' in page
    info = (await http.get("/info", headers=bearer("admin"))).text
    ours = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith(("diptych", "uvicorn")))
    assert ours.count("the API refused '127.0.0.1'") == 1
    for shown in (page, info, ours):
        assert not [key for key in [unknown, *KEYS.values()] if key in shown]


def revoke_all_but_b(file: Path) -> None:
    partial = file.with_suffix(".new")
    partial.write_text("\n".join(line for line in file.read_text().splitlines() if '"b"' in line))
    partial.chmod(0o600)
    partial.replace(file)


async def test_a_revoked_key_opens_nothing_and_answers_in_work_go_on(file: Path) -> None:
    class Clock:
        now = 0.0

        def __call__(self) -> float:
            return self.now

    clock = Clock()
    async with (
        front_door(keys=ApiKeys(file, clock), step_s=0.01) as door,
        httpx2.AsyncClient(base_url=door.listener.url, timeout=20) as http,
    ):
        asked = ASK | {"max_tokens": 30, "stream": True}
        async with http.stream("POST", "/v1/completions", json=asked, headers=bearer("a")) as answer:
            pieces = answer.aiter_bytes()
            first = await anext(pieces)
            revoke_all_but_b(file)
            clock.now += 1
            assert (await http.get("/v1/models", headers=bearer("a"))).status_code == 401
            assert (await http.get("/v1/models", headers=bearer("b"))).status_code == 200
            whole = first + b"".join([piece async for piece in pieces])
            assert b"[DONE]" in whole


async def test_a_spoilt_file_is_a_degraded_choice_that_admins_see(file: Path) -> None:
    keys = ApiKeys(file)
    async with front_door(keys=keys) as door, httpx2.AsyncClient(base_url=door.listener.url) as http:
        keys.fault = "line 3 is spoilt"
        assert "line 3 is spoilt" in (await http.get("/info", headers=bearer("admin"))).json()["degraded"]


async def test_the_clients_and_the_command_show_the_key_of_the_environment(
    door: FrontDoor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    url = door.listener.url

    def with_key(name: str | None) -> None:
        monkeypatch.delenv("DIPTYCH_API_KEY", raising=False)
        if name is not None:
            monkeypatch.setenv("DIPTYCH_API_KEY", KEYS[name])

    def ask(**how: Any) -> str:
        with diptych.connect(url, **how) as client:
            return client.complete("hello", max_tokens=2).text

    with_key("a")
    text = await asyncio.to_thread(ask)
    assert await asyncio.to_thread(ask, key=KEYS["b"]) == text
    async with diptych.connect_async(url) as client:
        assert (await client.complete("hello", max_tokens=2)).text == text
    assert [order.request.tenant for order in door.decode.orders] == ["a", "b", "a"]
    for how in ({"key": ""}, {"key": make_key()}):
        with pytest.raises(Unauthorized, match="asks for a key"):
            await asyncio.to_thread(lambda how=how: ask(**how))
    with pytest.raises(Forbidden):
        await asyncio.to_thread(lambda: ask(tenant="b"))
    assert await asyncio.to_thread(served, tmp_path, url) == (url, ["echo"])
    assert await asyncio.to_thread(_first_model, url) == "echo"
    streamed = json.dumps(ASK | {"stream": True, "stream_options": {"include_usage": True}}).encode()
    assert (await stream(Target.parse(url, KEYS["b"]), streamed, 10)).completion_tokens == 3
    assert "401" in (await stream(Target.parse(url), streamed, 10)).failure
    assert KEYS["b"] not in repr(Target.parse(url, KEYS["b"]))

    with pytest.raises(StartupError, match="wants an admin's key; put it into the variable DIPTYCH_API_KEY"):
        await asyncio.to_thread(fetch_info, url)
    with_key("admin")
    assert (await asyncio.to_thread(fetch_info, url))["engines"]
    with_key(None)
    with pytest.raises(StartupError, match="wants an admin's key"):
        await asyncio.to_thread(fetch_info, url)
    assert await asyncio.to_thread(lambda: chat(url)) == 1
    assert "asks for a key" in capsys.readouterr().err


async def test_without_keys_nothing_is_asked_for(tmp_path: Path) -> None:
    async with front_door() as door, httpx2.AsyncClient(base_url=door.listener.url) as http:
        for path in ("/info", "/metrics", "/v1/models"):
            assert (await http.get(path, headers={"authorization": "Bearer x"})).status_code == 200
        await http.post("/v1/completions", json=ASK, headers={"x-tenant": "t"})
        assert door.decode.orders[-1].request.tenant == "t"


def test_a_client_does_not_show_its_key() -> None:
    assert KEYS["a"] not in repr(vars(Client("http://127.0.0.1:1", key=KEYS["a"])))
