"""Both workers, joined by the real state machines of the hinge: a thousand requests, some cancelled, some given up in
the middle of their answer and taken up again.

Only memory and network are made up: KV lies in two echo runners whose next token depends on every cell of it, and
messages and copies take random time, come twice, get lost with their stream or arrive corrupted.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest

from diptych.decode.testing import DecodeBench
from diptych.kvtransfer.actions import Deliver, Dial, Fetch, Gather, HangUp, ReceiveAction, Retire, Scatter, Send
from diptych.kvtransfer.actions import SendAction as Action
from diptych.kvtransfer.layout import KvLayout
from diptych.kvtransfer.messages import ChunkReady, Link, Message
from diptych.kvtransfer.receiver import FetchResult, ReceiverMachine
from diptych.kvtransfer.sender import SenderMachine
from diptych.prefill.testing import PEER as DECODE_REF
from diptych.prefill.testing import PrefillBench
from diptych.protos.errors import DiptychError
from diptych.protos.ports import ReceiveEvent, SendEvent
from diptych.protos.settings import DecodeSettings, PrefillSettings, TransferSettings
from diptych.protos.testing import Cell
from diptych.protos.types import EngineId, EngineRef, FinishReason, SamplingParams, TransferKey

PREFILL_REF = EngineRef(EngineId("p0"), 1, "unix:/nowhere/p0.sock")
TICK_S = 0.1
MAX_OPEN = 60  # a broken stream ends all transfers that are open
FINAL = {FinishReason.STOP, FinishReason.LENGTH}


@dataclass
class Slot:
    generation: int = 1
    cells: tuple[Cell, ...] = ()


class SendSide:
    """ports.SendPort onto the sender machine."""

    def __init__(self, pair: MachinePair) -> None:
        self.pair = pair

    def open(self, key: TransferKey, peer: EngineRef, num_tokens: int) -> None:
        self.pair.sender.open(key, peer, num_tokens, self.pair.now)

    def computed(self, key: TransferKey, upto: int, blocks: Sequence[int]) -> None:
        self.pair.sender.computed(key, upto, tuple(blocks), self.pair.now)

    def finish(self, key: TransferKey, first_token: int, *, final: bool) -> None:
        self.pair.sender.finish(key, first_token, final=final, now=self.pair.now)

    def abort(self, key: TransferKey, error: DiptychError) -> None:
        self.pair.sender.abort(key, error, self.pair.now)


class ReceiveSide:
    """ports.ReceivePort onto the receiver machine."""

    def __init__(self, pair: MachinePair) -> None:
        self.pair = pair

    def expect(self, key: TransferKey, peer: EngineRef, num_tokens: int, have_tokens: int) -> None:
        self.pair.receiver.expect(key, peer, num_tokens, have_tokens, self.pair.now)

    def grant(self, key: TransferKey, blocks: Sequence[int]) -> None:
        self.pair.receiver.grant(key, tuple(blocks), self.pair.now)

    def abort(self, key: TransferKey, error: DiptychError) -> None:
        self.pair.receiver.abort(key, error, self.pair.now)


class MachinePair:
    """One prefill and one decode engine without threads: `turn` is one round of both step loops and some time."""

    def __init__(self, rng: random.Random, *, blocks: tuple[int, int], rough: bool) -> None:
        self.rng = rng
        self.now = 1000.0
        self.rough = rough
        transfer = TransferSettings(slots=4)
        self.sender = SenderMachine(settings=transfer, chunk_tokens=5)
        layout = KvLayout(layers=1, kv_heads=1, head_dim=1, dtype="float32", block_tokens=3)
        self.receiver = ReceiverMachine(settings=transfer, layout=layout)
        self.prefill = PrefillBench(
            num_blocks=blocks[0],
            block_tokens=4,
            settings=PrefillSettings(step_tokens=rng.choice([3, 16]), max_waiting=1000),
            port=lambda runner: SendSide(self),
        )
        self.decode = DecodeBench(
            num_blocks=blocks[1],
            block_tokens=3,
            settings=DecodeSettings(step_tokens=16, max_running=8, max_waiting=1000, watermark=0.05),
            port=lambda runner: ReceiveSide(self),
        )
        self.engines: list[PrefillBench | DecodeBench] = [self.prefill, self.decode]
        self.submitted: list[TransferKey] = []
        self._events: tuple[list[SendEvent], list[ReceiveEvent]] = ([], [])
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._slots = [Slot() for _ in range(transfer.slots)]
        self._private: dict[ChunkReady, tuple[Cell, ...]] = {}
        self._pair_epoch = 0
        self._up: set[int] = set()
        self._next_tick = self.now

    def submit(self, prompt: list[int], sampling: SamplingParams, *, tenant: str, priority: int) -> TransferKey:
        for bench in self.rng.sample(self.engines, 2):
            key = bench.submit(
                prompt, max_tokens=sampling.max_tokens, sampling=sampling, tenant=tenant, priority=priority
            )
            self._settle()
        self.submitted.append(key)
        return key

    def move(self, key: TransferKey) -> TransferKey | None:
        """Give an attempt up and go on with what a client has of its answer. None: that is all of it."""
        self.cancel(key)
        resume = self.so_far(key)
        if len(resume) == len(self.decode.expected(key)):
            return None
        for bench in self.rng.sample(self.engines, 2):
            again = bench.again(key, resume)
            self._settle()
        self.submitted.append(again)
        return again

    @property
    def num_open(self) -> int:
        """Attempts that have not ended on the decode engine."""
        return len(self.submitted) - len(self.decode.ledger.finishes)

    def turn(self) -> bool:
        """Both engines do a step and read their mail. False: nobody had anything to do."""
        busy = [self.prefill.step(), self.decode.step()]
        self._settle()
        self._pass_time(self.rng.uniform(0.0, 0.05))
        sent, received = self._events
        self._events = ([], [])
        for released in sent:
            self.prefill.worker.on_transfer(released)
        for event in received:
            self.decode.deliver(event)
        self.prefill.pool.check_integrity()
        self._settle()
        if self.rough and self.rng.random() < 0.002:
            self._break_stream(self._pair_epoch)
        return any(busy) or bool(sent or received) or bool(self.sender.num_open or self.receiver.num_open)

    def cancel(self, key: TransferKey) -> None:
        for bench in self.rng.sample(self.engines, 2):
            bench.cancel(key)
            self._settle()

    def assert_idle(self) -> None:
        self.prefill.assert_idle()
        self.decode.assert_idle()
        assert self.sender.num_open == self.receiver.num_open == self.sender.ledger.num_busy == 0

    def answer(self, key: TransferKey) -> tuple[list[int], FinishReason]:
        """What a router makes of both streams: tokens by index, decode's end unless token 0 was the end."""
        prefill, decode = self.prefill.ledger.finishes[key].reason, self.decode.ledger.finishes[key].reason
        return self.so_far(key), prefill if prefill in FINAL else decode

    def so_far(self, key: TransferKey) -> list[int]:
        """What a client has of an answer, with what the request came with."""
        merged = dict(enumerate(self.decode.requests[key].resume))
        for ledger in (self.prefill.ledger, self.decode.ledger):
            for index, token in enumerate(ledger.tokens.get(key, []), ledger.first_index.get(key, 0)):
                assert merged.setdefault(index, token) == token, "two engines disagree on a token"
        assert sorted(merged) == list(range(len(merged))), "a gap in the answer"
        return [merged[index] for index in range(len(merged))]

    # ---- the world ----------------------------------------------------------------------------

    def _pass_time(self, seconds: float) -> None:
        end = self.now + seconds
        while self._agenda and self._agenda[0][0] <= end:
            self.now, _, job = heapq.heappop(self._agenda)
            job()
            self._settle()
        self.now = end
        if self.now >= self._next_tick:
            self._next_tick = self.now + TICK_S
            self.sender.tick(self.now)
            self.receiver.tick(self.now)
            self._settle()
        self.sender.check_integrity()
        for bench in self.engines:
            bench.clock.now = self.now

    def _after(self, most_s: float, job: Callable[[], None]) -> None:
        heapq.heappush(self._agenda, (self.now + self.rng.uniform(0, most_s), next(self._order), job))

    def _settle(self) -> None:
        while (ours := self.sender.take_actions()) or (theirs := self.receiver.take_actions()):
            for action in ours:
                self._do_prefill(action)
            for reaction in [] if ours else theirs:
                self._do_decode(reaction)

    def _link(self, ref: EngineRef, pair_epoch: int) -> Link:
        return Link(ref.engine_id, ref.epoch, pair_epoch)

    def _transmit(self, by: EngineRef, pair_epoch: int, message: Message) -> None:
        for _ in range(1 + (self.rough and self.rng.random() < 0.05)):
            self._after(0.05 if self.rough else 0.01, lambda: self._arrive(by, pair_epoch, message))

    def _arrive(self, by: EngineRef, pair_epoch: int, message: Message) -> None:
        if pair_epoch in self._up:
            machine = self.receiver if by is PREFILL_REF else self.sender
            machine.on_message(self._link(by, pair_epoch), message, self.now)

    def _break_stream(self, epoch: int) -> None:
        if epoch in self._up:
            self._up.discard(epoch)
            self._after(0.2, lambda: self.sender.pair_down(self._link(DECODE_REF, epoch), self.now))
            self._after(0.2, lambda: self.receiver.pair_down(self._link(PREFILL_REF, epoch), self.now))

    def _do_prefill(self, action: Action) -> None:
        match action:
            case Send(link, message):
                self._transmit(PREFILL_REF, link.pair_epoch, message)
            case Deliver(event):
                self._events[0].append(event)  # type: ignore[arg-type]
            case Gather():
                self._after(0.05, lambda: self._gather(action))
            case Retire(slot, slot_gen):
                self._slots[slot] = Slot(slot_gen)
            case HangUp(link):
                self._break_stream(link.pair_epoch)

    def _do_decode(self, action: ReceiveAction) -> None:
        match action:
            case Send(link, message):
                self._transmit(DECODE_REF, link.pair_epoch, message)
            case Deliver(event):
                self._events[1].append(event)  # type: ignore[arg-type]
            case Dial():
                self._after(0.05, self._dial)
            case HangUp(link):
                self._break_stream(link.pair_epoch)
            case Fetch(_, ready):
                before = self._slots[ready.slot]
                self._after(0.05, lambda: self._fetch(ready, before))
            case Scatter(ready, blocks):
                self._after(0.05, lambda: self._scatter(ready, blocks))

    def _dial(self) -> None:
        self._pair_epoch += 1
        self._up.add(self._pair_epoch)
        self.sender.pair_up(self._link(DECODE_REF, self._pair_epoch), "test", self.now)
        self.receiver.pair_up(self._link(PREFILL_REF, self._pair_epoch), "test", self.now)

    def _gather(self, action: Gather) -> None:
        cells = self.prefill.runner.read(action.blocks, action.tok_to)[action.tok_from :]
        slot = self._slots[action.slot]
        assert slot.generation == action.slot_gen
        slot.cells = tuple(cells)
        self.sender.gathered(action.key, action.chunk, 8 * len(cells), hash(slot.cells) % 2**64, self.now)

    def _fetch(self, ready: ChunkReady, before: Slot) -> None:
        slot, result = self._slots[ready.slot], FetchResult.OK
        if slot is not before or slot.generation != ready.slot_gen:
            result = FetchResult.TORN
        elif hash(slot.cells) % 2**64 != ready.checksum or (self.rough and self.rng.random() < 0.02):
            result = FetchResult.CHECKSUM
        else:
            self._private[ready] = slot.cells
        self.receiver.fetched(ready, result, self.now)

    def _scatter(self, ready: ChunkReady, blocks: tuple[int, ...]) -> None:
        self.decode.runner.write(blocks, ready.tok_from, self._private.pop(ready))
        self.receiver.scattered(ready, None, self.now)


