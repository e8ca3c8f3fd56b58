"""Guides through the runners that compute: a device's, one step ahead and not, and ModelRunner, under a decode worker
and by hand.

Guards a mask of the wrong position, tokens chosen before a guide knew the one before, KV of certain tokens that was
never computed, and a step whose late choice fails taking others along.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diptych.decode.worker import DecodeWorker
from diptych.kernels.device.build import StepLimits, build_runner
from diptych.kernels.device.runner import DeviceOptions, DeviceRunner
from diptych.kernels.device.testing import BLOCK, GREEDY, VOCAB, SumDecoder, make_runner, oracle
from diptych.kernels.model import LoadedModel, load_model
from diptych.kernels.ops.sampling import reference
from diptych.kernels.runner import ModelRunner
from diptych.kernels.testing import make_tiny_checkpoint
from diptych.kvtransfer.pool import BlockPool
from diptych.protos.constraint import Guide
from diptych.protos.errors import DiptychError, EngineFault, InvalidRequest
from diptych.protos.pipeline import StepPipeline
from diptych.protos.ports import Runner
from diptych.protos.settings import DecodeSettings
from diptych.protos.step import LogitRules, SampleSpec, SlotPool, StepPlan, StepResult, StepRow
from diptych.protos.testing import FakeClock, FakeGuide, FakeReceiver, GuideRule, Ledger
from diptych.protos.types import DecodeOrder, FinishReason, GenerateRequest, SamplingParams, TransferKey

CPU = torch.device("cpu")
CARD = pytest.param("cuda", marks=pytest.mark.gpu)
Known = tuple[int, ...]


def within(vocab: int) -> GuideRule:
    """One to fifty ids, and after every third token up to five that are certain."""

    def rule(known: Known) -> tuple[Collection[int], Known]:
        def number(what: str) -> int:
            return zlib.crc32(repr((what, known)).encode())

        allowed = {number(f"a{at}") % vocab for at in range(1 + number("size") % 50)}
        count = number("run") % 6 if number("turn") % 3 == 0 else 0
        return allowed, tuple(number(f"f{at}") % vocab for at in range(count))

    return rule


@dataclass(frozen=True)
class Job:
    prompt: Known
    sampling: SamplingParams
    rule: GuideRule | None = None


def serve(
    runner: Runner, jobs: Sequence[Job], *, blocks: int = 200, step_tokens: int = 16
) -> tuple[list[list[int]], dict[str, float], Ledger]:
    """All of them at once; the answers, the worker's counters, and what the router saw."""
    clock, ledger = FakeClock(), Ledger()
    pool, slots = BlockPool(num_blocks=blocks, block_tokens=BLOCK), SlotPool(runner.max_slots)
    worker = DecodeWorker(
        settings=DecodeSettings(step_tokens=step_tokens, max_running=6, watermark=0.0),
        pipeline=StepPipeline(runner, clock),
        pool=pool,
        slots=slots,
        receiver=FakeReceiver(),
        emit=ledger,
        clock=clock,
        max_context_tokens=128,
    )
    keys = []
    for number, job in enumerate(jobs, 1):
        key = TransferKey(number.to_bytes(16, "big"))
        ledger.resumed[key] = 0
        guide = None if job.rule is None else FakeGuide(len(job.prompt), job.rule)
        request = GenerateRequest(key=key, prompt=job.prompt, sampling=job.sampling)
        worker.submit(DecodeOrder(request=request, prefill=None, guide=guide))
        keys.append(key)
        worker.step()
    while worker.step():
        pool.check_integrity()
    assert pool.counts().used == 0
    assert set(ledger.finishes) == set(keys)
    return [ledger.tokens.get(key, []) for key in keys], worker.counters(), ledger


def prompt_of(length: int, vocab: int, salt: int = 0) -> Known:
    return tuple((31 * at + 7 * salt + 5) % vocab for at in range(length))


