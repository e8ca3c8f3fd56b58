"""Workers, real runners, real pools and a real transfer in the test's own thread: a cluster without its processes.

`Stage` is one pair of engines (or one decode engine, colocated) of one model; `Witness` looks over its runners'
shoulders.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from hinge import Hinge, assert_every_layer_filled, read_kv
from situations import CONTEXT, SMALL_POOL, Prompt, Situation

from diptych.decode.worker import DecodeWorker
from diptych.kernels.model import LoadedModel
from diptych.kernels.ops.ragged import Segment, build_batch
from diptych.kernels.runner import ModelRunner
from diptych.kvtransfer.arena import KvArena
from diptych.kvtransfer.layout import KvLayout
from diptych.kvtransfer.pool import BlockPool
from diptych.prefill.worker import PrefillWorker
from diptych.protos.pipeline import StepPipeline
from diptych.protos.ports import Runner
from diptych.protos.settings import DecodeSettings, PrefillSettings
from diptych.protos.step import SlotPool, StepPlan, StepResult, StepRow
from diptych.protos.testing import FakeClock, Ledger
from diptych.protos.types import (
    DecodeOrder,
    Finish,
    FinishReason,
    GenerateRequest,
    PrefillOrder,
    SamplingParams,
    TransferKey,
)

MAX_SLOTS = 16
DECODE_STEP_TOKENS = 512
TURN_S = 0.002  # of the fake clock
MAX_IDLE_TURNS = 500
SENSITIVE = 1e-3  # a logit changes by more than this when a layer's KV is gone; rounding is a hundred times smaller
PROBES = 3  # rows per engine whose logits are computed without each layer
GREEDY = SamplingParams(max_tokens=1, temperature=0.0)
FINAL = {FinishReason.STOP, FinishReason.LENGTH}


class Witness:
    """A runner that looks before each step whether every layer holds KV of every earlier position of its rows."""

    def __init__(self, runner: Runner, arena: KvArena, model: LoadedModel, *, probes: int = 0) -> None:
        self.max_slots, self.max_step_tokens = runner.max_slots, runner.max_step_tokens
        self.vocab_size, self.depth, self.cost = runner.vocab_size, runner.depth, runner.cost
        self.longest_row = self.most_rows = self.most_tokens = 0
        self.read_tokens = 0  # positions whose KV a step read and an earlier one had written
        self.changes: list[float] = []  # of the logits, one per layer and K or V that was zeroed
        self._runner, self._arena, self._model = runner, arena, model
        self._probes = probes  # rows still to be probed

    def launch(self, plan: StepPlan) -> None:
        """See ports.Runner."""
        self.most_rows = max(self.most_rows, len(plan.rows))
        self.most_tokens = max(self.most_tokens, plan.num_tokens)
        for row in plan.rows:
            self.longest_row = max(self.longest_row, row.num_tokens)
            if row.start:
                assert_every_layer_filled(read_kv(self._arena, row.blocks, row.start))
                self.read_tokens += row.start
                if self._probes:
                    self._probes -= 1
                    self._probe(row)
        self._runner.launch(plan)

    def collect(self) -> StepResult:
        """See ports.Runner."""
        return self._runner.collect()

    def max_runs(self, rows: int) -> int:
        """See ports.Runner."""
        return self._runner.max_runs(rows)

    def idle(self) -> bool:
        """See ports.Runner."""
        return self._runner.idle()

    @torch.inference_mode()
    def _probe(self, row: StepRow) -> None:
        """Compute the row's first token with all KV, then without K, and without V, of each layer."""
        before = self._logits(row)
        blocks = list(row.blocks)
        for layer in self._arena.storage:
            for keys_or_values in layer:
                kept = keys_or_values[blocks]
                keys_or_values[blocks] = 0
                self.changes.append(float((self._logits(row) - before).abs().max()))
                keys_or_values[blocks] = kept
        assert torch.equal(self._logits(row), before)

    def _logits(self, row: StepRow) -> torch.Tensor:
        model = self._model
        batch = build_batch([Segment(0, 1, row.start, row.blocks)], self._arena.layout.block_tokens, model.device)
        token = torch.tensor([row.tokens[0] if row.tokens else 7])
        kv = dict(zip(model.layer_ids, self._arena.layers, strict=True))
        return model.forward(token, batch, kv, torch.tensor([0]))[0]


