"""Routes as a platform team meets them: what a request says reaches its target, and what became of it can be asked.

They guard against fields that one endpoint drops on the way to a route, against requests that lose whose they are, and
against lives that tell of one attempt where there were three.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from diptych.cluster.api.routed import RoutedModels
from diptych.cluster.api.testing import MODEL, FrontDoor, front_door
from diptych.cluster.batches.runner import BatchRunner
from diptych.cluster.batches.testing import CHAT, OVER, line
from diptych.cluster.gateway.gateway import Gateway
from diptych.cluster.gateway.settings import GatewaySettings
from diptych.cluster.gateway.testing import HANG, Script, ScriptedTarget, Wait, fails, says
from diptych.cluster.key_file import key_line
from diptych.cluster.keys import ApiKeys, make_key
from diptych.cluster.providers.settings import ProviderSettings
from diptych.cluster.router.call import GenerateCall
from diptych.protos.deltas import Content, Reasoning
from diptych.protos.failures import FailureKind
from diptych.protos.replies import Began, Usage

KIND = FailureKind
USE = Usage(input_tokens=1000, output_tokens=1000)
HELLO = [{"role": "user", "content": "hello"}]


@asynccontextmanager
async def routed(*targets: ScriptedTarget, **settings: Any) -> AsyncIterator[tuple[FrontDoor, httpx2.AsyncClient]]:
    """A door whose route `chat` leads to `targets` in their order, unless `routes` say otherwise."""
    routes = {"chat": {"targets": [target.name for target in targets], "strategy": "priority"}}
    read = GatewaySettings.model_validate({"routes": routes, **settings})
    async with (
        front_door(gateway=read, targets=targets) as door,
        httpx2.AsyncClient(base_url=door.listener.url, timeout=20) as http,
    ):
        yield door, http


def target(*scripts: Script, name: str = "p/a") -> ScriptedTarget:
    return ScriptedTarget(name, scripts)


async def last_life(http: httpx2.AsyncClient) -> dict[str, Any]:
    life: dict[str, Any] = (await http.get("/v1/requests")).json()["data"][0]
    return life


def places(life: dict[str, Any]) -> list[tuple[str, str | None]]:
    return [(one["decode_engine"], one["ended_by"]) for one in life["choices"][0]["placements"]]


async def test_each_endpoint_tells_a_target_how_long_an_answer_may_be() -> None:
    """`max_output_tokens` of /v1/responses reached own models alone: through a route the answer had no bound."""
    asked = target(says("one"))
    async with routed(asked) as (_, http):
        for path, ask in (
            ("/v1/chat/completions", {"messages": HELLO, "max_completion_tokens": 7}),
            ("/v1/messages", {"messages": HELLO, "max_tokens": 7}),
            ("/v1/responses", {"input": "hello", "max_output_tokens": 7}),
        ):
            assert (await http.post(path, json={"model": "chat", **ask})).status_code == 200
            wanted = asked.requests[-1].wanted_tokens
            assert wanted is not None, path
            assert wanted[1] == 7, path


@pytest.mark.parametrize("stream", [True, False])
async def test_lives_tell_every_attempt_of_requests_that_failed(stream: bool) -> None:
    """Whole answers that failed listed the last target alone."""
    async with routed(target([fails(KIND.AUTH)]), target([fails(KIND.SERVER)], name="q/b")) as (_, http):
        ask = {"model": "chat", "messages": HELLO, "stream": stream}
        assert (await http.post(CHAT, json=ask)).status_code == 502
        life = await last_life(http)
        told = places(life)
        assert told[:2] == [("p/a", "auth"), ("q/b", "server")]
        assert life["state"] == "failed"


@pytest.mark.parametrize("stream", [True, False])
async def test_lives_tell_who_is_being_waited_for(stream: bool) -> None:
    """A request that hung at a target was `placing` until it ended."""
    hangs = target([Wait(HANG)], name="q/b")
    async with routed(target([fails(KIND.AUTH)]), hangs) as (_, http):
        asked = asyncio.create_task(http.post(CHAT, json={"model": "chat", "messages": HELLO, "stream": stream}))
        while not hangs.requests:  # noqa: ASYNC110  the other end of the connection
            await asyncio.sleep(0.01)
        life = await last_life(http)
        assert (life["state"], places(life)) == ("placed", [("p/a", "auth"), ("q/b", None)])
        await http.post(f"/v1/requests/{life['id']}/cancel")
        assert (await asked).status_code == 499


async def test_lives_tell_of_a_target_that_goes_on() -> None:
    """It was told when the answer was over, as if it had done nothing."""
    breaks = target([Began(), Content("one "), fails(KIND.SERVER)])
    goes_on = ScriptedTarget("q/b", [[Began(), Content("two"), Wait(HANG)]], continues="prefill")
    routes = {"chat": {"targets": ["p/a", "q/b"], "strategy": "priority", "midstream": "continue"}}
    async with routed(breaks, goes_on, routes=routes) as (_, http):
        ask = {"model": "chat", "messages": HELLO, "stream": True}
        async with http.stream("POST", CHAT, json=ask) as reply:
            async for text in reply.aiter_lines():
                if '"two"' in text:
                    break
            life = await last_life(http)
            assert (life["state"], places(life)) == ("decoding", [("p/a", "server"), ("q/b", None)])


async def test_choices_have_seeds_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """All had the request's: equal answers, where an own model makes different ones."""
    calls: list[GenerateCall] = []
    asked = target(says("one"))
    routes = {"chat": {"targets": ["p/a"]}, "own": {"targets": [f"pool/{MODEL}"]}}
    async with routed(asked, routes=routes) as (door, http):
        ask = {"messages": HELLO, "n": 3, "max_tokens": 4, "temperature": 1}
        await http.post(CHAT, json={"model": "chat", "seed": -5, **ask})
        seeds = [request.seed for request in asked.requests]
        assert len(set(seeds)) == 3
        assert -5 in seeds
        assert all(seed is not None and -(2**63) <= seed < 2**63 for seed in seeds)
        object.__setattr__(door.served, "seed", 17)  # of requests that name none
        generate = door.router.generate
        monkeypatch.setattr(door.router, "generate", lambda call: calls.append(call) or generate(call))
        for more in ({"seed": -5}, {"seed": 2**62 + 1}, {}):
            made = []
            for model in ("own", MODEL):
                calls.clear()
                await http.post(CHAT, json={"model": model, **ask, **more})
                made.append(sorted(call.sampling.seed for call in calls))
            assert made[0] == made[1]
            assert len(set(made[0])) == 3


