"""An answer that was cut after any token goes on in a decode engine as if nothing had happened, on every way in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from diptych.decode.testing import DecodeBench
from diptych.protos.settings import DecodeSettings
from diptych.protos.step import SampleSpec
from diptych.protos.testing import echo_reference
from diptych.protos.types import FinishReason, SamplingParams, TransferKey

PROMPT = list(range(100, 111))
LENGTH = 12
UNRULED = echo_reference(PROMPT, LENGTH)
EVERYTHING = SamplingParams(
    max_tokens=LENGTH,
    temperature=0.7,
    top_k=5,
    seed=41,
    repetition_penalty=1.2,
    presence_penalty=0.4,
    frequency_penalty=0.3,
    logit_bias=((3, 1.5),),
    bad_words=((UNRULED[2],), (UNRULED[5],), (1, 2)),
    logprobs=2,
    prompt_logprobs=1,
)
ASKED = {
    "plain": SamplingParams(max_tokens=LENGTH),
    "everything": EVERYTHING,
    "stops": SamplingParams(max_tokens=LENGTH, stop_token_ids=frozenset(UNRULED[8:9]), logprobs=0),
    "stops_late": SamplingParams(
        max_tokens=LENGTH, stop_token_ids=frozenset({UNRULED[1], UNRULED[4]}), min_tokens=6, seed=7
    ),
    "chooses": SamplingParams(max_tokens=LENGTH, allowed_token_ids=(4, 9, 16, 25), bad_words=((9,),), seed=3),
}


def submit(bench: DecodeBench, sampling: SamplingParams, resume: list[int], *, transfer: bool) -> TransferKey:
    return bench.submit(
        PROMPT,
        max_tokens=sampling.max_tokens,
        stop=sorted(sampling.stop_token_ids),
        sampling=sampling,
        transfer=transfer,
        resume=tuple(resume),
    )


def uninterrupted(bench: DecodeBench, sampling: SamplingParams) -> list[int]:
    key = submit(bench, sampling, [], transfer=False)
    bench.run()
    bench.assert_complete(key, first_index=0)
    return bench.ledger.tokens[key]


def come_by_transfer(bench: DecodeBench, key: TransferKey) -> int:
    bench.want(key)
    bench.step()
    bench.commit(key)
    return 1


def come_by_local_prefill(bench: DecodeBench, key: TransferKey) -> int:
    return 0


def come_after_a_failed_transfer(bench: DecodeBench, key: TransferKey) -> int:
    bench.want(key)
    bench.step()
    bench.fail(key)
    return 0


WAYS = [come_by_transfer, come_by_local_prefill, come_after_a_failed_transfer]


@pytest.mark.parametrize("is_cached", [False, True])
@pytest.mark.parametrize("step_tokens", [3, 64])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("asked", ASKED)
def test_an_answer_cut_after_any_token_goes_on_as_it_was(
    asked: str, way: Callable[[DecodeBench, TransferKey], int], step_tokens: int, is_cached: bool
) -> None:
    sampling = ASKED[asked]
    settings = DecodeSettings(step_tokens=step_tokens)
    whole = uninterrupted(DecodeBench(settings=settings), sampling)
    for cut in range(len(whole) - (way is come_by_transfer)):
        bench = DecodeBench(settings=settings)
        if is_cached:
            assert uninterrupted(bench, sampling) == whole
        key = submit(bench, sampling, whole[:cut], transfer=way is not come_by_local_prefill)
        first = cut + way(bench, key)
        bench.run()
        assert bench.expected(key) == whole
        bench.assert_complete(key, first_index=first)
        assert bool(bench.ledger.prompt_logprobs.get(key)) == (
            cut == first and cut == 0 and sampling.prompt_logprobs is not None
        ), "the prompt's logprobs are told with the answer's first token, once"
        if is_cached and first > cut:
            assert bench.ledger.finishes[key].cached_tokens >= (len(PROMPT) + cut) // 4 * 4
        bench.assert_idle()


@pytest.mark.parametrize("way", WAYS)
def test_the_runner_is_asked_the_same_of_each_token_whoever_began_the_answer(
    way: Callable[[DecodeBench, TransferKey], int],
) -> None:
    def specs(bench: DecodeBench) -> dict[int, SampleSpec]:
        found = [spec for plan in bench.trace for row in plan if isinstance(spec := row[4], SampleSpec)]
        return {spec.position: spec for spec in found}

    bench = DecodeBench()
    whole = uninterrupted(bench, EVERYTHING)
    wanted = specs(bench)
    for cut in range(1, LENGTH - 1):
        bench = DecodeBench()
        key = submit(bench, EVERYTHING, whole[:cut], transfer=way is not come_by_local_prefill)
        first = cut + way(bench, key)
        bench.run()
        got = specs(bench)
        assert sorted(got) == list(range(len(PROMPT) + first, len(PROMPT) + LENGTH))
        for position, spec in got.items():
            assert replace(spec, history=None) == replace(wanted[position], history=None)
            told = spec.history
            assert (told is None) == (position > len(PROMPT) + first), "the slot's first sample brings the history"
            assert told is None or list(told) == [*PROMPT, *whole][:position]


@pytest.mark.parametrize("sampling", [ASKED["plain"], replace(EVERYTHING, max_tokens=24)])
def test_an_answer_that_goes_on_survives_preemption(sampling: SamplingParams) -> None:
    sampling = replace(sampling, max_tokens=24)
    whole = uninterrupted(DecodeBench(), sampling)
    preempted = 0
    for cut in range(23):
        bench = DecodeBench(num_blocks=11, settings=DecodeSettings(watermark=0.0))
        elder = bench.submit([7, 8, 9], max_tokens=30, transfer=False)
        bench.step()
        key = submit(bench, sampling, whole[:cut], transfer=True)
        bench.transfer(key)
        bench.run()
        bench.assert_complete(elder, first_index=0)
        assert bench.expected(key) == whole
        bench.assert_complete(key, first_index=cut + 1)
        preempted += bench.ledger.finishes[key].preemptions
        bench.assert_idle()
    assert preempted > 10


def test_a_transfer_whose_token_ends_the_answer_ends_the_order() -> None:
    bench = DecodeBench()
    whole = uninterrupted(bench, ASKED["stops"])
    key = submit(bench, ASKED["stops"], whole[:-1], transfer=True)
    bench.commit(key, final=True)
    finish = bench.ledger.finishes[key]
    assert (finish.reason, finish.num_tokens) == (FinishReason.CANCELLED, len(whole))
    bench.assert_idle()


def test_an_answer_goes_on_after_tokens_that_this_engine_would_not_have_chosen() -> None:
    """Another engine's numbers may have come out otherwise; what the client has seen stands."""
    for transfer in (False, True):
        bench = DecodeBench()
        key = submit(bench, ASKED["plain"], [5, 5, 6], transfer=transfer)
        if transfer:
            bench.transfer(key)
        bench.run()
        bench.assert_complete(key, first_index=3 + transfer)
        assert bench.expected(key)[:3] == [5, 5, 6]
        assert bench.expected(key)[3:] != UNRULED[3:]
        bench.assert_idle()


def test_an_order_with_more_than_the_pool_or_the_context_holds_or_a_complete_answer_is_refused() -> None:
    bench = DecodeBench(num_blocks=5, max_context_tokens=40)
    refused = {
        bench.submit(PROMPT, max_tokens=30, resume=(1,) * 10, transfer=False): "no_kv_blocks",
        bench.submit(PROMPT, max_tokens=40, resume=(1,) * 29, transfer=False): "context_length_exceeded",
        bench.submit(PROMPT, max_tokens=3, resume=(1, 2, 3), transfer=False): "invalid_request",
        bench.submit(PROMPT, max_tokens=9, resume=(1, 2), stop=[2], transfer=False): "invalid_request",
        bench.submit(PROMPT, max_tokens=9, resume=(1, 32_000), transfer=False): "invalid_request",
    }
    assert {key: bench.error_code(key) for key in refused} == refused
    fits = [
        bench.submit(PROMPT, max_tokens=10, resume=(1,) * 9, transfer=False),
        bench.submit(PROMPT, max_tokens=9, resume=(2, 1), stop=[2], transfer=False),
    ]
    bench.run()
    for key in fits:
        bench.assert_complete(key, first_index=len(bench.requests[key].resume))
    bench.assert_idle()