@dataclass
class Engine:
    """The parts of one engine."""

    model: LoadedModel
    block_tokens: int
    num_blocks: int
    step_tokens: int
    probes: int = 0
    depth: int = 1  # of the runner

    def __post_init__(self) -> None:
        model = self.model
        layout = KvLayout(
            layers=model.layers,
            kv_heads=model.kv_heads,
            head_dim=model.head_dim,
            dtype=model.dtype,
            block_tokens=self.block_tokens,
        )
        self.arena = KvArena(layout, self.num_blocks)
        runner = ModelRunner(
            model,
            self.arena.layers,
            block_tokens=self.block_tokens,
            max_slots=MAX_SLOTS,
            max_step_tokens=self.step_tokens,
            depth=self.depth,
        )
        self.runner = Witness(runner, self.arena, model, probes=self.probes)
        self.pipeline = StepPipeline(self.runner, time.monotonic)
        self.pool = BlockPool(num_blocks=self.num_blocks, block_tokens=self.block_tokens)
        self.slots = SlotPool(MAX_SLOTS)
        self.ledger = Ledger()

    def check_idle(self) -> None:
        """Exactly the baseline: no block used, no slot taken."""
        self.pool.check_integrity()
        assert self.pool.counts().used == 0, self.pool.counts()
        assert self.slots.num_free == MAX_SLOTS


