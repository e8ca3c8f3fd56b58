"""The prefill engine's driver: gives the sender machine its inputs and does what it asks for.

Calls come from the step thread (SendPort) and the asyncio thread (the KvChannel service); machine, ring and copies
belong to the transfer thread. They meet in the mailbox and in bounded outboxes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import grpc

from diptych.protos import kv_pb2 as pb
from diptych.protos import kv_pb2_grpc
from diptych.protos.errors import DiptychError, EngineFault, StartupError, TransferError
from diptych.protos.faults import FaultPlan, Point
from diptych.protos.ports import Released, SendEvent
from diptych.protos.settings import TransferSettings
from diptych.protos.types import EngineId, EngineRef, TransferKey

from . import pairing, probe
from .actions import Deliver, Gather, HangUp, Retire, Send, SendAction
from .arena import KvArena, copy_alone
from .channel import Outboxes
from .faults import copying, make_channel, publishing
from .layout import KvLayout
from .mailbox import Job, Mailbox
from .messages import ChunkReady, Link
from .pulse import TICK_S
from .ring import RingMemory, SlotRef, checksum
from .sender import SenderMachine
from .transports.base import RingOwner
from .transports.grpc import GrpcOwner
from .transports.local import LocalOwner
from .transports.shm import ShmOwner
from .wire import from_pb

log = logging.getLogger(__name__)


class SendDriver:
    """Implements SendPort. `attach` in the asyncio thread, `start`, use, `stop`; after `stop` nothing is delivered."""

    def __init__(
        self,
        *,
        me: EngineRef,
        layout: KvLayout,
        compat: bytes,
        arena: KvArena,
        settings: TransferSettings,
        run_dir: Path,
        deliver: Callable[[SendEvent], None],
        clock: Callable[[], float] = time.monotonic,
        faults: FaultPlan | None = None,
    ) -> None:
        slot_bytes = settings.slot_kib * 1024
        if slot_bytes < layout.bytes_per_token:
            raise StartupError(
                f"transfer.slot_kib: a staging slot of {settings.slot_kib} KiB cannot hold the KV of one token "
                f"({layout.bytes_per_token} bytes)."
            )
        self.me = me
        self.ring_slots = settings.slots
        self._layout = layout
        self._compat = compat
        self._faults = faults
        self._pack = arena.pack if faults is None else copying(arena.pack, faults, Point.HINGE_GATHER)
        self._settings = settings
        self._deliver = deliver
        self._clock = clock
        self._machine = SenderMachine(settings=settings, chunk_tokens=slot_bytes // layout.bytes_per_token)
        self._ring = RingMemory(settings.slots + 1, slot_bytes)
        probe.stage(self._ring, me.epoch)
        self._publish = self._ring.publish if faults is None else publishing(self._ring, faults)
        self._grpc_owner = GrpcOwner(self._ring, me)
        served = pairing.supported(settings.transport)
        self._owners: dict[str, RingOwner] = {pairing.GRPC: self._grpc_owner}
        if pairing.LOCAL in served:
            self._owners[pairing.LOCAL] = LocalOwner(self._ring, me)
        if pairing.SHM in served:
            self._owners[pairing.SHM] = ShmOwner(self._ring, run_dir)
        if pairing.GRPC not in served:
            del self._owners[pairing.GRPC]
        self._outboxes = Outboxes()
        self._links: dict[EngineId, Link] = {}  # asyncio thread: the newest channel of each decode engine
        self._heard: dict[Link, float] = {}  # asyncio thread: when each channel brought its last message
        self._mailbox = Mailbox("kv-send", tick=self._tick, is_idle=lambda: self._machine.is_idle, tick_s=TICK_S)
        self._stopped = False

    # ---- lifetime -----------------------------------------------------------------------------

    def attach(self, server: grpc.aio.Server) -> None:
        """Register the KvChannel service; in the asyncio thread, before the server starts."""
        self._outboxes.loop = asyncio.get_running_loop()
        kv_pb2_grpc.add_KvChannelServicer_to_server(_Service(self), server)  # type: ignore[no-untyped-call]

    def start(self) -> None:
        """Start the transfer thread."""
        self._mailbox.post(copy_alone)
        self._mailbox.start()

    def stop(self) -> None:
        """End all channels, join the transfer thread, free the ring. Any thread; idempotent. Nothing is delivered."""
        if self._stopped:
            return
        self._stopped = True
        self._mailbox.stop()
        self._outboxes.close_all()
        for owner in {id(owner): owner for owner in (*self._owners.values(), self._grpc_owner)}.values():
            owner.close()
        self._ring.close()

    # ---- SendPort, from the step thread -------------------------------------------------------

    def open(self, key: TransferKey, peer: EngineRef, num_tokens: int) -> None:
        """See SendPort."""
        self._post(lambda: self._machine.open(key, peer, num_tokens, self._clock()))

    def computed(self, key: TransferKey, upto: int, blocks: Sequence[int]) -> None:
        """See SendPort."""
        kept = tuple(blocks)  # the caller's list may grow
        self._post(lambda: self._machine.computed(key, upto, kept, self._clock()))

    def finish(self, key: TransferKey, first_token: int, *, final: bool) -> None:
        """See SendPort."""
        self._post(lambda: self._machine.finish(key, first_token, final=final, now=self._clock()))

    def abort(self, key: TransferKey, error: DiptychError) -> None:
        """See SendPort. Tells the peer also of a key that was never opened."""
        self._post(lambda: self._machine.abort(key, error, self._clock()))

    # ---- readings, from any thread ------------------------------------------------------------

    def counters(self) -> dict[str, float]:
        """Metric name to value since the start."""
        shm = self._owners.get(pairing.SHM)
        own = {
            "kv_thread_faults_total": float(self._mailbox.num_faults),
            "kv_refused_fetches_total": float(self._grpc_owner.refused.total),
            "kv_refused_attachments_total": float(shm.refused.total if isinstance(shm, ShmOwner) else 0),
        }
        return self._machine.counters | own

    @property
    def open_transfers(self) -> int:
        """Transfers that were opened and not released."""
        return self._machine.num_open

    @property
    def ring_slots_busy(self) -> int:
        """Staging slots in use or in quarantine."""
        return self._machine.ledger.num_busy

    # ---- transfer thread ----------------------------------------------------------------------

    def _post(self, job: Job) -> None:
        self._mailbox.post(lambda: self._input(job))

    def _tick(self) -> None:
        for link, at in list(self._heard.items()):
            self._machine.heard(link, at)
        self._input(lambda: self._machine.tick(self._clock()))

    def _input(self, job: Job) -> None:
        """One input and everything that follows from it, in the machine's order: a Retire precedes the next Gather."""
        job()
        todo = deque(self._machine.take_actions())
        while todo:
            self._perform(todo.popleft())
            todo.extend(self._machine.take_actions())

    def _perform(self, action: SendAction) -> None:
        match action:
            case Send(link, ChunkReady() as ready):
                capability = self._grpc_owner.capability(ready.key, ready.slot, ready.slot_gen)
                self._outboxes.send(link, replace(ready, capability=capability))
            case Send(link, message):
                self._outboxes.send(link, message)
            case Deliver(event):
                assert isinstance(event, Released)
                self._deliver(event)
            case Gather():
                self._gather(action)
            case Retire(slot, slot_gen):
                self._ring.retire(slot, slot_gen)
            case HangUp(link):
                self._outboxes.close(link)

    def _gather(self, action: Gather) -> None:
        size_bytes = (action.tok_to - action.tok_from) * self._layout.bytes_per_token
        try:
            with self._ring.data(action.slot, size_bytes) as data:
                self._pack(action.blocks, action.tok_from, action.tok_to, data)
                digest = checksum(data)
            ref = SlotRef(action.key, action.chunk, action.slot, action.slot_gen, size_bytes, digest)
            self._publish(ref)
        except Exception as exc:  # a bad block list or a device error ends this transfer, not the engine
            log.exception("%s: chunk %d could not be staged", action.key, action.chunk)
            error = EngineFault("the KV could not be staged", detail=repr(exc))
            self._machine.gather_failed(action.key, action.chunk, error, self._clock())
            return
        self._machine.gathered(action.key, action.chunk, size_bytes, digest, self._clock())

    # ---- asyncio thread -----------------------------------------------------------------------

    def _agree(self, hello: pb.KvMsg) -> tuple[Link, pb.HelloAck]:
        """Answer a Hello."""
        link = pairing.link_of(hello)
        ack = pb.HelloAck(engine_id=self.me.engine_id, engine_epoch=self.me.epoch)
        present = self._links.get(link.engine_id)
        words = pairing.why_not(
            hello, me=self.me, layout=self._layout, compat=self._compat, known=present, served=self._owners
        )
        if words is not None:
            log.warning("refused decode engine %s: %s", link.engine_id, words)
            ack.refusal = words
            return link, ack
        ack.transport = next(name for name in hello.hello.transports if name in self._owners)
        ack.blob = self._owners[ack.transport].invite()
        ack.slots, ack.slot_bytes = self._ring.num_slots, self._ring.slot_bytes
        known = probe.reference(self.me.epoch, ack.slots, ack.slot_bytes)
        ack.probe_capability = self._grpc_owner.capability(known.key, known.slot, known.generation)
        return link, ack

    async def _session(self, requests: AsyncIterator[pb.KvMsg], context: grpc.aio.ServicerContext) -> None:
        hello = await anext(aiter(requests), None)
        if self._stopped or hello is None or hello.WhichOneof("msg") != "hello":
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "a channel begins with Hello")
            return
        link, ack = self._agree(hello)
        envelope = pb.KvMsg(src_epoch=self.me.epoch, pair_epoch=link.pair_epoch, hello_ack=ack)
        if ack.refusal:
            await context.write(envelope)
            return
        channel = make_channel(self._faults, link.engine_id, src_epoch=self.me.epoch, pair_epoch=link.pair_epoch)
        self._links[link.engine_id] = link
        self._heard[link] = self._clock()
        self._outboxes.add(link, channel)
        self._post(lambda: self._machine.pair_up(link, ack.transport, self._clock()))
        try:
            await context.write(envelope)
            await channel.run(
                read=lambda: anext(aiter(requests), None),
                write=context.write,
                on_message=lambda msg: self._received(link, msg),
            )
        finally:
            self._outboxes.remove(link)
            self._heard.pop(link, None)
            if self._links.get(link.engine_id) == link:
                del self._links[link.engine_id]
            self._post(lambda: self._machine.pair_down(link, self._clock()))

    def _received(self, channel: Link, msg: pb.KvMsg) -> None:
        if channel in self._heard:
            self._heard[channel] = self._clock()
        link = Link(channel.engine_id, msg.src_epoch, msg.pair_epoch)
        try:
            message = from_pb(msg)
        except TransferError as exc:
            log.warning("a message of decode engine %s makes no sense: %s", link.engine_id, exc)
            return
        self._post(lambda: self._machine.on_message(link, message, self._clock()))


class _Service(kv_pb2_grpc.KvChannelServicer):
    """The gRPC shell of a driver."""

    def __init__(self, driver: SendDriver) -> None:
        self._driver = driver

    async def Session(self, requests: AsyncIterator[pb.KvMsg], context: grpc.aio.ServicerContext) -> None:
        """Control of one pair."""
        await self._driver._session(requests, context)

    async def FetchBytes(self, request: pb.FetchRequest, context: grpc.aio.ServicerContext) -> None:
        """Bytes of one slot."""
        await self._driver._grpc_owner.fetch(request, context)
