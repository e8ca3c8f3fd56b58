"""POST /v1/route/explain, the headers by which a request wants otherwise, and what a key lets of both."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx2
import pytest

from diptych.cluster.api.overrides import overrides
from diptych.cluster.api.testing import MODEL, front_door
from diptych.cluster.gateway.ports import Context
from diptych.cluster.gateway.settings import GatewaySettings
from diptych.cluster.gateway.testing import ScriptedTarget, says
from diptych.cluster.key_file import key_line
from diptych.cluster.keys import ApiKeys, Override, Scope, make_key
from diptych.protos.errors import Forbidden, InvalidRequest

CHAT = "/v1/chat/completions"
EXPLAIN = "/v1/route/explain"
BODY = {"model": "chat", "messages": [{"role": "user", "content": "hello"}]}
GATEWAY = GatewaySettings.model_validate(
    {
        "routes": {
            "chat": {"targets": ["p/a", "p/b"], "strategy": "priority"},
            "long": {"targets": ["p/long"]},
        },
        "rule_headers": ["x-app"],
        "rules": [
            {"name": "others", "when": {"tenant": "hidden-tenant"}, "then": {"refuse": "no"}},
            {"name": "web", "when": {"headers": {"x-app": "web"}}, "then": {"route": "long"}},
            {"name": "tagged", "when": {"tag": "eu"}, "then": {"only": "p/b"}},
        ],
    }
)


def keys(folder: Path) -> tuple[ApiKeys, dict[str, dict[str, str]]]:
    made = {
        "plain": make_key("a"),
        "free": make_key("a", may_override=frozenset(Override)),
        "tagged": make_key("a", tags=("eu",)),
        "files": make_key("a", scopes=frozenset({Scope.FILES})),
        "admin": make_key("ops", scopes=frozenset({Scope.ADMIN})),
    }
    file = folder / "keys.jsonl"
    file.write_text("".join(key_line(key) + "\n" for _, key in made.values()))
    file.chmod(0o600)
    return ApiKeys(file), {name: {"authorization": f"Bearer {shown}"} for name, (shown, _) in made.items()}


def test_through_the_front_door(tmp_path: Path) -> None:
    """Rules must hold for what is really asked over HTTP, by what the key says, and the dry run say the same."""

    async def job() -> None:
        known, shown = keys(tmp_path)
        targets = [ScriptedTarget(name, [says(name)]) for name in ("p/a", "p/b", "p/long")]
        async with (
            front_door(keys=known, gateway=GATEWAY, targets=targets) as door,
            httpx2.AsyncClient(base_url=door.listener.url, timeout=20) as http,
        ):

            async def ask(who: str, path: str = CHAT, body: Any = BODY, **sent: str) -> httpx2.Response:
                named = {name.replace("_", "-"): value for name, value in sent.items()}
                return await http.post(path, json=body, headers=shown[who] | named)

            cases: list[tuple[str, dict[str, str], str, str]] = [
                ("plain", {}, "p/a", ""),
                ("plain", {"x_app": "web"}, "p/long", "web"),
                ("plain", {"x_app": "cli"}, "p/a", ""),
                ("tagged", {}, "p/b", "tagged"),
                ("free", {"x_route_target": "p/b"}, "p/b", ""),
            ]
            for who, sent, target, rule in cases:
                answer = await ask(who, **sent)
                assert answer.status_code == 200, answer.text
                assert answer.json()["choices"][0]["message"]["content"] == target
                assert (answer.headers["x-route-target"], answer.headers.get("x-route-rule", "")) == (target, rule)
                told = (await ask(who, EXPLAIN, **sent)).json()
                assert (told["target"], told["rule"]) == (target, rule)
                assert "hidden-tenant" not in str(told)
                assert "in_flight" not in told["candidates"][0]
            assert sum(len(target.requests) for target in targets) == len(cases)

            refused = await ask("plain", x_route_target="p/b")
            assert (refused.status_code, refused.json()["error"]["param"]) == (403, "x-route-target")
            assert "--may-override target" in refused.json()["error"]["message"]
            for name, status in (("x_route_taget", 400), ("x_route_strategy", 400), ("x_cache", 400)):
                assert (await ask("free", **{name: "nonsense"})).status_code == status
            assert (await ask("files", EXPLAIN)).json()["target"] == "p/a"
            assert (await ask("plain", f"{EXPLAIN}?tenant=b")).status_code == 403
            assert (await ask("admin", f"{EXPLAIN}?tennant=b")).status_code == 400
            assert (await ask("admin", f"{EXPLAIN}?tenant=b&tenant=c")).status_code == 400
            told = (await ask("admin", f"{EXPLAIN}?tenant=b&tag=x&tag=eu")).json()
            assert (told["target"], told["rule"]) == ("p/b", "tagged")
            assert told["rules"][0]["words"] == "tenant is b, and it wants hidden-tenant"
            told = (await ask("admin", f"{EXPLAIN}?tenant=hidden-tenant")).json()
            assert (told["target"], told["why"], told["candidates"]) == ("", "refused: no", [])
            assert (await ask("plain", EXPLAIN, BODY | {"model": "nobody"})).status_code == 404
            own = await ask("plain", EXPLAIN, BODY | {"model": MODEL})
            assert (own.status_code, own.json()["error"]["param"]) == (400, "model")
            assert (await ask("plain", EXPLAIN, BODY | {"nonsense": 1})).status_code == 400

    asyncio.run(job())


def test_without_routes_there_is_nothing_to_explain() -> None:
    """The page is there in every server, and says what is missing."""

    async def job() -> None:
        async with front_door() as door, httpx2.AsyncClient(base_url=door.listener.url) as http:
            answer = await http.post(EXPLAIN, json=BODY)
            assert (answer.status_code, "there are: none" in answer.text) == (404, True)

    asyncio.run(job())


def headers_of(**told: str) -> list[tuple[bytes, bytes]]:
    return [(name.replace("_", "-").encode(), value.encode()) for name, value in told.items()]


def test_wishes_are_read_into_the_context() -> None:
    """Each header lands in its own field, and what rules may not read is left behind."""
    _, key = make_key("a", may_override=frozenset(Override), tags=("x",))
    sent = headers_of(x_route_target="pool/m", x_route_strategy="sticky", x_cache="always", x_app="web", x_other="1")
    told = overrides(Context(tenant="a"), key, sent, readable=("x-app",))
    assert told == Context(
        tenant="a",
        key=key.id,
        tags=("x",),
        headers=(("x-app", "web"),),
        target="pool/m",
        strategy="sticky",
        cache="always",
    )
    assert overrides(Context(), None, sent).target == "pool/m"  # nobody is asked for a key
    long = overrides(Context(), None, headers_of(x_app="x" * 999), readable=("x-app",))
    assert long.headers == ()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("x-route-target", "nonsense", "is no target: write PROVIDER/MODEL"),
        ("x-route-target", "p/" + "x" * 400, "is no target"),
        ("x-route-strategy", "best", "'best' is none of p2c, weighted, priority"),
        ("x-cache", "yes", "'yes' is none of no-store, no-cache, always"),
        ("x-route-retries", "9", "there is no header x-route-retries; there are x-route-target"),
    ],
)
def test_a_wish_that_says_nothing_is_an_error(name: str, value: str, words: str) -> None:
    """A header with a slip of the pen that is ignored looks as if it were obeyed."""
    with pytest.raises(InvalidRequest, match=words):
        overrides(Context(), None, [(name.encode(), value.encode())])
    with pytest.raises(InvalidRequest, match=r"twice|there is no header"):
        overrides(Context(), None, [(name.encode(), b"p/a"), (name.encode(), b"p/a")])


def test_a_key_lets_what_it_says_and_no_more() -> None:
    """One permission must not open the others."""
    sent = {"x-route-target": "p/a", "x-route-strategy": "p2c", "x-cache": "no-store"}
    for own in Override:
        _, key = make_key("a", may_override=frozenset({own}))
        for name, value in sent.items():
            headers = [(name.encode(), value.encode())]
            if own in name:
                overrides(Context(), key, headers)
            else:
                with pytest.raises(Forbidden, match=name):
                    overrides(Context(), key, headers)
