"""A real model's answer that was cut after any token goes on as it was, by transfer and computed where it goes on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from situations import Situation, random_prompt
from stage import FINAL, GREEDY, Stage
from subjects import subject_of

from diptych.protos.types import SamplingParams, TransferKey

NEW_TOKENS = 12
TIGHT_BLOCKS = 16
RULED = replace(
    GREEDY,
    repetition_penalty=1.2,
    presence_penalty=0.3,
    frequency_penalty=0.5,
    min_tokens=4,
    stop_token_ids=frozenset(range(0, 512, 40)),
    bad_words=((7,), (11, 12)),
    logit_bias=((30, 2.0),),
    logprobs=2,
)
ASKED = {"greedy": GREEDY, "ruled": RULED, "seeded": replace(RULED, temperature=0.8, top_k=40, top_p=0.95, seed=23)}
SITUATIONS = [
    Situation("disaggregated", "company", 17, (16, 5)),
    Situation("colocated", "company", 17),
    Situation("disaggregated", "preempted", 512, (16, 4)),
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def uninterrupted(situation: Situation, sampling: SamplingParams, prompt: tuple[int, ...]) -> list[int]:
    stage = Stage(subject_of("llama").model, situation, decode_blocks=TIGHT_BLOCKS)
    key = stage.submit(prompt, NEW_TOKENS, sampling=sampling)
    stage.settle()
    whole = stage.answer(key)
    stage.close()
    return whole


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.name)
@pytest.mark.parametrize("asked", ASKED)
def test_an_answer_cut_after_any_token_goes_on_as_it_was(asked: str, situation: Situation) -> None:
    sampling = ASKED[asked]
    tight = TIGHT_BLOCKS if situation.way == "preempted" else None
    stage = Stage(subject_of("llama").model, situation, seed=2, decode_blocks=tight)
    moved: dict[TransferKey, list[int]] = {}
    for length in (1, 16, 37):
        prompt = random_prompt(length, seed=3)
        whole = uninterrupted(situation, sampling, prompt)
        if sampling is GREEDY:
            subject_of("llama").reference.check(prompt, whole)
        for cut in range(len(whole)):
            moved[stage.submit(prompt, NEW_TOKENS, sampling=sampling, resume=whole[:cut])] = whole
            stage.turn()
    stage.settle()
    for key, whole in moved.items():
        assert stage.answer(key) == whole, f"cut after {len(stage.requests[key].resume)} tokens"
        finish = stage.finish(key)
        assert finish.reason in FINAL
        assert finish.num_tokens == len(whole)
    preempted = sum(stage.decode.ledger.finishes[key].preemptions for key in moved)
    assert (preempted > 0) == (situation.way == "preempted")
    stage.close()
