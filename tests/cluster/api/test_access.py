"""With keys every route but liveness and readiness asks for one, however its path is spelt; the tenant is the key's."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

import diptych
from diptych.cluster.api.access import Access, GuardedRoute
from diptych.cluster.api.app import create_app
from diptych.cluster.api.testing import FrontDoor, front_door
from diptych.cluster.bench.serve import _first_model
from diptych.cluster.bench.stream import Target, stream
from diptych.cluster.chat import chat
from diptych.cluster.client import Client
from diptych.cluster.config import LimitSettings, TenantSettings
from diptych.cluster.key_file import key_line
from diptych.cluster.keys import ApiKeys, Scope, make_key
from diptych.cluster.model_list import served
from diptych.cluster.status import fetch_info
from diptych.protos.errors import Forbidden, StartupError, Unauthorized

ASK: dict[str, Any] = {"model": "echo", "prompt": "hello world", "max_tokens": 3}
MADE = {
    "a": make_key("a"),
    "a2": make_key("a"),
    "b": make_key("b"),
    "admin": make_key("admin", scopes=frozenset(Scope)),
    "files": make_key("a", scopes=frozenset({Scope.FILES})),
    "pages": make_key("ops", scopes=frozenset({Scope.ADMIN})),
    "revoked": make_key("a", disabled=True),
    "expired": make_key("a", expires_at=1_000_000_000),
}
KEYS = {name: shown for name, (shown, _) in MADE.items()}
OPEN = {"/health", "/ready"}
FOR_ADMINS = {"/info", "/metrics"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.jsonl"
    path.write_text("\n".join(key_line(key) for _, key in MADE.values()))
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


def routes_of(door: FrontDoor, file: Path) -> list[GuardedRoute]:
    """Those of the app, so that a new one is looked at here."""
    routes = create_app(door.router, [door.served], ApiKeys(file), store=door.store).routes
    assert all(type(route) is GuardedRoute for route in routes)
    return [route for route in routes if isinstance(route, GuardedRoute)]


async def test_every_route_says_what_it_asks_for_and_asks(
    http: httpx2.AsyncClient, door: FrontDoor, file: Path
) -> None:
    """A route without a scope of its own would be open to the keys of monitoring, or of nobody."""
    routes = routes_of(door, file)
    assert {route.path for route in routes if route.access is Access.OPEN} == OPEN
    assert {route.path for route in routes if route.access is Access.ADMIN} == FOR_ADMINS
    for route in routes:
        assert route.methods
        (method,) = route.methods - {"HEAD"}
        path = re.sub(r"\{[^}]*\}", "none", route.path)

        async def status(name: str | None, method: str = method, path: str = path) -> int:
            headers = {} if name is None else bearer(name)
            return (
                await http.request(method, path, headers=headers, json={} if method == "POST" else None)
            ).status_code

        nobody, everything = await status(None), await status("admin")
        if route.access is Access.OPEN:
            assert nobody == 200
            continue
        assert (nobody, await status("revoked"), await status("expired")) == (401, 401, 401), path
        assert everything not in (401, 403), path
        for name in ("a", "files", "pages"):
            opens = route.access.opens is None or route.access.opens in MADE[name][1].scopes
            assert (await status(name) == 403) is not opens, (name, method, path)
            assert (await status(name)) != 401


SPELLINGS = r"""
//v1/models /v1/./models /v1/../info /./info /info/ /info/. //info /info; /info;a=b /info%2f /%69nfo
/i%6efo /INFO /Info /info%00 /info%20 /info?x /info#x /health/../info /health%2f..%2finfo
/health/info /ready;/info /ready/..;/info /health%3b/info /metrics/ //metrics /%2fmetrics
/metrics%3f /METRICS /v1/models/ /v1%2fmodels /V1/models /v1/models/..%2f..%2finfo
/v1/models/../../info /\info http://x/info http://x/health/../info /%c0%ae%c0%ae/info /admin /docs
/openapi.json /v1/ / * /v1/completions/ //v1/completions /v1/completions; /v1/keys /debug/pprof
/.env /health//info
""".split()


# What servers and frameworks call their pages of administration.
ADMIN_NAMES = """
/admin /admin/ /administrator /api /api/admin /api/v1/admin /api/keys /api/config /console /manage /management
/manage/health /actuator /actuator/env /actuator/heapdump /actuator/health /debug /debug/vars /debug/pprof/
/debug/requests /status /server-status /server-info /stats /varz /healthz /livez /readyz /ping /version /config
/config.json /configuration /env /.env /.git/config /settings /dashboard /ui /docs /redoc /openapi.json /swagger
/swagger.json /swagger-ui /graphql /rpc /shutdown /quit /restart /reload /reset /flush_cache /start_profile
/stop_profile /update_weights /load_lora_adapter /v1/load_lora_adapter /sleep /wake_up /get_server_info
/get_model_info /keys /v1/keys /v1/organization/admin_api_keys /v1/admin /users /login /metrics/prometheus /prometheus
/logs /trace /traces /pprof /-/routes /-/healthz /-/reload /phpmyadmin /cgi-bin/ /internal /private /root /secrets
""".split()


def respelt(path: str) -> list[str]:
    """Ways in which one path was read as another somewhere."""
    head, tail = path[:-1], path[-1]
    return [
        path,
        f"/{path}",
        f"{path}/",
        f"{path};",
        f"{path};a=b",
        f"{path}%2f",
        f"{path}%00",
        f"{path}%20",
        f"{path}?x=1",
        f"/.{path}",
        f"/health/..{path}",
        f"/health%2f..{path}",
        f"/health;{path}",
        f"/ready/..;{path}",
        f"{head}%{ord(tail):02x}",
        path.replace("/", "/./"),
        path.replace("/", "//"),
        path.replace("/", "%2f"),
        path.replace("/", "\\"),
        path.upper(),
        path.title(),
        f"http://x{path}",
    ]


async def test_a_route_in_any_spelling_opens_to_nobody_without_a_key(door: FrontDoor, file: Path) -> None:
    """Nobody learns that a page exists; a tenant's key reaches none of an admin."""
    asked = [route.path for route in routes_of(door, file) if route.access is not Access.OPEN]
    paths = [*(re.sub(r"\{[^}]*\}", "none", path) for path in asked), *ADMIN_NAMES]
    spelt = [spelling for path in dict.fromkeys(paths) for spelling in respelt(path)]
    for key, allowed in ((None, {400, 401, 404}), ("a", {200, 400, 403, 404, 405})):
        shown = b"" if key is None else f"authorization: Bearer {KEYS[key]}\r\n".encode()
        wrong = []
        for spelling in spelt:
            status, answer = await raw(door, f"GET {spelling}".encode(), shown)
            if status not in allowed or b"membership_version" in answer or b"diptych_requests" in answer:
                wrong.append((key, spelling, status))
        assert wrong == []
    assert door.decode.orders == []


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
    "an unknown one": [("authorization", "Bearer " + make_key("a")[0])],
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
    "its hash": [("x-api-key", MADE["a"][1].sha256)],
    "its id": [("x-api-key", MADE["a"][1].id)],
    "one with a prefix of ours": [("x-api-key", KEYS["a"][:30] + "x" * 16)],
    "a revoked one": [("x-api-key", KEYS["revoked"])],
    "an expired one": [("authorization", "Bearer " + KEYS["expired"])],
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


