"""What requests used and cost, asked of the store: for GET /v1/usage (api/usage.py) and the verb `diptych usage`.

Times are seconds since 1970 and whole hours of UTC; money leaves here as US dollars. Knows no HTTP and no keys.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, get_args

from sqlalchemy import Connection, RowMapping

from diptych.protos.errors import InvalidRequest
from diptych.protos.openai_replies import JsonObject
from diptych.protos.strict_json import printable

from .config import LABEL_RULE, is_label
from .gateway.matching import is_of_tenant, present_periods
from .gateway.money_settings import BudgetSettings
from .gateway.rates import dollars_of, nanos_of
from .store import budgets, spend
from .store.spend import DAY_S, By

QUERIES: Final = ("by", "key", "limit", "since", "tenant", "until")
ALL: Final = "*"  # instead of a tenant's name: all of them
MAX_ROWS: Final = 1000
MAX_DAYS: Final = 400
_COUNTS: Final = ("requests", "input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageQuery:
    """`tenant` None: all of them. `since` is in, `until` is not; both are whole hours."""

    by: By = "route"
    since: int
    until: int
    tenant: str | None
    key: str | None = None
    limit: int = MAX_ROWS


def read_query(fields: Mapping[str, str], tenant: str | None, now: float) -> UsageQuery:
    """Of a query string's fields; `tenant` where they name none. Without `since` it is the present month. Raises
    InvalidRequest that names the field.
    """
    for name in fields:
        if name not in QUERIES:
            raise InvalidRequest(f"there is no query {printable(name)} here; there are: {', '.join(QUERIES)}", name)
    by = fields.get("by", "route")
    if by not in get_args(By):
        raise InvalidRequest(f"by: {printable(by)!r} is none of {', '.join(get_args(By))}", "by")
    named = fields.get("tenant", tenant)
    for name in ("tenant", "key"):
        if (given := fields.get(name)) is not None and given != ALL and not is_label(given):
            raise InvalidRequest(f"{name} {LABEL_RULE}", name)
    month = datetime.fromtimestamp(now, UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    since = _time(fields, "since", int(month.timestamp()), now)
    until = -(-_time(fields, "until", int(now) + 1, now) // spend.HOUR_S) * spend.HOUR_S
    since -= since % spend.HOUR_S
    given = "since" if "since" in fields else "until"
    if until <= since:
        raise InvalidRequest(f"{given}: from {_shown(since)} until {_shown(until)} there is no time", given)
    if until - since > MAX_DAYS * DAY_S + spend.HOUR_S:
        raise InvalidRequest(f"{given}: no more than {MAX_DAYS} days can be asked for; so long rows are kept", given)
    limit = fields.get("limit", str(MAX_ROWS))
    if not limit.isascii() or not limit.isdecimal() or not 1 <= int(limit[:9]) <= MAX_ROWS:
        raise InvalidRequest(f"limit must be a whole number from 1 to {MAX_ROWS}", "limit")
    return UsageQuery(
        by=by,  # type: ignore[arg-type]  # checked above
        since=since,
        until=until,
        tenant=None if named == ALL else named,
        key=None if fields.get("key") == ALL else fields.get("key"),
        limit=int(limit),
    )


def usage_of(query: UsageQuery, rules: Mapping[str, BudgetSettings], now: float) -> Callable[[Connection], JsonObject]:
    """What a reader of the store is asked: the whole answer, as JSON has it. `rules`: the configured budgets; those of
    one tenant alone are shown to it, all of them to who asks for all tenants.
    """

    def job(connection: Connection) -> JsonObject:
        asked = {"since": query.since, "until": query.until, "tenant": query.tenant, "key": query.key}
        rows = spend.summed(connection, query.by, **asked)  # type: ignore[arg-type]
        accounts = budgets.listed(connection, round(now * 1000), periods=tuple(present_periods(now)))
        return {
            "object": "usage",
            "by": query.by,
            "tenant": ALL if query.tenant is None else query.tenant,
            "since": _shown(query.since),
            "until": _shown(query.until),
            "data": [{"name": _name(query.by, row["name"]), **_sums([row])} for row in rows[: query.limit]],
            "has_more": len(rows) > query.limit,
            "total": _sums(rows),
            "budgets": [
                _budget(row, rules.get(row["budget"])) for row in accounts if _is_shown(row, rules, query.tenant)
            ],
        }

    return job


def _time(fields: Mapping[str, str], name: str, default: int, now: float) -> int:
    text = fields.get(name)
    if text is None:
        return default
    if text[-1:] in ("d", "h") and text[:-1].isascii() and text[:-1].isdecimal() and len(text) <= 6:
        return max(int(now) - int(text[:-1]) * (DAY_S if text[-1] == "d" else spend.HOUR_S), 0)
    if text.isascii() and text.isdecimal() and len(text) <= 11:
        return int(text)
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise InvalidRequest(
            f"{name}: {printable(text, 40)!r} is no time; write a day such as 2026-11-01, 2026-11-01T12:00:00Z, "
            "seconds since 1970, or 7d or 24h for that long ago",
            name,
        ) from None
    if at.tzinfo is None:
        at = at.replace(tzinfo=UTC)
    return max(int(at.timestamp()), 0)


def _sums(rows: Sequence[RowMapping]) -> JsonObject:
    """`cost_usd` is null where nobody knows any of it; `unpriced` exchanges are not in it, or not whole."""
    found: JsonObject = {name: sum(int(row[name]) for row in rows) for name in _COUNTS}
    nanos, unpriced, estimated = (
        sum(int(row[name]) for row in rows) for name in ("cost_nanos", "unpriced", "estimated")
    )
    found["cost_usd"] = None if unpriced and not nanos else float(dollars_of(nanos))
    return found | {"unpriced": unpriced, "estimated": estimated}


def _budget(row: RowMapping, rule: BudgetSettings | None) -> JsonObject:
    """`left_usd` and `amount_usd` are null of a budget that is configured no more."""
    spent, held, lost = (int(row[name]) for name in ("spent_nanos", "held_nanos", "lost_nanos"))
    amount = None if rule is None else nanos_of(rule.amount_usd)
    return {
        "budget": row["budget"],
        "scope": row["scope"],
        "period": row["period"] or "total",
        "amount_usd": None if amount is None else float(dollars_of(amount)),
        "spent_usd": float(dollars_of(spent)),
        "held_usd": float(dollars_of(held)),
        "lost_usd": float(dollars_of(lost)),
        "left_usd": None if amount is None else float(dollars_of(max(amount - spent - held - lost, 0))),
    }


def _is_shown(row: RowMapping, rules: Mapping[str, BudgetSettings], tenant: str | None) -> bool:
    if tenant is None:
        return True
    rule = rules.get(row["budget"])
    return rule is not None and is_of_tenant(rule, row["scope"], tenant)


def _name(by: By, name: object) -> str:
    return _shown(int(str(name)))[:10] if by == "day" else str(name)


def _shown(at: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))
