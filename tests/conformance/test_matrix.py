"""Every family of models gives the reference's tokens in every situation: the quick part here, all of it when slow."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from matrix import run
from situations import QUICK, SITUATIONS, Situation
from subjects import subject_of

from diptych.kernels.testing import ARCHITECTURES
from diptych.kvtransfer.arena import KvArena

CELLS = [
    pytest.param(
        architecture,
        situation,
        marks=() if situation in QUICK else pytest.mark.slow,
        id=f"{architecture}-{situation.name}",
    )
    for architecture in ARCHITECTURES
    for situation in SITUATIONS
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other cost more than such small models gain by them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("architecture", "situation"), CELLS)
def test_tokens_are_those_of_the_reference(architecture: str, situation: Situation) -> None:
    subject = subject_of(architecture)
    ties = len(subject.reference.ties)
    outcome = run(subject.model, subject.reference, situation)
    assert outcome.tokens > 0
    for tie in subject.reference.ties[ties:]:
        print(f"tie: {tie}")


@pytest.mark.parametrize("situation", QUICK, ids=lambda situation: situation.name)
def test_steps_launched_before_the_last_is_collected_give_the_same_tokens(situation: Situation) -> None:
    subject = subject_of("llama")
    assert run(subject.model, subject.reference, situation, depth=2).tokens > 0


def test_a_layer_that_does_not_cross_and_a_wrong_token_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks themselves can fail."""
    subject = subject_of("llama")
    tokens = subject.reference.generate((5, 6, 7), 4)
    with pytest.raises(AssertionError, match="wrong token"):
        subject.reference.check((5, 6, 7), [*tokens[:2], (tokens[2] + 1) % 512, tokens[3]])

    unpack = KvArena.unpack

    def lose_a_layer(arena: KvArena, blocks: tuple[int, ...], tok_from: int, tok_to: int, data: memoryview) -> None:
        unpack(arena, blocks, tok_from, tok_to, data)
        arena.storage[1, 1, list(blocks)] = 0

    monkeypatch.setattr(KvArena, "unpack", lose_a_layer)
    with pytest.raises(AssertionError, match="changed on its way"):
        run(subject.model, subject.reference, QUICK[0])


def test_situations_have_names_of_their_own_and_the_quick_ones_are_among_them() -> None:
    assert len({situation.name for situation in SITUATIONS}) == len(SITUATIONS)
    assert set(QUICK) <= set(SITUATIONS)
