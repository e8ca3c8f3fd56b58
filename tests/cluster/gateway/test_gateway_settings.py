"""The branch `gateway:`: what is refused, with which path, and what it becomes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diptych.cluster.config import check_config, load_config
from diptych.cluster.gateway.gateway import Gateway
from diptych.cluster.gateway.ports import Ports
from diptych.cluster.gateway.settings import GatewaySettings
from diptych.cluster.gateway.testing import ScriptedTarget, says
from diptych.cluster.providers.registry import Registry
from diptych.cluster.providers.terms import Timeouts
from diptych.protos.errors import StartupError

A = {"targets": ["groq/x"]}


@pytest.mark.parametrize(
    ("gateway", "words"),
    [
        ({"routes": {"a": {"targets": []}}}, "gateway.routes.a.targets: should have at least 1 entry"),
        ({"routes": {"a": {}}}, "gateway.routes.a.targets is missing"),
        ({"routes": {"a": {"targets": ["x"]}}}, "gateway.routes.a.targets.0.target: 'x' is no target: write PROVIDER/"),
        ({"routes": {"a": {"targets": [{"target": "p/x", "wait": 1}]}}}, "targets.0.wait is not a known key .*weight"),
        ({"routes": {"a": {"targets": ["p/x", "p/x"]}}}, "p/x stands here twice"),
        (
            {"routes": {"a": {"targets": [{"target": "p/x", "weight": 0}]}}},
            "targets.0.weight: should be greater than 0",
        ),
        ({"routes": {"a": A | {"fallback": ["b"]}}}, "a.fallback.0: there is no route 'b'"),
        ({"routes": {"a": A | {"fallback": ["a"]}}}, "a.fallback.0: a -> a is a circle"),
        (
            {
                "routes": {
                    "a": A | {"fallback": ["b"]},
                    "b": A | {"fallback": ["p/x", "c"]},
                    "c": A | {"fallback": ["b"]},
                }
            },
            "c.fallback.0: b -> c -> b is a circle",
        ),
        ({"routes": {"a": A | {"strategy": "best"}}}, "gateway.routes.a.strategy: should be 'p2c'"),
        ({"routes": {"a": A | {"midstream": "restart"}}}, "gateway.routes.a.midstream: should be 'auto'"),
        ({"routes": {"a": A | {"timeouts": {"total": 5}}}}, "timeouts.total is not a known key .did you mean total_s"),
        ({"routes": {"a": A | {"hedge": {"after": "p12"}}}}, "gateway.routes.a.hedge.after"),
        ({"routes": {"a": A | {"retries": 11}}}, "gateway.routes.a.retries: should be less than or equal to 10"),
        ({"routes": {"a b": A}}, "'a b' is no name of a route"),
        ({"routs": {}}, "gateway.routs is not a known key .did you mean routes"),
        (
            {"routes": {"a": A}, "budgets": {"small": {"amount_usd": 1, "route": "aa"}}},
            "gateway: budgets.small.route: there is no route 'aa' .there are a., so that it would never hold",
        ),
        ({"limits": {"few": {"concurrency": 1, "route": "p/x"}}}, "limits.few.route: there is no route 'p/x' .* none"),
    ],
)
def test_what_is_wrong_is_told_with_its_path(gateway: dict[str, Any], words: str) -> None:
    """A misspelt key was ignored, and the fallback that it named was missed in the outage."""
    with pytest.raises(StartupError, match=words):
        check_config({"gateway": gateway}, "diptych.yaml")


def test_a_list_of_wrong_entries_is_not_called_short() -> None:
    """`targets: should have at least 1 entry, not ['x']` stood beside what was wrong with x."""
    with pytest.raises(StartupError) as told:
        check_config({"gateway": {"routes": {"a": {"targets": ["x"]}}}}, "diptych.yaml")
    assert "at least" not in str(told.value)


def test_one_circle_over_two_kinds_of_fallback_is_none() -> None:
    """A long route whose general fallback is the short one is sensible."""
    routes = {"short": A | {"context_fallback": ["long"]}, "long": A | {"fallback": ["short"]}}
    assert set(GatewaySettings.model_validate({"routes": routes}).routes) == {"short", "long"}


def test_timeouts_of_a_route_are_those_of_its_attempts() -> None:
    """Two classes of the same names drifted apart."""
    settings = GatewaySettings.model_validate({"routes": {"a": A | {"timeouts": {"first_token_s": 2, "idle_s": 3}}}})
    assert settings.routes["a"].timeouts.of_attempt() == Timeouts(first_token_s=2, idle_s=3)


@pytest.mark.parametrize(
    ("routes", "words"),
    [
        ({"a": {"targets": ["nobody/x"]}}, "gateway.routes.a.targets.0: there is no provider 'nobody'"),
        ({"a": {"targets": ["grog/x"]}}, "gateway.routes.a.targets.0: .*did you mean groq"),
        ({"a": {"targets": ["pool/x"]}}, "gateway.routes.a.targets.0: there is no own pool pool/x here.* pool/own"),
        ({"a": A | {"fallback": ["a2", "nobody/x"]}, "a2": A}, "gateway.routes.a.fallback.1: there is no provider"),
        ({"a": A | {"strategy": "lowest_cost"}}, "gateway.routes.a.strategy: lowest_cost needs prices"),
    ],
)
def test_a_gateway_refuses_routes_to_nowhere(routes: dict[str, Any], words: str) -> None:
    """It was found out by the first request, in the middle of the night."""
    settings = GatewaySettings.model_validate({"routes": routes})
    with pytest.raises(StartupError, match=words):
        Gateway(settings, Registry.load(environ={}), targets=[ScriptedTarget("pool/own", [says("x")])])


def test_a_file_makes_a_gateway(tmp_path: Path) -> None:
    """The in-process gateway and `diptych serve` read one file."""
    file = tmp_path / "diptych.yaml"
    file.write_text(
        "providers:\n  lab: {base_url: 'http://127.0.0.1:9/v1', api_key: none}\n  groq: {}\n"
        "gateway:\n  direct: true\n  routes:\n    chat:\n      targets: [lab/a/b, {target: pool/own, weight: 9}]\n"
        "      fallback: [groq/llama]\n      hedge: {after: 1.5}\n"
    )
    own = ScriptedTarget("pool/own", [says("x")])
    gateway = Gateway.from_config(file, targets=[own], ports=Ports(), environ={})
    assert gateway.models == ("chat",)
    told = gateway.explain("chat", [{"role": "user", "content": "x"}])
    assert {candidate.target for candidate in told.candidates} == {"lab/a/b", "pool/own", "groq/llama"}
    assert load_config(file).gateway == gateway.settings