def summed(prompt: Known, count: int, rule: GuideRule | None) -> list[int]:
    """What SumDecoder answers: the oracle's token where it is allowed, else the lowest that is."""
    known, guide = list(prompt), None if rule is None else FakeGuide(len(prompt), rule)
    while len(known) < len(prompt) + count:
        token = oracle(known)
        if rule is not None and guide is not None:
            at = len(known) - len(prompt)
            allowed = rule(tuple(guide.known))[0] if at == len(guide.known) else [guide.known[at]]
            token = token if token in allowed else min(allowed)
            guide.accept(len(known), token)
        known.append(token)
    return known[len(prompt) :]


@pytest.mark.parametrize("device", ["cpu", CARD])
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("blocks", [200, 34])
def test_a_device_gives_the_oracles_tokens_under_guides(device: str, graphs: bool, depth: int, blocks: int) -> None:
    """Beside requests without one; `blocks`: few enough that some are computed twice."""
    runner, _ = make_runner(torch.device(device), graphs=graphs)
    if graphs:
        runner.rehearse()
        runner.capture()
        while runner.idle():
            pass
    runner.depth = depth
    jobs = [
        Job(
            prompt_of(3 + 4 * at, VOCAB, at),
            SamplingParams(max_tokens=20 + at, temperature=0.0),
            within(VOCAB) if at % 3 else None,
        )
        for at in range(12)
    ]
    answers, counters, _ = serve(runner, jobs, blocks=blocks)
    for job, answer in zip(jobs, answers, strict=True):
        assert answer == summed(job.prompt, job.sampling.max_tokens, job.rule)
    assert counters["decode_forced_tokens_total"] > 20
    assert (counters["decode_preemptions_total"] > 0) == (blocks == 34)
    assert counters["decode_step_faults_total"] == 0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder: Path = make_tiny_checkpoint(tmp_path_factory.mktemp("models") / "llama")
    return load_model(folder, dtype="float32")


def kv_of(model: LoadedModel, blocks: int = 200) -> list[tuple[torch.Tensor, torch.Tensor]]:
    shape = (blocks + 1, model.kv_heads, BLOCK, model.head_dim)
    return [(torch.zeros(shape), torch.zeros(shape)) for _ in range(model.layers)]


def plain_runner(model: LoadedModel, depth: int) -> ModelRunner:
    return ModelRunner(model, kv_of(model), block_tokens=BLOCK, max_slots=8, max_step_tokens=64, depth=depth)


def device_runner(model: LoadedModel, depth: int) -> DeviceRunner:
    limits = StepLimits(max_slots=8, max_step_tokens=64, max_context_tokens=128, block_tokens=BLOCK)
    return build_runner(model, kv_of(model), limits, DeviceOptions(graphs=False, depth=depth))


MAKERS: list[Callable[[LoadedModel, int], Runner]] = [plain_runner, device_runner]


def model_jobs(vocab: int) -> list[Job]:
    rule = within(vocab)
    wishes: list[tuple[dict[str, Any], GuideRule | None]] = [
        ({"temperature": 0.0}, rule),
        ({"temperature": 0.0}, None),
        ({"temperature": 1.1, "seed": 3}, rule),
        ({"temperature": 0.9, "top_p": 0.8, "top_k": 9, "seed": 4}, rule),
        ({"temperature": 0.7, "seed": 5}, None),
        ({"temperature": 0.0, "logprobs": 2}, lambda known: (rule(known)[0], ())),
        ({"frequency_penalty": 0.8, "repetition_penalty": 1.2}, lambda known: (rule(known)[0], ())),
    ]
    return [
        Job(prompt_of(5 + 3 * at, vocab, at), SamplingParams(max_tokens=24, **fields), one)
        for at, (fields, one) in enumerate(wishes)
    ]


def test_all_runners_give_the_same_tokens_ahead_or_not(model: LoadedModel) -> None:
    jobs = model_jobs(model.vocab_size)
    wanted, _, ledger = serve(plain_runner(model, 1), jobs)
    assert all(len(answer) == 24 for answer in wanted)
    for make in MAKERS:
        for depth in (1, 2):
            answers, counters, told = serve(make(model, depth), jobs)
            assert answers == wanted
            assert counters["decode_forced_tokens_total"] > 0
            assert told.logprobs.keys() == ledger.logprobs.keys()


