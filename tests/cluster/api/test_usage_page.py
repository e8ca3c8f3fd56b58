"""GET /v1/usage: a key sees its tenant, an admin's key everybody, and the wrong question is answered in words."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import httpx2
import pytest

from diptych.cluster.api.testing import front_door
from diptych.cluster.gateway.books import AccountId, Batch, Flow, SpendKey, Tally
from diptych.cluster.gateway.settings import GatewaySettings
from diptych.cluster.gateway.stored_books import StoredBooks
from diptych.cluster.key_file import add_key, key_line
from diptych.cluster.keys import ApiKeys, Scope, make_key
from diptych.cluster.usage_verbs import run_usage

GATEWAY = GatewaySettings.model_validate(
    {
        "routes": {"chat": {"targets": ["pool/echo"]}},
        "pools": {"echo": {"per_device_hour": 1}},
        "budgets": {"each": {"amount_usd": 2, "tenant": "*", "period": "total"}},
    }
)


async def test_who_may_ask_for_whose_usage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another tenant's spend is nobody's business but an admin's."""
    file, keys = tmp_path / "keys.jsonl", {}
    for tenant, scopes in (("a", {Scope.INFERENCE}), ("b", {Scope.INFERENCE}), ("ops", {Scope.ADMIN})):
        keys[tenant], key = make_key(tenant, scopes=frozenset(scopes))
        add_key(file, key_line(key))
    async with (
        front_door(keys=ApiKeys(file), gateway=GATEWAY) as door,
        httpx2.AsyncClient(base_url=door.listener.url, timeout=20) as http,
    ):
        spend = {SpendKey(0, tenant, "k", "chat", "p/x"): Tally(requests=1, cost_nanos=10**9) for tenant in ("a", "b")}
        flows = {AccountId("each", f"tenant={tenant}", ""): Flow(10**9) for tenant in ("a", "b")}
        now = time.time()
        spend = {key._replace(hour=int(now) // 3600 * 3600): tally for key, tally in spend.items()}
        await StoredBooks(door.store).flush(Batch(holder="r", number=1, now=now, flows=flows, spend=spend))

        async def ask(who: str, query: str = "") -> httpx2.Response:
            return await http.get(f"/v1/usage{query}", headers={"authorization": f"Bearer {keys[who]}"})

        told = (await ask("a")).json()
        assert (told["tenant"], told["total"]["requests"]) == ("a", 1)
        assert [(one["scope"], one["left_usd"]) for one in told["budgets"]] == [("tenant=a", 1)]
        for query in ("?tenant=b", "?tenant=*"):
            refused = await ask("a", query)
            assert refused.status_code == 403
            assert "need an admin's" in refused.json()["error"]["message"]
        assert (await ask("ops", "?tenant=b&by=target")).json()["data"][0]["name"] == "p/x"
        assert (await ask("ops", "?tenant=*")).json()["total"]["requests"] == 2
        assert len((await ask("ops", "?tenant=*")).json()["budgets"]) == 2
        assert (await ask("ops")).json()["total"]["requests"] == 0
        for query in ("?by=x", "?limit=1&limit=2", "?x=1", "?since=%00", "?tenant=%ff"):
            wrong = await ask("a", query)
            assert (wrong.status_code, wrong.json()["error"]["type"]) == (400, "invalid_request_error")
        assert (await http.get("/v1/usage")).status_code == 401
        monkeypatch.setenv("DIPTYCH_API_KEY", keys["a"])
        verb = {"config": None, "overrides": (), "url": door.listener.url, "as_json": False}
        assert await asyncio.to_thread(lambda: run_usage({}, **verb)) == 0  # type: ignore[arg-type]
        assert "the tenant a, " in capsys.readouterr().out
        assert await asyncio.to_thread(lambda: run_usage({"tenant": "b"}, **verb)) == 1  # type: ignore[arg-type]
        assert "need an admin's" in capsys.readouterr().err
