"""Rules by request context: which one decides, what it does, and which mistakes a configuration may not hold."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from journeys import HELLO, gateway, read, run, text_of
from prometheus_client import CollectorRegistry, generate_latest

from diptych.cluster.config import check_config
from diptych.cluster.gateway.metrics import GatewayMetrics
from diptych.cluster.gateway.money import money_ports
from diptych.cluster.gateway.planning import RefusedByRule
from diptych.cluster.gateway.ports import Context, Ports
from diptych.cluster.gateway.rule_settings import WhenSettings, covers
from diptych.cluster.gateway.rules import Rules
from diptych.cluster.gateway.settings import GatewaySettings
from diptych.cluster.gateway.testing import ScriptedTarget, fails, says
from diptych.protos.errors import InvalidRequest, StartupError, UnknownModel
from diptych.protos.failures import FailureKind
from diptych.protos.openai import ChatRequest, read_chat

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
TOOL = {"type": "function", "function": {"name": "f"}}


def target(name: str, text: str = "", **fields: Any) -> ScriptedTarget:
    return ScriptedTarget(name, [says(text or name)], **fields)


def asked(content: Any = "hello", **fields: Any) -> ChatRequest:
    return read_chat({"model": "chat", "messages": [{"role": "user", "content": content}], **fields})


def ruled(*rules: dict[str, Any], **more: Any) -> dict[str, Any]:
    named = [{"name": f"r{i}", **rule} for i, rule in enumerate(rules)]
    return {"settings": {"rules": named, **more}, "routes": {"long": {"targets": ["p/long"]}}}


async def route_of(when: dict[str, Any], request: ChatRequest, context: Context, **more: Any) -> str:
    gate = gateway(target("p/a"), target("p/long"), **ruled({"when": when, "then": {"route": "long"}}, **more))
    _, record = await gate.answer(request, context)
    assert (record.rule == "r0") == (record.route == "long")
    assert record.model == "chat"
    return record.route


@pytest.mark.parametrize(
    ("when", "yes", "no"),
    [
        ({"tenant": "acme"}, {"context": Context(tenant="acme")}, {"context": Context(tenant="other")}),
        ({"key": ["k1", "k2"]}, {"context": Context(key="k2")}, {"context": Context(key="k3")}),
        ({"tag": "eu"}, {"context": Context(tags=("x", "eu"))}, {"context": Context(tags=("x",))}),
        ({"route": "chat"}, {}, None),
        ({"input_tokens": {"above": 100}}, {"request": asked("x" * 800)}, {"request": asked("x")}),
        ({"input_tokens": {"below": 100}}, {"request": asked("x")}, {"request": asked("x" * 800)}),
        ({"has": "image"}, {"request": asked([IMAGE])}, {"request": asked("an image")}),
        ({"tools": True}, {"request": asked(tools=[TOOL])}, {"request": asked()}),
        ({"tools": False}, {"request": asked()}, {"request": asked(tools=[TOOL])}),
        ({"form": True}, {"request": asked(response_format={"type": "json_object"})}, {"request": asked()}),
        (
            {"headers": {"x-app": "web"}},
            {"context": Context(headers=(("x-app", "web"),))},
            {"context": Context(headers=(("x-app", "cli"),))},
        ),
        ({"tenant": "acme", "tag": "eu"}, {"context": Context(tenant="acme", tags=("eu",))}, None),
        ({"tenant": "acme", "tag": "us"}, None, {"context": Context(tenant="acme", tags=("eu",))}),
    ],
)
def test_each_condition_holds_where_it_says_and_nowhere_else(
    when: dict[str, Any], yes: dict[str, Any] | None, no: dict[str, Any] | None
) -> None:
    """A condition that is read off the wrong field sends a tenant's data to another's provider."""

    async def job() -> None:
        for case, route in ((yes, "long"), (no, "chat")):
            if case is not None:
                given_ = {"request": asked(), "context": Context(), **case}
                assert await route_of(when, **given_, rule_headers=["x-app"]) == route

    run(job())


def test_a_request_cannot_say_who_it_is() -> None:
    """Fields of the body that sound like authentication, and headers that are not listed, meet no condition."""

    async def job() -> None:
        request = asked(user="acme", metadata={"tenant": "acme", "tag": "eu"})
        context = Context(headers=(("x-app", "web"), ("x-other", "web")))
        assert await route_of({"tenant": "acme"}, request, context) == "chat"
        assert await route_of({"tag": "eu"}, request, context) == "chat"
        gate = gateway(
            target("p/a"),
            target("p/long"),
            **ruled({"when": {"headers": {"x-app": "web"}}, "then": {"route": "long"}}, rule_headers=["x-app"]),
        )
        _, record = await gate.answer(asked(), Context(headers=(("x-other", "web"),)))
        assert record.route == "chat"

    run(job())


def test_the_first_rule_that_holds_decides_alone() -> None:
    """An exemption stands before what it exempts from; rules that all applied would add up to what nobody wrote."""

    async def job() -> None:
        gate = gateway(
            target("p/a"),
            target("p/long"),
            **ruled(
                {"when": {"tenant": "acme"}, "then": {}},
                {"when": {"tenant": ["acme", "other"]}, "then": {"route": "long"}},
                {"then": {"refuse": "ask the operator for a key"}},
            ),
        )
        rules = []
        for tenant in ("acme", "other"):
            _, record = await gate.answer(asked(), Context(tenant=tenant))
            rules.append((record.rule, record.target))
        assert rules == [("r0", "p/a"), ("r1", "p/long")]
        with pytest.raises(RefusedByRule, match="ask the operator for a key"):
            await gate.answer(asked())
        with pytest.raises(RefusedByRule):
            gate.stream(asked())
        with pytest.raises(UnknownModel):
            await gate.answer(asked(model="nobody"))

    run(job())


def test_targets_are_excluded_behind_the_route_as_well() -> None:
    """A tenant whose data must not leave must not leave by a fallback."""

    async def job() -> None:
        down, abroad, own = ScriptedTarget("q/a", [[fails(FailureKind.SERVER)]]), target("p/a"), target("pool/m")
        gate = gateway(
            down,
            abroad,
            own,
            targets=["q/a"],
            fallback=["p/a", "pool/m"],
            retries=0,
            settings={"rules": [{"name": "home", "when": {"tenant": "eu"}, "then": {"exclude": "p/*"}}]},
        )
        reply, record = await gate.answer(asked(), Context(tenant="eu"))
        assert (reply.message.content, abroad.requests) == ("pool/m", [])
        assert record.rule == "home"
        assert [entry.target for entry in record.attempts] == ["q/a", "pool/m"]
        reply, _ = await gate.answer(asked())
        assert reply.message.content == "p/a"

    run(job())


def test_a_rule_that_leaves_no_target_refuses() -> None:
    """Nothing of a route may be left for a tenant; going on without the rule would be the worst answer to that."""

    async def job() -> None:
        rule = {"when": {"tenant": "eu"}, "then": {"only": "p/long"}}
        gate = gateway(target("p/a"), target("p/long"), **ruled(rule))
        with pytest.raises(RefusedByRule, match="the rule r0 leaves no target of chat"):
            await gate.answer(asked(), Context(tenant="eu"))
        assert "leaves no target" in gate.explain(asked(), context=Context(tenant="eu")).why

    run(job())


def test_own_pools_first_and_another_strategy() -> None:
    """prefer_own holds over whatever the strategy would choose, and gives way where no own pool can."""

    async def job() -> None:
        own = ScriptedTarget("pool/m", [says("own"), [fails(FailureKind.SERVER)]], is_own=True)
        rule = {"when": {"tenant": "eu"}, "then": {"prefer_own": True, "strategy": "priority"}}
        gate = gateway(target("p/a"), own, strategy="weighted", settings={"rules": [{"name": "own", **rule}]})
        told = gate.explain(asked(), context=Context(tenant="eu"))
        assert (told.target, told.strategy, told.rule) == ("pool/m", "priority", "own")
        assert [await text(gate, "eu") for _ in range(2)] == ["own", "p/a"]

    async def text(gate: Any, tenant: str) -> str:
        return text_of((await read(gate, context=Context(tenant=tenant)))[0])

    run(job())


def test_a_canary_takes_its_part_and_each_conversation_stays() -> None:
    """A conversation that changes its model from turn to turn tells nothing about either model."""

    async def job() -> None:
        canary = {"percent": 20, "to": "long", "by": "session"}
        rule = {"when": {"route": "chat"}, "then": {"canary": canary}}
        gate = gateway(target("p/a"), target("p/long"), **ruled(rule))
        routes = {}
        for i in range(300):
            for turn in ("one", "two"):
                _, record = await gate.answer(asked(turn), Context(session=f"s{i}"))
                assert routes.setdefault(i, record.route) == record.route
        assert 40 <= sum(route == "long" for route in routes.values()) <= 80

    run(job())


@settings(max_examples=30, deadline=None)
@given(st.floats(0.1, 99.9), st.floats(0.1, 99.9), st.text(min_size=1, max_size=8))
def test_a_larger_canary_keeps_whom_the_smaller_one_had(first: float, second: float, session: str) -> None:
    """From 5 to 10 percent nobody may go back, or every step of a roll-out changes everybody's model."""
    small, large = sorted((first, second))
    context = Context(session=session)
    found = []
    for percent in (small, large):
        rule = {"name": "c", "then": {"canary": {"percent": percent, "to": "long"}}}
        tree = {"routes": {"long": {"targets": ["p/a"]}}, "rules": [rule]}
        read_rules = GatewaySettings.model_validate(tree).rules
        rules = Rules(read_rules, rng=Ports().rng, budgets_left=lambda request, context: {})
        found.append(rules.decide(asked(), context).route == "long")
    assert found != [True, False]


