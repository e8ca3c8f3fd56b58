"""What tokens cost: the public table read as its own package reads it, overrides before it, nothing ever for free."""

from __future__ import annotations

import datetime
import json
import socket
from dataclasses import replace
from decimal import Decimal
from typing import Any

import genai_prices
import pytest
from genai_prices.data import providers
from hypothesis import given
from hypothesis import settings as bounds
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from tills import asked

from diptych.cluster.gateway.devices import DeviceMeter, Reading
from diptych.cluster.gateway.money_metrics import MoneyMetrics
from diptych.cluster.gateway.money_settings import MoneySettings
from diptych.cluster.gateway.price_table import PriceTable
from diptych.cluster.gateway.prices import ASSUMED, Prices
from diptych.cluster.gateway.rates import NANOS, Rate, Rates, cost_at, dollars_of, most_at, nanos_of
from diptych.cluster.gateway.sizes import size_of
from diptych.cluster.gateway.testing import ScriptedTarget
from diptych.protos.anthropic_messages import parse_messages
from diptych.protos.replies import Usage


def prices(**settings: Any) -> Prices:
    return Prices(MoneySettings.model_validate(settings))


@pytest.mark.parametrize(("size", "cached", "made"), [(1000, 0, 100), (250_000, 1000, 7), (0, 0, 1)])
def test_the_table_costs_what_its_own_package_says(size: int, cached: int, made: int) -> None:
    """Tiers and prices that begin at a date are read by rules of our own, which must be theirs."""
    table, now = PriceTable(), datetime.datetime.now(datetime.UTC)
    counts = {"input_tokens": size, "output_tokens": made, "cache_read_tokens": cached, "web_searches": made}
    usage, theirs = Usage(**counts), genai_prices.Usage(**counts)
    num_compared = 0
    for provider in providers:
        if provider.id not in ("openai", "anthropic", "google", "aws", "groq", "x-ai", "perplexity"):
            continue
        for model in provider.models:
            rates = table.rates(provider.id, model.id, now.timestamp())
            if rates is None:
                continue
            cost = cost_at(rates, usage)
            assert cost is not None
            told = genai_prices.calc_price(
                theirs, model.id, provider_id=provider.id, genai_request_timestamp=now
            ).total_price
            assert abs(cost.nanos - told * NANOS) < 4, (provider.id, model.id)
            num_compared += 1
    assert num_compared > 200


def test_nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package can fetch newer prices; a gateway in a closed network would hang over it."""
    monkeypatch.setattr(socket, "getaddrinfo", None)
    monkeypatch.setattr(socket.socket, "connect", None)
    assert prices().rates("openai/gpt-4o") is not None


def test_who_is_not_in_the_table_has_no_price_and_is_counted() -> None:
    """A cost of 0 for what nobody knows would let budgets run on; a model's price at another provider is wrong."""
    registry = CollectorRegistry()
    found = Prices(MoneySettings(), metrics=MoneyMetrics(registry))
    usage = Usage(input_tokens=1, output_tokens=1)
    for target in ("ollama/gpt-4o", "lab/llama", "openai/no-such-model", "pool/tiny", "ope/gpt-4o"):
        assert found.rates(target) is None
        assert found.cost(target, usage) is None
        assert found.at_most(ScriptedTarget(target), asked()) is None
    assert 'unpriced_total{target="pool/tiny"} 1.0' in generate_latest(registry).decode()
    assert found.cost("openai/gpt-4o", Usage(input_tokens=1)) is None  # nobody told how long the answer was


def test_overrides_come_before_the_table_and_before_a_providers_star() -> None:
    """Negotiated prices, and own servers."""
    found = prices(
        prices={
            "openai/*": {"input_per_mtok": 7, "output_per_mtok": 7},
            "openai/gpt-4o": {"input_per_mtok": 1, "output_per_mtok": 2, "cache_read_per_mtok": 0, "per_request": 0.5},
            "ollama/*": {"input_per_mtok": 0, "output_per_mtok": 0},
        }
    )
    usage = Usage(input_tokens=1_000_000, output_tokens=1_000_000, cache_read_tokens=400_000)
    told = {name: found.cost(name, usage) for name in ("openai/gpt-4o", "openai/gpt-4o-mini", "ollama/x")}
    assert [cost and dollars_of(cost.nanos) for cost in told.values()] == [Decimal("3.1"), 14, 0]
    assert {cost.source for cost in told.values() if cost} == {"override"}


