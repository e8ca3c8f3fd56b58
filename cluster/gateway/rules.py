"""Which rule of the configuration decides about a request, and what it says: rule_settings.py at work.

planning.py asks once per request, before anything is reserved. Rules read the request, what the key says of who asks,
and headers that the configuration names; they know targets by their names alone and change nothing.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from diptych.protos.openai import ChatRequest
from diptych.protos.strict_json import printable

from .ports import Context
from .rule_settings import BudgetSpan, RuleSettings, StrategyName, WhenSettings, admits, may_answer
from .sizes import size_of
from .strategies import conversation_key

# Of each budget that a request falls under, which part is left as far as is known.
BudgetsLeft = Callable[[ChatRequest, Context], Mapping[str, float]]
_MEDIA: Final = {"image": "image", "audio": "audio", "file": "document"}
_LONGEST_SHOWN: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Restriction:
    """What else holds for a request. `exact`: the one target that may answer, empty: any."""

    only: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    exact: str = ""
    prefer_own: bool = False
    strategy: StrategyName | None = None

    @property
    def is_of_targets(self) -> bool:
        """Whether some targets may not answer."""
        return bool(self.only or self.exclude or self.exact)

    def admits(self, target: str) -> bool:
        """Whether it may answer."""
        return (not self.exact or target == self.exact) and may_answer(target, self.only, self.exclude)


FREE: Final = Restriction()


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What becomes of a request. `rule`: who said so, empty: none. `route`: what it is answered by. `refusal`: 403."""

    route: str
    rule: str = ""
    restriction: Restriction = FREE
    refusal: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """About one rule that was asked. `condition`: the first that does not hold; `words` quote what it wants."""

    rule: str
    outcome: Literal["decides", "does not hold", "not drawn"]
    condition: str = ""
    words: str = ""


class Rules:
    """Of one gateway."""

    def __init__(self, rules: Sequence[RuleSettings], *, rng: random.Random, budgets_left: BudgetsLeft) -> None:
        self._rng = rng
        self._budgets_left = budgets_left
        self._rules = [
            _Rule(
                settings=rule,
                conditions=_conditions(rule.when),
                restriction=Restriction(
                    only=rule.then.only,
                    exclude=rule.then.exclude,
                    prefer_own=rule.then.prefer_own,
                    strategy=rule.then.strategy,
                ),
            )
            for rule in rules
        ]

    def decide(self, request: ChatRequest, context: Context) -> Decision:
        """By the first rule that holds."""
        if not self._rules:
            return Decision(route=request.model)
        asked = _Asked(request, context, self._budgets_left)
        for rule in self._rules:
            if all(condition.holds(asked) for condition in rule.conditions) and self._is_drawn(rule, asked):
                return rule.decision(request.model)
        return Decision(route=request.model)

    def judged(self, request: ChatRequest, context: Context) -> tuple[Decision, tuple[Verdict, ...]]:
        """The same without chance, and why: about the rules that were asked, in order. A canary by chance does not
        decide here.
        """
        asked = _Asked(request, context, self._budgets_left)
        verdicts: list[Verdict] = []
        for rule in self._rules:
            name, canary = rule.settings.name, rule.settings.then.canary
            broken = next((condition for condition in rule.conditions if not condition.holds(asked)), None)
            if broken is not None:
                words = broken.why_not(asked)
                verdicts.append(Verdict(rule=name, outcome="does not hold", condition=broken.name, words=words))
            elif canary is not None and canary.by == "random" and canary.percent < 100:
                words = f"{canary.percent:g} of a hundred requests go to {canary.to} by chance, which is left out here"
                verdicts.append(Verdict(rule=name, outcome="not drawn", condition="canary", words=words))
            elif canary is not None and not self._is_drawn(rule, asked):
                words = f"this {canary.by} is not among the {canary.percent:g} of a hundred that go to {canary.to}"
                verdicts.append(Verdict(rule=name, outcome="not drawn", condition="canary", words=words))
            else:
                verdicts.append(Verdict(rule=name, outcome="decides"))
                return rule.decision(request.model), tuple(verdicts)
        return Decision(route=request.model), tuple(verdicts)

    def _is_drawn(self, rule: _Rule, asked: _Asked) -> bool:
        canary = rule.settings.then.canary
        if canary is None or canary.percent >= 100:
            return True
        if canary.by == "random":
            return self._rng.random() * 100 < canary.percent
        # Each rule draws anew: those who try one thing out should not be the same who try every other.
        digest = hashlib.blake2b(asked.crowd(canary.by), key=rule.settings.name.encode(), digest_size=8).digest()
        return int.from_bytes(digest) / 2.0**64 * 100 < canary.percent


