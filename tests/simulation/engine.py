"""One life of an engine: the real workers, pool and transfer machines; threads, memory and sockets are made up.

Its three threads are three queues: the step loop takes the inbox when its last step is over, the mailbox holds what the
step loop has for the machines, frames and copies come by timer. A stopped process keeps all of it for later.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import invariants
from invariants import SimPool, Violation
from network import HingeEnd, stream
from routes import TWICE, Routes
from runner import SimRunner, pack, unpack

from diptych.decode.worker import DecodeWorker
from diptych.kvtransfer.actions import Deliver, Dial, Fetch, Gather, HangUp, ReceiveAction, Retire, Scatter, Send
from diptych.kvtransfer.actions import SendAction as Action
from diptych.kvtransfer.fetch import read_chunk
from diptych.kvtransfer.layout import KvLayout
from diptych.kvtransfer.messages import ChunkReady, Link, Message
from diptych.kvtransfer.receiver import FetchResult, ReceiverMachine
from diptych.kvtransfer.ring import RingMemory, SlotRef, checksum
from diptych.kvtransfer.sender import SenderMachine
from diptych.prefill.worker import PrefillWorker
from diptych.protos.errors import DiptychError, PeerLost
from diptych.protos.pipeline import StepPipeline
from diptych.protos.ports import Committed, ReceiveEvent, Worker
from diptych.protos.settings import DecodeSettings, PrefillSettings, TransferSettings
from diptych.protos.status import EngineInfo, EngineStatus
from diptych.protos.step import SlotPool
from diptych.protos.types import DecodeOrder, EngineRef, PrefillOrder, Role, StepOutput, TransferKey

if TYPE_CHECKING:
    from world import World

TICK_S = 0.1
CHUNK_TOKENS = 5
TRANSFER = TransferSettings(slots=4)
PREFILL = PrefillSettings(step_tokens=16, max_running=4, max_waiting=24)
DECODE = DecodeSettings(step_tokens=16, max_running=6, max_waiting=24, watermark=0.05)
SHAPES = {Role.PREFILL: (20, 4), Role.DECODE: (24, 3)}  # blocks, tokens of each
MAX_CONTEXT = 48
_BYTES_PER_TOKEN = 8


class _Sender:
    """ports.SendPort: commands wait in the mailbox."""

    def __init__(self, engine: SimEngine, machine: SenderMachine) -> None:
        self._post = engine.mail
        self._clock = engine.clock
        self._machine = machine

    def open(self, key: TransferKey, peer: EngineRef, num_tokens: int) -> None:
        self._post(lambda: self._machine.open(key, peer, num_tokens, self._clock()))

    def computed(self, key: TransferKey, upto: int, blocks: Sequence[int]) -> None:
        kept = tuple(blocks)
        self._post(lambda: self._machine.computed(key, upto, kept, self._clock()))

    def finish(self, key: TransferKey, first_token: int, *, final: bool) -> None:
        self._post(lambda: self._machine.finish(key, first_token, final=final, now=self._clock()))

    def abort(self, key: TransferKey, error: DiptychError) -> None:
        self._post(lambda: self._machine.abort(key, error, self._clock()))


class _Receiver:
    """ports.ReceivePort: the same."""

    def __init__(self, engine: SimEngine, machine: ReceiverMachine) -> None:
        self._post = engine.mail
        self._clock = engine.clock
        self._machine = machine

    def expect(self, key: TransferKey, peer: EngineRef, num_tokens: int, have_tokens: int) -> None:
        self._post(lambda: self._machine.expect(key, peer, num_tokens, have_tokens, self._clock()))

    def grant(self, key: TransferKey, blocks: Sequence[int]) -> None:
        kept = tuple(blocks)
        self._post(lambda: self._machine.grant(key, kept, self._clock()))

    def abort(self, key: TransferKey, error: DiptychError) -> None:
        self._post(lambda: self._machine.abort(key, error, self._clock()))


class _Reader:
    """RingReader of one channel: the peer's memory, as long as there is a way to it."""

    inline = False

    def __init__(self, ring: RingMemory) -> None:
        self._ring: RingMemory | None = ring

    def read(self, ref: SlotRef, out: memoryview) -> None:
        if self._ring is None:
            raise PeerLost("the ring is closed")
        self._ring.read(ref, out)

    def close(self) -> None:
        self._ring = None