def test_what_is_not_told_apart_is_charged_as_what_it_is_part_of() -> None:
    """Cached tokens are part of the prompt, reasoning of the answer: neither is paid for twice, nor left out."""
    plain = Rates(input=Rate(1_000_000), output=Rate(10_000_000), source="table")
    usage = Usage(
        input_tokens=100,
        output_tokens=50,
        cache_read_tokens=30,
        cache_write_tokens=20,
        reasoning_tokens=40,
        input_audio_tokens=10,
        output_audio_tokens=5,
    )
    cost = cost_at(plain, usage)
    assert cost is not None
    assert (cost.input_nanos, cost.output_nanos) == (100, 500)
    apart = Rates(
        input=Rate(1_000_000),
        output=Rate(10_000_000),
        source="table",
        cache_read=Rate(0),
        cache_write=Rate(2_000_000),
        reasoning=Rate(20_000_000),
    )
    cost = cost_at(apart, usage)
    assert cost is not None
    assert (cost.input_nanos, cost.output_nanos) == (50 + 40, 100 + 800)


def test_writes_for_an_hour_and_searches_are_paid_for_apart_or_said_to_be_unknown() -> None:
    """A write for an hour costs 2, one for five minutes 1.25 of the input; both were paid for as the latter,
    searches as nothing.
    """
    usage = Usage(
        input_tokens=1_000_000,
        output_tokens=0,
        cache_write_tokens=500_000,
        cache_write_1h_tokens=200_000,
        web_searches=3,
    )
    given = {"input_per_mtok": 1, "output_per_mtok": 1, "cache_write_per_mtok": 1.25}
    more = {"cache_write_1h_per_mtok": 2, "per_web_search": 0.01}
    registry = CollectorRegistry()
    settings = MoneySettings.model_validate({"prices": {"a/plain": given, "a/whole": {**given, **more}}})
    found = Prices(settings, metrics=MoneyMetrics(registry))
    whole, least = found.cost("a/whole", usage), found.cost("a/plain", usage)
    assert whole is not None
    assert least is not None
    assert (dollars_of(whole.nanos), whole.unknown) == (Decimal("1.305"), ())
    assert (dollars_of(least.nanos), least.unknown) == (Decimal("1.125"), ("cache writes of one hour", "web searches"))
    assert 'unpriced_total{target="a/plain"} 1.0' in generate_latest(registry).decode()
    assert 'target="a/whole"' not in generate_latest(registry).decode()
    table = found.cost("anthropic/claude-opus-4-5", usage)
    assert table is not None
    assert (dollars_of(table.nanos), table.unknown) == (Decimal("6.405"), ())


@given(
    st.integers(0, 300_000),
    st.integers(0, 10_000),
    st.lists(st.integers(0, 400_000), min_size=5, max_size=5),
    st.lists(st.integers(0, 10**9), min_size=5, max_size=5),
)
@bounds(max_examples=60)
def test_nothing_costs_more_than_was_reserved_for_it(size: int, made: int, parts: list[int], rates: list[int]) -> None:
    """However providers divide the tokens of a text into kinds, the reservation covers it."""
    found = Rates(
        input=Rate(rates[0], ((200_000, rates[0] * 2),)),
        output=Rate(rates[1]),
        cache_read=Rate(min(rates[0], rates[2])),
        cache_write=Rate(rates[3]),
        cache_write_1h=Rate(2 * rates[3]),
        reasoning=Rate(rates[4]),
        source="table",
    )
    usage = Usage(
        input_tokens=size,
        output_tokens=made,
        cache_read_tokens=parts[0],
        cache_write_tokens=parts[1],
        reasoning_tokens=parts[2],
        cache_write_1h_tokens=parts[3],
    )
    cost = cost_at(found, usage)
    assert cost is not None
    assert 0 <= cost.nanos <= most_at(found, size, made, is_kept_long=True) + 1
    cost = cost_at(found, replace(usage, cache_write_1h_tokens=None))
    assert cost is not None
    assert cost.nanos <= most_at(found, size, made) + 1


