"""A thousand random requests, a fifth cancelled at random moments: right tokens, and nothing held afterwards."""

from __future__ import annotations

import random

import pytest
import torch
from situations import Situation, random_prompt
from stage import FINAL, Stage
from subjects import Subject, subject_of

from diptych.protos.types import FinishReason, TransferKey

ENDED_BY_US = {FinishReason.CANCELLED, FinishReason.ERROR}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("situation", "decode_blocks"),
    [
        pytest.param(Situation("disaggregated", "company", 64, (16, 5)), 120, id="disaggregated-roomy"),
        pytest.param(Situation("disaggregated", "company", 17), 14, id="disaggregated-tight"),
        pytest.param(Situation("colocated", "company", 64), 14, id="colocated-tight"),
    ],
)
def test_a_thousand_requests_of_which_a_fifth_is_cancelled_leave_both_pools_at_their_baseline(
    situation: Situation, decode_blocks: int
) -> None:
    storm(subject_of("llama"), situation, decode_blocks, num_requests=1000)


def test_a_hundred_requests_of_which_a_fifth_is_cancelled_leave_both_pools_at_their_baseline() -> None:
    storm(subject_of("llama"), Situation("disaggregated", "company", 17), 14, num_requests=100)


def storm(subject: Subject, situation: Situation, decode_blocks: int, *, num_requests: int) -> None:
    """`turn` checks both pools after every step."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rng = random.Random(num_requests)
    stage = Stage(subject.model, situation, seed=1, decode_blocks=decode_blocks)
    baseline = [engine.pool.counts() for engine in stage.engines]
    prompts = [random_prompt(length, seed) for length in (1, 5, 16, 17, 33, 60) for seed in range(4)]
    prompts += [random_prompt(40, 9) + random_prompt(length, 9) for length in (3, 8, 20)]
    doomed: set[TransferKey] = set()
    for _ in range(num_requests):
        key = stage.submit(rng.choice(prompts), rng.choice([1, 2, 6, 12]))
        if rng.random() < 0.2:
            doomed.add(key)
        for _ in range(rng.randrange(5)):
            stage.turn()
        for victim in sorted(doomed):
            if rng.random() < 0.3:
                stage.cancel(victim)
    stage.settle()
    cancelled = [key for key in doomed if stage.finish(key).reason not in FINAL]
    assert num_requests * 0.05 < len(cancelled) <= len(doomed)
    for key, request in stage.requests.items():
        got = stage.answer(key)
        if stage.finish(key).reason in FINAL:
            assert len(got) == request.sampling.max_tokens
        else:
            assert key in doomed, stage.finish(key)
        if got:
            subject.reference.check(request.prompt, got)
    for engine, counts in zip(stage.engines, baseline, strict=True):
        engine.pool.drop_cache()
        assert engine.pool.counts() == counts
    stage.close()
    torch.set_num_threads(threads)
