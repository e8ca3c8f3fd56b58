"""The decode engine's driver: gives the receiver machine its inputs and does what it asks for.

Calls come from the step thread (ReceivePort) and the asyncio thread (channels to prefill engines, dialed on demand);
machine and copies belong to the transfer thread, slow fetches to a few threads beside it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

import grpc

from diptych.protos import kv_pb2 as pb
from diptych.protos.errors import DiptychError, EngineFault, TransferError
from diptych.protos.faults import FaultPlan, Point
from diptych.protos.ports import Closed, Committed, Failed, ReceiveEvent, WantBlocks
from diptych.protos.settings import TransferSettings
from diptych.protos.trust import Trust
from diptych.protos.types import EngineRef, Role, TransferKey

from .actions import Deliver, Dial, Fetch, HangUp, ReceiveAction, Scatter, Send
from .arena import KvArena, copy_alone
from .channel import Outboxes
from .dial import Agreement, Dialer
from .faults import copying
from .fetch import FetchThreads, read_chunk
from .layout import KvLayout
from .mailbox import Job, Mailbox
from .messages import ChunkReady, Link
from .pulse import TICK_S
from .receiver import FetchResult, ReceiverMachine
from .transports.base import RingReader
from .wire import from_pb

log = logging.getLogger(__name__)

_SPARE_BUFFERS = 4


class ReceiveDriver:
    """Implements ReceivePort. `start` with the loop that shall dial, use, `stop`; after `stop` nothing is delivered."""

    def __init__(
        self,
        *,
        me: EngineRef,
        layout: KvLayout,
        compat: bytes,
        arena: KvArena,
        settings: TransferSettings,
        deliver: Callable[[ReceiveEvent], None],
        clock: Callable[[], float] = time.monotonic,
        trust: Trust | None = None,
        faults: FaultPlan | None = None,
    ) -> None:
        """Without `trust` it reaches engines of this process only, or servers that ask for no proof."""
        self.me = me
        self._arena = arena
        self._unpack = arena.unpack if faults is None else copying(arena.unpack, faults, Point.HINGE_SCATTER)
        self._deliver = deliver
        self._clock = clock
        self._machine = ReceiverMachine(settings=settings, layout=layout)
        trust = trust or Trust.alone(Role.DECODE.value)
        self._dialer = Dialer(me=me, layout=layout, compat=compat, settings=settings, trust=trust, faults=faults)
        self._outboxes = Outboxes()
        self._tasks: set[asyncio.Task[None]] = set()  # asyncio thread
        self._readers: dict[Link, RingReader] = {}  # transfer thread
        self._arrived: dict[ChunkReady, bytearray] = {}  # transfer thread: verified, until scattered
        self._spare: list[bytearray] = []  # private copies to use again
        self._pairs: dict[str, int] = {}  # transport -> channels agreed on so far
        self._heard: dict[Link, float] = {}  # asyncio thread: when each channel brought its last message
        self._fetchers = FetchThreads(num_threads=4, per_peer=2)
        self._mailbox = Mailbox("kv-receive", tick=self._tick, is_idle=lambda: self._machine.is_idle, tick_s=TICK_S)
        self._stopped = False

    # ---- lifetime -----------------------------------------------------------------------------

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the transfer thread; prefill engines are dialed on `loop` when a transfer needs them."""
        self._outboxes.loop = loop
        self._mailbox.post(copy_alone)
        self._mailbox.start()

    def stop(self) -> None:
        """End all channels and join the threads. Any thread; idempotent. Nothing is delivered."""
        if self._stopped:
            return
        self._stopped = True
        self._mailbox.stop()
        for reader in self._readers.values():
            reader.close()
        self._fetchers.stop()
        self._outboxes.call(self._cancel_tasks)

    def _cancel_tasks(self) -> None:
        for task in self._tasks:
            task.cancel()

    # ---- ReceivePort, from the step thread ----------------------------------------------------

    def expect(self, key: TransferKey, peer: EngineRef, num_tokens: int, have_tokens: int) -> None:
        """See ReceivePort."""
        self._post(lambda: self._machine.expect(key, peer, num_tokens, have_tokens, self._clock()))

    def grant(self, key: TransferKey, blocks: Sequence[int]) -> None:
        """See ReceivePort."""
        kept = tuple(blocks)  # the caller's list may grow
        self._post(lambda: self._machine.grant(key, kept, self._clock()))

    def abort(self, key: TransferKey, error: DiptychError) -> None:
        """See ReceivePort."""
        self._post(lambda: self._machine.abort(key, error, self._clock()))

    # ---- readings, from any thread ------------------------------------------------------------

    def counters(self) -> dict[str, float]:
        """Metric name to value since the start."""
        pairs = {f"kv_pairs_{name}_total": float(count) for name, count in list(self._pairs.items())}
        own = {
            "kv_transport_downgrades_total": float(self._dialer.num_downgrades),
            "kv_probe_failures_total": float(self._dialer.num_failed_probes),
            "kv_pair_probed_mib_s": self._dialer.probed_mib_s,
            "kv_unreachable_peers": float(self._machine.num_unreachable),
            "kv_thread_faults_total": float(self._mailbox.num_faults),
        }
        return self._machine.counters | pairs | own

    @property
    def open_transfers(self) -> int:
        """Transfers that were expected and have not ended."""
        return self._machine.num_open

    # ---- transfer thread ----------------------------------------------------------------------

    def _post(self, job: Job) -> None:
        self._mailbox.post(lambda: self._input(job))

    def _tick(self) -> None:
        for link, at in list(self._heard.items()):
            self._machine.heard(link, at)
        self._input(lambda: self._machine.tick(self._clock()))

    def _input(self, job: Job) -> None:
        """One input and everything that follows from it. What an action leads to comes before the next action, so
        that a chunk is scattered before the next is fetched and one private buffer does.
        """
        job()
        todo = self._machine.take_actions()[::-1]
        while todo:
            self._perform(todo.pop())
            todo.extend(self._machine.take_actions()[::-1])

    def _perform(self, action: ReceiveAction) -> None:
        match action:
            case Send(link, message):
                self._outboxes.send(link, message)
            case Deliver(event):
                assert isinstance(event, WantBlocks | Committed | Failed | Closed)
                self._deliver(event)
            case Dial():
                self._outboxes.call(lambda: self._spawn(action))
            case HangUp(link):
                self._outboxes.close(link)
                self._close_reader(link)
            case Fetch(link, ready):
                self._fetch(link, ready)
            case Scatter():
                self._scatter(action)

    def _fetch(self, link: Link, ready: ChunkReady) -> None:
        reader = self._readers.get(link)
        if reader is None:
            self._machine.fetched(ready, FetchResult.ERROR, self._clock())
            return
        buffer = self._spare.pop() if self._spare else bytearray()
        if len(buffer) < ready.size_bytes:
            buffer = bytearray(ready.size_bytes)
        if reader.inline:
            self._fetched(ready, buffer, read_chunk(reader, ready, buffer))
            return

        def work() -> None:
            result = read_chunk(reader, ready, buffer)
            self._post(lambda: self._fetched(ready, buffer, result))

        self._fetchers.post(link.engine_id, work)

    def _fetched(self, ready: ChunkReady, buffer: bytearray, result: FetchResult) -> None:
        self._arrived[ready] = buffer
        before = len(self._machine.peek_actions())
        self._machine.fetched(ready, result, self._clock())
        if not any(isinstance(action, Scatter) for action in self._machine.peek_actions()[before:]):
            self._recycle(ready)  # nobody wants these bytes

    def _scatter(self, action: Scatter) -> None:
        ready, blocks = action.ready, action.blocks
        error: DiptychError | None = None
        try:
            with memoryview(self._arrived[ready])[: ready.size_bytes] as data:
                self._unpack(blocks, ready.tok_from, ready.tok_to, data)
            if action.is_last:
                self._arena.clear_tail(blocks, ready.tok_to)
        except Exception as exc:  # a bad block list or a device error ends this transfer, not the engine
            log.exception("%s: chunk %d could not be put into its blocks", ready.key, ready.chunk)
            error = EngineFault("the KV could not be put into its blocks", detail=repr(exc))
        self._recycle(ready)
        self._machine.scattered(ready, error, self._clock())

    def _recycle(self, ready: ChunkReady) -> None:
        buffer = self._arrived.pop(ready)
        if len(self._spare) < _SPARE_BUFFERS:
            self._spare.append(buffer)

    def _pair_up(self, link: Link, agreement: Agreement) -> None:
        self._readers[link] = agreement.reader
        self._pairs[agreement.transport] = self._pairs.get(agreement.transport, 0) + 1
        self._machine.pair_up(link, agreement.transport, self._clock())

    def _pair_down(self, link: Link) -> None:
        self._machine.pair_down(link, self._clock())
        self._close_reader(link)

    def _close_reader(self, link: Link) -> None:
        """Ends its fetches too: those on the way are cancelled, those that wait find it closed."""
        reader = self._readers.pop(link, None)
        if reader is not None:
            reader.close()

    # ---- asyncio thread -----------------------------------------------------------------------

    def _spawn(self, dial: Dial) -> None:
        if not self._stopped:
            task = asyncio.get_running_loop().create_task(self._pair(dial.peer, dial.without))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pair(self, peer: EngineRef, without: tuple[str, ...]) -> None:
        """The life of one channel: dial, agree, run until it breaks. The next transfer dials anew."""
        try:
            agreement = await self._dialer.connect(peer, without)
        except Exception as exc:  # whatever it is: transfers wait for the end of this dial, and the next one too
            if not isinstance(exc, DiptychError):
                log.exception("prefill engine %s could not be dialed", peer.engine_id)
            error = exc if isinstance(exc, DiptychError) else EngineFault("the dial failed", detail=repr(exc))
            self._post(lambda: self._machine.pair_failed(peer, error, self._clock()))
            return
        link = Link(peer.engine_id, peer.epoch, agreement.pair_epoch)
        self._heard[link] = self._clock()
        self._outboxes.add(link, agreement.channel)
        self._post(lambda: self._pair_up(link, agreement))
        try:
            await agreement.channel.run(
                read=agreement.read,
                write=agreement.write,
                on_message=lambda msg: self._received(link, msg),
            )
        except (grpc.RpcError, asyncio.InvalidStateError) as exc:  # the latter from a write after the end
            log.info("the channel to prefill engine %s broke: %s", peer.engine_id, exc)
        finally:
            self._outboxes.remove(link)
            self._heard.pop(link, None)
            self._post(lambda: self._pair_down(link))
            await agreement.close()

    def _received(self, channel: Link, msg: pb.KvMsg) -> None:
        if channel in self._heard:
            self._heard[channel] = self._clock()
        link = Link(channel.engine_id, msg.src_epoch, msg.pair_epoch)
        try:
            message = from_pb(msg)
        except TransferError as exc:
            log.warning("a message of prefill engine %s makes no sense: %s", link.engine_id, exc)
            return
        self._post(lambda: self._machine.on_message(link, message, self._clock()))
