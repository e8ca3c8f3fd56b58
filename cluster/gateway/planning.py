"""From a request and who asks to what may answer: the rule that decides, a client's own wishes, the targets that stay.

gateway.py asks once per request. Which of the targets is chosen, and what becomes of it, is course.py's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from diptych.protos.errors import Forbidden, InvalidRequest, StartupError
from diptych.protos.openai import ChatRequest

from .course import Shared
from .ports import Context, Ports
from .record import ExchangeRecord
from .routes import Chain, Group, Routes
from .rules import Decision, Restriction, Rules, Verdict
from .settings import GatewaySettings, StrategyName
from .strategies import OwnFirst, Strategy
from .target import Target


class RefusedByRule(Forbidden):
    """A rule of the configuration says no, or leaves no target."""

    code = "refused_by_rule"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One request as it is to be answered: `request.model` is the route that does, `asked` the one that was named."""

    asked: str
    request: ChatRequest
    context: Context
    group: Group
    shared: Shared
    targets: Sequence[Target]  # all that may answer, whatever fails
    began_at: float  # when the request arrived, on the gateway's clock
    rule: str = ""

    @property
    def deadline(self) -> float:
        """On the same clock. Everything that is awaited for the request, all its attempts included, shares it."""
        total_s = self.group.settings.timeouts.total_s
        return self.began_at + min(total_s, self.request.timeout_s or total_s)

    @property
    def first_by(self) -> float:
        """When the first content must be there."""
        first_s = self.request.first_token_timeout_s
        return self.deadline if first_s is None else min(self.deadline, self.began_at + first_s)

    @property
    def record(self) -> ExchangeRecord:
        """A new one, of a request of which nothing is known yet."""
        return ExchangeRecord(model=self.asked, route=self.request.model, rule=self.rule)


class Limited:
    """Routes as a request may use them."""

    def __init__(self, routes: Routes, restriction: Restriction, strategies: Mapping[StrategyName, Strategy]) -> None:
        self._routes = routes
        self._restriction = restriction
        self._strategies = strategies

    def first(self, group: Group) -> Group:
        """`group` itself; with one exact target that one alone, wherever behind the group it stands."""
        exact = self._restriction.exact
        if not exact:
            return self._limited(group)
        chains: tuple[Chain, ...] = ("general", "context", "content_policy")
        for other in (group, *(found for chain in chains for found in self._routes.behind(group, chain))):
            if any(member.target.name == exact for member in other.members):
                return replace(self._limited(other), name=group.name, settings=group.settings)
        return replace(group, members=())

    def behind(self, group: Group, chain: Chain) -> tuple[Group, ...]:
        """See Routes.behind."""
        if self._restriction.exact:
            return ()
        limited = (self._limited(other) for other in self._routes.behind(group, chain))
        return tuple(other for other in limited if other.members)

    def reachable(self, group: Group) -> tuple[Target, ...]:
        """See Routes.reachable."""
        admits = self._restriction.admits
        return tuple(target for target in self._routes.reachable(group) if admits(target.name))

    def _limited(self, group: Group) -> Group:
        known = self._restriction
        strategy, settings = group.strategy, group.settings
        if known.strategy is not None:
            strategy = self._strategies[known.strategy]
            settings = settings.model_copy(update={"strategy": known.strategy})
        if known.prefer_own:
            strategy = OwnFirst(strategy)
        members = tuple(member for member in group.members if known.admits(member.target.name))
        return replace(group, members=members, strategy=strategy, settings=settings)


