"""The decode engine's end of the protocol as a pure machine: commands, messages and completed copies in, actions out.

The driver (receive.py) and the tests call it from one thread. It knows no clock, no socket, no memory.

    expect -> dialing -> bound -> first ChunkReady: WantBlocks -> grant -> fetch, verify, scatter chunks -> Committed
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum

from diptych.protos.errors import (
    Cancelled,
    ChecksumMismatch,
    DeadlineExceeded,
    DiptychError,
    Fenced,
    PeerLost,
    TransferError,
    TransferTimeout,
    error_from_code,
)
from diptych.protos.ports import Closed, Committed, Failed, ReceiveEvent, WantBlocks
from diptych.protos.settings import TransferSettings
from diptych.protos.types import EngineId, EngineRef, TransferKey

from .actions import Deliver, Dial, Fetch, HangUp, ReceiveAction, Scatter, Send
from .blame import Blame
from .history import Ended, History
from .layout import KvLayout
from .messages import (
    Abort,
    AbortAck,
    ChunkAck,
    ChunkReady,
    ChunkStatus,
    Expect,
    FinalAck,
    Heartbeat,
    Link,
    Message,
    PrefillFinished,
)
from .outage import Outages
from .pulse import Pulse

_MAX_FETCHES = 2  # of one slot: the first, and one more after a checksum or generation did not match
_COUNTERS = (
    "kv_transfers_total",
    "kv_transfer_bytes_total",
    "kv_transfer_failures_total",
    "kv_transfers_cancelled_total",
    "kv_fenced_messages_total",
    "kv_checksum_failures_total",
    "kv_torn_reads_total",
    "kv_fetch_errors_total",
    "kv_pairs_lost_total",
    "kv_transports_blamed_total",
    "kv_unreachable_transfers_total",
)


class FetchResult(StrEnum):
    """How a Fetch ended. OK: the bytes lie in private memory, whole and verified."""

    OK = "ok"
    CHECKSUM = "checksum"
    TORN = "torn"
    ERROR = "error"  # the transport failed


@dataclass(slots=True)
class _Chunk:
    ready: ChunkReady
    fetches: int = 0
    arrived: bool = False  # verified in private memory: the slot was given back
    done: bool = False


@dataclass(slots=True)
class _Transfer:
    key: TransferKey
    peer: EngineRef
    num_tokens: int
    have_tokens: int
    started_at: float
    progress_at: float
    link: Link | None = None
    transport: str = ""
    wanted: bool = False  # WantBlocks was delivered
    blocks: tuple[int, ...] | None = None
    chunks: dict[int, _Chunk] = field(default_factory=dict)
    finished: PrefillFinished | None = None
    num_scattering: int = 0
    size_bytes: int = 0
    outcome: ReceiveEvent | None = None  # set: waiting for writes into the blocks to end, then delivered


class ReceiverMachine:
    """Every `expect` ends in exactly one of Committed, Failed, Closed; nothing writes into its blocks afterwards."""

    def __init__(self, *, settings: TransferSettings, layout: KvLayout) -> None:
        self.counters: dict[str, float] = dict.fromkeys(_COUNTERS, 0.0)
        self._settings = settings
        self._layout = layout
        self._actions: list[ReceiveAction] = []
        self._open: dict[TransferKey, _Transfer] = {}
        self._attempt: dict[bytes, TransferKey] = {}
        self._pairs: dict[EngineId, tuple[Link, str]] = {}
        self._dialing: set[tuple[EngineId, int]] = set()
        self._reading: Counter[TransferKey] = Counter()  # fetches in flight, of ended transfers too
        self._owes_abort_ack: dict[TransferKey, Link] = {}  # until its fetches are over
        self._blame = Blame()
        self._outages = Outages()
        self._pulse = Pulse(settings)
        self._history = History(settings.lease_s + settings.stall_s)

    @property
    def num_open(self) -> int:
        """Transfers without an outcome."""
        return len(self._open)

    @property
    def num_unreachable(self) -> int:
        """Prefill engines that were dialed in vain and are dialed again from time to time."""
        return len(self._outages)

    @property
    def is_idle(self) -> bool:
        """Whether no timer runs: nothing is open, no pair is up, nobody is to be dialed again."""
        return not self._open and self._pulse.is_idle and not self._outages

    def take_actions(self) -> list[ReceiveAction]:
        """What is to be done now, in this order."""
        actions, self._actions = self._actions, []
        return actions

    def peek_actions(self) -> list[ReceiveAction]:
        """What `take_actions` would return; not to be changed."""
        return self._actions

    # ---- commands of the step thread ----------------------------------------------------------

    def expect(self, key: TransferKey, peer: EngineRef, num_tokens: int, have_tokens: int, now: float) -> None:
        """See ReceivePort."""
        if key in self._open:
            return
        if self._history.find(key) is not None or self._is_stale(key):
            self._deliver(Failed(key, Fenced("this attempt at the transfer is over")))
            return
        self._history.note(key, now)
        older = self._attempt.get(key.transfer_id)
        superseded = self._live(older) if older is not None else None
        if superseded is not None:
            self._fail(superseded, Fenced("a newer attempt at the transfer has begun"), now, tell=True)
        transfer = _Transfer(key, peer, num_tokens, min(have_tokens, num_tokens), started_at=now, progress_at=now)
        self._open[key] = transfer
        self._attempt[key.transfer_id] = key
        link, transport = self._pairs.get(peer.engine_id, (None, ""))
        if link is not None and link.epoch == peer.epoch:
            self._bind(transfer, link, transport, now)
            return
        if link is not None and link.epoch > peer.epoch:
            self._fail(transfer, PeerLost(f"prefill engine {peer.engine_id} has been restarted"), now)
            return
        if link is not None:
            self._hang_up(link, now)
        if (error := self._outages.why(peer, now)) is not None:
            self.counters["kv_unreachable_transfers_total"] += 1
            self._fail(transfer, error, now)
            return
        self._dial(peer)

    def grant(self, key: TransferKey, blocks: tuple[int, ...], now: float) -> None:
        """See ReceivePort."""
        transfer = self._live(key)
        if transfer is None or transfer.blocks is not None:
            return
        if len(blocks) < self._layout.blocks_for(transfer.num_tokens):
            self._fail(transfer, TransferError(f"{len(blocks)} blocks for {transfer.num_tokens} tokens"), now)
            return
        transfer.blocks = blocks
        transfer.progress_at = now
        for chunk in transfer.chunks.values():
            self._fetch(transfer, chunk)

    def abort(self, key: TransferKey, error: DiptychError, now: float) -> None:
        """See ReceivePort."""
        transfer = self._live(key)
        if transfer is not None:
            self._end(transfer, Closed(key), now, notify=Abort(key, error.code, str(error)))

    # ---- pairs --------------------------------------------------------------------------------

    def pair_up(self, link: Link, transport: str, now: float) -> None:
        """A channel is agreed on and the transport attached. An older channel of the same engine is down with this."""
        old = self._pairs.get(link.engine_id)
        if old is not None:
            self._hang_up(old[0], now)
        self._dialing.discard((link.engine_id, link.epoch))
        self._outages.reached(link.engine_id, link.epoch)
        self._pairs[link.engine_id] = (link, transport)
        self._pulse.begin(link, now)
        for transfer in list(self._open.values()):
            peer = (transfer.peer.engine_id, transfer.peer.epoch)
            if transfer.link is None and transfer.outcome is None and peer == (link.engine_id, link.epoch):
                self._bind(transfer, link, transport, now)

    def pair_failed(self, peer: EngineRef, error: DiptychError, now: float) -> None:
        """The engine was not reached in time or refused: all that waits for it fails, and what comes until it is."""
        self._dialing.discard((peer.engine_id, peer.epoch))
        self._outages.failed(peer, error, now)
        for transfer in list(self._open.values()):
            same = (transfer.peer.engine_id, transfer.peer.epoch) == (peer.engine_id, peer.epoch)
            if same and transfer.link is None and transfer.outcome is None:
                self._fail(transfer, error, now)

    def pair_down(self, link: Link, now: float) -> None:
        """The channel is gone: all that went over it fails."""
        if self._pairs.get(link.engine_id, (None, ""))[0] != link:
            return
        del self._pairs[link.engine_id]
        self._pulse.end(link)
        self._blame.end(link)
        for transfer in list(self._open.values()):
            if transfer.link == link and transfer.outcome is None:
                self._fail(transfer, PeerLost(f"prefill engine {link.engine_id} is gone"), now)

    def heard(self, link: Link, at: float) -> None:
        """The peer said something at that time, which may wait for its turn here still."""
        self._pulse.heard(link, at)

    # ---- completions --------------------------------------------------------------------------

    def fetched(self, ready: ChunkReady, result: FetchResult, now: float) -> None:
        """A Fetch ended. Only after OK may a Scatter of the same chunk follow, as an action."""
        key = ready.key
        self._reading[key] -= 1
        if self._reading[key] == 0:
            del self._reading[key]
            link = self._owes_abort_ack.pop(key, None)
            if link is not None:
                self._send(link, AbortAck(key))
        if result is FetchResult.CHECKSUM:
            self.counters["kv_checksum_failures_total"] += 1  # of an ended transfer too: bytes were altered
        transfer = self._live(key)
        if transfer is None:
            return
        assert transfer.link is not None
        assert transfer.blocks is not None
        if result is FetchResult.OK:
            transfer.progress_at = now
            transfer.chunks[ready.chunk].arrived = True
            transfer.num_scattering += 1
            self._send(transfer.link, self._ack(ready, ChunkStatus.OK))
            self._actions.append(Scatter(ready, transfer.blocks, ready.tok_to == transfer.num_tokens))
            return
        if result is not FetchResult.CHECKSUM:
            self.counters["kv_torn_reads_total" if result is FetchResult.TORN else "kv_fetch_errors_total"] += 1
        if result is FetchResult.CHECKSUM and self._blame.altered(transfer.link, transfer.transport, now):
            self.counters["kv_transports_blamed_total"] += 1
            self._hang_up(transfer.link, now)  # the next transfer dials, without this transport
            return
        chunk = transfer.chunks[ready.chunk]
        if chunk.fetches >= _MAX_FETCHES:
            self._fail(transfer, self._fetch_error(ready, result), now, tell=True)
            return
        if result is not FetchResult.ERROR:
            status = ChunkStatus.CHECKSUM if result is FetchResult.CHECKSUM else ChunkStatus.TORN
            self._send(transfer.link, self._ack(ready, status))
        self._fetch(transfer, chunk)

    def scattered(self, ready: ChunkReady, error: DiptychError | None, now: float) -> None:
        """A Scatter ended; the blocks hold the chunk unless there was an error."""
        transfer = self._open[ready.key]
        transfer.num_scattering -= 1
        if transfer.outcome is not None:
            self._close_if_quiet(transfer, now)
        elif error is not None:
            self._fail(transfer, error, now, tell=True)
        else:
            transfer.chunks[ready.chunk].done = True
            transfer.size_bytes += ready.size_bytes
            transfer.progress_at = now
            self._commit_if_whole(transfer, now)

    # ---- messages -----------------------------------------------------------------------------

    def on_message(self, link: Link, message: Message, now: float) -> None:
        """A message of the peer. One that names another life of the pair or an older attempt is dropped and counted."""
        if self._pairs.get(link.engine_id, (None, ""))[0] != link:
            self.counters["kv_fenced_messages_total"] += 1
            return
        self._pulse.heard(link, now)
        if isinstance(message, Heartbeat):
            self._on_heartbeat(link, message, now)
            return
        transfer = self._open.get(message.key)
        if self._is_stale(message.key) or (transfer is not None and transfer.link != link):
            self.counters["kv_fenced_messages_total"] += 1
            if isinstance(message, Abort):
                self._acknowledge(link, message.key)  # changes nothing here, and the peer's slots wait for it
            return
        match message:
            case ChunkReady() | PrefillFinished():
                if transfer is not None and transfer.outcome is None:
                    self._on_progress(transfer, link, message, now)
                elif transfer is None and self._history.find(message.key) is None:
                    self._send(link, Abort(message.key, TransferError.code, "nobody expects this transfer"))
            case Abort():
                self._on_abort(link, message, now)
            case AbortAck():
                pass
            case _:
                self.counters["kv_fenced_messages_total"] += 1  # a word that only a decode engine says

    def tick(self, now: float) -> None:
        """Let time pass: silent peers, dialing and dialing again, stalls, heartbeats."""
        for link in self._pulse.tick(now):
            self.counters["kv_pairs_lost_total"] += 1
            self._hang_up(link, now)
        for transfer in list(self._open.values()):
            if transfer.outcome is not None:
                continue
            waited = now - transfer.progress_at
            if transfer.link is None:
                if waited > self._settings.dial_timeout_s:
                    name = transfer.peer.engine_id
                    self._fail(transfer, PeerLost(f"prefill engine {name} cannot be reached"), now)
            elif transfer.wanted and transfer.blocks is None:
                transfer.progress_at = now  # it is this engine that has no room
            elif waited > self._settings.stall_s:
                error = TransferTimeout(f"no progress of the transfer for {self._settings.stall_s:g} s")
                self._fail(transfer, error, now, tell=True)
        for peer in self._outages.due(now):
            self._dial(peer)
        for link in self._pulse.due(now):
            alive = tuple(t.key for t in self._open.values() if t.link == link and t.outcome is None)
            self._send(link, Heartbeat(alive))  # an empty one too: the pair itself must be alive

    def _on_heartbeat(self, link: Link, message: Heartbeat, now: float) -> None:
        alive = frozenset(message.alive)
        for transfer in self._open.values():
            if transfer.link != link or transfer.outcome is not None or transfer.finished is not None:
                continue
            if transfer.key in alive:
                transfer.progress_at = now
            elif not transfer.chunks:
                self._send(link, Expect(transfer.key, transfer.have_tokens))  # the first one is lost, or late

    def _on_progress(self, transfer: _Transfer, link: Link, message: ChunkReady | PrefillFinished, now: float) -> None:
        wrong = self._why_wrong(transfer, message)
        if wrong is not None:
            self._fail(transfer, TransferError(wrong), now, tell=True)
            return
        if isinstance(message, ChunkReady) and (known := transfer.chunks.get(message.chunk)) is not None:
            if known.arrived:
                self._send(link, self._ack(message, ChunkStatus.OK))  # the first one is lost
            return
        if message == transfer.finished:
            return  # a repetition is no progress
        transfer.progress_at = now
        if isinstance(message, PrefillFinished):
            transfer.finished = message
            if message.final:
                committed = Committed(transfer.key, message.first_token, final=True)
                self._end(transfer, committed, now, notify=FinalAck(transfer.key))
            else:
                self._commit_if_whole(transfer, now)
        else:
            chunk = transfer.chunks[message.chunk] = _Chunk(message)
            if transfer.blocks is not None:
                self._fetch(transfer, chunk)
            elif not transfer.wanted:
                transfer.wanted = True
                self._deliver(WantBlocks(transfer.key))

    def _why_wrong(self, transfer: _Transfer, message: ChunkReady | PrefillFinished) -> str | None:
        if isinstance(message, PrefillFinished):
            if message.prompt_tokens != transfer.num_tokens:
                return f"the prefill engine computed {message.prompt_tokens} tokens, not {transfer.num_tokens}"
            return None
        known = transfer.chunks.get(message.chunk)
        if known is not None:
            return None if known.ready == message else f"chunk {message.chunk} was announced twice, differently"
        if not transfer.have_tokens <= message.tok_from < message.tok_to <= transfer.num_tokens:
            return f"chunk {message.chunk} holds tokens {message.tok_from}..{message.tok_to}, which nobody wants"
        if message.size_bytes != (message.tok_to - message.tok_from) * self._layout.bytes_per_token:
            return f"chunk {message.chunk} has {message.size_bytes} bytes"
        return None

    def _on_abort(self, link: Link, message: Abort, now: float) -> None:
        transfer = self._live(message.key)
        if transfer is not None:
            self._fail(transfer, error_from_code(message.code, message.message), now)
        self._acknowledge(link, message.key)

    def _acknowledge(self, link: Link, key: TransferKey) -> None:
        """Confirm an Abort, as soon as no fetch reads the transfer's slots."""
        if self._reading[key] > 0:
            self._owes_abort_ack[key] = link
        else:
            self._send(link, AbortAck(key))

    # ---- within -------------------------------------------------------------------------------

    def _live(self, key: TransferKey) -> _Transfer | None:
        transfer = self._open.get(key)
        return transfer if transfer is not None and transfer.outcome is None else None

    def _is_stale(self, key: TransferKey) -> bool:
        """Whether a newer attempt is known. Changes nothing."""
        present = self._attempt.get(key.transfer_id)
        return self._history.is_stale(key) or (present is not None and key.attempt < present.attempt)

    def _hang_up(self, link: Link, now: float) -> None:
        self._actions.append(HangUp(link))
        self.pair_down(link, now)

    def _dial(self, peer: EngineRef) -> None:
        if (peer.engine_id, peer.epoch) not in self._dialing:
            self._dialing.add((peer.engine_id, peer.epoch))
            self._actions.append(Dial(peer, without=self._blame.of(peer)))

    def _bind(self, transfer: _Transfer, link: Link, transport: str, now: float) -> None:
        transfer.link, transfer.transport, transfer.progress_at = link, transport, now
        self._send(link, Expect(transfer.key, transfer.have_tokens))

    def _fetch(self, transfer: _Transfer, chunk: _Chunk) -> None:
        assert transfer.link is not None
        chunk.fetches += 1
        self._reading[transfer.key] += 1
        self._actions.append(Fetch(transfer.link, chunk.ready))

    def _fetch_error(self, ready: ChunkReady, result: FetchResult) -> DiptychError:
        match result:
            case FetchResult.CHECKSUM:
                return ChecksumMismatch(f"chunk {ready.chunk} arrived altered, twice")
            case FetchResult.TORN:
                return ChecksumMismatch(f"the slot of chunk {ready.chunk} was reused before it was read")
            case _:
                return PeerLost(f"chunk {ready.chunk} could not be fetched")

    def _ack(self, ready: ChunkReady, status: ChunkStatus) -> ChunkAck:
        return ChunkAck(ready.key, ready.chunk, ready.slot, ready.slot_gen, status)

    def _commit_if_whole(self, transfer: _Transfer, now: float) -> None:
        """Commit when every chunk is in its place. Chunks that do not tile the prompt end the transfer."""
        finished = transfer.finished
        if finished is None or len(transfer.chunks) < finished.total_chunks:
            return
        at = transfer.have_tokens
        for index in range(finished.total_chunks):
            chunk = transfer.chunks.get(index)
            if chunk is None or chunk.ready.tok_from != at:
                break
            at = chunk.ready.tok_to
        if at != transfer.num_tokens or len(transfer.chunks) > finished.total_chunks:
            self._fail(transfer, TransferError("the chunks do not cover the prompt exactly"), now, tell=True)
        elif all(chunk.done for chunk in transfer.chunks.values()):
            committed = Committed(
                transfer.key,
                finished.first_token,
                final=False,
                size_bytes=transfer.size_bytes,
                seconds=now - transfer.started_at,
                transport=transfer.transport,
            )
            self._end(transfer, committed, now, notify=FinalAck(transfer.key))

    def _fail(self, transfer: _Transfer, error: DiptychError, now: float, *, tell: bool = False) -> None:
        notify = Abort(transfer.key, error.code, str(error)) if tell else None
        self._end(transfer, Failed(transfer.key, error), now, notify=notify)

    def _end(self, transfer: _Transfer, outcome: ReceiveEvent, now: float, *, notify: Message | None) -> None:
        assert transfer.outcome is None
        transfer.outcome = outcome
        if notify is not None and transfer.link is not None:
            self._send(transfer.link, notify)
        self._close_if_quiet(transfer, now)

    def _close_if_quiet(self, transfer: _Transfer, now: float) -> None:
        outcome = transfer.outcome
        if transfer.num_scattering or outcome is None:
            return
        del self._open[transfer.key]
        if self._attempt.get(transfer.key.transfer_id) == transfer.key:
            del self._attempt[transfer.key.transfer_id]
        self._history.end(transfer.key, Ended(), now)
        if isinstance(outcome, Committed):
            self.counters["kv_transfers_total"] += 1
            self.counters["kv_transfer_bytes_total"] += transfer.size_bytes
        elif isinstance(outcome, Failed) and not isinstance(outcome.error, Cancelled | DeadlineExceeded):
            self.counters["kv_transfer_failures_total"] += 1
        else:
            self.counters["kv_transfers_cancelled_total"] += 1
        self._deliver(outcome)

    def _send(self, link: Link, message: Message) -> None:
        self._actions.append(Send(link, message))

    def _deliver(self, event: ReceiveEvent) -> None:
        self._actions.append(Deliver(event))