def test_requests_go_elsewhere_when_a_budget_runs_low() -> None:
    """The gateway knows what is left once anything was leased, and rules by it without asking anybody."""

    async def job() -> None:
        tree = {
            "routes": {"chat": {"targets": ["p/a"]}, "long": {"targets": ["p/long"]}},
            "prices": {"p/*": {"input_per_mtok": 0, "output_per_mtok": 1_000_000}},
            "budgets": {"month": {"amount_usd": 10, "lease_usd": 1}},
            "rules": [{"name": "low", "when": {"budget_left": {"below": 0.5}}, "then": {"route": "long"}}],
        }
        read_settings = GatewaySettings.model_validate(tree)
        clock = asyncio.get_running_loop().time
        from diptych.cluster.gateway.gateway import Gateway

        targets = [ScriptedTarget(name, [says("x", tokens=2)]) for name in ("p/a", "p/long")]
        gate = Gateway(read_settings, targets=targets, ports=money_ports(read_settings, ports=Ports(clock=clock)))
        routes = [(await gate.answer(asked(max_tokens=2)))[1].route for _ in range(5)]
        assert routes == ["chat", "chat", "chat", "long", "long"]
        told = gate.explain(asked(max_tokens=2))
        assert (told.target, told.budgets[0].left) == ("", 0.0)
        assert "the budget month has $0 left" in told.why

    run(job())


