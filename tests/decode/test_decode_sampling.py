"""What a request may ask of sampling, through the decode worker: rules, histories, logprobs, faulty rows."""

from __future__ import annotations

import pytest

from diptych.decode.testing import DecodeBench
from diptych.protos.settings import DecodeSettings
from diptych.protos.step import StepRow
from diptych.protos.testing import echo_reference
from diptych.protos.types import FinishReason, SamplingParams

PROMPT = list(range(100, 123))
EVERYTHING = SamplingParams(max_tokens=1, repetition_penalty=1.3, bad_words=((1, 2),), logprobs=3, prompt_logprobs=2)


@pytest.mark.parametrize("transfer", [True, False])
@pytest.mark.parametrize("step_tokens", [3, 7, 64])
def test_logprobs_come_with_every_token_however_it_is_computed(transfer: bool, step_tokens: int) -> None:
    """Under a pool so small that sequences are preempted, some while their prompt is computed."""
    bench = DecodeBench(num_blocks=13, settings=DecodeSettings(step_tokens=step_tokens))
    keys = [
        bench.submit(PROMPT[at:][:18], max_tokens=20, sampling=EVERYTHING, transfer=transfer and at == 0)
        for at in range(4)
    ]
    if transfer:
        bench.transfer(keys[0])
    bench.run()
    assert bench.worker.counters()["decode_preemptions_total"] > 0
    for at, key in enumerate(keys):
        from_prefill = transfer and at == 0
        bench.assert_complete(key, first_index=int(from_prefill))
        assert len(bench.ledger.logprobs[key]) == 20 - from_prefill
        assert len(bench.ledger.prompt_logprobs.get(key, [])) == (0 if from_prefill else 17)
    assert (
        sum(bench.ledger.finishes[key].preemptions for key in keys)
        == (bench.worker.counters()["decode_preemptions_total"])
    )
    bench.assert_idle()


def test_a_prompt_that_owes_logprobs_reads_no_prefix_cache_here() -> None:
    bench = DecodeBench()
    bench.submit(PROMPT, transfer=False)
    bench.run()
    asked = bench.submit(PROMPT, transfer=False, sampling=EVERYTHING)
    plain = bench.submit(PROMPT, transfer=False)
    fetched = bench.submit(PROMPT, sampling=EVERYTHING)
    assert bench.receiver.transfers[fetched].have_tokens == 20, "prefill tells its logprobs"
    bench.run()
    assert [bench.ledger.finishes[key].cached_tokens for key in (asked, plain)] == [0, 20]
    bench.fail(fetched)
    bench.run()
    bench.assert_complete(fetched, first_index=0)
    assert bench.ledger.finishes[fetched].cached_tokens == 0, "now this engine has to"
    bench.assert_idle()


def test_a_history_is_given_once_per_slot_life_and_only_where_rules_look_back() -> None:
    bench = DecodeBench(num_blocks=9)
    sampling = SamplingParams(max_tokens=1, presence_penalty=0.5)
    keys = [bench.submit(PROMPT[at:][:10], transfer=False, max_tokens=20, sampling=sampling) for at in (0, 5)]
    plain = bench.submit([1, 2], transfer=False, max_tokens=3)
    bench.run()
    rows = [row for plan in bench.trace for row in plan]
    samples = [row[4] for row in rows if row[4] is not None]
    histories = [getattr(sample, "history", None) for sample in samples]
    preemptions = [bench.ledger.finishes[key].preemptions for key in (*keys, plain)]
    assert sum(preemptions) > 0
    given = len([history for history in histories if history is not None])
    assert 2 <= given <= 2 + preemptions[0] + preemptions[1]
    for key in (*keys, plain):
        bench.assert_complete(key, first_index=0)


def test_a_stop_token_before_min_tokens_neither_comes_nor_ends_the_request() -> None:
    bench = DecodeBench()
    undisturbed = echo_reference(PROMPT, 6)
    sampling = SamplingParams(max_tokens=1, min_tokens=4)
    key = bench.submit(PROMPT, max_tokens=30, stop=undisturbed[:2], sampling=sampling, transfer=False)
    bench.run()
    bench.assert_complete(key, first_index=0)
    assert bench.ledger.tokens[key][0] != undisturbed[0]
    fetched = bench.submit([9, *PROMPT], max_tokens=3, stop=echo_reference([9, *PROMPT], 1), sampling=sampling)
    bench.want(fetched)
    bench.step()
    first = echo_reference([9, *PROMPT], 1)[0]
    bench.deliver(bench.receiver.commit(fetched, [9, *PROMPT], first))
    assert fetched not in bench.ledger.finishes, "prefill's token 0 is a stop token that came too early"
    bench.run()
    assert bench.ledger.finishes[fetched].reason is FinishReason.LENGTH


def test_allowed_tokens_reach_the_runner() -> None:
    bench = DecodeBench()
    key = bench.submit(PROMPT, transfer=False, sampling=SamplingParams(max_tokens=1, allowed_token_ids=(4, 5)))
    bench.run()
    assert set(bench.ledger.tokens[key]) <= {4, 5}
    bench.assert_complete(key, first_index=0)


def test_only_the_requests_of_faulty_rows_end() -> None:
    bench = DecodeBench(settings=DecodeSettings(step_tokens=40))
    keys = [bench.submit(PROMPT[at:], transfer=False, max_tokens=12, sampling=EVERYTHING) for at in range(4)]
    bench.step()
    bench.step()
    bad = {keys[0], keys[3]}  # one decodes, of one the prompt is in computation
    slots = {bench.worker._sequences[key].slot for key in bad if bench.worker._sequences[key].slot is not None}

    def poison(row: StepRow) -> bool:
        return row.slot in slots

    bench.runner.poison = poison
    bench.step()
    bench.collect()
    bench.runner.poison = None
    assert set(bench.ledger.finishes) == bad
    for key in bad:
        assert bench.error_code(key) == "engine_fault"
        bench.assert_tokens(key)
    bench.run()
    for key in set(keys) - bad:
        bench.assert_complete(key, first_index=0)
    again = bench.submit(PROMPT, transfer=False)
    bench.run()
    bench.assert_complete(again, first_index=0)
    assert bench.worker.counters()["decode_row_faults_total"] == 2
    assert bench.worker.counters()["decode_step_faults_total"] == 0
    bench.assert_idle()


def test_a_request_whose_rules_leave_no_token_ends_with_their_names() -> None:
    bench = DecodeBench()
    sampling = SamplingParams(max_tokens=1, allowed_token_ids=(4, 5), bad_words=((4,), (5,)), min_tokens=1)
    key = bench.submit(PROMPT, transfer=False, sampling=sampling)
    bench.run()
    finish = bench.ledger.finishes[key]
    assert finish.error_code == "invalid_request"
    assert finish.error_message == (
        "no token is left by the rules of this request after 0 generated tokens: "
        "allowed_token_ids and bad_words exclude every one"
    )
    assert bench.worker.counters()["decode_row_faults_total"] == 0
    bench.assert_idle()
