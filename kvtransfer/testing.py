"""For tests of every floor: both machines on a virtual clock with a network that misbehaves, and the suite that each
transport must pass. `HingePair` models KV as numbers, so that one misplaced token is seen.
"""

from __future__ import annotations

import heapq
import itertools
import random
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from diptych.protos.errors import DiptychError, TransferError
from diptych.protos.ports import Closed, Committed, Failed, ReceiveEvent, Released, WantBlocks
from diptych.protos.settings import TransferSettings
from diptych.protos.types import EngineId, EngineRef, TransferKey

from .actions import Deliver, Dial, Fetch, Gather, HangUp, ReceiveAction, Retire, Scatter, Send, SendAction
from .layout import KvLayout
from .messages import ChunkReady, Link, Message
from .pulse import TICK_S
from .receiver import FetchResult, ReceiverMachine
from .ring import RingMemory, SlotRef, TornRead, checksum
from .sender import SenderMachine
from .transports.base import RingReader

Kv = tuple[TransferKey, int]  # the KV of one position of one transfer's prompt


@dataclass(slots=True)
class Weather:
    """What may happen to messages and copies; everything is drawn from the pair's seed."""

    delay_s: float = 0.0  # each message waits 0 .. delay_s: above 0 they overtake each other
    duplicate: float = 0.0  # probability
    copy_s: float = 0.0  # each gather, fetch and scatter takes 0 .. copy_s
    corrupt: float = 0.0  # probability that a fetch finds another checksum


@dataclass(slots=True)
class _Slot:
    generation: int = 1
    payload: tuple[Kv, ...] = ()


@dataclass(slots=True)
class _Owned:
    num_tokens: int
    have_tokens: int
    blocks: tuple[int, ...] = ()


