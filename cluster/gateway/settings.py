"""The branch `gateway:` of diptych.yaml: which names clients may use as `model`, and what answers behind each.

Read by Gateway and, for its errors, when the configuration is loaded. It knows targets by their names alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from diptych.cluster.providers.terms import Timeouts
from diptych.protos.settings import Seconds, Settings

from .money_settings import ANY, CacheSettings, MoneySettings, RouteCacheSettings
from .rule_settings import MAX_RULES, RuleSettings, check_header_names, check_rules
from .rule_settings import StrategyName as StrategyName

OWN = "pool"  # what stands before the slash of an own pool's name, as a provider's name does of a provider's model
ROUTE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")
TARGET_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}/[^\s/][^\s]{0,255}")
MAX_FALLBACKS = 16

Midstream = Literal["auto", "error", "continue"]
OnUnsupported = Literal["error", "warn", "drop"]
Fraction = Annotated[float, Field(ge=0, le=1)]


class TimeoutSettings(Settings):
    """How long a request and its attempts may take.

    A request's own timeout_s and first_token_timeout_s hold besides; and while there are other targets, one that says
    nothing gets no more than a part of the time that is left.
    """

    connect_s: Seconds = Field(3.0, description="to reach a provider's host, and again for TLS")
    headers_s: Seconds = Field(15.0, description="of a stream: from the call to the answer's headers")
    first_token_s: Seconds = Field(8.0, description="of a stream: from the call to the first text, reasoning or call")
    answer_s: Seconds = Field(120.0, description="of a whole answer that is not streamed")
    idle_s: Seconds = Field(20.0, description="between two pieces of an answer")
    total_s: Seconds = Field(300.0, description="all attempts of a request together")

    def of_attempt(self) -> Timeouts:
        """The same for a target."""
        return Timeouts(**self.model_dump())


class HedgeSettings(Settings):
    """A second attempt beside one that is slow to begin. Never of requests with tools or with provider_options."""

    after: Literal["p50", "p90", "p95", "p99"] | Seconds = Field(
        "p95", description="of the target's recent times to a first token; or a number of seconds"
    )
    max_fraction: float = Field(0.03, ge=0, le=0.5, description="second attempts per request of the route, at most")


class RouteTarget(Settings):
    """A place that can answer: PROVIDER/MODEL, or pool/MODEL for an own pool."""

    target: str = Field(description="PROVIDER/MODEL or pool/MODEL")
    weight: float = Field(1.0, gt=0, le=1e6, description="share among the route's targets")

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"target": value} if isinstance(value, str) else value

    @field_validator("target")
    @classmethod
    def _has_two_parts(cls, name: str) -> str:
        return checked_target(name)


def checked_target(name: str) -> str:
    """A target's name. Raises ValueError."""
    if not TARGET_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no target: write PROVIDER/MODEL, or {OWN}/MODEL for an own pool")
    return name


