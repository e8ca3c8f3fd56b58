"""A decode worker on a bench: real pool and scheduler, fake runner, receiver, clock. Checks the pool at each call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Unpack

from diptych.kvtransfer.pool import BlockPool
from diptych.protos.errors import DiptychError
from diptych.protos.lifecycle import logit_rules
from diptych.protos.pipeline import StepPipeline
from diptych.protos.ports import ReceiveEvent, ReceivePort, StepCost
from diptych.protos.settings import DecodeSettings
from diptych.protos.step import SlotPool
from diptych.protos.testing import (
    EchoRunner,
    FakeClock,
    FakeGuide,
    FakeReceiver,
    GuideRule,
    Ledger,
    RequestFields,
    echo_logprobs,
    echo_reference,
    snapshot,
)
from diptych.protos.types import (
    DecodeOrder,
    EngineId,
    EngineRef,
    FinishReason,
    GenerateRequest,
    SamplingParams,
    TransferKey,
)

from .worker import DecodeWorker

PEER = EngineRef(EngineId("p0"), 1, "unix:/nowhere/p0.sock")


class DecodeBench:
    """Drive `worker` through the methods here; read what happened in `ledger`, `receiver` and `trace`.

    `port` makes another receiver out of the runner; `receiver` is idle then.
    """

    depth = 1  # of the runner; tests set it for all benches
    num_request_faults = 0  # on demand: any other is an assertion that the barrier has caught

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_tokens: int = 4,
        max_context_tokens: int = 200,
        settings: DecodeSettings | None = None,
        slots: int = 16,
        prefix_cache: bool = True,
        cost: StepCost | None = None,
        port: Callable[[EchoRunner], ReceivePort] | None = None,
    ) -> None:
        self.clock = FakeClock()
        self.runner = EchoRunner(num_blocks=num_blocks, block_tokens=block_tokens, max_slots=slots, depth=self.depth)
        self.runner.cost = cost
        self.pipeline = StepPipeline(self.runner, self.clock)
        self.trace: list[tuple[tuple[object, ...], ...]] = []
        self.runner.observe = lambda plan: self.trace.append(snapshot(plan))
        self.pool = BlockPool(num_blocks=num_blocks, block_tokens=block_tokens, prefix_cache=prefix_cache)
        self.slots = SlotPool(slots)
        self.receiver = FakeReceiver(self.runner)
        self.ledger = Ledger()
        self.worker = DecodeWorker(
            settings=settings or DecodeSettings(),
            pipeline=self.pipeline,
            pool=self.pool,
            slots=self.slots,
            receiver=self.receiver if port is None else port(self.runner),
            emit=self.ledger,
            clock=self.clock,
            max_context_tokens=max_context_tokens,
        )
        self.requests: dict[TransferKey, GenerateRequest] = {}
        self.guides: dict[TransferKey, FakeGuide] = {}  # of those that were submitted with a rule
        self._rules: dict[bytes, GuideRule] = {}  # by transfer id

    def submit(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int = 8,
        stop: Sequence[int] = (),
        sampling: SamplingParams | None = None,
        transfer: bool = True,
        allow_local_prefill: bool = True,
        rule: GuideRule | None = None,
        **fields: Unpack[RequestFields],
    ) -> TransferKey:
        """A new order; keys count up. Without `transfer` it names no prefill engine. `sampling` but for max_tokens and
        the stop tokens. With a `rule` its answer has a guide.
        """
        key = TransferKey((len(self.requests) + 1).to_bytes(16, "big"))
        if rule is not None:
            self._rules[key.transfer_id] = rule
        sampling = replace(
            sampling or SamplingParams(max_tokens=1), max_tokens=max_tokens, stop_token_ids=frozenset(stop)
        )
        request = GenerateRequest(key=key, prompt=tuple(prompt), sampling=sampling, **fields)
        peer = PEER if transfer else None
        return self._order(request, peer, allow_local_prefill=allow_local_prefill)

    def again(self, key: TransferKey, resume: Sequence[int]) -> TransferKey:
        """The next attempt at a request, by transfer, of whose answer `resume` exists."""
        again = TransferKey(key.transfer_id, key.attempt + 1)
        request = replace(self.requests[key], key=again, resume=tuple(resume))
        return self._order(request, PEER)

    def _order(
        self, request: GenerateRequest, prefill: EngineRef | None, *, allow_local_prefill: bool = True
    ) -> TransferKey:
        key, rule = request.key, self._rules.get(request.key.transfer_id)
        self.requests[key] = request
        self.ledger.resumed[key] = len(request.resume)
        if rule is not None:
            self.guides[key] = FakeGuide(len(request.prompt), rule, request.resume)
        guide = self.guides.get(key)
        self.worker.submit(
            DecodeOrder(request=request, prefill=prefill, allow_local_prefill=allow_local_prefill, guide=guide)
        )
        self.pool.check_integrity()
        return key

    def step(self) -> bool:
        """One step of the worker, while transfers that are under way write into their blocks."""
        self.receiver.scribble()
        ran = self.worker.step()
        self.receiver.scribble()
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
        return int(self.worker.counters()["decode_steps_total"])

    def deliver(self, event: ReceiveEvent) -> None:
        """An event of the receiver."""
        self.worker.on_transfer(event)
        self.pool.check_integrity()

    def want(self, key: TransferKey) -> None:
        """The first chunk is announced."""
        self.deliver(self.receiver.want(key))

    def commit(self, key: TransferKey, *, final: bool = False) -> None:
        """The transfer ends well, with the token that an undisturbed prefill engine samples."""
        request = self.requests[key]
        self.deliver(self.receiver.commit(key, request.known, self.expected(key)[len(request.resume)], final=final))

    def fail(self, key: TransferKey, error: DiptychError | None = None) -> None:
        """The transfer ends badly."""
        self.deliver(self.receiver.fail(key, error))

    def transfer(self, key: TransferKey) -> None:
        """The whole way of an undisturbed transfer; there must be room."""
        self.want(key)
        self.step()
        assert self.receiver.transfers[key].blocks is not None, "nothing was granted"
        self.commit(key)

    def cancel(self, key: TransferKey) -> None:
        """The router gives the request up."""
        self.worker.cancel(key)
        self.pool.check_integrity()

    def end_transfers(self) -> None:
        """Every transfer ends as it would in the end: aborted ones close, others fail."""
        for key, receiving in list(self.receiver.transfers.items()):
            if receiving.aborted is not None:
                self.deliver(self.receiver.close(key))
            else:
                self.fail(key)

    def expected(self, key: TransferKey) -> list[int]:
        """The whole answer: what the request came with, then all tokens that it should get."""
        request = self.requests[key]
        sampling, resume = request.sampling, request.resume
        rules, num = logit_rules(sampling, len(request.prompt)), sampling.max_tokens - len(resume)
        rule = self._rules.get(key.transfer_id)
        tokens = [*resume, *echo_reference(request.prompt, num, rules=rules, resume=resume, rule=rule)]
        can_end = range(max(sampling.min_tokens, len(resume)), len(tokens))
        ends = [at for at in can_end if tokens[at] in sampling.stop_token_ids]
        return tokens[: ends[0] + 1] if ends else tokens

    def assert_tokens(self, key: TransferKey) -> None:
        """What was emitted is what an undisturbed engine would have emitted, up to where it was stopped."""
        first = self.ledger.first_index.get(key, 0)
        tokens = self.ledger.tokens.get(key, [])
        assert tokens == self.expected(key)[first : first + len(tokens)]
        self.assert_logprobs(key)

    def assert_logprobs(self, key: TransferKey) -> None:
        """Every token came with what was asked for, and so did the prompt's as far as they were told."""
        request, ledger = self.requests[key], self.ledger
        top, prompt_top = request.sampling.logprobs, request.sampling.prompt_logprobs
        first, tokens = ledger.first_index.get(key, 0), ledger.tokens.get(key, [])
        known = [*request.prompt, *self.expected(key)]
        at = len(request.prompt) + first
        wanted = (
            [] if top is None else [echo_logprobs(known[:to], known[to], top) for to in range(at, at + len(tokens))]
        )
        assert ledger.logprobs.get(key, []) == wanted
        told = ledger.prompt_logprobs.get(key, [])
        assert not told or prompt_top is not None
        assert told == [echo_logprobs(known[:to], known[to], prompt_top or 0) for to in range(1, len(told) + 1)]
        if first == 0 and tokens and prompt_top is not None:
            assert len(told) == len(request.prompt) - 1

    def assert_complete(self, key: TransferKey, *, first_index: int) -> None:
        """The whole answer was emitted, from token `first_index` on, and ended for the right reason."""
        expected = self.expected(key)
        assert self.ledger.first_index[key] == first_index
        assert self.ledger.tokens[key] == expected[first_index:]
        self.assert_logprobs(key)
        finish = self.ledger.finishes[key]
        assert finish.num_tokens == len(expected)
        stopped = expected[-1] in self.requests[key].sampling.stop_token_ids
        assert finish.reason is (FinishReason.STOP if stopped else FinishReason.LENGTH)

    def error_code(self, key: TransferKey) -> str:
        """Of a request that ended with an error."""
        finish = self.ledger.finishes[key]
        assert finish.reason is FinishReason.ERROR
        return finish.error_code

    def assert_idle(self) -> None:
        """Nothing is held, nothing is awaited or under way, and no step failed but on demand."""
        assert not self.pipeline.num_outstanding
        assert self.worker.counters()["decode_step_faults_total"] == self.runner.num_faults
        assert self.worker.counters()["decode_request_faults_total"] == self.num_request_faults
        assert not self.receiver.transfers
        assert self.pool.counts().used == 0, self.pool.counts()
        assert self.slots.num_free == self.slots.max_slots
        load = self.worker.load()
        assert (load.running, load.waiting) == (0, 0)
        assert self.worker.next_wake() is None
        assert not self.step()
