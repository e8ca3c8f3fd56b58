"""The parts of `gateway:` in diptych.yaml that concern money, limits and kept answers.

Embedded by settings.py; prices.py, ledger.py and cache.py act by them. They know targets, keys and tenants by name.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from diptych.protos.settings import Seconds, Settings

Period = Literal["total", "day", "month"]
Dollars = Annotated[float, Field(ge=0, le=1e9)]
ANY = "*"
RULE_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
PRICED = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}/(\*|[^\s/*][^\s*]{0,255})")
MAX_RULES = 256


def price_path(target: str) -> str:
    """The key by which a configuration says what a target costs."""
    provider, _, model = target.partition("/")
    return f"gateway.pools.{model}.per_device_hour" if provider == "pool" else f"gateway.prices.{target}"


class PriceSettings(Settings):
    """What a target costs, in US dollars; instead of what the built-in table says. 0 must be said."""

    input_per_mtok: Dollars = Field(description="US dollars for a million tokens of prompts")
    output_per_mtok: Dollars = Field(description="the same of answers, reasoning included")
    cache_read_per_mtok: Dollars | None = Field(
        None, description="of prompts that the provider's cache had; null: as input"
    )
    cache_write_per_mtok: Dollars | None = Field(
        None, description="of prompts that were written into it; null: as input"
    )
    cache_write_1h_per_mtok: Dollars | None = Field(
        None, description="of prompts that it keeps for an hour; null: unknown, and what such a request cost is too"
    )
    per_request: Dollars = Field(0.0, description="of each request, besides")
    per_web_search: Dollars | None = Field(
        None, description="of each search that the provider runs and counts; null: unknown, as above"
    )


class PoolPriceSettings(Settings):
    """What an own pool costs: seconds that its engines computed, apportioned to requests by their tokens."""

    per_device_hour: Dollars = Field(description="US dollars for an hour of one device, as busy as you expect it to be")
    devices: int = Field(1, ge=1, le=1024, description="devices of one engine")


class Matching(Settings):
    """Which requests a rule is of. What is null does not matter; `*`: each value has an account of its own."""

    key: str | None = Field(None, max_length=128, description="id of the API key; *: each key for itself")
    tenant: str | None = Field(None, max_length=128, description="of the key; *: each tenant for itself")
    route: str | None = Field(None, max_length=256, description="the request's `model`; *: each for itself")
    tag: str | None = Field(None, max_length=128, description="one of the request's tags; *: each tag for itself")


class BudgetSettings(Matching):
    """How much money requests may use, over all routers."""

    amount_usd: float = Field(gt=0, le=1e9, description="US dollars in one period")
    period: Period = Field("month", description="day and month begin at midnight UTC; total: never again")
    unpriced: Literal["refuse", "admit"] = Field(
        "refuse", description="requests that may go to a target whose price nobody knows; admit: they count nothing"
    )
    lease_usd: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="what a router sets aside at once; null: a hundredth of the amount. A request that may cost more "
        "gets as much as it needs",
    )
    shadow: bool = Field(False, description="true: nobody is refused, it is only counted and logged")


class LimitSettings(Matching):
    """How fast requests may come. Each router lets through its part of it: the limit divided by the routers."""

    requests_per_minute: int | None = Field(None, ge=1, le=10_000_000, description="null: no limit")
    input_tokens_per_minute: int | None = Field(None, ge=1, le=10**12, description="of prompts; null: no limit")
    output_tokens_per_minute: int | None = Field(None, ge=1, le=10**12, description="of answers; null: no limit")
    concurrency: int | None = Field(None, ge=1, le=1_000_000, description="requests in work; null: no limit")
    shadow: bool = Field(False, description="true: nobody is refused, it is only counted and logged")

    @model_validator(mode="after")
    def _limits_something(self) -> LimitSettings:
        tokens = self.input_tokens_per_minute or self.output_tokens_per_minute
        if not (self.requests_per_minute or tokens or self.concurrency):
            raise ValueError(
                "it limits nothing; give requests_per_minute, input_tokens_per_minute, output_tokens_per_minute or "
                "concurrency"
            )
        return self


class RouteCacheSettings(Settings):
    """Answers of a route that are given again to equal requests of the same tenant."""

    ttl_s: Seconds = Field(300.0, description="how long an answer is kept")
    always: bool = Field(
        False, description="true: whatever the temperature; false: requests with temperature 0, and those that ask"
    )


class CacheSettings(Settings):
    """Memory for kept answers, of each router. Which routes keep any: gateway.routes.NAME.cache."""

    max_mib: int = Field(64, ge=1, le=1 << 20, description="for all of them; the one that was not used longest goes")
    max_answer_kib: int = Field(256, ge=1, le=1 << 20, description="a longer answer is not kept")


class MoneySettings(Settings):
    """Prices, budgets and limits."""

    prices: dict[str, PriceSettings] = Field(
        {}, description="by PROVIDER/MODEL, or PROVIDER/* for all of a provider that have no line of their own"
    )
    pools: dict[str, PoolPriceSettings] = Field({}, description="own pools, by the model's name")
    budgets: dict[str, BudgetSettings] = Field({}, max_length=MAX_RULES, description="budgets, by names of your own")
    limits: dict[str, LimitSettings] = Field({}, max_length=MAX_RULES, description="limits, by names of your own")
    assumed_output_tokens: int = Field(
        4096,
        ge=1,
        le=10_000_000,
        description="set aside for the answer to a request that does not say max_completion_tokens",
    )

    @field_validator("prices")
    @classmethod
    def _of_targets(cls, prices: dict[str, PriceSettings]) -> dict[str, PriceSettings]:
        for name in prices:
            if not PRICED.fullmatch(name):
                raise ValueError(f"{name!r} is no target: write PROVIDER/MODEL, or PROVIDER/* for all of a provider")
            if name.startswith("pool/"):
                raise ValueError(f"{name}: own pools are priced by their devices' time; see pools")
        return prices

    @field_validator("budgets", "limits")
    @classmethod
    def _have_names(cls, rules: dict[str, Matching]) -> dict[str, Matching]:
        for name in rules:
            if not RULE_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no name: use small letters, digits, '_', '.' and '-'")
        return rules
