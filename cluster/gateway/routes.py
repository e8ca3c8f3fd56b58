"""What a name in a request's `model` leads to: groups of targets, and the groups behind them when they fail.

Built once from the settings; exchange.py walks through it with course.py. Which target is well is not known here.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Literal, Protocol

from diptych.cluster.providers.terms import Timeouts
from diptych.protos.errors import UnknownModel
from diptych.protos.strict_json import printable

from .hedging import HedgeBudget
from .load import Load
from .settings import TARGET_NAME, GatewaySettings, OnUnsupported, RouteSettings, RouteTarget, StrategyName
from .strategies import Member, Strategy
from .target import Target

MAX_DIRECT = 1024  # of the targets that clients name themselves, so many are remembered
Chain = Literal["general", "context", "content_policy"]
_SPECIAL: tuple[Chain, Chain] = ("context", "content_policy")
# The target of a name, which treats what it cannot do as the second word says. Raises ValueError that says why none.
Places = Callable[[str, OnUnsupported], Target]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Group:
    """Targets among which a strategy chooses: a route's, or one alone. `settings` are the route's, of a target alone
    those of the route that it stands behind.
    """

    name: str
    members: tuple[Member, ...]
    strategy: Strategy
    settings: RouteSettings
    hedges: HedgeBudget | None
    timeouts: Timeouts  # of one attempt
    is_direct: bool = False  # a client's own PROVIDER/MODEL: there is no end of those


class Ways(Protocol):
    """What a request may use of a gateway's routes: all of it, or what a rule leaves (planning.py)."""

    def behind(self, group: Group, chain: Chain) -> tuple[Group, ...]:
        """The groups to try when `group` failed in this way, in order."""

    def reachable(self, group: Group) -> tuple[Target, ...]:
        """All targets that may answer a request to `group`, whatever fails; each once."""


class Routes:
    """All of a gateway. `is_listed` says which targets clients may name themselves, where the settings let them. Raises
    ValueError that begins with the key path where a target does not exist.
    """

    def __init__(
        self,
        settings: GatewaySettings,
        places: Places,
        strategies: Mapping[StrategyName, Strategy],
        *,
        is_listed: Callable[[str], bool],
    ) -> None:
        self._settings = settings
        self._places = places
        self._is_listed = is_listed
        self._strategies = strategies
        self._loads: dict[str, Load] = {}  # of each configured target, whatever route leads to it
        self._known: dict[str, Target] = {}
        self._groups = {name: self._route(name, route) for name, route in settings.routes.items()}
        self._direct: dict[str, Group] = {}
        self._chains = {
            (name, chain): self._behind(name, chain) for name in settings.routes for chain in ("general", *_SPECIAL)
        }
        self._reach = {name: self._reachable(group) for name, group in self._groups.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """Of the routes."""
        return tuple(self._groups)

    @property
    def loads(self) -> Mapping[str, Load]:
        """Of all configured targets, by name."""
        return self._loads

    @property
    def places(self) -> Mapping[str, Target]:
        """The configured targets, by name."""
        return self._known

    @property
    def targets(self) -> Set[str]:
        """The names of all configured targets."""
        return self._loads.keys()

    def of(self, model: str) -> Group:
        """What a client's `model` means. Raises UnknownModel."""
        group = self._groups.get(model) or self._direct.get(model)
        if group is None:
            group = self._target_alone(model)
        return group

    def behind(self, group: Group, chain: Chain) -> tuple[Group, ...]:
        """The groups to try when `group` failed in this way, in order."""
        return self._chains.get((group.name, chain), ())

    def reachable(self, group: Group) -> tuple[Target, ...]:
        """All targets that may answer a request to `group`, whatever fails; each once."""
        found = self._reach.get(group.name)
        return tuple(member.target for member in group.members) if found is None else found

    def _reachable(self, group: Group) -> tuple[Target, ...]:
        found: dict[str, Target] = {}
        groups, seen = [group], {group.name}
        for one in groups:
            found |= {member.target.name: member.target for member in one.members if member.target.name not in found}
            for chain in ("general", *_SPECIAL):
                behind = [other for other in self.behind(one, chain) if other.name not in seen]
                seen |= {other.name for other in behind}
                groups += behind
        return tuple(found.values())

    def _target_alone(self, model: str) -> Group:
        if self._settings.direct and TARGET_NAME.fullmatch(model) and self._is_listed(model):
            try:
                alone = self._alone(model, RouteSettings(targets=(RouteTarget(target=model),)), is_direct=True)
            except ValueError as exc:
                raise UnknownModel(f"model: {exc}", "model") from exc
            if len(self._direct) >= MAX_DIRECT:
                del self._direct[next(iter(self._direct))]
            self._direct[model] = alone
            return alone
        known = self.names
        close = difflib.get_close_matches(model[:128], known, n=1, cutoff=0.6)
        told = f"did you mean {close[0]}?" if close else f"there are {', '.join(known[:16]) or 'none'}"
        raise UnknownModel(f"model: there is no route {printable(model)!r}; {told}", "model")

    def _route(self, name: str, settings: RouteSettings) -> Group:
        members = []
        for i, entry in enumerate(settings.targets):
            try:
                members.append(self._member(entry.target, settings, entry.weight))
            except ValueError as exc:
                raise ValueError(f"gateway.routes.{name}.targets.{i}: {exc}") from exc
        hedges = None if settings.hedge is None else HedgeBudget(settings.hedge)
        strategy = self._strategies[settings.strategy]
        return Group(
            name=name,
            members=tuple(members),
            strategy=strategy,
            settings=settings,
            hedges=hedges,
            timeouts=settings.timeouts.of_attempt(),
        )

    def _alone(self, target: str, settings: RouteSettings, *, is_direct: bool = False) -> Group:
        members = (self._member(target, settings, 1.0, is_kept=not is_direct),)
        return Group(
            name=target,
            members=members,
            strategy=self._strategies["priority"],
            settings=settings,
            hedges=None,
            timeouts=settings.timeouts.of_attempt(),
            is_direct=is_direct,
        )

    def _member(self, target: str, settings: RouteSettings, weight: float, *, is_kept: bool = True) -> Member:
        place = self._places(target, settings.on_unsupported)
        load = self._loads.get(target) or Load()
        if is_kept:
            self._loads[target] = load
            self._known[target] = place
        return Member(target=place, weight=weight, load=load)

    def _behind(self, name: str, chain: Chain) -> tuple[Group, ...]:
        """Depth first, each group once, without the route itself."""
        found: dict[str, Group] = {}
        self._collect(name, chain, found)
        found.pop(name, None)
        return tuple(found.values())

    def _collect(self, name: str, chain: Chain, found: dict[str, Group]) -> None:
        settings = self._settings.routes[name]
        key, others = {
            "general": ("fallback", settings.fallback),
            "context": ("context_fallback", settings.context_fallback),
            "content_policy": ("content_policy_fallback", settings.content_policy_fallback),
        }[chain]
        for i, other in enumerate(others):
            if other in found:
                continue
            if other in self._groups:
                found[other] = self._groups[other]
                self._collect(other, chain, found)
                continue
            try:
                found[other] = self._alone(other, settings)
            except ValueError as exc:
                raise ValueError(f"gateway.routes.{name}.{key}.{i}: {exc}") from exc
