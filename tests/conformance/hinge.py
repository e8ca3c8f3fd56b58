"""The transfer between two engines in the test's own thread: both machines, a real ring, the real arenas, no sockets.

Messages and events wait until `pump` moves them on, a few at a time. Whenever the decode side commits, the KV of the
whole prompt is compared between the two arenas, layer by layer, before the prefill side may let go of it.
"""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diptych.kvtransfer.actions import (
    Deliver,
    Dial,
    Fetch,
    Gather,
    HangUp,
    ReceiveAction,
    Retire,
    Scatter,
    Send,
    SendAction,
)
from diptych.kvtransfer.arena import KvArena
from diptych.kvtransfer.messages import ChunkReady, Link, Message
from diptych.kvtransfer.receiver import FetchResult, ReceiverMachine
from diptych.kvtransfer.ring import RingMemory, SlotRef, checksum
from diptych.kvtransfer.sender import SenderMachine
from diptych.kvtransfer.transports.local import LocalOwner, LocalReader
from diptych.protos.errors import DiptychError
from diptych.protos.ports import Clock, Committed, ReceiveEvent, Released, SendEvent
from diptych.protos.settings import TransferSettings
from diptych.protos.types import EngineId, EngineRef, TransferKey

CHUNK_TOKENS = 24  # of a slot: a multiple of no block size, so that chunks begin and end inside of blocks
CACHED_TOLERANCE = 1e-4  # of KV that another step computed: in a row of another shape
_numbers = itertools.count()


@dataclass
class Side:
    """One end: its life, its memory, and the worker that gets its events."""

    ref: EngineRef
    arena: KvArena
    deliver: Callable[[SendEvent | ReceiveEvent], None] = lambda event: None
    blocks: dict[TransferKey, tuple[int, ...]] = field(default_factory=dict)


class Hinge:
    """`sending` and `receiving` are the ports for the two workers; set `deliver` of both sides before the first use."""

    def __init__(self, p_arena: KvArena, d_arena: KvArena, *, clock: Clock, seed: int = 0, slots: int = 4) -> None:
        settings = TransferSettings(slots=slots)
        number = next(_numbers)
        self.p = Side(EngineRef(EngineId(f"hinge-p{number}"), 3, "local"), p_arena)
        self.d = Side(EngineRef(EngineId(f"hinge-d{number}"), 4, "local"), d_arena)
        self.sender = SenderMachine(settings=settings, chunk_tokens=CHUNK_TOKENS)
        self.receiver = ReceiverMachine(settings=settings, layout=d_arena.layout)
        self.sending, self.receiving = _Sending(self), _Receiving(self)
        self.compared_tokens = 0
        self._clock = clock
        self._rng = random.Random(seed)
        self._ring = RingMemory(slots, CHUNK_TOKENS * p_arena.layout.bytes_per_token)
        self._owner = LocalOwner(self._ring, self.p.ref)
        self._reader = LocalReader(self.p.ref)
        self._queue: deque[Callable[[], None]] = deque()
        self._private: dict[ChunkReady, bytearray] = {}
        self._asked: dict[TransferKey, tuple[int, int]] = {}  # tokens of the prompt, tokens cached at D
        self._pair_epoch = 0

    def pump(self) -> bool:
        """Move a few messages and events on. False: nothing waits."""
        now = self._clock()
        self._send_input(lambda: self.sender.tick(now))
        self._receive_input(lambda: self.receiver.tick(now))
        for _ in range(self._rng.randint(1, 6)):
            if self._queue:
                self._queue.popleft()()
        self.sender.check_integrity()
        return bool(self._queue)

    def check_quiet(self) -> None:
        """Nothing is open, no slot is held."""
        assert self.sender.num_open == self.receiver.num_open == 0
        assert self.sender.ledger.num_busy == 0
        assert not self._queue

    def close(self) -> None:
        """Free the ring."""
        self._reader.close()
        self._owner.close()
        self._ring.close()

    # ---- what the drivers do ----------------------------------------------------------------------

    def _send_input(self, job: Callable[[], None]) -> None:
        job()
        todo = deque(self.sender.take_actions())
        while todo:
            self._do_send(todo.popleft())
            todo.extend(self.sender.take_actions())

    def _receive_input(self, job: Callable[[], None]) -> None:
        job()
        todo = deque(self.receiver.take_actions())
        while todo:
            self._do_receive(todo.popleft())
            todo.extend(self.receiver.take_actions())

    def _do_send(self, action: SendAction) -> None:
        match action:
            case Send(link, message):
                self._queue.append(lambda: self._to_d(link.pair_epoch, message))
            case Deliver(event):
                assert isinstance(event, Released)
                self._queue.append(lambda: self.p.deliver(event))
            case Gather():
                size = (action.tok_to - action.tok_from) * self.p.arena.layout.bytes_per_token
                with self._ring.data(action.slot, size) as data:
                    self.p.arena.pack(action.blocks, action.tok_from, action.tok_to, data)
                    digest = checksum(data)
                self._ring.publish(SlotRef(action.key, action.chunk, action.slot, action.slot_gen, size, digest))
                self.sender.gathered(action.key, action.chunk, size, digest, self._clock())
            case Retire(slot, slot_gen):
                self._ring.retire(slot, slot_gen)
            case HangUp():
                raise AssertionError("nobody hangs up here")

    def _do_receive(self, action: ReceiveAction) -> None:
        match action:
            case Send(link, message):
                self._queue.append(lambda: self._to_p(link.pair_epoch, message))
            case Deliver(event):
                assert not isinstance(event, Released)
                if isinstance(event, Committed) and not event.final:
                    self._compare(event.key)
                self._queue.append(lambda: self.d.deliver(event))
            case Dial():
                self._queue.append(self._dial)
            case Fetch(_, ready):
                buffer = bytearray(ready.size_bytes)
                ref = SlotRef(ready.key, ready.chunk, ready.slot, ready.slot_gen, ready.size_bytes, ready.checksum)
                self._reader.read(ref, memoryview(buffer))
                assert checksum(memoryview(buffer)) == ready.checksum
                self._private[ready] = buffer
                self.receiver.fetched(ready, FetchResult.OK, self._clock())
            case Scatter():
                ready = action.ready
                data = memoryview(self._private.pop(ready))
                self.d.arena.unpack(action.blocks, ready.tok_from, ready.tok_to, data)
                if action.is_last:
                    self.d.arena.clear_tail(action.blocks, ready.tok_to)
                self.receiver.scattered(ready, None, self._clock())
            case HangUp():
                raise AssertionError("nobody hangs up here")

    def _dial(self) -> None:
        self._pair_epoch += 1
        self._send_input(lambda: self.sender.pair_up(self._link(self.d), "local", self._clock()))
        self._receive_input(lambda: self.receiver.pair_up(self._link(self.p), "local", self._clock()))

    def _link(self, peer: Side) -> Link:
        return Link(peer.ref.engine_id, peer.ref.epoch, self._pair_epoch)

    def _to_d(self, pair_epoch: int, message: Message) -> None:
        assert pair_epoch == self._pair_epoch
        self._receive_input(lambda: self.receiver.on_message(self._link(self.p), message, self._clock()))

    def _to_p(self, pair_epoch: int, message: Message) -> None:
        assert pair_epoch == self._pair_epoch
        self._send_input(lambda: self.sender.on_message(self._link(self.d), message, self._clock()))

    def _compare(self, key: TransferKey) -> None:
        """What D committed is what P computed: bit by bit where it crossed, closely where both had it cached."""
        num_tokens, cached = self._asked[key]
        if key not in self.d.blocks:
            assert cached == num_tokens, "committed without blocks"
            return
        there = read_kv(self.p.arena, self.p.blocks[key], num_tokens)
        here = read_kv(self.d.arena, self.d.blocks[key], num_tokens)
        assert torch.equal(here[:, :, :, cached:], there[:, :, :, cached:]), f"{key}: the KV changed on its way"
        torch.testing.assert_close(
            here[:, :, :, :cached], there[:, :, :, :cached], atol=CACHED_TOLERANCE, rtol=CACHED_TOLERANCE
        )
        assert_every_layer_filled(here)
        self.compared_tokens += num_tokens - cached


