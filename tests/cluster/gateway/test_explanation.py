"""What the dry run says is what happens: its target is the first one that is asked."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as bounds
from hypothesis import strategies as st
from journeys import HELLO, run

from diptych.cluster.gateway.gateway import Gateway
from diptych.cluster.gateway.money import money_ports
from diptych.cluster.gateway.planning import RefusedByRule
from diptych.cluster.gateway.ports import Context, Ports
from diptych.cluster.gateway.requests import read_request
from diptych.cluster.gateway.settings import GatewaySettings
from diptych.cluster.gateway.testing import Script, ScriptedTarget, fails, says
from diptych.protos.errors import DiptychError
from diptych.protos.failures import FailureKind

NAMES = ("p/a", "p/b", "q/c", "pool/x", "pool/y")
STRATEGIES = st.sampled_from(["priority", "lowest_cost", "sticky"])  # those without chance
SCRIPTS: dict[str, Script] = {
    "well": says("x"),
    "server": [fails(FailureKind.SERVER)],
    "gone": [fails(FailureKind.NOT_FOUND)],
    "limited": [fails(FailureKind.RATE_LIMITED, retry_after_s=30)],
}


def route(**more: Any) -> st.SearchStrategy[dict[str, Any]]:
    targets = st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True)
    return st.fixed_dictionaries({"targets": targets, "strategy": STRATEGIES, **more})


SETTINGS = st.fixed_dictionaries(
    {
        "direct": st.just(True),  # rules may speak of targets that no route has
        "routes": st.fixed_dictionaries({"chat": route(fallback=st.sampled_from([[], ["behind"]])), "behind": route()}),
        "prices": st.dictionaries(
            st.sampled_from(NAMES[:3]), st.sampled_from([0, 1, 5]).map(lambda n: dict.fromkeys(PER_MTOK, n))
        ),
        "pools": st.dictionaries(st.sampled_from(["x", "y"]), st.just({"per_device_hour": 1})),
        "rules": st.sampled_from(
            [
                [],
                [{"name": "own", "then": {"prefer_own": True}}],
                [{"name": "but", "then": {"exclude": ["p/a", "pool/x"]}}],
                [{"name": "some", "then": {"canary": {"percent": 50, "to": "behind"}, "prefer_own": True}}],
            ]
        ),
    }
)
PER_MTOK = ("input_per_mtok", "output_per_mtok")


async def differs(tree: dict[str, Any], does: list[str], cannot: frozenset[str], sessions: list[str]) -> str:
    """Which target was asked first instead of the one that was told; nothing where it was that one."""
    settings = GatewaySettings.model_validate(tree)
    targets = [
        ScriptedTarget(name, [SCRIPTS[what]], is_own=name.startswith("pool/"), cannot="no" if name in cannot else "")
        for name, what in zip(NAMES, does, strict=True)
    ]
    clock = asyncio.get_running_loop().time
    gate = Gateway(settings, targets=targets, ports=money_ports(settings, ports=Ports(clock=clock)))
    for session in sessions:
        request, context = read_request("chat", HELLO, {"max_tokens": 5}), Context(session=session)
        told = gate.explain(request, context=context)
        try:
            stream = gate.stream(request, context=context)
        except RefusedByRule:
            continue
        try:
            async with stream as events:
                async for _ in events:
                    pass
        except DiptychError:
            pass
        asked = [one.target for one in stream.record.attempts]
        sent = next((name for name in asked if name not in cannot), "")
        if told.target and sent != told.target:  # where it tells none, a request waits for one
            return f"{sent} for {told.target}: {told}"
    return ""


@given(
    SETTINGS,
    st.lists(st.sampled_from(sorted(SCRIPTS)), min_size=5, max_size=5),
    st.frozensets(st.sampled_from(NAMES), max_size=2),
    st.lists(st.sampled_from("abc"), min_size=1, max_size=4),
)
@bounds(max_examples=60, deadline=None)
def test_the_target_that_is_told_is_the_one_that_is_asked(
    tree: dict[str, Any], does: list[str], cannot: frozenset[str], sessions: list[str]
) -> None:
    """By each strategy without chance, with rules, fallbacks, prices that nobody knows, closed and failing targets."""
    assert run(differs(tree, does, cannot, sessions)) == ""


def test_an_own_pool_without_a_price_comes_first_where_own_ones_do() -> None:
    """prefer_own with lowest_cost: a score that nobody knows stood behind all that are known."""
    priced = {"input_per_mtok": 1, "output_per_mtok": 1}
    tree = {
        "routes": {"chat": {"targets": ["p/a", "pool/x"], "strategy": "lowest_cost"}},
        "prices": {"p/a": priced},
        "rules": [{"name": "own", "then": {"prefer_own": True}}],
    }
    assert run(differs(tree, ["well"] * 5, frozenset(), ["a"])) == ""


def test_a_target_that_cannot_leaves_the_order_of_the_others_as_it_is() -> None:
    """Behind one that cannot do what is asked, and was sent nothing, targets that fail now and then were left out."""
    tree = {"routes": {"chat": {"targets": ["p/a", "p/b", "q/c"], "strategy": "priority", "retries": 0}}}
    assert run(differs(tree, ["well", "server", "well", "well", "well"], frozenset({"p/a"}), ["a"] * 4)) == ""


@pytest.mark.parametrize("then", [{"strategy": "sticky"}, {"canary": {"percent": 50, "to": "behind"}}])
def test_half_a_surrogate_pair_of_a_program_breaks_nothing_here(then: dict[str, Any]) -> None:
    """It can be sent to most providers; sticky routes, canaries and estimates ended with a UnicodeEncodeError."""

    async def job() -> str:
        tree = {
            "routes": {name: {"targets": ["p/a", "p/b"]} for name in ("chat", "behind")},
            "rules": [
                {"name": "long", "when": {"input_tokens": {"above": 9999}}, "then": {}},
                {"name": "r", "then": then},
            ],
        }
        targets = [ScriptedTarget(name, [says("x")]) for name in ("p/a", "p/b")]
        gate = Gateway(GatewaySettings.model_validate(tree), targets=targets, ports=Ports(rng=random.Random(7)))
        return (await gate.chat("chat", [{"role": "user", "content": "\ud800"}])).message.content

    assert run(job()) == "x"
