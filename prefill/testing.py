"""A prefill worker on a bench: real pool and scheduler, fake runner, sender, clock. Checks the pool at each call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Unpack

from diptych.kvtransfer.pool import BlockPool
from diptych.protos.errors import DiptychError
from diptych.protos.pipeline import StepPipeline
from diptych.protos.ports import SendPort
from diptych.protos.settings import PrefillSettings
from diptych.protos.step import SlotPool
from diptych.protos.testing import (
    EchoRunner,
    FakeClock,
    FakeGuide,
    FakeSender,
    GuideRule,
    Ledger,
    RequestFields,
    snapshot,
)
from diptych.protos.types import EngineId, EngineRef, GenerateRequest, PrefillOrder, SamplingParams, TransferKey

from .worker import PrefillWorker

PEER = EngineRef(EngineId("d0"), 1, "unix:/nowhere/d0.sock")


class PrefillBench:
    """Drive `worker` through the methods here; read what happened in `ledger`, `sender.transfers` and `trace`.

    `port` makes another sender out of the runner; `sender` is idle then.
    """

    depth = 1  # of the runner; tests set it for all benches
    num_request_faults = 0  # on demand: any other is an assertion that the barrier has caught

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_tokens: int = 4,
        max_context_tokens: int = 200,
        settings: PrefillSettings | None = None,
        slots: int = 16,
        port: Callable[[EchoRunner], SendPort] | None = None,
    ) -> None:
        self.clock = FakeClock()
        self.runner = EchoRunner(num_blocks=num_blocks, block_tokens=block_tokens, max_slots=slots, depth=self.depth)
        self.pipeline = StepPipeline(self.runner, self.clock)
        self.trace: list[tuple[tuple[object, ...], ...]] = []
        self.runner.observe = lambda plan: self.trace.append(snapshot(plan))
        self.pool = BlockPool(num_blocks=num_blocks, block_tokens=block_tokens)
        self.slots = SlotPool(slots)
        self.sender = FakeSender(self.runner)
        self.ledger = Ledger()
        self.worker = PrefillWorker(
            settings=settings or PrefillSettings(),
            pipeline=self.pipeline,
            pool=self.pool,
            slots=self.slots,
            sender=self.sender if port is None else port(self.runner),
            emit=self.ledger,
            clock=self.clock,
            max_context_tokens=max_context_tokens,
        )
        self.requests: dict[TransferKey, GenerateRequest] = {}
        self.guides: dict[TransferKey, FakeGuide] = {}  # of those that were submitted with a rule
        self.rules: dict[bytes, GuideRule] = {}  # by transfer id

    def submit(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int = 8,
        stop: Sequence[int] = (),
        sampling: SamplingParams | None = None,
        rule: GuideRule | None = None,
        **fields: Unpack[RequestFields],
    ) -> TransferKey:
        """A new order; keys count up. `sampling` but for max_tokens and the stop tokens. With a `rule` its answer has a
        guide.
        """
        key = TransferKey((len(self.requests) + 1).to_bytes(16, "big"))
        if rule is not None:
            self.rules[key.transfer_id] = rule
        sampling = replace(
            sampling or SamplingParams(max_tokens=1), max_tokens=max_tokens, stop_token_ids=frozenset(stop)
        )
        request = GenerateRequest(key=key, prompt=tuple(prompt), sampling=sampling, **fields)
        return self._order(request)

    def again(self, key: TransferKey, resume: Sequence[int]) -> TransferKey:
        """The next attempt at a request, of whose answer `resume` exists."""
        again = TransferKey(key.transfer_id, key.attempt + 1)
        return self._order(replace(self.requests[key], key=again, resume=tuple(resume)))

    def _order(self, request: GenerateRequest) -> TransferKey:
        key, rule = request.key, self.rules.get(request.key.transfer_id)
        self.requests[key] = request
        self.ledger.resumed[key] = len(request.resume)
        if rule is not None:
            self.guides[key] = FakeGuide(len(request.prompt), rule, request.resume)
        self.worker.submit(PrefillOrder(request=request, decode=PEER, guide=self.guides.get(key)))
        self.pool.check_integrity()
        return key

    def step(self) -> bool:
        """One step of the worker."""
        ran = self.worker.step()
        self.pool.check_integrity()
        return ran

    def collect(self) -> None:
        """What is under way comes back, and nothing else is launched."""
        self.pipeline.settle(leave=0)
        self.pool.check_integrity()

    def run(self) -> int:
        """Step until there is nothing to do; the number of steps that were launched."""
        turns, before = 0, self.num_steps
        while self.step():
            turns += 1
            assert turns < 10_000, "the worker does not come to rest"
        return self.num_steps - before

    @property
    def num_steps(self) -> int:
        """Steps launched so far."""
        return int(self.worker.counters()["prefill_steps_total"])

    def release(self, key: TransferKey, error: DiptychError | None = None) -> None:
        """The sender lets go of the blocks."""
        self.worker.on_transfer(self.sender.release(key, error))
        self.pool.check_integrity()

    def release_sent(self) -> None:
        """Every transfer that can end does."""
        for key, sending in list(self.sender.transfers.items()):
            if sending.first_token is not None or sending.aborted is not None:
                self.release(key)

    def announced(self) -> list[TransferKey]:
        """The transfers with KV that the sender was told of and has not released."""
        return [key for key, sending in self.sender.transfers.items() if sending.upto]

    def cancel(self, key: TransferKey) -> None:
        """The router gives the request up."""
        self.worker.cancel(key)
        self.pool.check_integrity()

    def assert_idle(self) -> None:
        """Nothing is held, nothing is awaited or under way, and no step failed but on demand."""
        assert not self.pipeline.num_outstanding
        assert self.worker.counters()["prefill_step_faults_total"] == self.runner.num_faults
        assert self.worker.counters()["prefill_request_faults_total"] == self.num_request_faults
        assert not self.sender.transfers
        assert self.pool.counts().used == 0, self.pool.counts()
        assert self.slots.num_free == self.slots.max_slots
        load = self.worker.load()
        assert (load.running, load.waiting) == (0, 0)
        assert self.worker.next_wake() is None
        assert not self.step()