class _Asked:
    """A request, with what several rules may ask of it found out once."""

    def __init__(self, request: ChatRequest, context: Context, budgets_left: BudgetsLeft) -> None:
        self.request = request
        self.context = context
        self._budgets_left = budgets_left
        self._tokens: int | None = None
        self._media: frozenset[str] | None = None
        self._left: Mapping[str, float] | None = None
        self._headers: Mapping[str, str] | None = None

    @property
    def tokens(self) -> int:
        """Of the prompt, estimated."""
        if self._tokens is None:
            self._tokens = size_of(self.request).usual_tokens
        return self._tokens

    @property
    def media(self) -> frozenset[str]:
        """Which kinds it has."""
        if self._media is None:
            self._media = frozenset(_MEDIA[one.kind] for message in self.request.messages for one in message.media)
        return self._media

    @property
    def has_tools(self) -> bool:
        """Whether any are offered."""
        return self.request.tool_use is not None and bool(self.request.tool_use.tools)

    @property
    def headers(self) -> Mapping[str, str]:
        """Those that rules may read."""
        if self._headers is None:
            self._headers = dict(self.context.headers)
        return self._headers

    def left(self, budget: str | None) -> float | None:
        """Of a budget, or of the one with the least left; None: nobody knows, or none holds."""
        if self._left is None:
            self._left = self._budgets_left(self.request, self.context)
        return min(self._left.values(), default=None) if budget is None else self._left.get(budget)

    def crowd(self, by: Literal["session", "tenant", "key", "random"]) -> bytes:
        """What is drawn for; where it is not known the conversation, which stays together all the same."""
        known = {"tenant": self.context.tenant, "key": self.context.key}.get(by, "")
        return known.encode(errors="surrogatepass") if known else conversation_key(self.request, self.context.session)


class _Condition(NamedTuple):
    name: str
    holds: Callable[[_Asked], bool]
    why_not: Callable[[_Asked], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rule:
    settings: RuleSettings
    conditions: tuple[_Condition, ...]
    restriction: Restriction

    def decision(self, model: str) -> Decision:
        then = self.settings.then
        return Decision(
            route=then.leads_to or model,
            rule=self.settings.name,
            restriction=self.restriction,
            refusal=then.refuse or "",
        )


def _conditions(when: WhenSettings) -> tuple[_Condition, ...]:
    """The cheap ones first."""
    found: list[_Condition] = []
    if when.route is not None:
        found.append(_by_route(when.route))
    if when.tenant is not None:
        found.append(_by_name("tenant", when.tenant, lambda asked: (asked.context.tenant,)))
    if when.key is not None:
        found.append(_by_name("key", when.key, lambda asked: (asked.context.key,)))
    if when.tag is not None:
        found.append(_by_name("tag", when.tag, lambda asked: asked.context.tags))
    for name, values in when.headers.items():
        found.append(_by_header(name, values))
    if when.tools is not None:
        found.append(_by_truth("tools", when.tools, lambda asked: asked.has_tools))
    if when.form is not None:
        found.append(_by_truth("form", when.form, lambda asked: asked.request.output_form is not None))
    if when.has is not None:
        found.append(_by_name("has", when.has, lambda asked: tuple(sorted(asked.media))))
    if when.input_tokens is not None:
        above, below = when.input_tokens.above, when.input_tokens.below
        found.append(_by_span("input_tokens", (above, below), lambda asked: asked.tokens))
    if when.budget_left is not None:
        found.append(_by_budget(when.budget_left))
    return tuple(found)


def _by_name(name: str, wanted: Sequence[str], told: Callable[[_Asked], Sequence[str]]) -> _Condition:
    values = frozenset(wanted)

    def why_not(asked: _Asked) -> str:
        known = ", ".join(_shown(value) for value in told(asked) if value) or "none"
        return f"{name} is {known}, and it wants {' or '.join(wanted)}"

    return _Condition(name, lambda asked: not values.isdisjoint(told(asked)), why_not)


def _by_route(wanted: Sequence[str]) -> _Condition:
    return _Condition(
        "route",
        lambda asked: any(admits(pattern, asked.request.model) for pattern in wanted),
        lambda asked: f"route is {_shown(asked.request.model)}, and it wants {' or '.join(wanted)}",
    )


def _by_header(name: str, wanted: Sequence[str]) -> _Condition:
    return _by_name(f"headers.{name}", wanted, lambda asked: (asked.headers.get(name, ""),))


def _by_truth(name: str, wanted: bool, told: Callable[[_Asked], bool]) -> _Condition:
    return _Condition(
        name, lambda asked: told(asked) is wanted, lambda asked: f"it is for requests {_with(wanted)} {name}"
    )


def _with(wanted: bool) -> str:
    return "with" if wanted else "without"


def _by_span(name: str, span: tuple[float | None, float | None], told: Callable[[_Asked], float | None]) -> _Condition:
    above, below = span

    def holds(asked: _Asked) -> bool:
        value = told(asked)
        return value is not None and (above is None or value > above) and (below is None or value < below)

    def why_not(asked: _Asked) -> str:
        value = told(asked)
        wanted = [f"above {above:g}"] if above is not None else []
        wanted += [f"below {below:g}"] if below is not None else []
        known = "not known here" if value is None else f"{value:.6g}"
        return f"{name} is {known}, and it wants {' and '.join(wanted)}"

    return _Condition(name, holds, why_not)


def _by_budget(span: BudgetSpan) -> _Condition:
    return _by_span("budget_left", (span.above, span.below), lambda asked: asked.left(span.budget))


def _shown(value: str) -> str:
    """A client may have said it."""
    return printable(value if len(value) <= _LONGEST_SHOWN else value[:_LONGEST_SHOWN] + "...")
