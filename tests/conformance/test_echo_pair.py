"""A pair of echo engines with the real transfer between them, in this thread: every bit of KV crosses, or it shows."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hinge import Hinge, read_kv

from diptych.decode.worker import DecodeWorker
from diptych.kernels.echo.runner import EchoRunner
from diptych.kernels.echo.testing import expected, expected_prompt_logprobs, expected_tokens
from diptych.kvtransfer.arena import KvArena
from diptych.kvtransfer.layout import KvLayout
from diptych.kvtransfer.pool import BlockPool
from diptych.prefill.worker import PrefillWorker
from diptych.protos.echo import BAD, END, STOP, VOCAB_SIZE
from diptych.protos.settings import DecodeSettings, PrefillSettings
from diptych.protos.step import SlotPool
from diptych.protos.testing import FakeClock, Ledger
from diptych.protos.types import DecodeOrder, FinishReason, GenerateRequest, PrefillOrder, SamplingParams, TransferKey

MAX_SLOTS = 16
CONTEXT = 400
FINAL = {FinishReason.STOP, FinishReason.LENGTH}


class BitHinge(Hinge):
    """Compares bits: as numbers, the echo's KV is noise and often none at all."""

    def _compare(self, key: TransferKey) -> None:
        num_tokens, cached = self._asked[key]
        if key in self.d.blocks:
            there = read_kv(self.p.arena, self.p.blocks[key], num_tokens).view(torch.uint8)
            here = read_kv(self.d.arena, self.d.blocks[key], num_tokens).view(torch.uint8)
            assert torch.equal(here, there), f"{key}: the KV changed on its way"
            self.compared_tokens += num_tokens - cached


@dataclass
class Engine:
    block_tokens: int
    num_blocks: int
    dtype: str
    step_tokens: int

    def __post_init__(self) -> None:
        layout = KvLayout(layers=2, kv_heads=2, head_dim=8, dtype=self.dtype, block_tokens=self.block_tokens)
        self.arena = KvArena(layout, self.num_blocks)
        self.runner = EchoRunner(self.arena.bytes(), max_slots=MAX_SLOTS, max_step_tokens=self.step_tokens)
        self.pool = BlockPool(num_blocks=self.num_blocks, block_tokens=self.block_tokens)
        self.slots = SlotPool(MAX_SLOTS)
        self.ledger = Ledger()


class Pair:
    """A prefill and a decode engine; `turn` gives each a step."""

    def __init__(self, rng: random.Random, *, sizes: tuple[int, int], blocks: tuple[int, int], dtype: str) -> None:
        self.rng = rng
        self.clock = FakeClock()
        self.p = Engine(sizes[0], blocks[0], dtype, rng.choice([7, 32, 256]))
        self.d = Engine(sizes[1], blocks[1], dtype, 64)
        self.hinge = BitHinge(self.p.arena, self.d.arena, clock=self.clock, seed=1)
        self.requests: dict[TransferKey, GenerateRequest] = {}
        parts = [
            {
                "runner": engine.runner,
                "pool": engine.pool,
                "slots": engine.slots,
                "emit": engine.ledger,
                "clock": self.clock,
                "max_context_tokens": CONTEXT,
            }
            for engine in (self.p, self.d)
        ]
        self.prefill = PrefillWorker(
            settings=PrefillSettings(step_tokens=self.p.step_tokens, max_running=8, max_waiting=2000),
            sender=self.hinge.sending,
            **parts[0],  # type: ignore[arg-type]
        )
        self.decode = DecodeWorker(
            settings=DecodeSettings(step_tokens=64, max_running=MAX_SLOTS, max_waiting=2000),
            receiver=self.hinge.receiving,
            **parts[1],  # type: ignore[arg-type]
        )
        self.hinge.p.deliver, self.hinge.d.deliver = self.prefill.on_transfer, self.decode.on_transfer

    def submit(self, prompt: tuple[int, ...], sampling: SamplingParams) -> TransferKey:
        key = TransferKey((len(self.requests) + 1).to_bytes(16, "big"))
        request = self.requests[key] = GenerateRequest(key=key, prompt=prompt, sampling=sampling)
        self.decode.submit(DecodeOrder(request=request, prefill=self.hinge.p.ref))
        self.prefill.submit(PrefillOrder(request=request, decode=self.hinge.d.ref))
        return key

    def turn(self) -> bool:
        busy = self.prefill.step() | self.hinge.pump() | self.decode.step()
        self.clock.advance(0.002)
        return busy

    def settle(self) -> None:
        idle = 0
        while any(key not in engine.ledger.finishes for engine in (self.p, self.d) for key in self.requests):
            idle = 0 if self.turn() else idle + 1
            assert idle < 500, "requests are left and nobody does anything"
        while self.turn():
            pass

    def answer(self, key: TransferKey) -> list[int]:
        merged: dict[int, int] = {}
        for engine in (self.p, self.d):
            for index, token in enumerate(engine.ledger.tokens.get(key, []), engine.ledger.first_index.get(key, 0)):
                assert merged.setdefault(index, token) == token, "two engines disagree on a token"
        return [merged[index] for index in range(len(merged))]

    def close(self) -> None:
        for engine in (self.p, self.d):
            engine.pool.check_integrity()
            assert engine.pool.counts().used == 0
            assert engine.slots.num_free == MAX_SLOTS
        self.hinge.check_quiet()
        self.hinge.close()


