"""A prefill engine that is told of an answer's beginning computes it with the prompt and samples the next token."""

from __future__ import annotations

from dataclasses import replace

import pytest

from diptych.prefill.testing import PrefillBench
from diptych.protos.lifecycle import logit_rules
from diptych.protos.settings import PrefillSettings
from diptych.protos.testing import echo_logprobs, echo_reference
from diptych.protos.types import FinishReason, SamplingParams

PROMPT = list(range(100, 111))
LENGTH = 9
SAMPLING = SamplingParams(
    max_tokens=LENGTH,
    seed=5,
    min_tokens=4,
    frequency_penalty=0.3,
    bad_words=((4,), (1, 2)),
    logprobs=3,
    prompt_logprobs=2,
)


def answer(stop: list[int]) -> list[int]:
    held = replace(SAMPLING, stop_token_ids=frozenset(stop))
    return echo_reference(PROMPT, LENGTH, rules=logit_rules(held, len(PROMPT)))


EARLY = echo_reference(PROMPT, LENGTH)[2]  # held back by min_tokens
STOP = [EARLY, answer([EARLY])[6]]
WHOLE = answer(STOP)[:7]


@pytest.mark.parametrize("step_tokens", [1, 4, 64])
def test_the_next_token_is_that_of_the_uninterrupted_answer_wherever_it_was_cut(step_tokens: int) -> None:
    whole = WHOLE
    for cut in range(len(whole)):
        bench = PrefillBench(settings=PrefillSettings(step_tokens=step_tokens))
        for again in (False, True):
            known = [*PROMPT, *whole[:cut]]
            key = bench.submit(PROMPT, max_tokens=LENGTH, stop=STOP, sampling=SAMPLING, resume=tuple(whole[:cut]))
            bench.run()
            assert bench.ledger.first_index[key] == cut
            assert bench.ledger.tokens[key] == [whole[cut]]
            assert bench.ledger.logprobs[key] == [echo_logprobs(known, whole[cut], 3)]
            assert len(bench.ledger.prompt_logprobs.get(key, [])) == (0 if cut else len(PROMPT) - 1)
            sending = bench.sender.transfers[key]
            assert (sending.num_tokens, sending.first_token) == (len(known), whole[cut])
            ends = cut == len(whole) - 1
            assert sending.final == ends
            if not ends:
                assert sending.content == list(enumerate(known))
            bench.release(key)
            finish = bench.ledger.finishes[key]
            assert finish.num_tokens == cut + 1
            assert finish.cached_tokens == ((len(known) - 1) // 4 * 4 if again and cut else 0)
            assert finish.reason is (FinishReason.STOP if ends else FinishReason.HANDOFF)
        bench.assert_idle()


def test_the_answer_that_is_cut_has_a_stop_token_held_back_and_one_at_its_end() -> None:
    assert WHOLE[-1] == STOP[1]
    assert not set(STOP) & set(WHOLE[:-1])
    assert echo_reference(PROMPT, len(WHOLE)) != WHOLE


def test_what_waits_is_counted_with_the_answers_beginning() -> None:
    bench = PrefillBench()
    key = bench.submit(PROMPT, max_tokens=LENGTH, resume=(1, 2, 3))
    assert bench.worker.counters()["prefill_queued_tokens"] == len(PROMPT) + 3
    bench.run()
    assert bench.worker.counters()["prefill_tokens_total"] == len(PROMPT) + 3
    bench.release(key)
    bench.assert_idle()


def test_an_order_with_more_than_the_pool_or_the_context_holds_or_a_complete_answer_is_refused() -> None:
    bench = PrefillBench(num_blocks=5, max_context_tokens=40)
    refused = {
        bench.submit(PROMPT, max_tokens=30, resume=(1,) * 10): "no_kv_blocks",
        bench.submit(PROMPT, max_tokens=40, resume=(1,) * 29): "context_length_exceeded",
        bench.submit(PROMPT, max_tokens=3, resume=(1, 2, 3)): "invalid_request",
        bench.submit(PROMPT, max_tokens=9, resume=(1, 2), stop=[2]): "invalid_request",
        bench.submit(PROMPT, max_tokens=9, resume=(1, 32_000)): "invalid_request",
    }
    assert {key: bench.ledger.finishes[key].error_code for key in refused} == refused
    assert bench.ledger.finishes[min(refused)].error_message.endswith("cannot hold a prompt of 21 tokens")
    fits = bench.submit(PROMPT, max_tokens=30, resume=(1,) * 9)
    bench.run()
    bench.release(fits)
    bench.assert_idle()