def test_own_pools_are_paid_for_by_the_seconds_that_their_engines_computed() -> None:
    """All requests together must pay for the engines' time, and those that a cache spared them pay nothing for that."""
    time = 0.0
    meter = DeviceMeter(lambda: time)
    found = Prices(
        MoneySettings.model_validate({"pools": {"tiny": {"per_device_hour": 3.6, "devices": 2}}}), meter=meter
    )
    usage = Usage(input_tokens=1000, output_tokens=100, cache_read_tokens=400)
    cost = found.cost("pool/tiny", usage)
    assert cost is not None
    assert cost.source == "assumed"
    assert cost.nanos == nanos_of((600 * ASSUMED.input_s + 100 * ASSUMED.output_s) * 2 * 0.001)
    meter.read("tiny", "prefill-0@1", {"prefill_tokens_total": 500.0, "prefill_step_seconds_total": 99.0})
    meter.read("tiny", "decode-0@1", {"decode_tokens_total": 7.0, "decode_step_seconds_total": 99.0})
    assert meter.of("tiny") is None  # what was before we looked is of another time
    time = 1.0
    meter.read("tiny", "prefill-0@1", {"prefill_tokens_total": 2500.0, "prefill_step_seconds_total": 100.0})
    meter.read("tiny", "decode-0@1", {"decode_tokens_total": 107.0, "decode_step_seconds_total": 100.0})
    cost = found.cost("pool/tiny", usage)
    assert cost is not None
    assert cost.source == "devices"
    assert cost.nanos == pytest.approx((600 * 0.0005 + 100 * 0.01) * 2 * 0.001 * NANOS, rel=1e-6)
    meter.read("tiny", "decode-0@1", {"decode_tokens_total": 1.0, "decode_step_seconds_total": 0.1})  # it began anew
    again = found.cost("pool/tiny", usage)
    assert again is not None
    assert again.nanos == cost.nanos


def test_the_meter_looks_at_the_engines_that_live_once_a_second_while_it_is_asked() -> None:
    """An engine that comes back counts from 0; one that is gone must not be remembered for ever."""
    now, engines = 0.0, {"decode-0@1": 0.0}
    looks = 0

    def readings() -> list[Reading]:
        nonlocal looks
        looks += 1
        return [
            Reading("m", name, {"decode_tokens_total": steps * 100, "decode_step_seconds_total": steps})
            for name, steps in engines.items()
        ]

    meter = DeviceMeter(lambda: now, readings)
    assert meter.of("m") is None
    engines["decode-0@1"] = 2.0
    assert meter.of("m") is None
    assert looks == 1
    now = 1.0
    told = meter.of("m")
    assert told is not None
    assert told.output_s == 0.01
    engines.clear()
    engines["decode-0@2"] = 0.0
    now = 2.0
    assert meter.of("m") == told
    assert list(meter._last) == [("m", "decode-0@2")]


def test_a_colocated_pool_pays_one_rate_for_both() -> None:
    """Its decode engines compute the prompts, too."""
    meter = DeviceMeter(lambda: 0.0)
    for number in (0.0, 1.0):
        meter.read("m", "decode-0", {"decode_tokens_total": number * 50, "decode_step_seconds_total": number})
    told = meter.of("m")
    assert told is not None
    assert (told.input_s, told.output_s) == (0.02, 0.02)


def test_sizes_are_guessed_on_the_safe_side_of_what_tokenizers_count() -> None:
    """English at four bytes a token, other writing by its bytes, pictures by the dearest."""
    text = "The quick brown fox jumps over the lazy dog. " * 40
    size = size_of(asked())
    assert size.usual_tokens == 2 + 8
    assert size.most_tokens == 3 + 8
    from diptych.cluster.gateway.requests import read_request

    long = read_request("chat", [{"role": "user", "content": text}], {})
    assert 400 <= size_of(long).usual_tokens <= size_of(long).most_tokens  # o200k counts 401
    seen = [{"type": "image_url", "image_url": {"url": "https://x.test/a.png"}}]
    assert size_of(read_request("chat", [{"role": "user", "content": seen}], {})).usual_tokens >= 1600
    tools = [{"type": "function", "function": {"name": "f", "description": "d" * 400}}]
    assert size_of(asked(tools=tools)).usual_tokens > 110
    assert not size_of(long).is_kept_long
    kept = {"anthropic": {"cache_control": {"type": "ephemeral", "ttl": "1h"}}}
    assert size_of(read_request("chat", [{"role": "user", "content": text}], {"provider_options": kept})).is_kept_long
    part = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral", "ttl": "1h"}}
    body = {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": [part]}]}
    assert size_of(parse_messages(json.dumps(body).encode())).is_kept_long


def test_dollars_become_nanos_exactly_and_never_nothing() -> None:
    """0.1 and 0.2 are no binary numbers."""
    assert nanos_of(0.1) + nanos_of(0.2) == nanos_of(0.3) == 300_000_000
    assert nanos_of(1e-12) == 1
    assert dollars_of(nanos_of(0.07)) == Decimal("0.07")
