"""What web pages can have a visitor's browser do here: nothing, unless they are named (exam row S28).

A page of any site could otherwise upload files and cancel requests on a loopback port without keys, and with a name
that it makes point here read every answer.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest

from diptych.cluster.api.testing import FrontDoor, front_door
from diptych.cluster.browser_settings import BrowserSettings
from diptych.cluster.config import RouterSettings, load_config
from diptych.cluster.key_file import key_line
from diptych.cluster.keys import ApiKeys, make_key
from diptych.protos.errors import StartupError

PAGE = "https://chat.example.com"
HELLO = {"model": "echo", "messages": [{"role": "user", "content": "hello"}]}
EVERY = [
    ("GET", "/v1/models"),
    ("GET", "/v1/requests"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/messages"),
    ("POST", "/v1/responses"),
    ("POST", "/v1/files"),
    ("POST", "/v1/requests/chatcmpl-0/cancel"),
    ("DELETE", "/v1/files/file-0"),
    ("GET", "/health"),
    ("GET", "/info"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
    ("OPTIONS", "/v1/chat/completions"),
    ("GET", "/nothing"),
]


@pytest.fixture
async def shared() -> AsyncIterator[tuple[FrontDoor, httpx2.AsyncClient]]:
    async with (
        front_door(browser=BrowserSettings(hosts=("llm.example.com",), origins=(PAGE,))) as door,
        httpx2.AsyncClient(base_url=door.listener.url, timeout=20) as http,
    ):
        yield door, http


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1", "file://", "x" * 500])
async def test_a_foreign_page_gets_403_and_no_word_for_its_browser(
    door: FrontDoor, http: httpx2.AsyncClient, origin: str
) -> None:
    asked = {"origin": origin, "access-control-request-method": "POST", "cookie": "a=b"}
    for method, path in EVERY:
        reply = await http.request(method, path, headers=asked, json=HELLO if method == "POST" else None)
        assert reply.status_code == 403, (method, path)
        assert not [name for name in reply.headers if name.startswith("access-control")]
        body = reply.json()["error"]
        assert body.get("code", "foreign_page") == "foreign_page"
        assert "router.browser.origins" in body["message"]
    assert door.prefill.orders == door.decode.orders == []


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil.example"]
)
async def test_a_name_that_anybody_could_point_here_gets_403(http: httpx2.AsyncClient, host: str) -> None:
    for method, path in EVERY:
        reply = await http.request(method, path, headers={"host": host})
        assert reply.status_code == 403, (method, path)
        assert "router.browser.hosts" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    "host", ["127.0.0.1:8000", "[::1]:8000", "::1", "localhost", "LOCALHOST:1", "a.localhost", "x"]
)
async def test_addresses_and_names_of_this_machine_are_its_own(http: httpx2.AsyncClient, host: str) -> None:
    assert (await http.get("/v1/models", headers={"host": host})).status_code == 200


async def test_with_keys_a_server_has_any_name(tmp_path: Path) -> None:
    """Behind a proxy it has the proxy's; and a page that came by another name has no key."""
    key, made = make_key("a")
    path = tmp_path / "keys"
    path.touch(mode=0o600)
    path.write_text(key_line(made))
    async with (
        front_door(keys=ApiKeys(path)) as door,
        httpx2.AsyncClient(base_url=door.listener.url, timeout=20) as http,
    ):
        named = {"host": "llm.example.com"}
        assert (await http.get("/v1/models", headers=named)).status_code == 401
        shown = {**named, "authorization": f"Bearer {key}"}
        assert (await http.get("/v1/models", headers=shown)).status_code == 200
        assert (await http.get("/v1/models", headers={**shown, "origin": PAGE})).status_code == 403


async def test_a_named_page_is_told_what_it_may_do_and_never_with_credentials(
    shared: tuple[FrontDoor, httpx2.AsyncClient],
) -> None:
    _, http = shared
    asked = {"origin": PAGE, "access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    reply = await http.options("/v1/chat/completions", headers=asked)
    assert reply.status_code == 204
    assert reply.headers["access-control-allow-origin"] == PAGE
    assert "content-type" in reply.headers["access-control-allow-headers"]
    answer = await http.post("/v1/chat/completions", json={**HELLO, "stream": True}, headers={"origin": PAGE})
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert answer.headers["vary"] == "origin"
    for one in (reply, answer):
        assert "access-control-allow-credentials" not in one.headers
        assert "*" not in json.dumps(dict(one.headers))
    assert (await http.get("/v1/models", headers={"origin": "https://other.example"})).status_code == 403
    assert (await http.get("/v1/models", headers={"host": "LLM.example.com:80"})).status_code == 200


async def test_two_origins_are_none(http: httpx2.AsyncClient) -> None:
    reply = await http.get("/v1/models", headers=[("origin", PAGE), ("origin", PAGE)])
    assert reply.status_code == 403


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("origins", "*", "There is no wildcard"),
        ("origins", "https://a.example/path", "without a path"),
        ("origins", "HTTPS://A.example", "small letters"),
        ("hosts", "https://a.example", "without scheme"),
        ("hosts", "*.a.example", "wildcards"),
    ],
)
def test_what_names_no_page_and_no_host_is_refused_at_the_start(key: str, value: str, words: str) -> None:
    with pytest.raises(StartupError, match=words):
        load_config(overrides=[f'router.browser.{key}=["{value}"]'])
    assert not RouterSettings().browser.origins