async def test_a_batch_is_its_keys(tmp_path: Path) -> None:
    """Lines of a batch had a tenant and no key: rules, budgets and limits by key or tag did not see them."""
    shown, key = make_key("a", tags=("trial", "x"))
    file = tmp_path / "keys"
    file.touch(mode=0o600)
    file.write_text(key_line(key))
    rules = [
        {"name": "by-tag", "when": {"tag": "trial", "route": "chat"}, "then": {"route": "small"}},
        {"name": "by-key", "when": {"key": key.id, "route": "closed"}, "then": {"refuse": "not for this key"}},
    ]
    routes = {"chat": {"targets": ["p/a"]}, "small": {"targets": ["q/b"]}, "closed": {"targets": ["p/a"]}}
    settings = GatewaySettings.model_validate({"routes": routes, "rules": rules})
    big, small = target(says("big")), target(says("small"), name="q/b")
    async with (
        front_door(keys=ApiKeys(file)) as door,
        httpx2.AsyncClient(
            base_url=door.listener.url, timeout=20, headers={"authorization": f"Bearer {shown}"}
        ) as http,
    ):
        routed_models = RoutedModels(Gateway(settings, targets=[big, small]), door.router)
        runner = BatchRunner(door.router, [door.served], door.store, routes=routed_models)
        lines = [line("one", model="chat"), line("two", model="closed")]
        data = "\n".join(map(json.dumps, lines)).encode()
        kept = await http.post("/v1/files", data={"purpose": "batch"}, files={"file": ("in.jsonl", data)})
        ask = {"input_file_id": kept.json()["id"], "endpoint": CHAT, "completion_window": "24h"}
        batch = (await http.post("/v1/batches", json=ask)).json()
        try:
            while (batch := (await http.get(f"/v1/batches/{batch['id']}")).json())["status"] not in OVER:
                await runner.look()
                await asyncio.sleep(0.01)
        finally:
            await runner.stop()
        assert batch["request_counts"] == {"total": 2, "completed": 1, "failed": 1}
        assert (len(big.requests), len(small.requests)) == (0, 1)
        refused = (await http.get(f"/v1/files/{batch['error_file_id']}/content")).json()
        assert refused["response"]["status_code"] == 403


async def test_a_providers_model_that_clients_may_name_has_a_card() -> None:
    """The page said that it is not served, and it was."""
    lab = ProviderSettings(base_url="http://127.0.0.1:1/v1", api_key="none")
    read = GatewaySettings.model_validate({"direct": True})
    async with (
        front_door(gateway=read, providers={"lab": lab}) as door,
        httpx2.AsyncClient(base_url=door.listener.url, timeout=20) as http,
    ):
        for headers in ({}, {"anthropic-version": "2023-06-01"}):
            card = await http.get("/v1/models/lab/some/model", headers=headers)
            assert (card.status_code, card.json()["id"]) == (200, "lab/some/model")
            assert (await http.get("/v1/models/lag/model", headers=headers)).status_code == 404
        listed = (await http.get("/v1/models")).json()["data"]
        assert [one["id"] for one in listed] == [MODEL]


async def test_nobody_has_seen_a_whole_answer_that_breaks_off() -> None:
    """Whole responses, and whole answers with a time for their first token, are made of streams; the failure of one
    behind its first words was the client's, with a healthy target beside.
    """
    breaks = target([Began(), Reasoning("hm"), Content("one "), USE, fails(KIND.SERVER)])
    async with routed(breaks, target(says("two"), name="q/b")) as (_, http):
        for path, ask in (
            ("/v1/responses", {"input": "hello"}),
            (CHAT, {"messages": HELLO, "first_token_timeout_s": 10}),
        ):
            reply = await http.post(path, json={"model": "chat", **ask})
            assert reply.status_code == 200, reply.text
            assert (reply.headers["x-route-target"], reply.headers["x-route-attempts"]) == ("q/b", "2")
            assert "two" in reply.text
            assert "one " not in reply.text
            assert "hm" not in reply.text
            use = reply.json()["usage"]
            assert 1000 not in use.values(), "what was void is not the answer's"
        begun = (await http.post("/v1/responses", json={"model": "chat", "input": "hello", "background": True})).json()
        while begun["status"] in ("queued", "in_progress"):
            await asyncio.sleep(0.01)
            begun = (await http.get(f"/v1/responses/{begun['id']}")).json()
        assert (begun["status"], [item["type"] for item in begun["output"]]) == ("completed", ["message"])
        assert begun["output"][0]["content"][0]["text"] == "two"
        life = await last_life(http)
        assert (life["state"], places(life)) == ("finished", [("p/a", "server"), ("q/b", None)])
