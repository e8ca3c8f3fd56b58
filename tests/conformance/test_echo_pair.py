"""A pair of echo engines with the real transfer between them, in this thread: every bit of KV crosses, or it shows."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hinge import Hinge, read_kv

from diptych.decode.worker import DecodeWorker
from diptych.kernels.echo.runner import EchoRunner
from diptych.kernels.echo.testing import ExpectedToken, expected, expected_prompt_logprobs, expected_tokens
from diptych.kvtransfer.arena import KvArena
from diptych.kvtransfer.layout import KvLayout
from diptych.kvtransfer.pool import BlockPool
from diptych.prefill.worker import PrefillWorker
from diptych.protos.echo import BAD, END, STOP, VOCAB_SIZE
from diptych.protos.pipeline import StepPipeline
from diptych.protos.ports import WorkerLoad
from diptych.protos.settings import DecodeSettings, PrefillSettings
from diptych.protos.step import SlotPool
from diptych.protos.testing import FakeClock, Ledger
from diptych.protos.types import (
    DecodeOrder,
    FinishReason,
    GenerateRequest,
    PrefillOrder,
    SamplingParams,
    TokenLogprobs,
    TransferKey,
)

MAX_SLOTS = 16
CONTEXT = 400
NOTHING = WorkerLoad(running=0, waiting=0)
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
    depth: int

    def __post_init__(self) -> None:
        layout = KvLayout(layers=2, kv_heads=2, head_dim=8, dtype=self.dtype, block_tokens=self.block_tokens)
        self.arena = KvArena(layout, self.num_blocks)
        self.runner = EchoRunner(
            self.arena.bytes(), max_slots=MAX_SLOTS, max_step_tokens=self.step_tokens, depth=self.depth
        )
        self.pool = BlockPool(num_blocks=self.num_blocks, block_tokens=self.block_tokens)
        self.slots = SlotPool(MAX_SLOTS)
        self.ledger = Ledger()


class Pair:
    """A prefill and a decode engine; `turn` gives each a step."""

    def __init__(
        self, rng: random.Random, *, sizes: tuple[int, int], blocks: tuple[int, int], dtype: str, depth: int = 1
    ) -> None:
        self.rng = rng
        self.clock = FakeClock()
        self.p = Engine(sizes[0], blocks[0], dtype, rng.choice([7, 32, 256]), depth)
        self.d = Engine(sizes[1], blocks[1], dtype, 64, depth)
        self.hinge = BitHinge(self.p.arena, self.d.arena, clock=self.clock, seed=1)
        self.requests: dict[TransferKey, GenerateRequest] = {}
        parts = [
            {
                "pipeline": StepPipeline(engine.runner, self.clock),
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

    def submit(
        self,
        prompt: tuple[int, ...],
        sampling: SamplingParams,
        *,
        resume: Sequence[int] = (),
        local: bool = False,
        salt: bytes = b"",
    ) -> TransferKey:
        key = TransferKey((len(self.requests) + 1).to_bytes(16, "big"))
        request = GenerateRequest(key=key, prompt=prompt, sampling=sampling, resume=tuple(resume), salt=salt)
        self.requests[key] = request
        for engine in (self.p, self.d):
            engine.ledger.resumed[key] = len(resume)
        self.decode.submit(DecodeOrder(request=request, prefill=None if local else self.hinge.p.ref))
        if not local:
            self.prefill.submit(PrefillOrder(request=request, decode=self.hinge.d.ref))
        return key

    def turn(self) -> bool:
        busy = self.prefill.step() | self.hinge.pump() | self.decode.step()
        self.clock.advance(0.002)
        return busy

    def settle(self) -> None:
        idle = 0
        while self.prefill.load() != NOTHING or any(key not in self.d.ledger.finishes for key in self.requests):
            idle = 0 if self.turn() else idle + 1
            assert idle < 500, "requests are left and nobody does anything"
        while self.turn():
            pass

    def answer(self, key: TransferKey) -> list[int]:
        """The whole of it, with what the request came with."""
        merged = dict(enumerate(self.requests[key].resume))
        for engine in (self.p, self.d):
            for index, token in enumerate(engine.ledger.tokens.get(key, []), engine.ledger.first_index.get(key, 0)):
                assert merged.setdefault(index, token) == token, "two engines disagree on a token"
        return [merged[index] for index in range(len(merged))]

    def logprobs(self, key: TransferKey) -> list[TokenLogprobs]:
        """Of the tokens that came here, in order."""
        return [*self.p.ledger.logprobs.get(key, []), *self.d.ledger.logprobs.get(key, [])]

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


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("num_requests", [100, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("sizes", "blocks", "dtype"),
    [((16, 5), (60, 400), "float32"), ((3, 16), (160, 13), "bfloat16")],
    ids=["roomy", "preempting"],
)
def test_random_requests_get_the_expected_tokens(
    sizes: tuple[int, int], blocks: tuple[int, int], dtype: str, num_requests: int, depth: int
) -> None:
    rng = random.Random(5)
    pair = Pair(rng, sizes=sizes, blocks=blocks, dtype=dtype, depth=depth)
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
            assert pair.logprobs(key) == [at.logprobs(sampling.logprobs) for at in wanted]
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


RULED = SamplingParams(
    max_tokens=14,
    temperature=0.9,
    top_k=6,
    seed=77,
    min_tokens=7,
    stop_token_ids=frozenset({END}),
    repetition_penalty=1.3,
    presence_penalty=0.4,
    frequency_penalty=0.6,
    logit_bias=((17, 4.0), (18, 3.0)),
    bad_words=((17, 18), (19,)),
    logprobs=2,
    prompt_logprobs=1,
)
CUT_ANSWERS = {
    "greedy": replace(RULED, temperature=0.0, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0),
    "seeded": RULED,
    "chooses": SamplingParams(max_tokens=10, seed=3, allowed_token_ids=(3, 17, 18, 19), frequency_penalty=0.9),
    "short": SamplingParams(max_tokens=2, temperature=0.0, logprobs=0),
}


@pytest.mark.parametrize(("sizes", "blocks"), [((16, 5), (60, 400)), ((3, 4), (300, 16))], ids=["roomy", "preempting"])
@pytest.mark.parametrize("asked", CUT_ANSWERS)
@pytest.mark.parametrize("depth", [1, 2])
def test_an_answer_cut_after_any_token_goes_on_as_it_was(
    asked: str, sizes: tuple[int, int], blocks: tuple[int, int], depth: int
) -> None:
    """Twice each, by transfer and computed by the decode engine, all at once; whoever comes later hits the caches."""
    sampling = CUT_ANSWERS[asked]
    pair = Pair(random.Random(9), sizes=sizes, blocks=blocks, dtype="float32", depth=depth)
    moved: dict[TransferKey, list[ExpectedToken]] = {}
    for prompt in [tuple(range(200, 217)), (5, 6, 7, STOP, 4, 7), (9,)]:
        whole = expected(prompt, sampling.max_tokens, sampling)
        for cut in range(len(whole)):
            resume = [at.token for at in whole[:cut]]
            assert expected(prompt, sampling.max_tokens, sampling, generated=resume) == whole[cut:]
            for local in (False, True):
                salt = bytes([cut]) if cut % 2 else b""  # with one of its own it finds no block of the others
                moved[pair.submit(prompt, sampling, resume=resume, local=local, salt=salt)] = whole
                pair.turn()
    pair.settle()
    for key, whole in moved.items():
        cut = len(pair.requests[key].resume)
        assert pair.answer(key) == [at.token for at in whole]
        top = sampling.logprobs
        assert pair.logprobs(key) == ([] if top is None else [at.logprobs(top) for at in whole[cut:]])
        told = [engine.ledger.prompt_logprobs.get(key, []) for engine in (pair.p, pair.d)]
        assert not (cut and any(told)), "whoever goes on with an answer tells nothing of the prompt"
        ends = [engine.ledger.finishes[key] for engine in (pair.p, pair.d) if key in engine.ledger.finishes]
        (end,) = [finish for finish in ends if finish.reason in FINAL]
        assert end.num_tokens == len(whole)
    preempted = sum(finish.preemptions for finish in pair.d.ledger.finishes.values())
    assert (preempted > 0) == (blocks[1] == 16 and sampling.max_tokens > 2), preempted
    hits = any(finish.cached_tokens for finish in pair.d.ledger.finishes.values())
    assert hits == (sampling.max_tokens > 2)
    pair.close()


def test_an_answer_goes_on_after_tokens_that_this_model_would_not_have_chosen() -> None:
    pair = Pair(random.Random(3), sizes=(4, 4), blocks=(40, 40), dtype="bfloat16")
    prompt, resume = tuple(range(300, 310)), [11, 12, 13]
    keys = [pair.submit(prompt, RULED, resume=resume, local=local) for local in (False, True)]
    pair.settle()
    tokens = resume + expected_tokens(prompt, RULED.max_tokens, RULED, generated=resume)
    assert [pair.answer(key) for key in keys] == [tokens, tokens]
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
