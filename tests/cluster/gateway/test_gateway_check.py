"""Mistakes of `providers:` and `gateway:` are found before anything starts, each with its key path and the remedy."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import pytest

from diptych.cluster.config import check_config
from diptych.cluster.doctor_cluster import gateway as doctor_of_gateway
from diptych.cluster.doctor_machine import State
from diptych.cluster.gateway.check import check_gateway, unpriced
from diptych.cluster.gateway.ledger import Ledger
from diptych.cluster.gateway.money import money_ports
from diptych.cluster.gateway.settings import GatewaySettings
from diptych.cluster.route_verbs import Asker, offline, rendered
from diptych.protos.errors import StartupError

LAB = {"base_url": "http://127.0.0.1:1/v1", "api_key": "env:LAB_KEY"}


def check(tree: dict[str, Any], **environ: str) -> str:
    """What is wrong; empty: nothing."""
    try:
        check_gateway(check_config({"models": {"echo": {"source": "echo"}}, **tree}, "test"), environ)
    except StartupError as exc:
        return str(exc)
    return ""


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["pool/ecko"], "gateway.routes.a.targets.0: there is no model 'ecko'"),
        (["lab/m"], "LAB_KEY"),
        (["groqq/m"], "did you mean groq"),
        (["groq/m"], "GROQ_API_KEY"),
    ],
)
def test_targets_that_cannot_answer_are_told(targets: list[str], words: str) -> None:
    """They were found by the first client."""
    told = check({"providers": {"lab": LAB}, "gateway": {"routes": {"a": {"targets": targets}}}})
    assert words in told
    assert "gateway.routes.a.targets.0" in told


@pytest.mark.parametrize(
    ("gateway", "words"),
    [
        (
            {"prices": {"gorq/*": {"input_per_mtok": 1, "output_per_mtok": 1}}},
            "gateway.prices.gorq/*: there is no prov",
        ),
        ({"pools": {"ecko": {"per_device_hour": 1}}}, "gateway.pools.ecko: there is no model 'ecko'"),
    ],
)
def test_a_price_of_nothing_is_told(gateway: dict[str, Any], words: str) -> None:
    """It was taken without a word, and what it was meant for cost what the built-in table says, or nobody knew."""
    routes = {"a": {"targets": ["pool/echo"]}}
    assert words in check({"gateway": {"routes": routes, **gateway}})


def test_a_mistake_is_told_once() -> None:
    """A key that was missing was told for each target: twenty sentences for one variable."""
    routes = {f"r{i}": {"targets": ["lab/m", "groq/m"]} for i in range(20)}
    told = check({"providers": {"lab": LAB}, "gateway": {"routes": routes}})
    assert (told.count("$LAB_KEY"), told.count("$GROQ_API_KEY")) == (1, 1)
    assert "gateway.routes.r0.targets.0, gateway.routes.r1.targets.0, gateway.routes.r2.targets.0 and 17 more: " in told


def test_fallbacks_and_listed_providers_are_looked_at_too() -> None:
    """A fallback is needed when it is too late to set a variable."""
    routes = {"a": {"targets": ["pool/echo"], "fallback": ["groq/m"]}}
    assert "gateway.routes.a.fallback.0" in check({"gateway": {"routes": routes}})
    assert not check({"gateway": {"routes": routes}}, GROQ_API_KEY="x")
    assert "providers.lab" in check({"providers": {"lab": LAB}, "gateway": {"direct": True}})
    assert not check({"providers": {"lab": LAB}}), "nobody can reach it"
    assert "base_url" in check({"providers": {"nobody-knows": {}}})


def test_a_budget_over_what_has_no_price_is_told_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    """It was found by the first client, whose request got 503."""
    routes = {
        "chat": {"targets": ["groq/llama-3.3-70b-versatile"], "fallback": ["lab/big"]},
        "own": {"targets": ["pool/echo"]},
        "priced": {"targets": ["lab/free", "groq/llama-3.3-70b-versatile"]},
    }
    tree = {
        "routes": routes,
        "prices": {"lab/free": {"input_per_mtok": 0, "output_per_mtok": 0}},
        "budgets": {
            "all": {"amount_usd": 1, "tenant": "*"},
            "of-own": {"amount_usd": 1, "route": "own"},
            "lax": {"amount_usd": 1, "unpriced": "admit"},
            "shadow": {"amount_usd": 1, "shadow": True},
            "of-priced": {"amount_usd": 1, "route": "priced"},
        },
    }
    settings = GatewaySettings.model_validate(tree)
    told = unpriced(settings)
    assert [line.split(" costs")[0] for line in told] == [
        "gateway.budgets.all: nobody knows what lab/big",
        "gateway.budgets.all: nobody knows what pool/echo",
        "gateway.budgets.of-own: nobody knows what pool/echo",
    ]
    assert "the route chat" in told[0]
    assert "give gateway.prices.lab/big, 0 where it is free, or say gateway.budgets.all.unpriced: admit" in told[0]
    assert "give gateway.pools.echo.per_device_hour" in told[1]
    config = check_config({"models": {"echo": {"source": "echo"}}, "providers": {"lab": LAB}, "gateway": tree}, "test")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("LAB_KEY", "GROQ_API_KEY"):
            patch.setenv(name, "x")
        finding = doctor_of_gateway(config)
    assert (finding.state, "lab/big" in finding.told) == (State.SLOW, True)

    async def start() -> None:
        ledger = money_ports(settings).ledger
        assert isinstance(ledger, Ledger)
        async with ledger:
            pass

    asyncio.run(start())
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == told
    body = {"model": "chat", "messages": [{"role": "user", "content": "hello"}]}
    explained = rendered(offline(config, body, Asker(tenant="a"), {"LAB_KEY": "x", "GROQ_API_KEY": "x"}))
    assert "nobody knows what lab/big costs, so the budget all cannot be kept" in explained
    assert "gateway.prices.lab/big" in explained


def test_without_routes_nothing_of_the_gateway_is_imported() -> None:
    """Who has own models alone should not wait for it."""
    code = (
        "import sys\n"
        "from diptych.cluster.config import load_config\n"
        "from diptych.cluster.gateway.check import check_gateway\n"
        "import diptych.cluster.api.app\n"
        "check_gateway(load_config())\n"
        "print([name for name in sys.modules if name.startswith('diptych.cluster.gateway.gateway')\n"
        "  or name.endswith(('.routed', '.pool_target', 'providers.client', 'providers.registry'))])\n"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.strip() == "[]"