class RouteSettings(Settings):
    """A name that clients use as `model`."""

    targets: tuple[RouteTarget, ...] = Field(min_length=1, description="what answers")
    strategy: StrategyName = Field(
        "p2c",
        description="p2c: the better of two by requests in work and latency; weighted: by chance; priority: the first "
        "that can; lowest_cost; sticky: a conversation stays where its prompt may be cached",
    )
    fallback: tuple[str, ...] = Field((), max_length=MAX_FALLBACKS, description="routes or targets, when these fail")
    context_fallback: tuple[str, ...] = Field(
        (), max_length=MAX_FALLBACKS, description="routes or targets, when a request is too long for these"
    )
    content_policy_fallback: tuple[str, ...] = Field(
        (), max_length=MAX_FALLBACKS, description="routes or targets, when a provider's filter gives no answer"
    )
    midstream: Midstream = Field(
        "auto",
        description="when a target fails after the first text: auto: go on at an own pool of the same weights, else "
        "end with an error; error: always that; continue: plain texts go on at any target that can go on from a text",
    )
    on_unsupported: OnUnsupported = Field(
        "error",
        description="what a provider cannot do: error: another target or a refusal; warn: left out, told in the "
        "answer's headers and logged; drop: left out, told in the headers",
    )
    timeouts: TimeoutSettings = TimeoutSettings()
    retries: int = Field(2, ge=0, le=10, description="further attempts at the route's own targets")
    hedge: HedgeSettings | None = Field(None, description="null: never two attempts at once")
    cache: RouteCacheSettings | None = Field(None, description="null: no answer is given twice")

    @field_validator("targets")
    @classmethod
    def _differ(cls, targets: tuple[RouteTarget, ...]) -> tuple[RouteTarget, ...]:
        names = [entry.target for entry in targets]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{name} stands here twice; give it a weight instead")
        return targets

    @property
    def fallbacks(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """(key, names) of each of the three."""
        yield "fallback", self.fallback
        yield "context_fallback", self.context_fallback
        yield "content_policy_fallback", self.content_policy_fallback


class BreakerSettings(Settings):
    """When a target gets no requests for a while; of each target and key."""

    window_s: Seconds = Field(30.0, description="what counts as recent")
    min_requests: int = Field(5, ge=1, description="fewer of them open nothing")
    failures: Fraction = Field(0.5, description="part of them that must have failed")
    open_s: Seconds = Field(5.0, description="how long the first time; doubled each time its probe fails")
    max_open_s: Seconds = Field(60.0, description="how long at most")
    not_found_s: Seconds = Field(300.0, description="how long after the provider said that it has no such model")
    quota_s: Seconds = Field(600.0, description="how long after it said that nothing is paid for")
    cooldown_s: Seconds = Field(1.0, description="how long after a rate limit without Retry-After; doubled likewise")


class GatewaySettings(MoneySettings):
    """Routes, and what holds for all of them."""

    direct: bool = Field(False, description="clients may also name PROVIDER/MODEL of any configured provider")
    routes: dict[str, RouteSettings] = Field({}, description="names that clients use as `model`")
    retry_fraction: Fraction = Field(
        0.1, description="further attempts at targets that are failing, per recent request"
    )
    retry_floor: int = Field(10, ge=0, description="so many in 10 seconds are free, for routers with little traffic")
    rule_headers: tuple[str, ...] = Field(
        (), max_length=64, description="headers of requests that rules may read; clients choose what they say"
    )
    rules: tuple[RuleSettings, ...] = Field(
        (),
        max_length=MAX_RULES,
        description="requests that go elsewhere than `model` says; the first one decides",
    )
    breaker: BreakerSettings = BreakerSettings()
    cache: CacheSettings = CacheSettings()

    @field_validator("routes")
    @classmethod
    def _lead_somewhere(cls, routes: dict[str, RouteSettings]) -> dict[str, RouteSettings]:
        for name, route in routes.items():
            if not ROUTE_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no name of a route: use letters, digits, '.', '_', ':', '/' and '-'")
            for key, names in route.fallbacks:
                for i, other in enumerate(names):
                    _check_fallback(routes, f"{name}.{key}.{i}", other)
        for name in routes:
            for key, _ in routes[name].fallbacks:
                _refuse_cycles(routes, key, (name,))
        return routes

    @field_validator("rule_headers")
    @classmethod
    def _are_told_by_clients(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        check_header_names(names)
        return names

    @field_validator("rules")
    @classmethod
    def _can_happen(cls, rules: tuple[RuleSettings, ...], info: ValidationInfo) -> tuple[RuleSettings, ...]:
        known = info.data
        if "routes" in known and "budgets" in known and "rule_headers" in known:  # else they are wrong, and it is told
            reach = reach_of(known["routes"])
            check_rules(
                rules,
                reach=reach,
                direct=bool(known.get("direct")),
                budgets=known["budgets"],
                headers=known["rule_headers"],
            )
        return rules

    @model_validator(mode="after")
    def _hold_for_something(self) -> GatewaySettings:
        """A budget of a route that is not there would keep nobody from spending."""
        for key, rules in (("budgets", self.budgets), ("limits", self.limits)):
            for name, rule in rules.items():
                route = rule.route
                if route in (None, ANY) or route in self.routes or (self.direct and TARGET_NAME.fullmatch(route)):
                    continue
                known = ", ".join(sorted(self.routes)) or "none"
                raise ValueError(
                    f"{key}.{name}.route: there is no route {route!r} (there are {known}), so that it would never hold"
                )
        return self


def reach_of(routes: Mapping[str, RouteSettings]) -> dict[str, tuple[str, ...]]:
    """By route the targets that may answer, those of its fallbacks included."""
    return {name: tuple(_reached(routes, name, set())) for name in routes}


def _reached(routes: Mapping[str, RouteSettings], name: str, seen: set[str]) -> dict[str, None]:
    if name in seen:
        return {}
    seen.add(name)
    if name not in routes:
        return {name: None}
    found: dict[str, None] = {entry.target: None for entry in routes[name].targets}
    for _, others in routes[name].fallbacks:
        for other in others:
            found |= _reached(routes, other, seen)
    return found


def _check_fallback(routes: Mapping[str, RouteSettings], path: str, name: str) -> None:
    if name in routes or TARGET_NAME.fullmatch(name):
        return
    known = ", ".join(sorted(routes))
    raise ValueError(f"{path}: there is no route {name!r} (there are {known}), and a target is PROVIDER/MODEL")


def _refuse_cycles(routes: Mapping[str, RouteSettings], key: str, path: tuple[str, ...]) -> None:
    """Depth first along one kind of fallback."""
    for i, name in enumerate(getattr(routes[path[-1]], key)):
        if name in path:
            circle = " -> ".join((*path[path.index(name) :], name))
            raise ValueError(f"{path[-1]}.{key}.{i}: {circle} is a circle; a request would never get out of it")
        if name in routes:
            _refuse_cycles(routes, key, (*path, name))