@dataclass
class HingePair:
    """One prefill and one decode machine. Call the commands, then `run`; read `released` and `outcomes`.

    Checks by itself: one Released per open, one outcome per expect, no read of P's blocks after Released, no write into
    D's blocks after an outcome, and at Committed that every position holds its own KV.
    """

    seed: int = 0
    settings: TransferSettings = field(default_factory=lambda: TransferSettings(slots=4))
    weather: Weather = field(default_factory=Weather)
    chunk_tokens: int = 4
    block_tokens: tuple[int, int] = (4, 3)  # of P and of D
    auto_grant: bool = True

    def __post_init__(self) -> None:
        self.now = 1000.0
        self.rng = random.Random(self.seed)
        self.p = EngineRef(EngineId("p0"), 5, "unix:/p0")
        self.d = EngineRef(EngineId("d0"), 6, "unix:/d0")
        self.layout = KvLayout(layers=1, kv_heads=1, head_dim=1, dtype="float32", block_tokens=self.block_tokens[1])
        self.sender = SenderMachine(settings=self.settings, chunk_tokens=self.chunk_tokens)
        self.receiver = ReceiverMachine(settings=self.settings, layout=self.layout)
        self.reachable = True
        self.released: dict[TransferKey, Released] = {}
        self.outcomes: dict[TransferKey, ReceiveEvent] = {}
        self.wanted: list[TransferKey] = []
        self.dialed: list[Dial] = []
        self.sent: list[tuple[str, Message]] = []  # by "p" or "d", in order
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._slots = [_Slot() for _ in range(self.settings.slots)]
        self._pair_epoch = 0
        self._up: set[int] = set()  # pair epochs whose stream stands
        self._fresh_block = itertools.count()
        self._p_kv: dict[tuple[int, int], Kv | None] = {}
        self._d_kv: dict[tuple[int, int], Kv | None] = {}
        self._private: dict[ChunkReady, tuple[Kv, ...]] = {}  # verified by D, not yet scattered
        self._p_owned: dict[TransferKey, _Owned] = {}
        self._d_owned: dict[TransferKey, _Owned] = {}

    # ---- commands -----------------------------------------------------------------------------

    def open(self, key: TransferKey, num_tokens: int) -> None:
        """P's step thread begins a transfer."""
        assert key not in self._p_owned
        count = -(-num_tokens // self.block_tokens[0])
        self._p_owned[key] = _Owned(num_tokens, 0, tuple(next(self._fresh_block) for _ in range(count)))
        self.sender.open(key, self.d, num_tokens, self.now)
        self._settle()

    def compute(self, key: TransferKey, upto: int) -> None:
        """P's step thread has computed positions 0 .. upto - 1."""
        owned = self._p_owned.get(key)
        if owned is None:
            return  # released meanwhile
        for position in range(upto):
            self._p_kv[_place(owned.blocks, position, self.block_tokens[0])] = (key, position)
        self.sender.computed(key, upto, owned.blocks, self.now)
        self._settle()

    def finish(self, key: TransferKey, first_token: int = 77, *, final: bool = False) -> None:
        """P's step thread has sampled token 0."""
        self.sender.finish(key, first_token, final=final, now=self.now)
        self._settle()

    def abort_p(self, key: TransferKey, error: DiptychError) -> None:
        """P's step thread gives up."""
        self.sender.abort(key, error, self.now)
        self._settle()

    def expect(self, key: TransferKey, num_tokens: int, have_tokens: int = 0) -> None:
        """D's step thread wants the KV."""
        assert key not in self._d_owned
        self._d_owned[key] = _Owned(num_tokens, have_tokens)
        self.receiver.expect(key, self.p, num_tokens, have_tokens, self.now)
        self._settle()

    def grant(self, key: TransferKey) -> None:
        """D's step thread grants blocks; ignored when the transfer has ended."""
        owned = self._d_owned.get(key)
        if owned is not None and not owned.blocks:
            owned.blocks = tuple(next(self._fresh_block) for _ in range(self.layout.blocks_for(owned.num_tokens)))
            self.receiver.grant(key, owned.blocks, self.now)
            self._settle()

    def abort_d(self, key: TransferKey, error: DiptychError) -> None:
        """D's step thread gives up."""
        self.receiver.abort(key, error, self.now)
        self._settle()

    def whole(self, key: TransferKey, num_tokens: int, have_tokens: int = 0) -> None:
        """All commands of one undisturbed transfer."""
        self.expect(key, num_tokens, have_tokens)
        self.open(key, num_tokens)
        self.compute(key, num_tokens)
        self.finish(key)

    def break_stream(self) -> None:
        """The present channel breaks: what is on its way is lost, and both ends learn of it, not at the same time."""
        self._hang_up(self._pair_epoch)
        self._settle()

    def _hang_up(self, epoch: int) -> None:
        if epoch in self._up:
            self._up.discard(epoch)
            self._after(self._draw(0.2), lambda: self.sender.pair_down(self._link("d", epoch), self.now))
            self._after(self._draw(0.2), lambda: self.receiver.pair_down(self._link("p", epoch), self.now))

    def run(self, seconds: float) -> None:
        """Let virtual time pass."""
        end = self.now + seconds
        next_tick = self.now + TICK_S
        while True:
            at = self._agenda[0][0] if self._agenda else end
            if min(at, next_tick) > end:
                break
            if next_tick <= at:
                self.now = next_tick
                next_tick += TICK_S
                self.sender.tick(self.now)
                self.receiver.tick(self.now)
            elif self._agenda:
                self.now, _, job = heapq.heappop(self._agenda)
                job()
            else:
                break
            self._settle()
            self.sender.check_integrity()
        self.now = end

    def check_quiet(self) -> None:
        """Raise AssertionError unless nothing is open, every block is given back and every slot is free."""
        assert not self._p_owned, f"not released: {[str(key) for key in self._p_owned]}"
        assert not self._d_owned, f"without outcome: {[str(key) for key in self._d_owned]}"
        assert self.sender.num_open == self.receiver.num_open == 0
        assert self.sender.ledger.num_busy == 0
        assert not self.sender.is_unsettled
        self.sender.check_integrity()

    # ---- the world ----------------------------------------------------------------------------

    def inject(self, to: str, message: Message, *, epoch: int | None = None, pair_epoch: int | None = None) -> None:
        """Hand a message to machine "p" or "d" as if the peer of those epochs (the present ones by default) sent it."""
        peer = self.d if to == "p" else self.p
        link = Link(
            peer.engine_id,
            peer.epoch if epoch is None else epoch,
            self._pair_epoch if pair_epoch is None else pair_epoch,
        )
        (self.sender if to == "p" else self.receiver).on_message(link, message, self.now)
        self._settle()

    def _draw(self, most: float) -> float:
        return self.rng.uniform(0.0, most) if most else 0.0

    def _after(self, seconds: float, job: Callable[[], None]) -> None:
        heapq.heappush(self._agenda, (self.now + seconds, next(self._order), job))

    def _link(self, peer: str, pair_epoch: int) -> Link:
        ref = self.p if peer == "p" else self.d
        return Link(ref.engine_id, ref.epoch, pair_epoch)

    def _settle(self) -> None:
        while True:
            ours, theirs = self.sender.take_actions(), self.receiver.take_actions()
            if not ours and not theirs:
                return
            for action in ours:
                self._do_p(action)
            for reaction in theirs:
                self._do_d(reaction)

    def _do_p(self, action: SendAction) -> None:
        match action:
            case Send(link, message):
                self._transmit("p", link.pair_epoch, message)
            case Deliver(event):
                assert isinstance(event, Released)
                assert event.key in self._p_owned, f"{event.key} was released and not open"
                assert event.key not in self.released, f"{event.key} was released twice"
                for block in self._p_owned.pop(event.key).blocks:
                    for offset in range(self.block_tokens[0]):
                        self._p_kv[block, offset] = None  # another request computes here now
                self.released[event.key] = event
            case Gather():
                self._after(self._draw(self.weather.copy_s), lambda: self._gather(action))
            case Retire(slot, slot_gen):
                self._slots[slot] = _Slot(slot_gen)
            case HangUp(link):
                self._hang_up(link.pair_epoch)

    def _gather(self, action: Gather) -> None:
        assert action.key in self._p_owned, f"{action.key} was read after its release"
        slot = self._slots[action.slot]
        assert slot.generation == action.slot_gen
        found = []
        for position in range(action.tok_from, action.tok_to):
            held = self._p_kv[_place(action.blocks, position, self.block_tokens[0])]
            assert held == (action.key, position)
            found.append(held)
        slot.payload = tuple(found)
        self.sender.gathered(action.key, action.chunk, 8 * len(found), hash(slot.payload) % 2**64, self.now)

    def _do_d(self, action: ReceiveAction) -> None:
        match action:
            case Send(link, message):
                self._transmit("d", link.pair_epoch, message)
            case Deliver(event):
                assert not isinstance(event, Released)
                self._on_event(event)
            case Dial(peer):
                self.dialed.append(action)
                self._after(self._draw(self.weather.delay_s), lambda: self._dial(peer))
            case HangUp(link):
                self._hang_up(link.pair_epoch)
            case Fetch(_, ready):
                before = self._slots[ready.slot]
                self._after(self._draw(self.weather.copy_s), lambda: self._fetch(ready, before))
            case Scatter(ready, blocks):
                self._after(self._draw(self.weather.copy_s), lambda: self._scatter(ready, blocks))

    def _dial(self, peer: EngineRef) -> None:
        if not self.reachable:
            self.receiver.pair_failed(peer, TransferError("nobody answers"), self.now)
            return
        self._pair_epoch += 1
        self._up.add(self._pair_epoch)
        self.sender.pair_up(self._link("d", self._pair_epoch), "test", self.now)
        self.receiver.pair_up(self._link("p", self._pair_epoch), "test", self.now)

    def _fetch(self, ready: ChunkReady, before: _Slot) -> None:
        slot = self._slots[ready.slot]
        if slot is not before or slot.generation != ready.slot_gen:
            result = FetchResult.TORN
        elif hash(slot.payload) % 2**64 != ready.checksum or self.rng.random() < self.weather.corrupt:
            result = FetchResult.CHECKSUM
        else:
            result = FetchResult.OK
            self._private[ready] = slot.payload
        self.receiver.fetched(ready, result, self.now)

    def _scatter(self, ready: ChunkReady, blocks: tuple[int, ...]) -> None:
        owned = self._d_owned.get(ready.key)
        assert owned is not None, f"{ready.key} was written to after its end"
        assert blocks == owned.blocks
        for position, kv in zip(range(ready.tok_from, ready.tok_to), self._private[ready], strict=True):
            self._d_kv[_place(blocks, position, self.block_tokens[1])] = kv
        self.receiver.scattered(ready, None, self.now)

    def _on_event(self, event: ReceiveEvent) -> None:
        if isinstance(event, WantBlocks):
            assert event.key in self._d_owned
            self.wanted.append(event.key)
            if self.auto_grant:
                self._after(self._draw(self.weather.delay_s), lambda: self.grant(event.key))
            return
        assert event.key in self._d_owned, f"{event.key} ended and was not expected"
        assert event.key not in self.outcomes, f"{event.key} ended twice"
        owned = self._d_owned.pop(event.key)
        self.outcomes[event.key] = event
        if isinstance(event, Committed) and not event.final:
            for position in range(owned.have_tokens, owned.num_tokens):
                held = self._d_kv[_place(owned.blocks, position, self.block_tokens[1])]
                assert held == (event.key, position), f"position {position} of {event.key} holds the KV of {held}"

    def _transmit(self, by: str, pair_epoch: int, message: Message) -> None:
        self.sent.append((by, message))
        for _ in range(1 + (self.rng.random() < self.weather.duplicate)):
            self._after(self._draw(self.weather.delay_s), lambda: self._arrive(by, pair_epoch, message))

    def _arrive(self, by: str, pair_epoch: int, message: Message) -> None:
        if pair_epoch not in self._up:
            return  # lost with its stream
        machine = self.receiver if by == "p" else self.sender
        machine.on_message(self._link(by, pair_epoch), message, self.now)

    def failure(self, key: TransferKey) -> DiptychError:
        """The error that D's end of the transfer ended with."""
        event = self.outcomes[key]
        assert isinstance(event, Failed), event
        return event.error

    def closed(self, key: TransferKey) -> bool:
        """Whether D's end was closed by its own abort."""
        return isinstance(self.outcomes.get(key), Closed)

    def committed(self, key: TransferKey) -> bool:
        """Whether D's end was committed."""
        return isinstance(self.outcomes.get(key), Committed)


def _place(blocks: tuple[int, ...], position: int, block_tokens: int) -> tuple[int, int]:
    return blocks[position // block_tokens], position % block_tokens


# ---- transports -------------------------------------------------------------------------------

MakePair = Callable[[int, int], AbstractContextManager[tuple[RingMemory, RingReader]]]


def publish(ring: RingMemory, slot: int, data: bytes, number: int = 0) -> SlotRef:
    """Stage `data` as chunk `number` in the slot's present generation."""
    with ring.data(slot, len(data)) as area:
        area[:] = data
    key = TransferKey(number.to_bytes(16, "big"), number)
    ref = SlotRef(key, number, slot, ring.generation(slot), len(data), checksum(memoryview(data)))
    ring.publish(ref)
    return ref


def _try_read(reader: RingReader, ref: SlotRef) -> bytes | None:
    out = bytearray(ref.size_bytes)
    try:
        reader.read(ref, memoryview(out))
    except TornRead:
        return None
    return bytes(out)


def check_transport(make_pair: MakePair, *, slot_bytes: int = 700_000) -> None:
    """The conformance suite: `make_pair(num_slots, slot_bytes)` gives a fresh ring and a reader attached to it."""
    with make_pair(4, slot_bytes) as (ring, reader):
        _check_round_trips(ring, reader, slot_bytes)
        _check_refusals(ring, reader)
        _check_races(ring, reader)
        reader.close()
        ref = publish(ring, 0, b"after the end")
        try:
            reader.read(ref, memoryview(bytearray(ref.size_bytes)))
        except TransferError:
            pass
        else:
            raise AssertionError("a closed reader read")


def _check_round_trips(ring: RingMemory, reader: RingReader, slot_bytes: int) -> None:
    rng = random.Random(1)
    for number, size_bytes in enumerate((1, 63, 4096, 262_144, 262_145, slot_bytes)):
        data = rng.randbytes(size_bytes)
        ref = publish(ring, number % 4, data, number)
        assert _try_read(reader, ref) == data, f"{size_bytes} bytes did not arrive"
        assert _try_read(reader, ref) == data, "a second read of the same slot differs"
        ring.retire(number % 4, ref.generation + 1)
    refs = [(data := rng.randbytes(slot_bytes - slot), publish(ring, slot, data, slot)) for slot in range(4)]
    found: dict[int, bytes | None] = {}
    threads = [
        threading.Thread(target=lambda at=at, ref=ref: found.__setitem__(at, _try_read(reader, ref)))
        for at, (_, ref) in enumerate(refs)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for at, (data, _) in enumerate(refs):
        assert found[at] == data, "slots read at once got mixed up"


def _check_refusals(ring: RingMemory, reader: RingReader) -> None:
    ring.retire(0, ring.generation(0) + 1)
    ref = publish(ring, 0, b"x" * 1000, 3)
    other = TransferKey(bytes(15) + b"\x09", 0)
    wrong = {
        "an old generation": SlotRef(ref.key, ref.chunk, 0, ref.generation - 1, 1000, ref.checksum),
        "a generation to come": SlotRef(ref.key, ref.chunk, 0, ref.generation + 1, 1000, ref.checksum),
        "another transfer": SlotRef(other, ref.chunk, 0, ref.generation, 1000, ref.checksum),
        "another attempt": SlotRef(TransferKey(ref.key.transfer_id, 9), 3, 0, ref.generation, 1000, ref.checksum),
        "more than was staged": SlotRef(ref.key, ref.chunk, 0, ref.generation, 1001, ref.checksum),
        "less than was staged": SlotRef(ref.key, ref.chunk, 0, ref.generation, 999, ref.checksum),
        "a slot that does not exist": SlotRef(ref.key, ref.chunk, 4, ref.generation, 1000, ref.checksum),
    }
    for what, bad in wrong.items():
        assert _try_read(reader, bad) is None, f"{what} was read"
    ring.retire(0, ref.generation + 1)
    assert _try_read(reader, ref) is None, "a retired slot was read"


def _check_races(ring: RingMemory, reader: RingReader) -> None:
    """While the owner reuses a slot over and over, a read gives the announced bytes or TornRead, never a mixture."""
    sizes = ring.slot_bytes
    current: list[SlotRef] = [publish(ring, 1, bytes(sizes), 0)]
    done = threading.Event()

    def reuse() -> None:
        for number in range(1, 60):
            ring.retire(1, ring.generation(1) + 1)
            current[0] = publish(ring, 1, bytes([number]) * sizes, number)
        done.set()

    writer = threading.Thread(target=reuse)
    writer.start()
    while not done.is_set():
        ref = current[0]
        data = _try_read(reader, ref)
        assert data is None or data == bytes([ref.chunk]) * sizes, "a torn read went unnoticed"
    writer.join()
    assert _try_read(reader, current[0]) is not None
