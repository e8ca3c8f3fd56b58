"""A dry run: which rule would decide, where a request would go now, why not elsewhere, and what it would cost. Sends
nothing, changes nothing, leaves out chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from typing import Any

from diptych.protos.errors import Forbidden
from diptych.protos.failures import ProviderFailure
from diptych.protos.openai import ChatRequest
from diptych.protos.replies import Usage

from .course import Shared
from .planning import Plan, Planner
from .ports import Context, Ports, Standing
from .rates import Rates, cost_at, dollars_of
from .routes import Group
from .rules import Decision, Verdict
from .settings import GatewaySettings
from .sizes import size_of
from .strategies import Asked, Member
from .target import LacksKey


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a request would cost in US dollars, with an answer as long as it may become. Rates are for a million
    tokens; `source`: override, table, devices or assumed.
    """

    dollars: float
    input_per_mtok: float
    output_per_mtok: float
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A target. `excluded`: why it would not be asked now; empty: it would. `score`: of the group's strategy, the lower
    the better, among those that are not excluded; None: of the others, and where nobody knows (prices). `cost` None:
    nobody knows the price.
    """

    target: str
    group: str
    weight: float
    state: str  # of its breaker
    excluded: str
    score: float | None
    in_flight: int
    latency_ms: float | None
    cost: Estimate | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What `explain` says. `target` is the most likely one (p2c and weighted choose by chance); empty: none can be
    asked now, and `why` says it. `group` is the route that answers, by `rule` if there is one; `rules` are those that
    were asked. `candidates` are in the order in which they would be tried, the excluded ones of a group last.
    """

    model: str
    group: str
    strategy: str
    target: str
    why: str
    rule: str = ""
    rules: tuple[Verdict, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    budgets: tuple[Standing, ...] = ()
    input_tokens: int = 0  # estimated
    output_tokens: int = 0  # at most

    def told(self, *, is_operator: bool = True) -> dict[str, Any]:
        """As plain values, for JSON. Who is no operator is not told what other rules want, nor how busy targets are."""
        found = asdict(self)
        if not is_operator:
            for verdict in found["rules"]:
                del verdict["words"]
            for candidate in found["candidates"]:
                del candidate["in_flight"], candidate["latency_ms"], candidate["score"], candidate["weight"]
            for standing in found["budgets"]:
                del standing["scope"]
        return found


def explained(
    planner: Planner, ports: Ports, settings: GatewaySettings, request: ChatRequest, context: Context
) -> Explanation:
    """Of `request`. Raises UnknownModel, and InvalidRequest for wishes that cannot be met."""
    decision, verdicts = planner.judged(request, context)
    wanted = request.wanted_tokens
    output_tokens = settings.assumed_output_tokens if wanted is None else wanted[1]
    input_tokens = size_of(request).usual_tokens
    try:
        plan = planner.planned(request, context, decision)
    except Forbidden as exc:
        return _refused(request, decision, verdicts, exc.message)
    usage = Usage(input_tokens=input_tokens, output_tokens=output_tokens)
    candidates = tuple(_all_candidates(plan, ports, usage))
    budgets: tuple[Standing, ...] = ()
    if ports.ledger is not None:
        budgets = ports.ledger.standing(plan.request, plan.targets, plan.context)
    target, why = _chosen(candidates, plan)
    refuses = next((standing.refuses for standing in budgets if standing.refuses), "")
    return Explanation(
        model=request.model,
        group=plan.group.name,
        strategy=plan.group.settings.strategy,
        target="" if refuses else target,
        why=refuses or why,
        rule=decision.rule,
        rules=verdicts,
        candidates=candidates,
        budgets=budgets,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
    )


def _refused(request: ChatRequest, decision: Decision, verdicts: tuple[Verdict, ...], why: str) -> Explanation:
    return Explanation(
        model=request.model,
        group=decision.route,
        strategy="",
        target="",
        why=f"refused: {why}",
        rule=decision.rule,
        rules=verdicts,
    )


def _chosen(candidates: Sequence[Candidate], plan: Plan) -> tuple[str, str]:
    """The most likely target, and why."""
    best = next((candidate for candidate in candidates if not candidate.excluded), None)
    if best is None:
        return "", "no target takes this request now"
    num_ready = sum(candidate.group == best.group and not candidate.excluded for candidate in candidates)
    first = plan.group.name
    where = "" if best.group == first else f"nobody in {first} can; of its fallback {best.group} "
    if num_ready == 1:
        return best.target, f"{where}it is the only one that can"
    groups = {group.name: group for group in (plan.group, *plan.shared.routes.behind(plan.group, "general"))}
    return best.target, f"{where}it has the best score of {num_ready} by {groups[best.group].settings.strategy}"


def _all_candidates(plan: Plan, ports: Ports, usage: Usage) -> list[Candidate]:
    asked = Asked(request=plan.request, session=plan.context.session, now=plan.shared.clock())
    found = []
    for group in (plan.group, *plan.shared.routes.behind(plan.group, "general")):
        candidates = [
            _candidate(plan.shared, group, member, (asked, reason, score), _estimate(ports, member, usage))
            for member, reason, score in _scored(plan.shared, group, asked)
        ]
        found += sorted(candidates, key=_place)
    return found


def _place(candidate: Candidate) -> tuple[bool, float]:
    return bool(candidate.excluded), math.inf if candidate.score is None else candidate.score


def _scored(shared: Shared, group: Group, asked: Asked) -> list[tuple[Member, str, float | None]]:
    reasons = [_excluded(shared, member, asked.request) for member in group.members]
    ready = [member for member, reason in zip(group.members, reasons, strict=True) if not reason]
    told = group.strategy.scores(ready, asked) if ready else ()
    scores = {m.target.name: score for m, score in zip(ready, told, strict=True) if math.isfinite(score)}
    return [
        (member, reason, scores.get(member.target.name)) for member, reason in zip(group.members, reasons, strict=True)
    ]


def _candidate(
    shared: Shared, group: Group, member: Member, said: tuple[Asked, str, float | None], cost: Estimate | None
) -> Candidate:
    asked, reason, score = said
    latency_s = member.load.latency_s(asked.now)
    return Candidate(
        target=member.target.name,
        group=group.name,
        weight=member.weight,
        state=shared.breakers.of(member.target).state,
        excluded=reason,
        score=score,
        in_flight=member.load.busy,
        latency_ms=None if latency_s is None else round(latency_s * 1000, 1),
        cost=cost,
    )


def _estimate(ports: Ports, member: Member, usage: Usage) -> Estimate | None:
    rates: Rates | None = None if ports.rates is None else ports.rates(member.target.name)
    cost = None if rates is None else cost_at(rates, usage)
    if rates is None or cost is None:
        return None
    size = usage.input_tokens or 0
    return Estimate(
        dollars=_plain(dollars_of(cost.nanos)),
        input_per_mtok=_plain(dollars_of(rates.input.at(size))),
        output_per_mtok=_plain(dollars_of(rates.output.at(size))),
        source=cost.source,
    )


def _plain(dollars: Decimal) -> float:
    return float(dollars)


def _excluded(shared: Shared, member: Member, request: ChatRequest) -> str:
    target = member.target
    if isinstance(target, LacksKey) and target.lacks:
        return target.lacks
    breaker = shared.breakers.of(target)
    if not breaker.admits:
        why = "" if breaker.why is None else f" after {breaker.why.value}"
        opens_in_s = breaker.opens_in_s
        until = "until its key changes" if opens_in_s == math.inf else f"for {opens_in_s:.0f} s more"
        return f"closed off{why}, {until}"
    try:
        target.check(request)
    except ProviderFailure as exc:
        return exc.failure.message
    return ""
