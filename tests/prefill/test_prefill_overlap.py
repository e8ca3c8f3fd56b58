"""A chunk is launched before the last one is collected: what comes between must find blocks and slot untouched."""

from __future__ import annotations

import pytest

from diptych.prefill import scheduler
from diptych.prefill.testing import PrefillBench
from diptych.protos.errors import PeerLost
from diptych.protos.settings import PrefillSettings
from diptych.protos.testing import echo_reference
from diptych.protos.types import SamplingParams

PROMPT = list(range(100, 123))


@pytest.fixture(autouse=True)
def depth(monkeypatch: pytest.MonkeyPatch) -> int:
    """Of all benches; the other depth has nothing to say here."""
    monkeypatch.setattr(PrefillBench, "depth", 2)
    return 2


def bench_of(step_tokens: int = 10) -> PrefillBench:
    return PrefillBench(settings=PrefillSettings(step_tokens=step_tokens))


def test_the_next_chunk_is_launched_before_the_last_is_announced() -> None:
    bench = bench_of()
    key = bench.submit(PROMPT)
    bench.step()
    assert (bench.sender.transfers[key].upto, bench.pipeline.num_outstanding) == (0, 1)
    bench.step()
    assert (bench.trace[-1][0][1], bench.sender.transfers[key].upto) == (10, 10)
    assert bench.run() == 1
    assert bench.ledger.tokens[key] == echo_reference(PROMPT, 1)
    bench.release(key)
    bench.assert_idle()


def test_blocks_that_the_sender_let_go_of_stay_until_the_chunk_under_way_is_back() -> None:
    bench = bench_of()
    key = bench.submit(PROMPT)
    bench.step()
    bench.step()
    bench.release(key, PeerLost("gone"))
    assert bench.ledger.finishes[key].error_code == "peer_lost"
    assert (bench.pool.counts().used, bench.slots.num_free) == (6, 15)
    assert bench.step(), "the row under way comes back"
    assert (bench.pool.counts().used, bench.slots.num_free) == (0, 16)
    assert bench.num_steps == 2, "no other chunk was launched"
    bench.assert_idle()


def test_a_cancelled_prompt_computes_no_further_chunk_and_is_not_announced_any_more() -> None:
    bench = bench_of()
    key, other = bench.submit(PROMPT), bench.submit(PROMPT[::-1])
    bench.step()
    bench.cancel(key)
    bench.run()
    sending = bench.sender.transfers[key]
    assert (sending.upto, sending.aborted is not None) == (0, True)
    assert bench.worker.counters()["prefill_tokens_total"] == 10 + 23
    assert bench.ledger.tokens == {other: echo_reference(PROMPT[::-1], 1)}
    assert bench.slots.num_free == 16
    bench.release_sent()
    bench.assert_idle()


def test_a_step_tells_few_positions_of_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "MOST_TOLD", 6)
    bench = bench_of()
    asking = SamplingParams(max_tokens=1, prompt_logprobs=1)
    keys = [bench.submit(PROMPT[at:], sampling=asking) for at in range(3)]
    bench.run()
    told = [sum(len(row[2]) for row in plan if row[5] is not None) for plan in bench.trace]
    assert max(told) == 6
    for at, key in enumerate(keys):
        assert len(bench.ledger.prompt_logprobs[key]) == 22 - at
    bench.release_sent()
    bench.assert_idle()


def test_a_chunk_found_faulty_a_step_late_ends_its_prompt_once_and_nothing_of_it_can_be_found() -> None:
    bench = bench_of()
    key = bench.submit(PROMPT, sampling=SamplingParams(max_tokens=1, prompt_logprobs=1))
    bench.runner.poison = lambda row: row.start == 0
    bench.run()
    bench.runner.poison = None
    assert bench.ledger.finishes[key].error_code == "engine_fault"
    assert bench.worker.counters()["prefill_row_faults_total"] == 1
    assert key not in bench.ledger.prompt_logprobs
    bench.release_sent()
    again = bench.submit(PROMPT)
    bench.run()
    assert bench.ledger.tokens[again] == echo_reference(PROMPT, 1)
    bench.release_sent()
    assert bench.ledger.finishes[again].cached_tokens == 0
    bench.assert_idle()


def test_a_slot_has_its_next_owner_when_the_last_chunk_is_back_and_not_before() -> None:
    bench = PrefillBench(slots=1, settings=PrefillSettings(step_tokens=64))
    first, second = bench.submit(PROMPT), bench.submit(PROMPT[::-1])
    bench.step()
    assert bench.step()
    assert bench.num_steps == 1, "nothing could be planned: the step was waited for"
    bench.run()
    bench.release_sent()
    for key in (first, second):
        assert bench.ledger.tokens[key] == echo_reference(list(bench.requests[key].prompt), 1)
    bench.assert_idle()