MESSAGES = [{"role": "user", "content": "hello"}]
GENERATING: dict[str, dict[str, Any]] = {
    "/v1/completions": ASK,
    "/v1/chat/completions": {"model": "echo", "messages": MESSAGES, "max_tokens": 3},
    "/v1/messages": {"model": "echo", "messages": MESSAGES, "max_tokens": 3},
    "/v1/responses": {"model": "echo", "input": "hello", "max_output_tokens": 3},
}


async def test_no_key_asks_for_more_urgency_than_its_tenant_may(file: Path) -> None:
    """Priority goes before the tenants' shares: who could name any would have everybody else wait for ever."""
    tenants = {"a": TenantSettings(weight=9), "b": TenantSettings(most_urgent=-5)}
    async with (
        front_door(keys=ApiKeys(file), tenants=tenants) as door,
        httpx2.AsyncClient(base_url=door.listener.url, timeout=20) as http,
    ):
        for path, ask in GENERATING.items():
            for name, least in (("a", 0), ("b", -5), ("admin", 0)):
                reply = await http.post(path, json=ask | {"priority": least}, headers=bearer(name))
                assert reply.status_code == 200, reply.text
                assert door.decode.orders[-1].request.priority == least
                reply = await http.post(path, json=ask | {"priority": least - 1}, headers=bearer(name))
                assert reply.status_code == 400
                words = reply.json()["error"]["message"]
                assert f"priority is {least - 1}, and this tenant may ask for {least} and more" in words
    async with front_door() as door, httpx2.AsyncClient(base_url=door.listener.url, timeout=20) as http:
        reply = await http.post("/v1/completions", json=ASK | {"priority": -7}, headers={"x-tenant": "a"})
        assert reply.status_code == 200, "where nobody shows a key nobody is kept from anything"


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
    unknown = make_key("a")[0]
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
        front_door(keys=ApiKeys(file, clock=clock), step_s=0.01) as door,
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
    now = iter(range(10**6))
    keys = ApiKeys(file, clock=lambda: float(next(now)))
    async with front_door(keys=keys) as door, httpx2.AsyncClient(base_url=door.listener.url) as http:
        await asyncio.to_thread(file.write_text, "spoilt")
        degraded = (await http.get("/info", headers=bearer("admin"))).json()["degraded"]
        assert any("not JSON" in choice and "the keys from before still hold" in choice for choice in degraded)


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
    for how in ({"key": ""}, {"key": make_key("a")[0]}):
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


