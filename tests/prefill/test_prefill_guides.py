"""Token 0 of an answer with a guide: under its mask in any chunks, handed over, the model's alone where none is asked.

Guards a mask that is asked for at the wrong position, certain tokens that a prefill engine has no business with, and a
guide that allows nothing taking its neighbours along.
"""

from __future__ import annotations

from collections.abc import Collection

import pytest

from diptych.prefill.testing import PrefillBench
from diptych.protos.errors import InvalidRequest
from diptych.protos.settings import PrefillSettings
from diptych.protos.testing import echo_logprobs, echo_reference, talkative
from diptych.protos.types import FinishReason, SamplingParams

PROMPT = list(range(100, 123))
Rule = tuple[Collection[int], tuple[int, ...]]


def certain(known: tuple[int, ...]) -> Rule:
    """Token 0 is 40 to 49, and 7, 8, 9 are certain behind it."""
    return (range(40, 50), (7, 8, 9) if len(known) == 1 else ())


def nothing(known: tuple[int, ...]) -> Rule:
    return (), ()


@pytest.mark.parametrize("step_tokens", [1, 4, 22, 23, 24])
@pytest.mark.parametrize("num_prompt", [1, 4, 23])
def test_token_0_keeps_to_the_mask_in_any_chunks_and_from_the_cache(step_tokens: int, num_prompt: int) -> None:
    bench = PrefillBench(settings=PrefillSettings(step_tokens=step_tokens))
    for rule in (talkative, certain):
        for _ in range(2):
            key = bench.submit(PROMPT[:num_prompt], rule=rule)
            bench.run()
            assert bench.ledger.tokens[key] == echo_reference(PROMPT[:num_prompt], 1, rule=rule)
            assert bench.sender.transfers[key].first_token == bench.ledger.tokens[key][0]
            assert bench.guides[key].known[0] == bench.ledger.tokens[key][0]
            bench.release(key)
            assert bench.ledger.finishes[key].reason is FinishReason.HANDOFF
    bench.assert_idle()


def test_what_is_certain_behind_token_0_is_the_decode_engines_to_tell() -> None:
    bench = PrefillBench()
    key = bench.submit(PROMPT, rule=certain, stop=[8])
    bench.run()
    assert len(bench.ledger.tokens[key]) == 1
    assert not bench.sender.transfers[key].final
    bench.release(key)
    assert bench.ledger.finishes[key].num_tokens == 1
    bench.assert_idle()


def test_token_0_may_end_the_answer() -> None:
    bench = PrefillBench()
    stop = bench.submit(PROMPT, rule=certain, stop=range(40, 50))
    length = bench.submit(PROMPT, rule=certain, max_tokens=1)
    bench.run()
    assert bench.ledger.finishes[stop].reason is FinishReason.STOP
    assert bench.ledger.finishes[length].reason is FinishReason.LENGTH
    bench.release_sent()
    bench.assert_idle()


@pytest.mark.parametrize("cut", range(1, 12))
def test_an_answer_that_was_cut_goes_on_within_a_run_or_behind_it(cut: int) -> None:
    whole = echo_reference(PROMPT, 12, rule=talkative)
    bench = PrefillBench()
    key = bench.submit(PROMPT, max_tokens=12, rule=talkative)
    again = bench.again(key, whole[:cut])
    bench.run()
    assert bench.ledger.tokens[key] == whole[:1]
    assert bench.ledger.tokens[again] == whole[cut : cut + 1]
    assert bench.ledger.first_index[again] == cut
    bench.release_sent()
    bench.assert_idle()


def test_logprobs_are_those_of_the_model_and_the_rank_shows_the_mask() -> None:
    bench = PrefillBench()
    key = bench.submit(PROMPT, rule=certain, sampling=SamplingParams(max_tokens=1, logprobs=2, prompt_logprobs=1))
    bench.run()
    (token,) = bench.ledger.tokens[key]
    assert bench.ledger.logprobs[key] == [echo_logprobs(PROMPT, token, 2)]
    assert len(bench.ledger.prompt_logprobs[key]) == len(PROMPT) - 1
    bench.release(key)
    bench.assert_idle()


def test_guides_and_none_and_one_that_allows_nothing_share_a_step() -> None:
    bench = PrefillBench()
    rules = [talkative, None, nothing, certain, None]
    keys = [bench.submit([at, *PROMPT[:5]], rule=rule) for at, rule in enumerate(rules)]
    refused = keys[2]
    bench.guides[refused].error = InvalidRequest("the grammar cannot begin", "response_format")
    assert bench.run() == 1
    for at, (key, rule) in enumerate(zip(keys, rules, strict=True)):
        wanted = echo_reference([at, *PROMPT[:5]], 1, rule=rule)
        assert bench.ledger.tokens.get(key, []) == wanted
    finish = bench.ledger.finishes[refused]
    assert (finish.reason, finish.error_code) == (FinishReason.ERROR, "invalid_request")
    assert "cannot begin" in finish.error_message
    assert bench.worker.counters()["prefill_row_faults_total"] == 0
    bench.release_sent()
    assert refused not in bench.sender.transfers
    bench.assert_idle()


@pytest.mark.parametrize("where", ["launch", "collect"])
def test_a_failed_step_and_a_cancel_under_way_leave_nothing_behind(where: str) -> None:
    bench = PrefillBench(settings=PrefillSettings(step_tokens=8))
    key = bench.submit(PROMPT, rule=talkative)
    bench.step()
    bench.runner.fault = where  # type: ignore[assignment]
    bench.run()
    assert bench.ledger.finishes[key].error_code == "engine_fault"
    cancelled = bench.submit(PROMPT, rule=certain)
    bench.step()
    bench.cancel(cancelled)
    after = bench.submit(PROMPT[1:], rule=certain)
    bench.run()
    assert bench.ledger.tokens[after] == echo_reference(PROMPT[1:], 1, rule=certain)
    bench.release_sent()
    bench.run()
    bench.assert_idle()
