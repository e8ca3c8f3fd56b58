"""What was used and cost: sums by what is asked for, of whom one may ask, as JSON and as a table."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from diptych.cluster.gateway.books import AccountId, Batch, Flow, SpendKey, Tally
from diptych.cluster.gateway.money_settings import BudgetSettings
from diptych.cluster.gateway.stored_books import StoredBooks
from diptych.cluster.store.database import Store
from diptych.cluster.store.testing import bare, temporary_store
from diptych.cluster.usage import read_query, usage_of
from diptych.cluster.usage_verbs import render, run_usage
from diptych.protos.errors import InvalidRequest

NOW = 1_795_000_000.0  # 2026-11-18T11:06:40Z
HOUR = int(NOW) // 3600 * 3600
RULES = {"each": BudgetSettings(amount_usd=2, tenant="*"), "all": BudgetSettings(amount_usd=5, period="total")}


def row(tenant: str, route: str, target: str, hour: int = HOUR, **sums: int) -> tuple[SpendKey, Tally]:
    return SpendKey(hour, tenant, f"key_{tenant}", route, target), Tally(**{"requests": 1, **sums})


async def fill(store: Store, now: float = NOW, month: str = "2026-11") -> None:
    hour = int(now) // 3600 * 3600
    rows = dict(
        [
            row("a", "chat", "groq/x", hour, input_tokens=10, output_tokens=5, cost_nanos=1_500_000_000),
            row("a", "chat", "pool/tiny", hour - 86_400, input_tokens=1, output_tokens=1, cost_nanos=1),
            row("a", "new", "groq/unknown", hour, input_tokens=3, unpriced=1),
            row("b", "chat", "groq/x", hour, input_tokens=7, output_tokens=2, cost_nanos=500_000_000, estimated=1),
        ]
    )
    flows = {
        AccountId("each", "tenant=a", month): Flow(1_500_000_001, 100),
        AccountId("each", "tenant=b", month): Flow(500_000_000, 0),
        AccountId("all", "", ""): Flow(2_000_000_001, 0),
    }
    await StoredBooks(store).flush(Batch(holder="r1", number=1, now=now, flows=flows, spend=rows))


async def ask(own: str | None, **fields: str) -> Any:
    async with temporary_store() as store:
        await fill(store)
        query = read_query(fields, own, NOW)
        return json.loads(json.dumps(await store.read(usage_of(query, RULES, NOW))))


async def test_a_tenant_sees_its_own_alone() -> None:
    """Neither others' spend nor the account that it shares with them."""
    told = await ask("a")
    assert (told["tenant"], told["since"], told["until"]) == ("a", "2026-11-01T00:00:00Z", "2026-11-18T12:00:00Z")
    assert [(one["name"], one["requests"], one["cost_usd"]) for one in told["data"]] == [
        ("chat", 2, 1.500000001),
        ("new", 1, None),
    ]
    assert (told["total"]["cost_usd"], told["total"]["unpriced"], told["total"]["input_tokens"]) == (1.500000001, 1, 14)
    (budget,) = told["budgets"]
    assert (budget["scope"], budget["amount_usd"], budget["spent_usd"]) == ("tenant=a", 2, 1.500000001)
    assert budget["held_usd"] + budget["lost_usd"] == pytest.approx(1e-7)
    assert budget["left_usd"] == pytest.approx(0.4999998989)


@pytest.mark.parametrize(
    ("by", "names"),
    [
        ("tenant", ["a", "b"]),
        ("key", ["key_a", "key_b"]),
        ("target", ["groq/x", "pool/tiny", "groq/unknown"]),
        ("day", ["2026-11-17", "2026-11-18"]),
    ],
)
async def test_sums_are_made_by_what_is_asked_for(by: str, names: list[str]) -> None:
    told = await ask(None, by=by)
    assert [one["name"] for one in told["data"]] == names
    assert sum(one["requests"] for one in told["data"]) == told["total"]["requests"] == 4
    assert [one["budget"] for one in told["budgets"]] == ["all", "each", "each"]


async def test_a_part_is_asked_for_by_time_key_and_number() -> None:
    """The total is of all rows; hours are whole."""
    told = await ask(None, since="24h", key="key_a", limit="1", by="target")
    assert [one["name"] for one in told["data"]] == ["groq/x"]
    assert told["has_more"]
    assert told["total"]["requests"] == 3
    told = await ask(None, since="2026-11-17", until="2026-11-18T00:00:00Z")
    assert told["total"]["requests"] == 1
    assert (await ask(None, tenant="b"))["total"]["requests"] == 1
    assert (await ask("b", tenant="*"))["total"]["requests"] == 4


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"by": "model"}, "by: 'model' is none of tenant, key, route, target, day"),
        ({"page": "1"}, "there is no query page here; there are: by, key"),
        ({"since": "yesterday"}, "since: 'yesterday' is no time; write a day such as 2026-11-01"),
        ({"until": "2026-10-01"}, "until: from 2026-11-01T00:00:00Z until 2026-10-01T00:00:00Z there is no time"),
        ({"since": "0"}, "no more than 400 days"),
        ({"limit": "0"}, "limit must be a whole number from 1 to 1000"),
        ({"limit": "9" * 5000}, "limit must be"),
        ({"tenant": "a\x00"}, "tenant must have"),
        ({"key": "\ud800"}, "key must have"),
        ({"since": "0001-01-01"}, "no more than 400 days"),
        ({"until": "9999-12-31T23:59:59+00:00"}, "no more than 400 days"),
        ({"since": "9" * 11}, "since: from 5138"),
    ],
)
def test_a_wrong_question_is_told_what_is_right(fields: dict[str, str], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as told:
        read_query(fields, "a", NOW)
    assert told.value.param in fields


def test_the_verb_reads_the_store_and_says_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a configuration, whether a cluster runs or not."""
    monkeypatch.setattr("diptych.cluster.usage_verbs.time.time", lambda: NOW)

    async def prepare() -> None:
        async with temporary_store(data_dir=tmp_path) as store:
            await fill(store)

    asyncio.run(prepare())
    where = [f"data_dir={tmp_path}", "gateway.budgets.each.amount_usd=2", "gateway.budgets.each.tenant='*'"]
    if (store_url := bare(tmp_path).url) is not None:
        where.append(f"store.url='{store_url}'")
    run = {"config": None, "overrides": where, "url": None}
    assert run_usage({"by": "tenant"}, **run, as_json=False) == 0  # type: ignore[arg-type]
    shown = capsys.readouterr().out
    assert "all tenants, 2026-11-01T00:00:00Z to 2026-11-18T12:00:00Z" in shown
    assert "a              3     14       6       0  1.500000         1" in shown
    assert "each    tenant=a  2026-11  2.000000  1.500000" in shown
    assert run_usage({"by": "day"}, **run, as_json=True) == 0  # type: ignore[arg-type]
    assert json.loads(capsys.readouterr().out)["total"]["requests"] == 4
    assert run_usage({"by": "model"}, **run, as_json=False) == 2  # type: ignore[arg-type]
    assert "diptych: --by: 'model' is none of" in capsys.readouterr().err
    assert run_usage({}, config=None, overrides=[], url="http://127.0.0.1:1", as_json=False) == 1
    assert "http://127.0.0.1:1 does not answer" in capsys.readouterr().err


async def test_an_empty_store_is_a_table_with_zeros() -> None:
    async with temporary_store() as store:
        told = await store.read(usage_of(read_query({}, None, NOW), {}, NOW))
    assert "total         0      0       0       0  0.000000         -" in render(told)