def test_a_client_names_target_and_strategy_within_the_route() -> None:
    """x-route-target may not lead out of what the route and the rules let."""

    async def job() -> None:
        rule = {"when": {"tenant": "eu"}, "then": {"exclude": "p/long"}}
        gate = gateway(target("p/a"), target("p/long"), fallback=["long"], **ruled(rule))
        reply, record = await gate.answer(asked(), Context(target="p/long"))
        assert reply.message.content == "p/long"
        assert [entry.target for entry in record.attempts] == ["p/long"]
        with pytest.raises(InvalidRequest, match="x-route-target: chat has no such target; there are p/a, p/long"):
            await gate.answer(asked(), Context(target="p/other"))
        with pytest.raises(RefusedByRule, match="does not let p/long answer"):
            await gate.answer(asked(), Context(target="p/long", tenant="eu"))
        with pytest.raises(InvalidRequest, match="lowest_cost needs prices"):
            await gate.answer(asked(), Context(strategy="lowest_cost"))
        assert gate.explain(asked(), context=Context(strategy="sticky")).strategy == "sticky"

    run(job())


def test_an_answer_of_another_target_is_not_given_from_memory() -> None:
    """A kept answer may come from the very target that a rule excludes."""

    async def job() -> None:
        tree = {
            "routes": {"chat": {"targets": ["p/a", "q/b"], "strategy": "priority", "cache": {"always": True}}},
            "rules": [{"name": "home", "when": {"key": "k"}, "then": {"exclude": "p/*"}}],
        }
        read_settings = GatewaySettings.model_validate(tree)
        from diptych.cluster.gateway.gateway import Gateway

        gate = Gateway(
            read_settings, targets=[target("p/a"), target("q/b")], ports=money_ports(read_settings, ports=Ports())
        )
        assert (await gate.answer(asked()))[0].message.content == "p/a"
        assert (await gate.answer(asked()))[1].cache == "hit"
        reply, record = await gate.answer(asked(), Context(key="k"))
        assert (reply.message.content, record.cache) == ("q/b", "")

    run(job())


