"""The budget of prompt tokens: monotone in what is allowed, never nothing, full where nobody would notice."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.decode.arbiter import CHUNK, Demand, Goals, StepBudget
from diptych.decode.testing import DecodeBench

QUIET = Demand(decode_rows=20, kv_tokens=20_000, queued_tokens=500, prompt_kv=0, oldest_wait_s=0.0)


class Linear:
    """5 ms for any step, 10 us a decoding row."""

    def __init__(self, token_s: float) -> None:
        self._token_s = token_s

    def seconds(self, *, decode_rows: int, prompt_tokens: int, kv_tokens: int, prompt_kv: int) -> float:
        return 5e-3 + self._token_s * prompt_tokens + 10e-6 * decode_rows


COST = Linear(25e-6)


def seconds_of(demand: Demand, num_tokens: int) -> float:
    return COST.seconds(
        decode_rows=demand.decode_rows,
        prompt_tokens=num_tokens,
        kv_tokens=demand.kv_tokens,
        prompt_kv=demand.prompt_kv,
    )


def given_to(demand: Demand, goals: Goals | None = None, step_tokens: int = 8192) -> int:
    return StepBudget(step_tokens=step_tokens, cost=COST, goals=goals).prompt_tokens(demand)


def test_a_few_prompts_leave_the_readers_their_pace() -> None:
    tokens = given_to(QUIET)
    assert tokens % CHUNK == 0
    assert seconds_of(QUIET, tokens) <= Goals().itl_target_s < seconds_of(QUIET, tokens + CHUNK)


@pytest.mark.parametrize("change", [{"oldest_wait_s": 0.34}, {"queued_tokens": 12_000}])
def test_prompts_that_would_wait_too_long_get_more_up_to_the_limit(change: dict[str, float]) -> None:
    demand = replace(QUIET, **change)  # type: ignore[arg-type]
    tokens = given_to(demand)
    assert tokens > given_to(QUIET)
    assert seconds_of(demand, tokens) <= Goals().itl_limit_s < seconds_of(demand, tokens + CHUNK)


def test_a_backlog_that_no_pace_clears_gets_full_steps() -> None:
    demand = replace(QUIET, queued_tokens=1_000_000)
    assert given_to(demand) == 8192 - demand.decode_rows


@pytest.mark.parametrize("change", [{"decode_rows": 0}, {"queued_tokens": 0}], ids=["nobody reads", "no prompts"])
def test_steps_are_full_where_nobody_would_notice(change: dict[str, int]) -> None:
    demand = replace(QUIET, **change)  # type: ignore[arg-type]
    assert given_to(demand) == 8192 - demand.decode_rows


def test_a_step_within_the_target_is_full_to_the_last_token() -> None:
    assert given_to(QUIET, step_tokens=500) == 480


def test_prompts_never_stand_still_though_the_decoding_rows_alone_take_too_long() -> None:
    assert given_to(QUIET, Goals(itl_target_s=1e-6, itl_limit_s=1e-6, overload=1e9)) == CHUNK


demands = st.builds(
    Demand,
    decode_rows=st.integers(0, 512),
    kv_tokens=st.integers(0, 10**6),
    queued_tokens=st.integers(0, 10**6),
    prompt_kv=st.integers(0, 10**5),
    oldest_wait_s=st.floats(0, 100),
)


@given(demand=demands, step_tokens=st.integers(512, 8192))
def test_the_budget_fits_the_step_and_is_nothing_only_where_no_token_is_left(demand: Demand, step_tokens: int) -> None:
    tokens = given_to(demand, step_tokens=step_tokens)
    left = step_tokens - demand.decode_rows
    assert 0 <= tokens <= left
    assert tokens or not left


@given(demand=demands, more=st.floats(0, 1))
def test_prompts_that_have_waited_longer_get_no_less(demand: Demand, more: float) -> None:
    later = replace(demand, oldest_wait_s=demand.oldest_wait_s + more)
    assert given_to(later) >= given_to(demand)


def bench_of_slow_tokens() -> DecodeBench:
    """Four chunks fit into 20 ms, a full step into 55."""
    return DecodeBench(num_blocks=400, max_context_tokens=1000, cost=Linear(50e-6))


def widths(bench: DecodeBench) -> list[int]:
    """Tokens of each row of the last step."""
    return [len(row[2]) if isinstance(row[2], tuple) else 1 for row in bench.trace[-1]]


def test_decoding_sequences_keep_their_pace_while_prompts_are_computed_beside_them() -> None:
    bench = bench_of_slow_tokens()
    first = bench.submit(range(400), transfer=False, max_tokens=30)
    bench.step()
    assert widths(bench) == [400], "nobody decodes: the whole prompt at once"
    others = [bench.submit(range(at, at + 350), transfer=False, max_tokens=5) for at in (1, 2)]
    bench.step()
    assert widths(bench) == [1, 4 * CHUNK]
    while any(key not in bench.ledger.tokens for key in others):
        bench.step()
        assert sum(width for width in widths(bench) if width > 1) <= 4 * CHUNK
    bench.run()
    for key in (first, *others):
        bench.assert_complete(key, first_index=0)
    bench.assert_idle()


def test_a_prompt_that_has_waited_gets_the_longer_step() -> None:
    bench = bench_of_slow_tokens()
    bench.submit(range(10), transfer=False, max_tokens=30)
    bench.step()
    bench.submit(range(1, 401), transfer=False, max_tokens=5)
    bench.clock.advance(0.34)
    bench.step()
    assert widths(bench) == [1, 400]
    bench.run()
    bench.assert_idle()