async def test_a_tenant_with_slow_bodies_leaves_connections_to_others(file: Path) -> None:
    """A body may take half a minute: a thousand slow ones of one tenant kept everybody out."""
    limits = LimitSettings(max_connections=16)
    head = b"POST /v1/tokenize HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 9\r\n"
    async with front_door(limits, keys=ApiKeys(file)) as door:
        slow = [await asyncio.open_connection(door.listener.host, door.listener.port) for _ in range(14)]
        for _, writer in slow:
            writer.write(head + b"x-api-key: %b\r\n\r\n" % KEYS["a"].encode())
        async with httpx2.AsyncClient(base_url=door.listener.url, timeout=20) as http:
            async with asyncio.timeout(10):
                while (refused := await http.get("/v1/models", headers=bearer("a2"))).status_code == 200:
                    pass
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "tenant_over_share")
            assert (await http.post("/v1/requests/x/cancel", headers=bearer("a"))).status_code == 404
            assert (await http.post("/v1/completions", json=ASK, headers=bearer("b"))).status_code == 200
            for _, writer in slow:
                writer.close()
            async with asyncio.timeout(10):
                while (await http.get("/v1/models", headers=bearer("a"))).status_code != 200:
                    pass


async def test_each_answer_is_counted_by_route_and_status(http: httpx2.AsyncClient) -> None:
    """Guards against failures that no metric tells of, and against series that clients make."""
    for path, key in (("/v1/models", "a"), ("/v1/models", "revoked"), ("/info", "a"), ("/v1/files/file-0", "a")):
        await http.get(path, headers=bearer(key))
    await http.request("PUT", "/v1/models", headers=bearer("a"))
    await http.post("/v1/completions", json=ASK | {"n": -1}, headers=bearer("a"))
    for name in range(5):
        await http.get(f"/nowhere/{name}", headers=bearer("a"))
    page = (await http.get("/metrics", headers=bearer("admin"))).text
    told = {line.partition("{")[2] for line in page.splitlines() if line.startswith("diptych_http_answers_total{")}
    assert told == {
        'route="/v1/models",status="200"} 1.0',
        'route="/v1/models",status="401"} 1.0',
        'route="/v1/models",status="405"} 1.0',
        'route="/info",status="403"} 1.0',
        'route="/v1/files/{id}",status="404"} 1.0',
        'route="/v1/completions",status="400"} 1.0',
        'route="",status="404"} 5.0',
    }
