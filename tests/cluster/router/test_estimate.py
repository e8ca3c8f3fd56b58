"""Estimates approach what engines report, and survive what they should not report."""

from __future__ import annotations

import pytest

from diptych.cluster.router.estimate import DEFAULT_RATES, MAX_PAIRS, EngineMeter, PairMeter, Reserved
from diptych.protos.status import EngineStatus


def status(**counters: float) -> EngineStatus:
    return EngineStatus(counters=counters)


def test_the_prefill_rate_approaches_the_measured_one() -> None:
    meter = EngineMeter()
    for n in range(60):
        meter.read(status(prefill_tokens_total=500.0 * n, prefill_step_seconds_total=1.0 * n))
    assert meter.rates.prefill_tokens_per_s == pytest.approx(500, rel=0.01)


def test_a_colocated_engine_measures_prompts_on_its_decode_steps() -> None:
    meter = EngineMeter()
    for n in range(60):
        grown = {"decode_tokens_total": 510.0 * n, "decode_generated_tokens_total": 10.0 * n}
        meter.read(status(**grown, decode_steps_total=1.0 * n, decode_step_seconds_total=0.5 * n))
    assert meter.rates.prefill_tokens_per_s == pytest.approx(1000, rel=0.01)
    assert meter.rates.base_s == DEFAULT_RATES.base_s


@pytest.mark.parametrize(("prompt", "rate"), [(30, 300), (100, 300), (400, 300), (400, 5000)])
def test_prompts_among_the_steps_of_busy_sequences_have_a_rate_of_their_own(prompt: int, rate: int) -> None:
    """A colocated engine under steady load computes some prompt in nearly every reading, often not the larger part."""
    meter, total = EngineMeter(), dict.fromkeys(("tokens", "generated_tokens", "steps", "step_seconds"), 0.0)
    for n in range(3000):
        batch, here = (8, 32, 64)[n // 20 % 3], prompt if n % 4 else 0
        for name, grown in (
            ("steps", 4.0),
            ("tokens", 4.0 * batch + here),
            ("generated_tokens", 4.0 * batch + (here > 0)),
            ("step_seconds", 4 * (0.03 + 0.002 * batch) + here / rate),
        ):
            total[name] += grown
        counters = {f"decode_{name}_total": value for name, value in total.items()}
        meter.read(status(**counters, decode_running=float(batch), decode_kv_tokens=100.0 * batch))
    assert meter.rates.prefill_tokens_per_s == pytest.approx(rate, rel=0.4)
    for batch in (8, 64):
        assert meter.rates.itl_s(batch, 100 * batch) == pytest.approx(0.03 + 0.002 * batch, rel=0.25)


def test_the_time_between_tokens_is_learned_over_batch_sizes() -> None:
    meter, seconds, steps = EngineMeter(), 0.0, 0.0
    for n in range(4000):
        batch = (1, 8, 32, 64)[n // 50 % 4]
        steps += 10
        seconds += 10 * (0.03 + 0.002 * batch)
        meter.read(
            status(
                decode_steps_total=steps,
                decode_step_seconds_total=seconds,
                decode_running=float(batch),
                decode_kv_tokens=100.0 * batch,
            )
        )
    for batch in (1, 32, 64):
        assert meter.rates.itl_s(batch, 100 * batch) == pytest.approx(0.03 + 0.002 * batch, rel=0.25)


def test_readings_that_stand_still_or_lack_names_change_nothing() -> None:
    meter = EngineMeter()
    for counters in ({}, {"steps": 1.0}, {"decode_steps_total": 5.0}, {"decode_steps_total": 5.0}, {}):
        meter.read(status(**counters))
    assert meter.rates == DEFAULT_RATES


def test_a_reservation_ends_with_the_second_reading_or_with_time() -> None:
    meter = EngineMeter()
    meter.reserve(0.0, prompt_tokens=10, kv_tokens=5)
    meter.read(status())
    assert meter.reserved(0.1) == Reserved(1, 10, 5)
    meter.reserve(0.1, prompt_tokens=1, kv_tokens=1)
    meter.read(status())
    assert meter.reserved(0.2) == Reserved(1, 1, 1)
    assert meter.reserved(2.2) == Reserved()


def test_pairs_are_learned_apart_and_bounded() -> None:
    pairs = PairMeter()
    for _ in range(60):
        pairs.learn("p", "d", 100, 1.0)
    assert pairs.tokens_per_s("p", "d") == pytest.approx(100, rel=0.01)
    assert pairs.tokens_per_s("p", "e") == PairMeter.DEFAULT
    pairs.learn("p", "e", 0, 1.0)
    pairs.learn("p", "e", 5, 0.0)
    assert pairs.tokens_per_s("p", "e") == PairMeter.DEFAULT
    for n in range(MAX_PAIRS):
        pairs.learn("p", str(n), 1, 1.0)
    assert pairs.tokens_per_s("p", "d") == PairMeter.DEFAULT