class Storm:
    """Random requests; some are given up at a random moment, and most of those are taken up again, maybe often."""

    def __init__(self, pair: MachinePair) -> None:
        self.pair, self.rng = pair, pair.rng
        self.doomed: list[TransferKey] = []
        self.given_up: set[TransferKey] = set()
        self.asked: dict[TransferKey, TransferKey] = {}  # by attempt: the first attempt at the same request
        self.moves: list[int] = []  # after how many tokens

    def blow(self, num_requests: int) -> None:
        rng, pair = self.rng, self.pair
        for _ in range(num_requests):
            head, tail = rng.choice([0, 4, 12]), rng.choice([1, 2, 9])
            prompt = [rng.randrange(2)] * head + [rng.randrange(9) for _ in range(tail)]
            sampling = SamplingParams(
                max_tokens=rng.choice([1, 2, 9, 20]),
                repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
                logprobs=rng.choice([None, None, 2]),
            )
            key = pair.submit(prompt, sampling, tenant=rng.choice("ab"), priority=rng.choice([0, 0, 0, 1, -1]))
            self.asked[key] = key
            if rng.random() < 0.3:
                self.doomed.append(key)
            for _ in range(rng.randrange(5)):
                self.turn()
            while pair.num_open > MAX_OPEN:
                self.turn()
        turns = 0
        while self.turn():
            turns += 1
            assert turns < 20_000, "the pair does not come to rest"

    def turn(self) -> bool:
        """Whether anything was done; maybe one of the doomed meets its fate, mostly in the middle of its answer."""
        if self.doomed and self.rng.random() < 0.3:
            begun = [key for key in self.doomed if self.pair.so_far(key)]
            if begun or self.rng.random() < 0.2:
                victim = self.rng.choice(begun or self.doomed)
                self.doomed.remove(victim)
                self.give_up(victim)
        return self.pair.turn() or bool(self.doomed)

    def give_up(self, key: TransferKey) -> None:
        self.given_up.add(key)
        if self.rng.random() < 0.4:
            self.pair.cancel(key)
        elif (again := self.pair.move(key)) is not None:
            self.asked[again] = self.asked[key]
            self.moves.append(len(self.pair.decode.requests[again].resume))
            if self.rng.random() < 0.3:
                self.doomed.append(again)


