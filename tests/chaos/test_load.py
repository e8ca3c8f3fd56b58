"""The client counts what a server does wrong as what it is, and gives a right answer its due."""

from __future__ import annotations

from typing import Any

import pytest
from fake_front import FakeFront, Spoil, fake_front
from load import Answer, Ask, Asks, Target, burst, send, steady
from oracle import Verdict

from diptych.kernels.echo.testing import expected_tokens

ASK = Ask((17, 4, 99), tuple(expected_tokens((17, 4, 99), 12)))


def target(front: FakeFront) -> Target:
    return Target(front.url, "echo", {"a": {"x-tenant": "a"}, "b": {"x-tenant": "b"}})


async def answered(ask: Ask = ASK, **settings: Any) -> Answer:
    async with fake_front(**settings) as front:
        return await send(target(front), ask)


@pytest.mark.parametrize("together", [1, 5, 12])
async def test_a_right_answer_is_whole_and_right_however_it_is_cut(together: int) -> None:
    answer = await answered(together=together)
    assert answer.is_whole
    assert not answer.failure
    assert answer.verdict.is_right
    assert answer.tokens == list(ASK.expected)
    assert len(answer.times) == len(answer.tokens)
    assert answer.moves == 1
    assert answer.engines == {"decode-0"}


@pytest.mark.parametrize(
    ("spoil", "verdict"),
    [
        (lambda tokens: [*tokens[:5], tokens[4], *tokens[5:]], Verdict(doubled=1)),
        (lambda tokens: [*tokens[:5], *tokens], Verdict(doubled=5)),
        (lambda tokens: [*tokens[:5], 3, *tokens[6:]], Verdict(wrong=1)),
        (lambda tokens: [*tokens[:5], *tokens[6:]], Verdict(missing=1)),
        (lambda tokens: tokens[:-2], Verdict(missing=2)),
    ],
)
async def test_what_is_wrong_with_an_answer_that_calls_itself_whole_is_counted(spoil: Spoil, verdict: Verdict) -> None:
    answer = await answered(spoil=spoil)
    assert answer.is_whole
    assert answer.verdict == verdict


@pytest.mark.parametrize(
    ("settings", "failure"),
    [
        ({"end": "error"}, "engine_lost"),
        ({"end": "cut"}, "connection:IncompleteReadError"),
        ({"status": 503}, "overloaded"),
    ],
)
async def test_a_failure_is_told_by_name_and_its_tokens_are_judged_all_the_same(
    settings: dict[str, Any], failure: str
) -> None:
    answer = await answered(**settings)
    assert not answer.is_whole
    assert answer.failure == failure
    assert answer.verdict.is_right
    spoiled = await answered(spoil=lambda tokens: [tokens[0], *tokens], **settings)
    assert spoiled.verdict.is_right == (settings.get("status") == 503)


async def test_nobody_listening_is_a_failure_and_no_exception() -> None:
    answer = await send(Target("http://127.0.0.1:1", "echo", {}), ASK)
    assert answer.failure.startswith("connection:")


async def test_a_client_that_leaves_has_not_failed() -> None:
    asks = [Ask(ASK.prompt, ASK.expected, leave_after=3), Ask(ASK.prompt, ASK.expected, leave_after_s=0.05)]
    async with fake_front(end="hang") as front:
        for answer in await burst(target(front), asks):
            assert answer.has_left
            assert not answer.failure
            assert answer.verdict.is_right


async def test_requests_say_who_asks_and_what() -> None:
    async with fake_front() as front:
        await send(target(front), Ask(ASK.prompt, ASK.expected, tenant="b"))
        (body,) = front.bodies
        assert body["prompt"] == [17, 4, 99]
        assert body["max_tokens"] == 12
        assert "x-tenant: b" in front.heads[0]


async def test_every_choice_of_every_prompt_is_judged() -> None:
    second = (5, 6, 7)
    ask = Ask(ASK.prompt, ASK.expected, n=2, beside=((second, tuple(expected_tokens(second, 12))),))
    answer = await answered(ask)
    assert answer.is_whole
    assert answer.verdict.is_right
    assert sorted(answer.others) == [1, 2, 3]
    spoiled = await answered(ask, spoil=lambda tokens: [*tokens[:5], tokens[4], *tokens[5:]])
    assert spoiled.verdict == Verdict(doubled=4)
    answer.others.pop(3)
    assert answer.verdict == Verdict(missing=12), "a choice that never came"


def test_broad_requests_have_several_choices() -> None:
    asks = Asks(expected_tokens, seed=3)
    for ask in (asks.broad() for _ in range(50)):
        assert 2 <= ask.num_choices <= 9
        assert all(len(ask.expected_of(choice)) == len(ask.expected) for choice in range(ask.num_choices))


async def test_a_steady_load_is_sent_from_its_seed_and_all_of_it_is_judged() -> None:
    async with fake_front(spoil=lambda tokens: tokens[:1] + tokens) as front:
        answers = await steady(target(front), Asks(expected_tokens, seed=3), rate=100, for_s=0.2, seed=5)
    assert len(answers) > 5
    assert sum((answer.verdict for answer in answers), Verdict()) == Verdict(doubled=len(answers))


def test_the_same_seed_asks_the_same() -> None:
    assert Asks(expected_tokens, seed=3).take(5) == Asks(expected_tokens, seed=3).take(5)
    assert Asks(expected_tokens, seed=3).take(5) != Asks(expected_tokens, seed=4).take(5)


def test_silence_is_counted_from_the_moment_to_the_next_token() -> None:
    answer = Answer(ASK, sent=10.0, times=[11.0, 12.0, 15.0], ended=15.5)
    assert answer.silence_after(12.5) == 2.5
    assert answer.silence_after(15.2) == pytest.approx(0.3)
    assert answer.silence_after(9.0) is None
    assert answer.silence_after(16.0) is None
    assert list(answer.gaps()) == [(12.0, 1.0), (15.0, 3.0)]