def row_of(slot: int, tokens: Known | None, start: int, guide: Guide | None, **fields: Any) -> StepRow:
    """Slot s has blocks 16 s ..."""
    num = 1 if tokens is None else len(tokens)
    spec = replace(GREEDY, position=start + num, guide=guide, **fields)
    blocks = list(range(16 * slot, 16 * slot + 16))
    return StepRow(slot=slot, num_tokens=num, tokens=tokens, start=start, blocks=blocks, sample=spec)


def run(runner: Runner, *rows: StepRow) -> StepResult:
    runner.launch(StepPlan(0, rows))
    return runner.collect()


@pytest.mark.parametrize("make", MAKERS)
def test_masks_are_obeyed_and_what_is_certain_is_told(
    make: Callable[[LoadedModel, int], Runner], model: LoadedModel
) -> None:
    runner = make(model, 1)
    free = run(runner, row_of(0, (5, 6, 7), 0, None)).tokens[0]
    assert free is not None
    allowed = [token for token in range(3, 300, 7) if token != free]
    guides = [
        FakeGuide(3, lambda known: (allowed, (1, 2))),
        FakeGuide(3, lambda known: (range(512), ())),
        FakeGuide(3, lambda known: ([511], (9,) if known == (511,) else ())),
    ]
    rows = [row_of(slot, (5, 6, 7), 0, guide) for slot, guide in enumerate([None, *guides])]
    result = run(runner, *reversed(rows))
    tokens = dict(enumerate(reversed(result.tokens)))
    assert tokens[0] == tokens[2] == free
    assert tokens[1] in allowed
    assert tokens[3] == 511
    assert result.forced == {2: (1, 2), 0: (9,)}
    assert guides[0].known == [tokens[1], 1, 2]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("fields", [{}, {"temperature": 1.0}, {"rules": LogitRules(num_prompt=3, bad_words=((4,),))}])
def test_a_guide_that_allows_nothing_is_ruled_out_and_is_told_nothing(
    make: Callable[[LoadedModel, int], Runner], model: LoadedModel, fields: dict[str, Any]
) -> None:
    runner = make(model, 1)
    nothing = FakeGuide(3, lambda known: ((), ()))
    nothing.error = InvalidRequest("it cannot go on", "response_format")
    other = FakeGuide(3, lambda known: ({4, 5}, (6,)))
    free = run(runner, row_of(0, (5, 6, 7), 0, None)).tokens[0]
    result = run(
        runner,
        row_of(1, (5, 6, 7), 0, nothing, **fields),
        row_of(0, (5, 6, 7), 0, None),
        row_of(2, (5, 6, 7), 0, other, **fields),
    )
    assert result.faults == result.ruled_out == {0}
    assert result.tokens[:2] == (None, free)
    assert result.tokens[2] in {4, 5}
    assert result.forced == {2: (6,)}
    assert nothing.known == []
    behind = run(runner, row_of(1, None, 3, nothing), row_of(0, None, 3, None))
    assert (set(behind.faults), set(behind.ruled_out)) == ({0}, set()), "there is no token to go on from"


def test_masks_are_filled_without_a_second_team_of_threads(model: LoadedModel) -> None:
    """With two teams libgomp lets workers sleep between operations: every step takes a multiple of its time."""
    runner = plain_runner(model, 1)
    runner.vocab_size = 1 << 18
    specs = [SampleSpec(0.0, 1.0, 0, 0, 3, guide=FakeGuide(3, lambda known: ({5}, ()))) for _ in range(32)]
    torch.ones(1 << 20).sum()  # the team of this thread
    runner._masker.submit(lambda: None).result()
    before = set(os.listdir("/proc/self/task"))
    masks = runner._masker.submit(runner._masks, specs).result()
    assert set(os.listdir("/proc/self/task")) <= before
    assert all(mask_W.nonzero().tolist() == [[0]] and mask_W[0] == 1 << 5 for mask_W in masks.values())
    assert len(masks) == 32