@pytest.mark.parametrize(("blocks", "rough"), [((24, 28), False), ((14, 20), True)])
def test_a_thousand_requests_some_cancelled_and_some_moved_leave_both_pools_as_they_were(
    blocks: tuple[int, int], rough: bool
) -> None:
    pair = MachinePair(random.Random(11), blocks=blocks, rough=rough)
    storm = Storm(pair)
    storm.blow(1000)
    for key in pair.submitted:
        pair.decode.assert_tokens(key)
        tokens, reason = pair.answer(key)
        if key not in storm.given_up:
            assert tokens == pair.decode.expected(storm.asked[key])
            assert reason is FinishReason.LENGTH
    for bench in pair.engines:
        assert set(bench.ledger.finishes) == set(pair.submitted)
    pair.assert_idle()
    counters = {**pair.prefill.worker.counters(), **pair.decode.worker.counters()}
    assert 250 < len(storm.given_up) < 450
    assert sum(cut > 0 for cut in storm.moves) > 50
    assert max(key.attempt for key in pair.submitted) > 1
    assert sum(finish.transfer_bytes > 0 for finish in pair.decode.ledger.finishes.values()) > 200
    assert counters["decode_preemptions_total"] > (20 if rough else 0)
    assert counters["prefill_cached_tokens_total"] > 500
    if rough:
        assert counters["decode_local_prefills_total"] > 10
