"""What a step costs by those that were timed: exact at them, between them in between, and never less for more work."""

from __future__ import annotations

import random

import pytest

from diptych.kernels.device.cost import MeasuredCost, Timed, fit


def make_cost() -> MeasuredCost:
    """4 ms of weights, 20 us a token, 1 ns a pair, 1.5 with an earlier step's, 30 ns a position that decoding reads."""

    def timed(tokens: int, each: int, behind: int = 0) -> Timed:
        read = 1e-9 * each / 2 + 1.5e-9 * behind if each > 1 else 0.0
        return Timed(tokens, each, 0.004 + 20e-6 * tokens + tokens * read, behind)

    steps = [timed(1, 1), timed(64, 1), timed(512, 128), timed(8192, 128)]
    whole, parted, near, far = timed(8192, 8192), timed(8192, 128), timed(1024, 1024), timed(1024, 1024, 7168)
    return fit(steps, whole=whole, parted=parted, near=near, far=far, kv_token_s=30e-9)


def test_every_part_of_the_cost_is_found() -> None:
    cost = make_cost()
    assert cost.pair_s == pytest.approx(1e-9)
    assert cost.earlier_s == pytest.approx(1.5e-9)
    for rows, prompt, kv, before in ((1, 0, 100, 0), (64, 0, 64_000, 0), (8, 1000, 65_000, 3000), (0, 8192, 0, 0)):
        expected = 0.004 + 20e-6 * (rows + prompt) + 30e-9 * kv + 1e-9 * prompt * (1.5 * before + prompt / 2)
        found = cost.seconds(decode_rows=rows, prompt_tokens=prompt, kv_tokens=kv, prompt_kv=before)
        assert found == pytest.approx(expected, rel=1e-6)


def test_beyond_the_largest_step_a_token_costs_what_it_did_there() -> None:
    cost = make_cost()
    largest = cost.seconds(decode_rows=8192, prompt_tokens=0, kv_tokens=0, prompt_kv=0)
    assert cost.seconds(decode_rows=16384, prompt_tokens=0, kv_tokens=0, prompt_kv=0) == pytest.approx(2 * largest)


@pytest.mark.parametrize("seed", range(20))
def test_more_work_never_costs_less_whatever_was_measured(seed: int) -> None:
    rng = random.Random(seed)
    steps = [Timed(1 << power, rng.choice([1, 7]), rng.random()) for power in range(rng.randint(1, 13))]
    whole, parted = Timed(512, 512, rng.random()), Timed(512, 64, rng.random())
    near, far = Timed(64, 64, rng.random()), Timed(64, 64, rng.random(), 448)
    cost = fit(steps, whole=whole, parted=parted, near=near, far=far, kv_token_s=rng.random() * 1e-8)
    work = {"decode_rows": 0, "prompt_tokens": 1, "kv_tokens": 0, "prompt_kv": 0}
    last = cost.seconds(**work)
    for _ in range(200):
        work[rng.choice(list(work))] += rng.randint(0, 100)
        now = cost.seconds(**work)
        assert now >= last
        last = now


def test_a_prompt_that_cannot_be_parted_tells_nothing_of_context() -> None:
    two, one = Timed(2, 2, 0.2), Timed(1, 1, 0.1)
    cost = fit([one], whole=Timed(2, 2, 0.3), parted=two, near=one, far=one, kv_token_s=0.0)
    assert cost.pair_s == cost.earlier_s == 0