def test_explain_tells_each_rule_and_nothing_of_others_to_strangers() -> None:
    """An operator sees why a rule did not hold; a tenant must not read other tenants' names off it."""

    async def job() -> None:
        gate = gateway(
            target("p/a"),
            target("p/long"),
            **ruled(
                {"when": {"tenant": "secret-tenant"}, "then": {}},
                {"when": {"input_tokens": {"above": 99}}, "then": {"route": "long"}},
                {"then": {"canary": {"percent": 50, "to": "long", "by": "random"}}},
                {"when": {"tag": "x"}, "then": {"route": "long"}},
            ),
        )
        told = gate.explain(asked(), context=Context(tenant="me", tags=("x",)))
        assert [(v.rule, v.outcome, v.condition) for v in told.rules] == [
            ("r0", "does not hold", "tenant"),
            ("r1", "does not hold", "input_tokens"),
            ("r2", "not drawn", "canary"),
            ("r3", "decides", ""),
        ]
        assert told.rules[0].words == "tenant is me, and it wants secret-tenant"
        assert told.rules[1].words == "input_tokens is 10, and it wants above 99"
        assert "secret-tenant" in str(told.told())
        assert "secret-tenant" not in str(told.told(is_operator=False))
        assert (told.group, told.target) == ("long", "p/long")

    run(job())


def test_rules_are_counted_by_name() -> None:
    """Series are routes and rules of the configuration, whatever clients name."""

    async def job() -> None:
        registry = CollectorRegistry()
        made = ruled({"then": {"route": "long"}})
        gate = gateway(target("p/a"), target("p/long"), ports={"metrics": GatewayMetrics(registry)}, **made)
        await gate.chat("chat", HELLO)
        text = generate_latest(registry).decode()
        assert 'diptych_gateway_rule_decisions_total{rule="r0"} 1.0' in text
        assert 'diptych_gateway_requests_total{outcome="answered",route="long"} 1.0' in text

    run(job())