def read_kv(arena: KvArena, blocks: Sequence[int], num_tokens: int) -> Tensor:
    """[layers, k and v, kv_heads, tokens, head_dim] of positions 0 .. num_tokens - 1; a copy."""
    size = arena.layout.block_tokens
    used = torch.tensor(list(blocks[: -(-num_tokens // size)]), dtype=torch.int64)
    kv = arena.storage[:, :, used].transpose(2, 3).flatten(3, 4)
    return kv[:, :, :, :num_tokens]


def assert_every_layer_filled(kv: Tensor) -> None:
    """No position has a K or V of zeros only, in any layer."""
    empty = (kv == 0).all(dim=-1).all(dim=2).nonzero()
    assert empty.numel() == 0, f"no KV at (layer, k or v, position) {empty[:5].tolist()}"


@dataclass
class _Sending:
    """ports.SendPort of the prefill worker."""

    hinge: Hinge

    def open(self, key: TransferKey, peer: EngineRef, num_tokens: int) -> None:
        h = self.hinge
        h._send_input(lambda: h.sender.open(key, peer, num_tokens, h._clock()))

    def computed(self, key: TransferKey, upto: int, blocks: Sequence[int]) -> None:
        h = self.hinge
        h.p.blocks[key] = tuple(blocks)
        h._send_input(lambda: h.sender.computed(key, upto, tuple(blocks), h._clock()))

    def finish(self, key: TransferKey, first_token: int, *, final: bool) -> None:
        h = self.hinge
        h._send_input(lambda: h.sender.finish(key, first_token, final=final, now=h._clock()))

    def abort(self, key: TransferKey, error: DiptychError) -> None:
        h = self.hinge
        h._send_input(lambda: h.sender.abort(key, error, h._clock()))


@dataclass
class _Receiving:
    """ports.ReceivePort of the decode worker."""

    hinge: Hinge

    def expect(self, key: TransferKey, peer: EngineRef, num_tokens: int, have_tokens: int) -> None:
        h = self.hinge
        h._asked[key] = (num_tokens, have_tokens)
        h._receive_input(lambda: h.receiver.expect(key, peer, num_tokens, have_tokens, h._clock()))

    def grant(self, key: TransferKey, blocks: Sequence[int]) -> None:
        h = self.hinge
        h.d.blocks[key] = tuple(blocks)
        h._receive_input(lambda: h.receiver.grant(key, tuple(blocks), h._clock()))

    def abort(self, key: TransferKey, error: DiptychError) -> None:
        h = self.hinge
        h._receive_input(lambda: h.receiver.abort(key, error, h._clock()))