def test_a_mask_does_not_stay_with_its_slot(model: LoadedModel) -> None:
    for make in MAKERS:
        runner = make(model, 1)
        free = run(runner, row_of(0, (5, 6, 7), 0, None)).tokens
        only = FakeGuide(3, lambda known: ({77}, ()))
        assert run(runner, row_of(0, (5, 6, 7), 0, only)).tokens == (77,)
        assert run(runner, row_of(0, (5, 6, 7), 0, None)).tokens == free


def test_the_definition_chooses_each_token_of_a_guided_answer(model: LoadedModel) -> None:
    """ModelRunner against logits of its own, without a guide in between."""
    runner = plain_runner(model, 1)
    rule, known = within(model.vocab_size), list(prompt_of(7, model.vocab_size))
    sampling = SamplingParams(max_tokens=15, temperature=0.9, top_p=0.9, seed=11)
    (answer,), _, _ = serve(runner, [Job(tuple(known), sampling, rule)])
    guide = FakeGuide(7, rule)
    plain = plain_runner(model, 1)
    for token in answer:
        at = len(known) - 7
        if at < len(guide.known):
            assert token == guide.known[at]
        else:
            allowed = set(rule(tuple(guide.known))[0])
            told = run(plain, row_of(0, tuple(known), 0, None, logprobs=512)).logprobs[0].top
            logits = torch.full((1, 512), -torch.inf)
            for one, logprob in told:
                logits[0, one] = logprob if one in allowed else -torch.inf
            spec = SampleSpec(0.9, 0.9, 0, 11, len(known))
            assert token == int(reference.sample(logits, [spec], {}, {}).tokens_N[0])
        guide.accept(len(known), token)
        known.append(token)


class _Failing:
    """A guide that breaks its promise at one position."""

    def __init__(self, at: int) -> None:
        self.error: DiptychError | None = None
        self.told: list[tuple[int, int]] = []
        self._at = at

    def accept(self, position: int, token: int) -> Known:
        self.told.append((position, token))
        return ()

    def fill(self, position: int, mask: memoryview) -> None:
        if position == self._at:
            raise ValueError("a broken promise")
        mask[:] = b"\xff" * len(mask)


@pytest.mark.parametrize("then", ["plain", "guided"])
def test_a_late_choice_that_fails_is_its_steps_fault_alone(then: str) -> None:
    runner, _ = make_runner(CPU)
    failing, sound = _Failing(4), FakeGuide(3, lambda known: (range(VOCAB), ()))
    known = [7, 8, 9]
    runner.launch(StepPlan(1, (row_of(0, (1, 2, 3), 0, failing), row_of(1, (7, 8, 9), 0, sound))))
    runner.launch(StepPlan(2, (row_of(0, None, 3, failing), row_of(2, (4, 5), 0, None))))
    result = runner.collect()
    assert not result.faults
    known.append(result.tokens[1] or 0)
    assert known[3] == oracle(known[:3])
    assert failing.told == [(3, oracle([1, 2, 3]))]
    # The step behind the failed one is launched before that is known.
    rows = [
        row_of(1, None, 3, None if then == "plain" else sound),
        row_of(0, None, 4, failing),
        row_of(2, None, 2, None),
    ]
    runner.launch(StepPlan(3, tuple(rows)))
    with pytest.raises(EngineFault, match="could not compute"):
        runner.collect()
    result = runner.collect()
    assert result.step_id == 3
    assert result.faults == {1, 2}, "their slots have no token to go on from"
    assert result.ruled_out == frozenset()
    assert result.tokens[0] == oracle(known)
    assert failing.told == [(3, oracle([1, 2, 3]))]
    known.append(result.tokens[0] or 0)
    assert run(runner, row_of(1, None, 4, sound if then == "guided" else None)).tokens == (oracle(known),)