ROUTES = {"chat": {"targets": ["groq/a"], "fallback": ["long"]}, "long": {"targets": ["openai/b"]}}


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ([{"then": {}}], "gateway.rules.0.name is missing"),
        ([{"name": "A b", "then": {}}], "gateway.rules.0.name: 'A b' is no name"),
        ([{"name": "a", "when": {"tenant": "x"}, "then": {}}] * 2, "gateway.rules: 1.name: there is a rule a before"),
        ([{"name": "a", "then": {"route": "x"}}], "gateway.rules: 0.then.route: there is no route 'x'"),
        ([{"name": "a", "then": {"canary": {"percent": 5, "to": "x"}}}], "0.then.canary.to: there is no route 'x'"),
        ([{"name": "a", "then": {"canary": {"percent": 0, "to": "chat"}}}], "0.then.canary.percent: should be greater"),
        ([{"name": "a", "when": {"route": "x"}, "then": {}}], "0.when.route: there is no route 'x'.* no request asks"),
        ([{"name": "a", "when": {"route": "chat"}, "then": {"route": "chat"}}], "chat -> chat is a circle"),
        ([{"name": "a", "when": {"tenant": []}, "then": {}}], "0.when.tenant: should have at least 1 entry"),
        ([{"name": "a", "when": {"input_tokens": {}}, "then": {}}], "0.when.input_tokens: it says neither"),
        ([{"name": "a", "when": {"input_tokens": {"above": 9, "below": 10}}, "then": {}}], "no number of tokens is"),
        ([{"name": "a", "when": {"budget_left": {"below": 0.1}}, "then": {}}], "0.when.budget_left: there are no bud"),
        ([{"name": "a", "when": {"headers": {"x-a": "b"}}, "then": {}}], "0.when.headers.x-a: rules may not read"),
        ([{"name": "a", "when": {"has": "video"}, "then": {}}], "gateway.rules.0.when.has.0: should be 'image'"),
        ([{"name": "a", "then": {"only": "gro/a"}}], "0.then.only.0: gro/a is no target of any route"),
        ([{"name": "a", "then": {"exclude": "groq"}}], "0.then.exclude: 'groq' is no target: write PROVIDER/MODEL"),
        (
            [{"name": "a", "when": {"route": "long"}, "then": {"exclude": "openai/*"}}],
            "0.then: only and exclude leave no target of long",
        ),
        ([{"name": "a", "then": {"refuse": "no", "route": "long"}}], "0.then: a request that is refused goes nowhere"),
        (
            [{"name": "a", "then": {"route": "long", "canary": {"percent": 5, "to": "long"}}}],
            "0.then: give a route or a canary, not both",
        ),
        (
            [
                {"name": "wide", "when": {"tenant": ["a", "b"]}, "then": {}},
                {"name": "narrow", "when": {"tenant": "a", "has": "image"}, "then": {}},
            ],
            "gateway.rules: 1: narrow is never reached, for wide before it takes all",
        ),
    ],
)
def test_mistakes_name_the_key(rules: list[dict[str, Any]], words: str) -> None:
    """A rule that silently never matches is an access rule that is not there."""
    with pytest.raises(StartupError, match=words):
        check_config({"gateway": {"routes": ROUTES, "rules": rules}}, "c")


@pytest.mark.parametrize("name", ["authorization", "x-tenant", "x-api-key", "X-App", "cookie"])
def test_headers_of_authentication_cannot_be_allowed(name: str) -> None:
    """A rule by x-tenant would believe the client what only its key can say."""
    with pytest.raises(StartupError, match=r"gateway\.rule_headers: 0: "):
        check_config({"gateway": {"routes": ROUTES, "rule_headers": [name]}}, "c")


def test_a_strategy_by_price_needs_prices() -> None:
    """As of a route: a rule would choose among unknown prices by the order of the configuration."""

    async def job() -> None:
        with pytest.raises(StartupError, match=r"gateway.rules.0.then.strategy: lowest_cost needs prices"):
            gateway(target("p/a"), target("p/long"), **ruled({"then": {"strategy": "lowest_cost"}}))

    run(job())


_names = st.sampled_from([None, ("a",), ("a", "b"), ("b", "c")])
_whens = st.builds(
    lambda tenant, tag, tools, above: WhenSettings.model_validate(
        {
            key: value
            for key, value in (
                ("tenant", tenant),
                ("tag", tag),
                ("tools", tools),
                ("input_tokens", None if above is None else {"above": above}),
            )
            if value is not None
        }
    ),
    _names,
    _names,
    st.sampled_from([None, True, False]),
    st.sampled_from([None, 5, 50]),
)


@settings(max_examples=40, deadline=None)
@given(_whens, _whens, st.sampled_from("abc"), st.sampled_from("abc"), st.booleans(), st.integers(0, 80))
def test_what_covers_a_rule_holds_wherever_it_does(
    wide: WhenSettings, narrow: WhenSettings, tenant: str, tag: str, has_tools: bool, length: int
) -> None:
    """A false alarm would refuse a configuration that means something."""
    request = asked("xxxx" * length, **({"tools": [TOOL]} if has_tools else {}))
    context = Context(tenant=tenant, tags=(tag,))
    held = []
    for when in (wide, narrow):
        tree = {"routes": {"long": {"targets": ["p/a"]}}, "rules": [{"name": "r", "when": when, "then": {}}]}
        rules = Rules(
            GatewaySettings.model_validate(tree).rules, rng=Ports().rng, budgets_left=lambda request, context: {}
        )
        held.append(bool(rules.decide(request, context).rule))
    if covers(wide, narrow):
        assert held != [False, True]