class Stage:
    """Submit, `turn` or `settle`, and read `answer`. Every turn checks both pools; a seed decides who is how fast."""

    def __init__(
        self,
        model: LoadedModel,
        situation: Situation,
        *,
        seed: int = 0,
        decode_blocks: int | None = None,
        depth: int = 1,
    ) -> None:
        self.max_context_tokens = model.max_context_tokens if situation.way == "limit" else CONTEXT
        self.requests: dict[TransferKey, GenerateRequest] = {}
        self.clock = FakeClock()
        self.rng = random.Random(seed)
        self.disaggregated = situation.layout == "disaggregated"
        probes = PROBES if situation.way == "layers" else 0
        roomy = 8 * self.max_context_tokens  # tokens: company and cached prompts find a place
        d_size = situation.blocks[1]
        if decode_blocks is None:
            decode_blocks = SMALL_POOL if situation.way == "preempted" else -(-roomy // d_size)
        decode_tokens = DECODE_STEP_TOKENS if self.disaggregated else situation.chunk
        self.decode = Engine(model, d_size, decode_blocks, decode_tokens, probes, depth)
        self.prefill: Engine | None = None
        self.hinge: Hinge | None = None
        if self.disaggregated:
            p_size = situation.blocks[0]
            self.prefill = Engine(model, p_size, -(-roomy // p_size), situation.chunk, probes, depth)
            self.hinge = Hinge(self.prefill.arena, self.decode.arena, clock=self.clock, seed=seed)
            self.prefill_worker = PrefillWorker(
                settings=PrefillSettings(step_tokens=situation.chunk, max_running=8),
                pipeline=self.prefill.pipeline,
                pool=self.prefill.pool,
                slots=self.prefill.slots,
                sender=self.hinge.sending,
                emit=self.prefill.ledger,
                clock=self.clock,
                max_context_tokens=self.max_context_tokens,
            )
            self.hinge.p.deliver = self.prefill_worker.on_transfer
        self.decode_worker = DecodeWorker(
            settings=DecodeSettings(step_tokens=decode_tokens, max_running=min(MAX_SLOTS, decode_tokens)),
            pipeline=self.decode.pipeline,
            pool=self.decode.pool,
            slots=self.decode.slots,
            receiver=self.hinge.receiving if self.hinge is not None else _NoReceiver(),
            emit=self.decode.ledger,
            clock=self.clock,
            max_context_tokens=self.max_context_tokens,
        )
        if self.hinge is not None:
            self.hinge.d.deliver = self.decode_worker.on_transfer

    @property
    def engines(self) -> list[Engine]:
        """Those that take part, the one that computes prompts first."""
        return [self.decode] if self.prefill is None else [self.prefill, self.decode]

    def submit(
        self, prompt: Prompt, max_tokens: int, *, sampling: SamplingParams = GREEDY, resume: Sequence[int] = ()
    ) -> TransferKey:
        """Tell both engines, in an order that the seed decides. `sampling` but for max_tokens."""
        key = TransferKey((len(self.requests) + 1).to_bytes(16, "big"))
        sampling = replace(sampling, max_tokens=max_tokens)
        request = GenerateRequest(key=key, prompt=prompt, sampling=sampling, resume=tuple(resume))
        self.requests[key] = request
        for engine in self.engines:
            engine.ledger.resumed[key] = len(resume)
        if self.hinge is None:
            self.decode_worker.submit(DecodeOrder(request=request, prefill=None))
            return key
        hinge = self.hinge
        tell = [
            lambda: self.prefill_worker.submit(PrefillOrder(request=request, decode=hinge.d.ref)),
            lambda: self.decode_worker.submit(DecodeOrder(request=request, prefill=hinge.p.ref)),
        ]
        self.rng.shuffle(tell)
        for one in tell:
            one()
        return key

    def cancel(self, key: TransferKey) -> None:
        """Tell the engines, as a router does whose client has gone."""
        if self.prefill is not None:
            self.prefill_worker.cancel(key)
        self.decode_worker.cancel(key)

    def turn(self) -> bool:
        """A step of each worker and a few movements of the hinge. False: nothing was to be done."""
        busy = False
        if self.hinge is not None:
            busy |= self.prefill_worker.step()
            self._check()
            busy |= self.hinge.pump()
            self._check()
        busy |= self.decode_worker.step()
        self._check()
        self.clock.advance(TURN_S)
        return busy

    def settle(self) -> None:
        """Until every request has ended on every engine."""
        idle = 0
        while not all(key in engine.ledger.finishes for engine in self.engines for key in self.requests):
            idle = 0 if self.turn() else idle + 1
            assert idle < MAX_IDLE_TURNS, "requests are left and nobody does anything"
        while self.turn():
            pass

    def finish(self, key: TransferKey) -> Finish:
        """How the request ended: prefill's word where token 0 was the end, else decode's."""
        if self.prefill is not None and self.prefill.ledger.finishes[key].reason in FINAL:
            return self.prefill.ledger.finishes[key]
        return self.decode.ledger.finishes[key]

    def answer(self, key: TransferKey) -> list[int]:
        """All tokens so far, those it came with included, merged by index as the router does."""
        merged = dict(enumerate(self.requests[key].resume))
        for engine in self.engines:
            first = engine.ledger.first_index.get(key, 0)
            for index, token in enumerate(engine.ledger.tokens.get(key, []), first):
                assert merged.setdefault(index, token) == token, "two engines disagree on a token"
        assert sorted(merged) == list(range(len(merged))), "a gap in the answer"
        return [merged[index] for index in range(len(merged))]

    def close(self) -> None:
        """Check that nothing is held any more, anywhere."""
        for engine in self.engines:
            engine.check_idle()
        if self.hinge is not None:
            self.hinge.check_quiet()
            self.hinge.close()

    def _check(self) -> None:
        for engine in self.engines:
            engine.pool.check_integrity()


class _NoReceiver:
    """The colocated layout transfers nothing."""

    def expect(self, *args: object) -> None:
        raise AssertionError("a transfer in the colocated layout")

    grant = abort = expect


def cached_tokens(stage: Stage, keys: Sequence[TransferKey]) -> list[list[int]]:
    """Per engine, what each request's prompt found in its prefix cache."""
    return [[engine.ledger.finishes[key].cached_tokens for key in keys] for engine in stage.engines]
