"""Which budgets and limits a request falls under, and whose account of each: by key, tenant, route and tag.

ledger.py asks with what it knows from authentication; nothing of it is read from the request's body but the route.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import product
from typing import Final
from urllib.parse import quote

from .money_settings import ANY, Matching, Period

MAX_SCOPE: Final = 1000  # characters; a longer one is told by its hash
_PLAIN: Final = "".join(chr(code) for code in range(33, 127) if chr(code) != "%")
FOREVER_S: Final = 86_400.0  # what clients are told of a budget that never begins anew


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Of one request."""

    key: str
    tenant: str
    route: str
    tags: tuple[str, ...] = ()


def scopes(rule: Matching, facts: Facts) -> tuple[str, ...]:
    """The accounts of `rule` that the request is charged to: none where it does not match, several for several tags."""
    parts: list[tuple[str, ...]] = []
    for name, wanted, told in (
        ("key", rule.key, (facts.key,)),
        ("tenant", rule.tenant, (facts.tenant,)),
        ("route", rule.route, (facts.route,)),
        ("tag", rule.tag, facts.tags),
    ):
        if wanted is None:
            continue
        if wanted == ANY:
            parts.append(tuple(_part(name, value) for value in dict.fromkeys(told)))
        elif wanted not in told:
            return ()
    return tuple(_bounded(" ".join(chosen)) for chosen in product(*parts))


def period_of(period: Period, now: float) -> str:
    """The present one's name. `now`: seconds since 1970."""
    if period == "total":
        return ""
    return datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%d" if period == "day" else "%Y-%m")


def ends_in_s(period: Period, now: float) -> float:
    """Until the next one begins."""
    if period == "total":
        return FOREVER_S
    at = datetime.fromtimestamp(now, UTC)
    midnight = at.replace(hour=0, minute=0, second=0, microsecond=0)
    if period == "day":
        ends = midnight + timedelta(days=1)
    else:
        ends = (midnight.replace(day=1) + timedelta(days=32)).replace(day=1)
    return max((ends - at).total_seconds(), 1.0)


def present_periods(now: float) -> Iterator[str]:
    """The names of all that can be now."""
    yield from (period_of("total", now), period_of("day", now), period_of("month", now))


def is_of_tenant(rule: Matching, scope: str, tenant: str) -> bool:
    """Whether the account `scope` of `rule` is that of one tenant alone, and of this one."""
    if rule.tenant != ANY:
        return rule.tenant == tenant
    parts = scope.split(" ")
    place = 1 if rule.key == ANY else 0
    return len(parts) > place and parts[place] == _part("tenant", tenant)


def _part(name: str, value: str) -> str:
    """One word of printable ASCII, whatever the value is: no account can look like another one's."""
    return f"{name}={quote(value, safe=_PLAIN, errors='surrogatepass')}"


def _bounded(scope: str) -> str:
    return scope if len(scope) <= MAX_SCOPE else "sha256=" + hashlib.sha256(scope.encode()).hexdigest()