class SimEngine:
    """`kill`, `stop` and `resume` are what happens to a process; `begin_drain` and `quit` are asked of it."""

    def __init__(self, world: World, info: EngineInfo) -> None:
        self.world = world
        self.info = info
        self.ref = info.ref
        self.name = str(info.ref.engine_id)
        self.loop = world.loop
        self.clock = world.loop.time
        self.rng: random.Random = world.rng
        self.is_alive = True
        self.is_stopped = False
        self.routes = Routes(self)
        role = min(info.roles, key=lambda role: role is Role.DECODE)
        num_blocks, size = SHAPES[role]
        self.slots = SlotPool(12)
        self.runner = SimRunner(
            num_blocks=num_blocks, block_tokens=size, max_slots=12, max_step_tokens=16, depth=world.depth_of(info.ref)
        )
        self.pipeline = StepPipeline(self.runner, self.clock)
        self.pool = SimPool(self.runner, num_blocks=num_blocks, block_tokens=size)
        self.names = self.pool.watch_names()
        self.sender: SenderMachine | None = None
        self.receiver: ReceiverMachine | None = None
        self.ring: RingMemory | None = None
        self.workers: dict[Role, Worker] = {}
        self.arrived: dict[ChunkReady, bytearray] = {}
        self._frozen: list[Callable[[], None]] = []
        self._inbox: deque[tuple[str, Role, object]] = deque()
        self._mail: deque[Callable[[], None]] = deque()
        self._has_turn = False
        self._free_at = 0.0
        self._wake_at = float("inf")
        self._ticks = False
        self._pair_epoch = 0
        self._channels: dict[Link, HingeEnd] = {}
        self._current: dict[str, Link] = {}  # by peer: the channel that is up, as this end was told
        self._readers: dict[Link, _Reader] = {}
        self._ended: set[TransferKey] = set()
        self._steps = 0
        if info.roles & world.poison.roles:
            self.runner.on_poison = self._poisoned
        if Role.PREFILL in info.roles:
            self._add_prefill()
        if Role.DECODE in info.roles:
            self._add_decode(size)

    def _add_prefill(self) -> None:
        self.ring = RingMemory(TRANSFER.slots, CHUNK_TOKENS * _BYTES_PER_TOKEN)
        self.sender = SenderMachine(settings=TRANSFER, chunk_tokens=CHUNK_TOKENS)
        self.workers[Role.PREFILL] = PrefillWorker(
            settings=PREFILL,
            pipeline=self.pipeline,
            pool=self.pool,
            slots=self.slots,
            sender=_Sender(self, self.sender),
            emit=lambda out: self._emit(Role.PREFILL, out),
            clock=self.clock,
            max_context_tokens=MAX_CONTEXT,
        )

    def _add_decode(self, block_tokens: int) -> None:
        layout = KvLayout(layers=1, kv_heads=1, head_dim=1, dtype="float32", block_tokens=block_tokens)
        self.receiver = ReceiverMachine(settings=TRANSFER, layout=layout)
        self.workers[Role.DECODE] = DecodeWorker(
            settings=DECODE,
            pipeline=self.pipeline,
            pool=self.pool,
            slots=self.slots,
            receiver=_Receiver(self, self.receiver),
            emit=lambda out: self._emit(Role.DECODE, out),
            clock=self.clock,
            max_context_tokens=MAX_CONTEXT,
        )

    # ---- the process ----------------------------------------------------------------------------

    def post(self, job: Callable[[], None]) -> None:
        """Run a job in this process: now, when it goes on, or never."""
        if not self.is_alive:
            return
        if self.is_stopped:
            self._frozen.append(job)
            return
        try:
            job()
        except Violation as wrong:
            self.world.violated(wrong)
        except Exception as exc:
            self.world.failed(self, exc)

    def after(self, seconds: float, job: Callable[[], None]) -> None:
        """A job of this process, later."""
        self.loop.call_later(seconds, self.post, job)

    def kill(self) -> None:
        """SIGKILL: the kernel closes its streams."""
        self._end(politely=False)

    def quit(self) -> None:
        """The end that was asked for: routers are told that it is one."""
        self._end(politely=True)

    def _end(self, *, politely: bool) -> None:
        if self.is_alive:
            self.is_alive = False
            self._frozen.clear()
            self.routes.close_all(politely=politely)
            for end in self._channels.values():
                end.close()

    def _poisoned(self) -> None:
        self.world.poison.num_felled += 1
        if self.world.poison.kills and self.is_alive:
            self.kill()
            self.world.members.died(self)

    def stop(self) -> None:
        """SIGSTOP."""
        self.is_stopped = True

    def resume(self) -> None:
        """SIGCONT: all that came meanwhile is there at once."""
        if self.is_alive and self.is_stopped:
            self.is_stopped = False
            jobs, self._frozen = self._frozen, []
            for job in jobs:
                self.post(job)

    @property
    def num_requests(self) -> int:
        """Requests without a terminal event."""
        return self.routes.num_requests

    @property
    def is_busy(self) -> bool:
        """Whether a drain would wait."""
        transfers = sum(m.num_open for m in (self.sender, self.receiver) if m is not None)
        return bool(self.num_requests or transfers)

    def status(self) -> EngineStatus:
        """What a Status frame tells."""
        loads = [worker.load() for worker in self.workers.values()]
        counters: dict[str, float] = {}
        for worker in self.workers.values():
            counters |= worker.counters()
        return EngineStatus(
            running=sum(load.running for load in loads),
            waiting=sum(load.waiting for load in loads),
            blocks=self.pool.counts(),
            steps=self._steps,
            counters=counters,
        )

    # ---- step thread ----------------------------------------------------------------------------

    def put(self, kind: str, role: Role, item: object) -> None:
        """Into the inbox: `order`, the same `again` while it is in work, `cancel` or `news`."""
        self._inbox.append((kind, role, item))
        self._wake(self.clock())

    def tell(self, kind: str, role: Role, item: object) -> None:
        """As `put`; now and then twice, for whoever says something may say it again."""
        self.put(kind, role, item)
        if self.rng.random() < TWICE:
            self.world.counters["said twice"] += 1
            self.put(kind, role, item)

    def _wake(self, when: float) -> None:
        when = max(when, self._free_at)
        if not self._has_turn or when < self._wake_at:
            self._has_turn, self._wake_at = True, when
            self.loop.call_at(when, self.post, lambda: self._turn(when))

    def _turn(self, when: float) -> None:
        if not self._has_turn or when != self._wake_at:
            return  # another wake-up came before
        self._has_turn = False
        while self._inbox:
            kind, role, item = self._inbox.popleft()
            worker = self.workers[role]
            if kind in ("order", "again"):
                assert isinstance(item, PrefillOrder | DecodeOrder)
                if kind == "order" or self.routes.has(role, item.request.key):
                    worker.submit(item)
            elif kind == "cancel":
                assert isinstance(item, TransferKey)
                worker.cancel(item)
            else:
                self._news(worker, item)
        stepped = sum([worker.step() for worker in self.workers.values()])
        self._steps += stepped
        self.world.look(self)
        if stepped:
            self._free_at = self.clock() + self.rng.uniform(0.001, 0.02)
            self._wake(self._free_at)
        else:
            wakes = [wake for worker in self.workers.values() if (wake := worker.next_wake()) is not None]
            if wakes:
                self._wake(max(min(wakes), self.clock() + 0.001))

    def _news(self, worker: Worker, event: object) -> None:
        if isinstance(event, Committed) and not event.final:
            sequence = worker._sequences.get(event.key)  # type: ignore[attr-defined]
            if sequence is not None and sequence.table is not None:
                invariants.i3(self, sequence.blocks, sequence.request.known)
        worker.on_transfer(event)  # type: ignore[arg-type]

    def _emit(self, role: Role, out: StepOutput) -> None:
        self.routes.told(role, out)

    # ---- transfer thread ------------------------------------------------------------------------

    def mail(self, job: Callable[[], None]) -> None:
        """From the step thread to the machines, in order, a moment later."""
        self._mail.append(job)
        if len(self._mail) == 1:
            self.after(0.002 * self.rng.random(), self._read_mail)

    def _read_mail(self) -> None:
        mail, self._mail = self._mail, deque()
        for job in mail:
            job()
            self._settle()

    def _settle(self) -> None:
        """Do what the machines ask for, and let them tick while they have timers."""
        is_idle = True
        if self.sender is not None:
            while actions := self.sender.take_actions():
                for action in actions:
                    self._send_side(action)
            is_idle = self.sender.is_idle
        if self.receiver is not None:
            while todo := self.receiver.take_actions():
                for reaction in todo:
                    self._receive_side(reaction)
            is_idle = is_idle and self.receiver.is_idle
        if not is_idle and not self._ticks:
            self._ticks = True
            self.after(TICK_S, self._tick)

    def _tick(self) -> None:
        self._ticks = False
        for machine in (self.sender, self.receiver):
            if machine is not None:
                machine.tick(self.clock())
        self._settle()

    def _say(self, link: Link, message: Message) -> None:
        end = self._channels.get(link)
        if end is not None:
            end.send(message)

    def _hang_up(self, link: Link) -> None:
        end = self._channels.pop(link, None)
        if end is not None:
            end.close()
            self._down(link)

    def _hear(self, link: Link, message: Message, role: Role) -> None:
        """A message arrived. The world knows whether its channel is up; a machine must find out by itself."""
        machine = self.sender if role is Role.PREFILL else self.receiver
        assert machine is not None
        is_fenced = self._current.get(link.engine_id) != link
        before = invariants.digest(machine) if is_fenced else 0
        self.world.note(self, type(message).__name__, getattr(message, "key", None), is_fenced)
        machine.on_message(link, message, self.clock())
        if is_fenced and invariants.digest(machine) != before:
            raise Violation("i6", f"{self.name}: a message of a channel that is down changed something: {message}")
        self._settle()

    def _down(self, link: Link) -> None:
        if self._current.get(link.engine_id) == link:
            del self._current[link.engine_id]
        reader = self._readers.pop(link, None)
        if reader is not None:
            reader.close()
        for machine in (self.sender, self.receiver):
            if machine is not None:
                machine.pair_down(link, self.clock())
        self._settle()

    def _up(self, link: Link, end: HingeEnd, role: Role) -> None:
        self._channels[link] = end
        self._current[link.engine_id] = link
        end.on_frame = lambda message: self._hear(link, message, role)  # type: ignore[arg-type]
        end.on_break = lambda: (self._channels.pop(link, None), self._down(link))  # type: ignore[assignment, return-value]
        machine = self.sender if role is Role.PREFILL else self.receiver
        assert machine is not None
        machine.pair_up(link, "sim", self.clock())
        self._settle()

    # ---- as a prefill engine

    def _send_side(self, action: Action) -> None:
        match action:
            case Send(link, message):
                self._say(link, message)
            case Deliver(event):
                self.tell("news", Role.PREFILL, event)
            case Gather():
                self.after(0.003 * self.rng.random(), lambda: self._gather(action))
            case Retire(slot, slot_gen):
                assert self.ring is not None
                self.ring.retire(slot, slot_gen)
            case HangUp(link):
                self._hang_up(link)

    def _gather(self, action: Gather) -> None:
        assert self.sender is not None
        assert self.ring is not None
        job = self.workers[Role.PREFILL]._jobs.get(action.key)  # type: ignore[attr-defined]
        read = -(-action.tok_to // self.pool.block_tokens)
        if job is None or job.table is None or tuple(job.table.blocks[:read]) != action.blocks[:read]:
            raise Violation("read_after_free", f"{self.name}: {action.key} is copied out of blocks that it gave back")
        data = pack(self.runner.read(action.blocks, action.tok_to)[action.tok_from :])
        number = checksum(memoryview(data))
        with self.ring.data(action.slot, len(data)) as area:
            area[:] = self.world.flipped(data)
        self.ring.publish(SlotRef(action.key, action.chunk, action.slot, action.slot_gen, len(data), number))
        self.sender.gathered(action.key, action.chunk, len(data), number, self.clock())
        self._settle()

    def greet(self, link: Link, end: HingeEnd) -> None:
        """A decode engine's Hello arrived."""
        self._up(link, end, Role.PREFILL)
        end.send("welcome")

    # ---- as a decode engine

    def _receive_side(self, action: ReceiveAction) -> None:
        match action:
            case Send(link, message):
                self._say(link, message)
            case Deliver(event):
                self._deliver(event)  # type: ignore[arg-type]
            case Dial(peer):
                self._dial(peer)
            case HangUp(link):
                self._hang_up(link)
            case Fetch(link, ready):
                slow = 0.5 if self.rng.random() < 0.05 else 0.004
                reader = self._readers.get(link)
                self.after(slow * self.rng.random(), lambda: self._fetch(reader, ready))
            case Scatter():
                self.after(0.003 * self.rng.random(), lambda: self._scatter(action))

    def _deliver(self, event: ReceiveEvent) -> None:
        if not type(event).__name__.startswith("Want"):
            if event.key in self._ended:
                raise Violation("ended_twice", f"{self.name}: the transfer {event.key} ended twice: {event}")
            self._ended.add(event.key)
        self.tell("news", Role.DECODE, event)

    def _dial(self, peer: EngineRef) -> None:
        """Hello, welcome, channel. Whoever is stopped or cut off does not answer in time."""
        assert self.receiver is not None
        self._pair_epoch += 1
        theirs = Link(self.ref.engine_id, self.ref.epoch, self._pair_epoch)
        ours = Link(peer.engine_id, peer.epoch, self._pair_epoch)
        there = self.world.life(peer)
        state = {"open": True}

        def give_up(words: str) -> None:
            if state.pop("open", False):
                assert self.receiver is not None
                if there is not None:
                    mine.close()
                self.receiver.pair_failed(peer, PeerLost(words), self.clock())
                self._settle()

        mine = HingeEnd(self.world.network, self.name, self.post)
        if there is None or not there.is_alive:
            there = None
            self.after(0.001, lambda: give_up("nobody listens"))
            return
        other = HingeEnd(self.world.network, there.name, there.post)
        stream(mine, other)

        def welcomed(_: object) -> None:
            if state.pop("open", False):
                assert there.ring is not None
                self._readers[ours] = _Reader(there.ring)
                self._up(ours, mine, Role.DECODE)

        mine.on_frame = welcomed
        mine.on_break = lambda: give_up("the channel broke")
        other.on_frame = lambda _: there.greet(theirs, other)
        mine.send("hello")
        self.after(TRANSFER.dial_timeout_s, lambda: give_up("no answer in time"))

    def _fetch(self, reader: _Reader | None, ready: ChunkReady) -> None:
        assert self.receiver is not None
        buffer = bytearray(ready.size_bytes)
        result = FetchResult.ERROR if reader is None else read_chunk(reader, ready, buffer)
        self.world.note(self, "fetch", ready.key, result.value)
        self.arrived[ready] = buffer
        before = len(self.receiver.peek_actions())
        self.receiver.fetched(ready, result, self.clock())
        if not any(isinstance(action, Scatter) for action in self.receiver.peek_actions()[before:]):
            del self.arrived[ready]
        self._settle()

    def _scatter(self, action: Scatter) -> None:
        assert self.receiver is not None
        key = action.ready.key
        sequence = self.workers[Role.DECODE]._sequences.get(key)  # type: ignore[attr-defined]
        blocks = () if sequence is None or sequence.table is None else tuple(sequence.table.blocks)
        if blocks[: len(action.blocks)] != action.blocks:
            raise Violation("write_after_free", f"{self.name}: {key} is copied into blocks that it gave back")
        self.runner.write(action.blocks, action.ready.tok_from, unpack(bytes(self.arrived.pop(action.ready))))
        self.receiver.scattered(action.ready, None, self.clock())
        self._settle()

    def lose_channel(self) -> str:
        """This end of its oldest channel breaks. The peer is told, but what it reads meanwhile is not held back."""
        link = next(iter(self._channels), None)
        if link is not None:
            self._hang_up(link)
        return str(link)

    # ---- asked by the manager

    def begin_drain(self) -> None:
        """Take no new requests."""
        self.info = replace(self.info, draining=True)
        self.routes.draining = True