class Planner:
    """Of one gateway. Raises StartupError for a rule that needs what this gateway has not."""

    def __init__(
        self,
        settings: GatewaySettings,
        routes: Routes,
        shared: Shared,
        *,
        strategies: Mapping[StrategyName, Strategy],
        ports: Ports,
    ) -> None:
        self._routes = routes
        self._shared = shared
        self._strategies = strategies
        self._ledger = ports.ledger
        self._has_prices = ports.prices is not None
        self._headers = frozenset(settings.rule_headers)
        self._rules = Rules(settings.rules, rng=ports.rng, budgets_left=self._budgets_left)
        for i, rule in enumerate(settings.rules):
            if rule.then.strategy == "lowest_cost" and not self._has_prices:
                raise StartupError(
                    f"gateway.rules.{i}.then.strategy: lowest_cost needs prices, and this gateway was given none"
                )

    def plan(self, request: ChatRequest, context: Context) -> Plan:
        """Raises UnknownModel, RefusedByRule, and InvalidRequest for a wish that cannot be met."""
        self._routes.of(request.model)
        context = self._with_readable_headers(context)
        return self.planned(request, context, self._rules.decide(request, context))

    def judged(self, request: ChatRequest, context: Context) -> tuple[Decision, tuple[Verdict, ...]]:
        """What the rules say, without chance. Raises UnknownModel."""
        self._routes.of(request.model)
        return self._rules.judged(request, self._with_readable_headers(context))

    def planned(self, request: ChatRequest, context: Context, decision: Decision) -> Plan:
        """As `plan`, by a decision that was made."""
        if decision.refusal:
            raise RefusedByRule(decision.refusal)
        asked = request.model
        group = self._routes.of(decision.route)
        if decision.route != asked:
            request = request.model_copy(update={"model": decision.route})
        restriction = self._wished(decision.restriction, group, context)
        began_at = self._shared.clock() - context.waited_s
        if restriction == Restriction():
            targets = self._routes.reachable(group)
            return Plan(
                asked=asked,
                request=request,
                context=context,
                group=group,
                shared=self._shared,
                targets=targets,
                began_at=began_at,
                rule=decision.rule,
            )
        limited = Limited(self._routes, restriction, self._strategies)
        targets = limited.reachable(group)
        if not targets:
            raise self._none_left(decision, group, context)
        if restriction.is_of_targets:  # what is kept may be another target's answer
            context = replace(context, cache="no-store")
        return Plan(
            asked=asked,
            request=request,
            context=context,
            group=limited.first(group),
            shared=replace(self._shared, routes=limited),
            targets=targets,
            began_at=began_at,
            rule=decision.rule,
        )

    def _wished(self, restriction: Restriction, group: Group, context: Context) -> Restriction:
        """`restriction`, with what the client wants besides. Raises InvalidRequest."""
        if not (context.target or context.strategy):
            return restriction
        names = [target.name for target in self._routes.reachable(group)]
        if context.target and context.target not in names:
            raise InvalidRequest(
                f"x-route-target: {group.name} has no such target; there are {', '.join(names[:16])}", "x-route-target"
            )
        if context.strategy == "lowest_cost" and not self._has_prices:
            raise InvalidRequest("x-route-strategy: lowest_cost needs prices, and there are none", "x-route-strategy")
        strategy = context.strategy or restriction.strategy
        return replace(restriction, exact=context.target, strategy=strategy)

    def _none_left(self, decision: Decision, group: Group, context: Context) -> RefusedByRule:
        if context.target:
            return RefusedByRule(
                f"x-route-target: the rule {decision.rule} does not let {context.target} answer this request; leave "
                "the header out"
            )
        return RefusedByRule(f"the rule {decision.rule} leaves no target of {group.name} for this request")

    def _with_readable_headers(self, context: Context) -> Context:
        """Whatever the caller has passed on: rules read what the configuration names."""
        if all(name in self._headers for name, _ in context.headers):
            return context
        return replace(context, headers=tuple(pair for pair in context.headers if pair[0] in self._headers))

    def _budgets_left(self, request: ChatRequest, context: Context) -> Mapping[str, float]:
        if self._ledger is None:
            return {}
        found: dict[str, float] = {}
        for standing in self._ledger.standing(request, (), context):
            if standing.left is not None:  # several tags may each have an account
                found[standing.budget] = min(standing.left, found.get(standing.budget, 1.0))
        return found
