"""What a request may ask of sampling, through the prefill worker: token 0 by the rules, logprobs, faulty rows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from diptych.prefill.testing import PrefillBench
from diptych.protos.lifecycle import logit_rules
from diptych.protos.settings import PrefillSettings
from diptych.protos.testing import echo_logprobs, echo_reference
from diptych.protos.types import FinishReason, SamplingParams

PROMPT = list(range(100, 123))
EVERYTHING = SamplingParams(max_tokens=1, frequency_penalty=0.3, logprobs=3, prompt_logprobs=2)


@pytest.mark.parametrize("step_tokens", [1, 4, 22, 23, 24])
@pytest.mark.parametrize("num_prompt", [1, 2, 4, 23])
def test_prompt_and_token_0_come_with_their_logprobs_in_any_chunks(step_tokens: int, num_prompt: int) -> None:
    bench = PrefillBench(settings=PrefillSettings(step_tokens=step_tokens))
    for _ in range(2):
        key = bench.submit(PROMPT[:num_prompt], sampling=EVERYTHING)
        bench.run()
        (token,) = bench.ledger.tokens[key]
        known = [*PROMPT[:num_prompt], token]
        assert bench.ledger.logprobs[key] == [echo_logprobs(known[:-1], token, 3)]
        assert bench.ledger.prompt_logprobs.get(key, []) == [
            echo_logprobs(known[:at], known[at], 2) for at in range(1, num_prompt)
        ]
        bench.release(key)
        cached = bench.ledger.finishes[key].cached_tokens
        assert cached == 0, "what is found in the cache has no logits"
    bench.assert_idle()


def test_a_prompt_without_a_question_still_reads_the_cache() -> None:
    bench = PrefillBench()
    bench.submit(PROMPT, sampling=EVERYTHING)
    bench.run()
    plain = bench.submit(PROMPT, sampling=replace(EVERYTHING, prompt_logprobs=None))
    bench.run()
    bench.release_sent()
    assert bench.ledger.finishes[plain].cached_tokens == 20
    assert plain not in bench.ledger.prompt_logprobs


def test_token_0_keeps_the_rules() -> None:
    bench = PrefillBench()
    stop = echo_reference(PROMPT, 1)
    sampling = SamplingParams(max_tokens=8, min_tokens=1, stop_token_ids=frozenset(stop))
    key = bench.submit(PROMPT, stop=stop, sampling=sampling)
    bench.run()
    assert bench.ledger.tokens[key] == echo_reference(PROMPT, 1, rules=logit_rules(sampling, len(PROMPT)))
    assert bench.ledger.tokens[key] != stop
    assert not bench.sender.transfers[key].final
    bench.release(key)
    assert bench.ledger.finishes[key].reason is FinishReason.HANDOFF


def test_only_the_requests_of_faulty_rows_end() -> None:
    bench = PrefillBench(settings=PrefillSettings(step_tokens=40))
    keys = [bench.submit(PROMPT[at:], sampling=EVERYTHING) for at in range(3)]
    bench.runner.poison = lambda row: row.tokens is not None and row.tokens[0] == PROMPT[1]
    bench.step()
    bench.collect()
    bench.runner.poison = None
    assert {key: finish.error_code for key, finish in bench.ledger.finishes.items()} == {keys[1]: "engine_fault"}
    assert bench.sender.transfers[keys[1]].aborted is not None
    bench.run()
    for at in (0, 2):
        assert bench.ledger.tokens[keys[at]] == echo_reference(PROMPT[at:], 1)
    bench.release_sent()
    again = bench.submit(PROMPT[1:])
    bench.run()
    assert bench.ledger.tokens[again] == echo_reference(PROMPT[1:], 1)
    bench.release_sent()
    assert bench.worker.counters()["prefill_row_faults_total"] == 1
    assert bench.worker.counters()["prefill_step_faults_total"] == 0
    bench.assert_idle()


def test_a_request_whose_rules_leave_no_token_ends_with_their_names() -> None:
    bench = PrefillBench()
    sampling = SamplingParams(max_tokens=1, allowed_token_ids=(4, 5), bad_words=((4,), (5,)), min_tokens=1)
    key = bench.submit(PROMPT, sampling=sampling)
    bench.run()
    finish = bench.ledger.finishes[key]
    assert finish.error_code == "invalid_request"
    assert finish.error_message == (
        "no token is left by the rules of this request after 0 generated tokens: "
        "allowed_token_ids and bad_words exclude every one"
    )
    assert bench.worker.counters()["prefill_row_faults_total"] == 0
    bench.release_sent()
    bench.assert_idle()