def samplings(rng: random.Random) -> Iterator[SamplingParams]:
    """Of many kinds, for ever."""
    while True:
        yield SamplingParams(
            max_tokens=rng.choice([1, 2, 9, 40]),
            temperature=rng.choice([0.0, 0.0, 0.8, 1.5]),
            seed=rng.randrange(1000),
            top_k=rng.choice([0, 0, 3]),
            min_tokens=rng.choice([0, 0, 5]),
            stop_token_ids=frozenset({END}) if rng.random() < 0.8 else frozenset(),
            repetition_penalty=rng.choice([1.0, 1.0, 1.0, 1.3]),
            allowed_token_ids=rng.choice([None, None, None, (3, 17, 20_000)]),
            logprobs=rng.choice([None, None, 2]),
            prompt_logprobs=rng.choice([None, None, None, 1]),
        )


@pytest.mark.parametrize("num_requests", [100, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("sizes", "blocks", "dtype"),
    [((16, 5), (60, 400), "float32"), ((3, 16), (160, 13), "bfloat16")],
    ids=["roomy", "preempting"],
)
def test_random_requests_get_the_expected_tokens(
    sizes: tuple[int, int], blocks: tuple[int, int], dtype: str, num_requests: int
) -> None:
    rng = random.Random(5)
    pair = Pair(rng, sizes=sizes, blocks=blocks, dtype=dtype)
    wishes = samplings(rng)
    for _ in range(num_requests):
        common = rng.choice([0, 0, 16, 33])
        length = rng.choice([1, 2, 3, 15, 16, 17, 40, 90])
        prompt = [rng.randrange(2)] * common + [rng.randrange(VOCAB_SIZE) for _ in range(length)]
        if rng.random() < 0.2:
            prompt += [STOP, rng.randrange(12), 7]
        pair.submit(tuple(prompt), next(wishes))
        for _ in range(rng.randrange(6)):
            pair.turn()
    pair.settle()
    preempted = 0
    for key, request in pair.requests.items():
        sampling = request.sampling
        wanted = expected(request.prompt, sampling.max_tokens, sampling)
        assert pair.answer(key) == [at.token for at in wanted]
        if sampling.logprobs is not None:
            told = [*pair.p.ledger.logprobs[key], *pair.d.ledger.logprobs.get(key, [])]
            assert told == [at.logprobs(sampling.logprobs) for at in wanted]
        if sampling.prompt_logprobs is not None:
            told = max((engine.ledger.prompt_logprobs.get(key, []) for engine in (pair.p, pair.d)), key=len)
            assert told == expected_prompt_logprobs(request.prompt, sampling.prompt_logprobs)
        preempted += pair.d.ledger.finishes[key].preemptions
    finishes = pair.d.ledger.finishes.values()
    assert sum(finish.transfer_bytes > 0 for finish in finishes) > num_requests // 2
    assert sum(finish.cached_tokens > 0 for finish in finishes) > num_requests // 10
    assert (preempted > num_requests // 50) == (blocks[1] == 13), preempted
    assert pair.hinge.compared_tokens > 10 * num_requests
    pair.close()


def test_a_damaged_copy_that_no_checksum_saw_shows_in_the_answer() -> None:
    """The real transfer would refuse it; the echo does not rely on that."""
    pair = Pair(random.Random(2), sizes=(4, 4), blocks=(40, 40), dtype="bfloat16")
    unpack = pair.d.arena.unpack

    def damage(blocks: tuple[int, ...], tok_from: int, tok_to: int, data: memoryview) -> None:
        data[len(data) // 2] ^= 4
        unpack(blocks, tok_from, tok_to, data)

    pair.d.arena.unpack = damage  # type: ignore[method-assign, assignment]
    pair.hinge._compare = lambda key: None  # type: ignore[method-assign]
    prompt = tuple(range(100, 130))
    key = pair.submit(prompt, SamplingParams(max_tokens=6, temperature=0.0))
    pair.settle()
    assert pair.answer(key) == [expected_tokens(prompt, 1)[0], BAD, BAD, BAD, BAD, BAD]
    pair.close()
