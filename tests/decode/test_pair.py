"""A prefill and a decode worker over a hinge that moves KV between two echo runners: tokens as from one engine."""

from __future__ import annotations

import random

import pytest

from diptych.decode.testing import DecodeBench
from diptych.prefill.testing import PrefillBench
from diptych.protos.errors import Cancelled, PeerLost
from diptych.protos.settings import DecodeSettings, PrefillSettings
from diptych.protos.types import FinishReason, TransferKey


class Pair:
    """The test's hinge: chunks cross when `move` is called, in the order and as far as `rng` likes."""

    def __init__(self, rng: random.Random, *, step_tokens: int = 7, prefill_blocks: int = 40, decode_blocks: int = 40):
        self.rng = rng
        self.prefill = PrefillBench(num_blocks=prefill_blocks, settings=PrefillSettings(step_tokens=step_tokens))
        self.decode = DecodeBench(num_blocks=decode_blocks, settings=DecodeSettings(step_tokens=16))
        self.submitted: list[TransferKey] = []

    def submit(self, prompt: list[int], *, max_tokens: int, stop: list[int]) -> TransferKey:
        key = self.prefill.submit(prompt, max_tokens=max_tokens, stop=stop)
        assert self.decode.submit(prompt, max_tokens=max_tokens, stop=stop) == key
        self.submitted.append(key)
        return key

    def move(self, *, loss: float = 0.0) -> None:
        """Each open transfer may take one move; with probability `loss` it fails instead."""
        sends, receives = self.prefill.sender.transfers, self.decode.receiver.transfers
        for key in self.rng.sample(sorted({*sends, *receives}), len({*sends, *receives})):
            send, receive = sends.get(key), receives.get(key)
            if self.rng.random() < loss or (send is not None and send.aborted):
                self.lose(key)
            elif receive is not None and receive.aborted:
                self.decode.deliver(self.decode.receiver.close(key))
                self.lose(key)
            elif send is None or receive is None:
                self.lose(key)
            elif send.upto > receive.have_tokens and not receive.wanted:
                self.decode.want(key)
            elif send.first_token is not None and send.final:
                self.decode.deliver(self.decode.receiver.commit(key, (), send.first_token, final=True))
                self.prefill.release(key)
            elif send.first_token is not None and (receive.blocks or receive.have_tokens == receive.num_tokens):
                # What crosses is what lies in the prefill engine's blocks, not what the test knows of the prompt.
                tokens = [token for _, token in self.prefill.runner.read(send.blocks, send.upto)]
                self.decode.deliver(self.decode.receiver.commit(key, tokens, send.first_token))
                self.prefill.release(key)

    def lose(self, key: TransferKey) -> None:
        receive = self.decode.receiver.transfers.get(key)
        if key in self.prefill.sender.transfers:
            self.prefill.release(key, PeerLost("lost"))
        if receive is not None and receive.aborted:
            self.decode.deliver(self.decode.receiver.close(key))
        elif receive is not None:
            self.decode.fail(key, Cancelled("by prefill") if self.rng.random() < 0.2 else PeerLost("lost"))

    def settle(self) -> None:
        for _ in range(10_000):
            busy = [self.prefill.step(), self.decode.step()]
            if not any(busy) and not self.prefill.sender.transfers and not self.decode.receiver.transfers:
                return
            self.move()
        raise AssertionError("the pair does not come to rest")

    def answer(self, key: TransferKey) -> tuple[list[int], FinishReason]:
        """What a router makes of both streams: tokens by index, decode's end unless token 0 was the end."""
        merged: dict[int, int] = {}
        for ledger in (self.prefill.ledger, self.decode.ledger):
            first = ledger.first_index.get(key, 0)
            for index, token in enumerate(ledger.tokens.get(key, []), first):
                assert merged.setdefault(index, token) == token, "two engines disagree on a token"
        assert sorted(merged) == list(range(len(merged))), "a gap in the answer"
        prefill, decode = self.prefill.ledger.finishes[key].reason, self.decode.ledger.finishes[key].reason
        final = {FinishReason.STOP, FinishReason.LENGTH}
        return [merged[index] for index in sorted(merged)], prefill if prefill in final else decode

    def assert_whole(self, key: TransferKey) -> None:
        tokens, reason = self.answer(key)
        expected = self.decode.expected(key)
        stopped = expected[-1] in self.decode.requests[key].sampling.stop_token_ids
        assert tokens == expected
        assert reason is (FinishReason.STOP if stopped else FinishReason.LENGTH)


@pytest.mark.parametrize("loss", [0.0, 0.05, 0.4])
@pytest.mark.parametrize("decode_blocks", [11, 40])
@pytest.mark.parametrize("seed", range(8))
def test_every_answer_is_that_of_one_undisturbed_engine(seed: int, decode_blocks: int, loss: float) -> None:
    rng = random.Random(seed)
    pair = Pair(
        rng, step_tokens=rng.choice([1, 3, 7, 64]), prefill_blocks=rng.choice([10, 40]), decode_blocks=decode_blocks
    )
    for _ in range(60):
        prompt = [rng.randrange(2)] * rng.choice([0, 4, 12]) + [rng.randrange(9)] * rng.choice([1, 2, 4, 7])
        stop = list(range(0, 32_000, 10)) if rng.random() < 0.3 else []
        pair.submit(prompt, max_tokens=rng.choice([1, 2, 9, 20]), stop=stop)
        for _ in range(rng.randrange(6)):
            pair.prefill.step()
            pair.decode.step()
            pair.move(loss=loss)
    pair.settle()
    for key in pair.submitted:
        pair.assert_whole(key)
    pair.prefill.assert_idle()
    pair.decode.assert_idle()


@pytest.mark.parametrize("seed", range(8))
def test_two_hundred_requests_of_which_a_fifth_is_cancelled_leave_nothing(seed: int) -> None:
    rng = random.Random(seed)
    pair = Pair(rng, decode_blocks=rng.choice([12, 40]))
    cancelled: set[TransferKey] = set()
    for at in range(200):
        key = pair.submit([at % 5] * rng.choice([3, 8, 13]), max_tokens=rng.choice([1, 6, 20]), stop=[])
        if rng.random() < 0.2:
            cancelled.add(key)
        for _ in range(rng.randrange(4)):
            pair.prefill.step()
            pair.decode.step()
            pair.move()
        for victim in list(cancelled):
            if rng.random() < 0.3:
                halves = [pair.prefill.cancel, pair.decode.cancel]
                rng.shuffle(halves)
                halves[0](victim)
                pair.move()
                halves[1](victim)
    pair.settle()
    for key in pair.submitted:
        if key in cancelled:
            pair.decode.assert_tokens(key)
            assert key in pair.prefill.ledger.finishes
        else:
            pair.assert_whole(key)
    pair.prefill.assert_idle()
    pair.decode.assert_idle()
