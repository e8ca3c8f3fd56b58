"""GET /v1/usage: what requests through the gateway used and cost."""

from __future__ import annotations

from typing import get_args

from diptych.cluster.store.spend import By
from diptych.cluster.usage import MAX_DAYS, MAX_ROWS

from .answers import COUNT, answer
from .shapes import Field, Operation, Reply, flag, many, nullable, number, one_of, text, told, whole

_BY = one_of(*get_args(By))
_DOLLARS = number(0)
_SUMS = (
    told("requests", COUNT),
    told("input_tokens", COUNT, "what caches had included"),
    told("output_tokens", COUNT, "reasoning included"),
    told("cache_read_tokens", COUNT),
    told("cache_write_tokens", COUNT),
    told("cost_usd", nullable(_DOLLARS), "as far as prices are known; null: of nothing here"),
    told(
        "unpriced",
        COUNT,
        "exchanges whose price nobody knows, or not all of it: not in `cost_usd`, or in part",
    ),
    told("estimated", COUNT, "exchanges whose tokens nobody told"),
)
ROW = answer(
    "UsageRow", "What belongs together.", told("name", text(), "of the tenant, key, route, target or day"), *_SUMS
)
TOTAL = answer("UsageTotal", "All rows together, those beyond `limit` too.", *_SUMS)
BUDGET = answer(
    "UsageBudget",
    "A budget's account of its present period; a tenant sees those that are its alone.",
    told("budget", text(1)),
    told("scope", text(), "whose account, where a budget has one for each"),
    told("period", text(1), "2026-11-23, 2026-11 or total"),
    told("amount_usd", nullable(_DOLLARS), "null: it is configured no more"),
    told("spent_usd", _DOLLARS),
    told("held_usd", _DOLLARS, "set aside by routers for requests"),
    told("lost_usd", _DOLLARS, "set aside by routers that died; it counts as spent"),
    told("left_usd", nullable(_DOLLARS)),
)
USAGE = answer(
    "TenantUsage",
    "What requests used and cost.",
    told("object", one_of("usage")),
    told("by", _BY),
    told("tenant", text(), "*: all"),
    told("since", text(1), "the first hour, UTC"),
    told("until", text(1), "the hour behind the last one"),
    told("data", many(ROW.ref), "the dearest first; days in order"),
    told("has_more", flag(), "there are more than `limit`"),
    told("total", TOTAL.ref),
    told("budgets", many(BUDGET.ref)),
)
_TIME = "a day, a time with its zone, seconds since 1970, or 7d or 24h for that long ago"
OPERATIONS = (
    Operation(
        id="getUsage",
        method="GET",
        path="/v1/usage",
        tag="Usage",
        words="what the tenant's requests through the gateway used and cost, by hours of UTC",
        scope="any key",
        query=(
            Field(name="by", schema=_BY, words="what rows are made of", default="route"),
            Field(
                name="since", schema=text(1), words=f"{_TIME}; at most {MAX_DAYS} days", default="the month's first day"
            ),
            Field(name="until", schema=text(1), words=_TIME, default="now"),
            Field(name="key", schema=text(1, 128), words="only this key's, by its id"),
            Field(name="tenant", schema=text(1, 128), words="another one's, *: of all; for an admin's key"),
            Field(name="limit", schema=whole(1, MAX_ROWS), words="rows at most", default=str(MAX_ROWS)),
        ),
        replies=(Reply(status=200, words="the sums", media={"application/json": USAGE.ref}),),
        errors=frozenset({400, 403}),
    ),
)