def test_a_step_behind_one_that_could_not_be_read_is_still_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, _ = make_runner(CPU)
    sound = FakeGuide(3, lambda known: (range(VOCAB), ()))
    runner.launch(StepPlan(1, (row_of(0, (1, 2, 3), 0, sound),)))
    runner.launch(StepPlan(2, (row_of(1, (1, 2, 3), 0, FakeGuide(3, lambda known: ({5}, ()))),)))

    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with monkeypatch.context() as patched:
        patched.setattr(runner, "_wait", fail)
        with pytest.raises(DiptychError):
            runner.collect()
    assert runner.collect().tokens == (5,)


def test_a_slot_that_was_faulted_takes_the_next_guide(model: LoadedModel) -> None:
    """Ahead: its row is launched before anybody knows, and the guide is not told a token that nobody sampled."""
    runner, keys = make_runner(CPU)
    guide = FakeGuide(3, lambda known: (range(VOCAB), ()))
    other = FakeGuide(2, lambda known: (range(0, VOCAB, 2), ()))
    first = run(runner, row_of(0, (1, 2, 3), 0, guide), row_of(1, (4, 5), 0, other))
    keys[0, 0, 1] = torch.nan
    runner.launch(StepPlan(1, (row_of(0, None, 3, guide), row_of(1, None, 2, other))))
    runner.launch(StepPlan(2, (row_of(0, None, 4, guide), row_of(1, None, 3, other))))
    results = [runner.collect(), runner.collect()]
    assert [result.faults for result in results] == [{0}, {0}]
    assert guide.known == [first.tokens[0]]
    assert len(other.known) == 3
    assert all(token % 2 == 0 for token in other.known)
    keys[0, 0, 1] = 2.0 + 1
    anew = FakeGuide(3, lambda known: ({11, 12}, ()))
    result = run(runner, row_of(0, (1, 2, 3), 0, anew))
    assert result.tokens[0] in {11, 12}
    assert not result.faults


@pytest.mark.parametrize("make", MAKERS)
def test_a_broken_promise_ends_what_was_in_the_step_and_the_runner_goes_on(
    make: Callable[[LoadedModel, int], Runner], model: LoadedModel
) -> None:
    for depth in (1, 2):
        runner = make(model, depth)
        with pytest.raises(EngineFault):
            run(runner, row_of(0, (5, 6, 7), 0, _Failing(3)), row_of(1, (5, 6), 0, None))
        sound = FakeGuide(3, lambda known: ({8}, (9,)))
        result = run(runner, row_of(0, (5, 6, 7), 0, sound), row_of(1, (5, 6), 0, None))
        assert result.tokens[0] == 8
        assert result.forced == {0: (9,)}


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("make", MAKERS)
def test_a_worker_ends_a_request_whose_guide_allows_nothing_with_its_words(
    make: Callable[[LoadedModel, int], Runner], model: LoadedModel, depth: int
) -> None:
    """And the row that was under way behind it hurts nobody."""
    rule = within(model.vocab_size)
    stuck: GuideRule = lambda known: (rule(known)[0] if len(known) < 4 else (), ())  # noqa: E731
    jobs = [
        Job(prompt_of(6, 512, at), SamplingParams(max_tokens=14), one) for at, one in enumerate([rule, stuck, None])
    ]
    wanted, _, _ = serve(plain_runner(model, 1), [jobs[0], jobs[2]])
    answers, counters, ledger = serve(make(model, depth), jobs)
    assert [answers[0], answers[2]] == wanted
    assert len(answers[1]) == 4
    reasons = [finish.reason for _, finish in sorted(ledger.finishes.items(), key=lambda item: item[0].transfer_id)]
    assert reasons == [FinishReason.LENGTH, FinishReason.ERROR, FinishReason.LENGTH]
    assert counters["decode_row_faults_total"] == 0


def test_sum_decoder_is_what_the_reference_here_says() -> None:
    """Otherwise the first test would say little."""
    runner, _ = make_runner(CPU, SumDecoder())
    guide = FakeGuide(2, lambda known: ({90, 91}, ()))
    assert run(runner, row_of(0, (1, 2), 0, guide)).tokens[0] == summed((1, 2), 1, lambda known: ({90, 91}, ()))[0]
