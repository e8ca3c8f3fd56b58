"""The prefill engine's end of the protocol as a pure machine: commands, messages and completed copies in, actions out.

The driver (send.py) and the tests call it from one thread. It knows no clock, no socket, no memory.

    open -> bound to a link by Expect -> chunks: filling, staged, acked -> PrefillFinished -> FinalAck -> Released
"""

from __future__ import annotations

from dataclasses import dataclass, field

from diptych.protos.errors import (
    Cancelled,
    DeadlineExceeded,
    DiptychError,
    Fenced,
    PeerLost,
    TransferError,
    TransferTimeout,
    error_from_code,
)
from diptych.protos.ports import Released
from diptych.protos.settings import TransferSettings
from diptych.protos.types import EngineId, EngineRef, TransferKey

from .actions import Deliver, Gather, HangUp, Retire, Send, SendAction
from .history import Ended, History
from .ledger import SlotLedger, SlotState
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
from .pulse import Pulse

_MAX_EARLY = 4096  # transfers that peers expect and nobody has opened yet
_COUNTERS = (
    "kv_transfers_total",
    "kv_transfer_bytes_total",
    "kv_transfer_failures_total",
    "kv_transfers_cancelled_total",
    "kv_fenced_messages_total",
    "kv_checksum_failures_total",
    "kv_torn_reads_total",
    "kv_lease_expired_total",
    "kv_quarantine_timeouts_total",
    "kv_pairs_lost_total",
)
_FROM_DECODE = Expect | ChunkAck | FinalAck | Abort | AbortAck  # what a decode engine says of a transfer


@dataclass(slots=True)
class _Chunk:
    slot: int
    slot_gen: int
    tok_from: int
    tok_to: int
    ready: ChunkReady | None = None  # as announced: the peer may read the slot

    @property
    def staged(self) -> bool:
        return self.ready is not None


@dataclass(slots=True)
class _Transfer:
    key: TransferKey
    peer: EngineRef
    num_tokens: int
    opened_at: float
    renewed_at: float
    link: Link | None = None
    transport: str = ""
    upto: int = 0  # tokens computed
    next_token: int = 0  # tokens before it are cached by the peer or in chunks
    blocks: tuple[int, ...] = ()
    chunks: dict[int, _Chunk] = field(default_factory=dict)  # not acknowledged yet
    num_chunks: int = 0
    num_filling: int = 0
    first_token: int | None = None
    told_finished: bool = False
    is_granted: bool = False  # the peer has taken a chunk, so it has blocks for all of them
    size_bytes: int = 0
    ended: Ended | None = None  # set: waiting for a copy out of the blocks to end, then Released


@dataclass(slots=True)
class _Early:
    link: Link
    have_tokens: int
    since: float


@dataclass(slots=True)
class _Quarantine:
    slots: list[int]
    engine_id: EngineId
    until: float


class SenderMachine:
    """Every `open` ends in exactly one Released. Actions pile up; `take_actions` after each input."""

    def __init__(self, *, settings: TransferSettings, chunk_tokens: int) -> None:
        assert chunk_tokens >= 1
        self.ledger = SlotLedger(settings.slots, settings.pair_min_slots)
        self.counters: dict[str, float] = dict.fromkeys(_COUNTERS, 0.0)
        self._settings = settings
        self._chunk_tokens = chunk_tokens
        self._actions: list[SendAction] = []
        self._open: dict[TransferKey, _Transfer] = {}
        self._early: dict[TransferKey, _Early] = {}
        self._attempt: dict[bytes, TransferKey] = {}  # the open attempt of a transfer id
        self._pairs: dict[EngineId, tuple[Link, str]] = {}
        self._quarantine: dict[TransferKey, _Quarantine] = {}
        self._starved: dict[TransferKey, None] = {}  # wait for a slot, oldest first
        self._pulse = Pulse(settings)
        self._history = History(settings.lease_s + settings.stall_s)

    @property
    def num_open(self) -> int:
        """Transfers that have not been released."""
        return len(self._open)

    @property
    def is_idle(self) -> bool:
        """Whether no timer runs: nothing is unsettled and no pair is up."""
        return not self.is_unsettled and self._pulse.is_idle

    @property
    def is_unsettled(self) -> bool:
        """Whether a transfer is open or expected, or a slot in quarantine."""
        return bool(self._open or self._early or self._quarantine)

    def take_actions(self) -> list[SendAction]:
        """What is to be done now, in this order."""
        actions, self._actions = self._actions, []
        return actions

    # ---- commands of the step thread ----------------------------------------------------------

    def open(self, key: TransferKey, peer: EngineRef, num_tokens: int, now: float) -> None:
        """See SendPort. A key whose transfer has ended already (the peer aborted it first) is released at once."""
        if key in self._open:
            return
        ended = self._history.find(key)
        if ended is not None or self._is_stale(key):
            error = ended.error if ended is not None else None
            self._deliver(Released(key, error or Fenced("this attempt at the transfer is over")))
            return
        self._supersede(key, now)
        transfer = _Transfer(key, peer, num_tokens, opened_at=now, renewed_at=now)
        self._open[key] = transfer
        self._attempt[key.transfer_id] = key
        early = self._early.pop(key, None)
        if early is not None:
            self._bind(transfer, early.link, early.have_tokens, now)

    def computed(self, key: TransferKey, upto: int, blocks: tuple[int, ...], now: float) -> None:
        """See SendPort."""
        transfer = self._live(key)
        if transfer is not None:
            transfer.upto = min(max(upto, transfer.upto), transfer.num_tokens)
            transfer.blocks = blocks
            transfer.renewed_at = now
            self._stage(transfer)

    def finish(self, key: TransferKey, first_token: int, *, final: bool, now: float) -> None:
        """See SendPort."""
        transfer = self._live(key)
        if transfer is None:
            return
        transfer.renewed_at = now
        transfer.first_token = first_token
        if final:
            ended = Ended(final_token=first_token, num_tokens=transfer.num_tokens)
            self._end(transfer, ended, now, notify=self._final_message(key, ended))
        else:
            self._stage(transfer)

    def abort(self, key: TransferKey, error: DiptychError, now: float) -> None:
        """See SendPort. For a key that was never opened: the peer learns of it, and there is no Released."""
        transfer = self._live(key)
        if transfer is not None:
            self._end(transfer, Ended(error), now, notify=Abort(key, error.code, str(error)))
        elif key not in self._open and self._history.find(key) is None:
            self._history.end(key, Ended(error), now)
            early = self._early.pop(key, None)
            if early is not None:
                self._send(early.link, Abort(key, error.code, str(error)))

    # ---- pairs --------------------------------------------------------------------------------

    def pair_up(self, link: Link, transport: str, now: float) -> None:
        """A channel is agreed on. An older channel of the same engine is down with this."""
        old = self._pairs.get(link.engine_id)
        if old is not None:
            self._hang_up(old[0], now)
        self._pairs[link.engine_id] = (link, transport)
        self._pulse.begin(link, now)
        self.ledger.add_pair(link.engine_id)

    def pair_down(self, link: Link, now: float) -> None:
        """The channel is gone: all that went over it ends, its slots are free at once."""
        if self._pairs.get(link.engine_id, (None, ""))[0] != link:
            return
        del self._pairs[link.engine_id]
        self._pulse.end(link)
        error = PeerLost(f"decode engine {link.engine_id} is gone")
        for key in [key for key, early in self._early.items() if early.link == link]:
            del self._early[key]
        for transfer in list(self._open.values()):
            if transfer.link == link and transfer.ended is None:
                self._end(transfer, Ended(error), now, notify=None)
        for key in [key for key, held in self._quarantine.items() if held.engine_id == link.engine_id]:
            self._end_quarantine(key)
        self.ledger.remove_pair(link.engine_id)
        self._feed_starved()

    def heard(self, link: Link, at: float) -> None:
        """The peer said something at that time, which may wait for its turn here still."""
        self._pulse.heard(link, at)

    # ---- completions --------------------------------------------------------------------------

    def gathered(self, key: TransferKey, chunk: int, size_bytes: int, checksum: int, now: float) -> None:
        """A Gather is complete and published."""
        transfer = self._open[key]
        done = transfer.chunks[chunk]
        transfer.num_filling -= 1
        if transfer.ended is not None:
            del transfer.chunks[chunk]
            self._retire(done.slot)
            self._close_if_quiet(transfer, now)
            self._feed_starved()
            return
        assert transfer.link is not None
        done.ready = ChunkReady(key, chunk, done.tok_from, done.tok_to, done.slot, done.slot_gen, size_bytes, checksum)
        self.ledger.staged(done.slot)
        transfer.size_bytes += size_bytes
        self._send(transfer.link, done.ready)
        self._tell_finished(transfer)

    def gather_failed(self, key: TransferKey, chunk: int, error: DiptychError, now: float) -> None:
        """A Gather raised; nothing was published."""
        transfer = self._open[key]
        transfer.num_filling -= 1
        self._retire(transfer.chunks.pop(chunk).slot)
        if transfer.ended is None:
            self._end(transfer, Ended(error), now, notify=Abort(key, error.code, str(error)))
        else:
            self._close_if_quiet(transfer, now)
        self._feed_starved()

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
        if not isinstance(message, _FROM_DECODE):
            self.counters["kv_fenced_messages_total"] += 1
            return
        # An old attempt that ended here may still have slots in quarantine: its last words count.
        last_word = isinstance(message, FinalAck | Abort | AbortAck) and message.key in self._quarantine
        stale = self._is_stale(message.key) and not last_word
        transfer = self._open.get(message.key)
        if stale or (transfer is not None and transfer.link not in (None, link)):
            self.counters["kv_fenced_messages_total"] += 1
            return
        if isinstance(message, Expect | Abort):
            self._supersede(message.key, now)
        match message:
            case Expect():
                self._on_expect(link, message, now)
            case ChunkAck():
                self._on_chunk_ack(link, message, now)
            case FinalAck(key):
                self._on_final_ack(link, key, now)
            case Abort():
                self._on_abort(link, message, now)
            case AbortAck(key):
                self._end_quarantine(key)
                self._feed_starved()

    def tick(self, now: float) -> None:
        """Let time pass: silent peers, leases, expectations that nobody opened, quarantines."""
        for link in self._pulse.tick(now):
            self.counters["kv_pairs_lost_total"] += 1
            self._hang_up(link, now)
        for transfer in list(self._open.values()):
            if transfer.ended is None and now - transfer.renewed_at > self._settings.lease_s:
                self.counters["kv_lease_expired_total"] += 1
                error = TransferTimeout(f"no sign of the decode engine for {self._settings.lease_s:g} s")
                notify = Abort(transfer.key, error.code, str(error))
                self._end(transfer, Ended(error), now, notify=notify, quarantine=False)
        for key, early in list(self._early.items()):
            if now - early.since > self._settings.lease_s:
                del self._early[key]
                error = TransferTimeout("the prefill engine was not asked for this request")
                self._history.end(key, Ended(error), now)
                self._send(early.link, Abort(key, error.code, str(error)))
        for key, held in list(self._quarantine.items()):
            if now >= held.until:
                self.counters["kv_quarantine_timeouts_total"] += 1
                self._end_quarantine(key)
        self._feed_starved()

    def _on_expect(self, link: Link, message: Expect, now: float) -> None:
        key = message.key
        transfer = self._open.get(key)
        if transfer is None:
            if self._history.find(key) is not None:
                self._tell_ended(link, key)
            elif len(self._early) >= _MAX_EARLY:
                self._send(link, Abort(key, "overloaded", "too many transfers are expected"))
            else:
                self._early.setdefault(key, _Early(link, message.have_tokens, now))
        elif transfer.ended is None and transfer.link is None:
            if (transfer.peer.engine_id, transfer.peer.epoch) != (link.engine_id, link.epoch):
                self.counters["kv_fenced_messages_total"] += 1
                self._send(link, Abort(key, Fenced.code, "the transfer is meant for another decode engine"))
            else:
                self._bind(transfer, link, message.have_tokens, now)

    def _bind(self, transfer: _Transfer, link: Link, have_tokens: int, now: float) -> None:
        if (transfer.peer.engine_id, transfer.peer.epoch) != (link.engine_id, link.epoch):
            self._send(link, Abort(transfer.key, Fenced.code, "the transfer is meant for another decode engine"))
            return
        transfer.link = link
        transfer.transport = self._pairs[link.engine_id][1]
        transfer.next_token = min(have_tokens, transfer.num_tokens)
        transfer.renewed_at = now
        self._stage(transfer)

    def _on_chunk_ack(self, link: Link, message: ChunkAck, now: float) -> None:
        transfer = self._open.get(message.key)
        if transfer is None:
            if self._history.find(message.key) is None:
                self._tell_ended(link, message.key)
            return
        chunk = transfer.chunks.get(message.chunk)
        if chunk is None or transfer.ended is not None:
            return
        if not chunk.staged or (chunk.slot, chunk.slot_gen) != (message.slot, message.slot_gen):
            self.counters["kv_fenced_messages_total"] += 1
            return
        transfer.renewed_at = now
        if message.status is ChunkStatus.OK:
            del transfer.chunks[message.chunk]
            self._retire(chunk.slot)
            transfer.is_granted = True
            self._stage(transfer)
            self._feed_starved()
        elif message.status is ChunkStatus.CHECKSUM:
            self.counters["kv_checksum_failures_total"] += 1
        else:
            self.counters["kv_torn_reads_total"] += 1

    def _on_final_ack(self, link: Link, key: TransferKey, now: float) -> None:
        transfer = self._open.get(key)
        if transfer is None:
            self._end_quarantine(key)
            if self._history.find(key) is None:
                self._tell_ended(link, key)
        elif transfer.told_finished and transfer.ended is None:
            self._end(transfer, Ended(), now, notify=None)
        self._feed_starved()

    def _on_abort(self, link: Link, message: Abort, now: float) -> None:
        key = message.key
        self._early.pop(key, None)
        transfer = self._live(key)
        ended = Ended(error_from_code(message.code, message.message))
        if transfer is not None:
            self._end(transfer, ended, now, notify=None)
        elif key not in self._open:
            self._history.end(key, ended, now)  # an `open` or `Expect` that comes later meets this
        self._end_quarantine(key)
        self._send(link, AbortAck(key))
        self._feed_starved()

    def _on_heartbeat(self, link: Link, message: Heartbeat, now: float) -> None:
        alive = []
        for key in message.alive:
            transfer = self._open.get(key)
            if transfer is not None and transfer.link == link:
                transfer.renewed_at = now
                alive.append(key)
                self._repeat(transfer, link)
            elif key in self._early:
                alive.append(key)
            elif transfer is None:
                self._tell_ended(link, key)
        self._send(link, Heartbeat(tuple(alive)))

    # ---- within -------------------------------------------------------------------------------

    def _live(self, key: TransferKey) -> _Transfer | None:
        transfer = self._open.get(key)
        return transfer if transfer is not None and transfer.ended is None else None

    def _is_stale(self, key: TransferKey) -> bool:
        """Whether a newer attempt is known. Changes nothing."""
        present = self._attempt.get(key.transfer_id)
        return self._history.is_stale(key) or (present is not None and key.attempt < present.attempt)

    def _supersede(self, key: TransferKey, now: float) -> None:
        """A newer attempt has begun, here or at the peer: it ends the older one."""
        self._history.note(key, now)
        older = self._attempt.get(key.transfer_id)
        transfer = self._live(older) if older is not None and older.attempt < key.attempt else None
        if transfer is not None:
            error = Fenced("a newer attempt at the transfer has begun")
            self._end(transfer, Ended(error), now, notify=Abort(transfer.key, error.code, str(error)))

    def _hang_up(self, link: Link, now: float) -> None:
        self._actions.append(HangUp(link))
        self.pair_down(link, now)

    def _stage(self, transfer: _Transfer) -> None:
        """Put as much as possible of what is computed into slots, then tell that this was all."""
        link = transfer.link
        if link is None or transfer.ended is not None:
            return
        while (num_tokens := self._stageable(transfer)) > 0:
            slot = self.ledger.try_take(link.engine_id, transfer.key, spare=self._spare(transfer, link))
            if slot is None:
                self._starved[transfer.key] = None
                return
            tok_from, tok_to = transfer.next_token, transfer.next_token + num_tokens
            chunk = _Chunk(slot, self.ledger.slots[slot].generation, tok_from, tok_to)
            index = transfer.num_chunks
            transfer.chunks[index] = chunk
            transfer.num_chunks += 1
            transfer.num_filling += 1
            transfer.next_token = tok_to
            self._actions.append(
                Gather(transfer.key, index, slot, chunk.slot_gen, tok_from, tok_to, transfer.blocks),
            )
        self._starved.pop(transfer.key, None)
        self._tell_finished(transfer)

    def _spare(self, transfer: _Transfer, link: Link) -> int | None:
        """Slots that this transfer must leave to others of its pair; None: it may take another pair's share, too.

        Chunks of a transfer without blocks stay in their slots until the peer has room, and room may come only from a
        transfer that has blocks: while one of those is under way, the last slot is for them. No share holds up one slot
        of theirs: a pair that comes back may find its share, and with it the last slot, kept from everybody. Only one,
        or a peer that fetches slowly would take what others are sure of.
        """
        granted = [other for other in self._open.values() if other.link == link and other.is_granted]
        if transfer.is_granted:
            return 0 if any(other.chunks for other in granted) else None
        return int(any(other.ended is None and other.next_token < other.num_tokens for other in granted))

    def _stageable(self, transfer: _Transfer) -> int:
        """Tokens of the next chunk, 0 for none. Slots go out full, except at the prompt's end and when none is out."""
        ready = min(transfer.upto - transfer.next_token, self._chunk_tokens)
        full = ready == self._chunk_tokens or transfer.upto == transfer.num_tokens or not transfer.chunks
        return ready if full else 0

    def _tell_finished(self, transfer: _Transfer) -> None:
        all_out = transfer.next_token >= transfer.num_tokens and transfer.num_filling == 0
        if transfer.link is None or transfer.first_token is None or transfer.told_finished or not all_out:
            return
        transfer.told_finished = True
        self._send(transfer.link, self._finished_message(transfer))

    def _finished_message(self, transfer: _Transfer) -> PrefillFinished:
        assert transfer.first_token is not None
        return PrefillFinished(
            transfer.key, transfer.num_chunks, transfer.num_tokens, transfer.first_token, final=False
        )

    def _repeat(self, transfer: _Transfer, link: Link) -> None:
        """Whatever the peer has not acknowledged, once more: it, or the acknowledgement, may be lost."""
        if transfer.ended is None:
            for chunk in transfer.chunks.values():
                if chunk.ready is not None:
                    self._send(link, chunk.ready)
            if transfer.told_finished:
                self._send(link, self._finished_message(transfer))

    def _final_message(self, key: TransferKey, ended: Ended) -> PrefillFinished:
        assert ended.final_token is not None
        return PrefillFinished(key, 0, ended.num_tokens, ended.final_token, final=True)

    def _tell_ended(self, link: Link, key: TransferKey) -> None:
        """Answer a peer that speaks of a transfer that is not open here."""
        ended = self._history.find(key)
        if ended is None:
            self._send(link, Abort(key, TransferError.code, "the prefill engine does not know this transfer"))
        elif ended.final_token is not None:
            self._send(link, self._final_message(key, ended))
        else:
            error = ended.error or Fenced("the transfer is over")
            self._send(link, Abort(key, error.code, str(error)))

    def _end(
        self, transfer: _Transfer, ended: Ended, now: float, *, notify: Message | None, quarantine: bool = True
    ) -> None:
        """Stop. With `notify` the peer may still read what was announced: its slots wait for its answer."""
        assert transfer.ended is None
        transfer.ended = ended
        self._starved.pop(transfer.key, None)
        staged = [index for index, chunk in transfer.chunks.items() if chunk.staged]
        slots = [transfer.chunks.pop(index).slot for index in staged]
        if notify is not None and transfer.link is not None:
            self._send(transfer.link, notify)
            if slots and quarantine:
                until = now + self._settings.abort_ack_s
                self._quarantine[transfer.key] = _Quarantine(slots, transfer.link.engine_id, until)
                for slot in slots:
                    self.ledger.quarantine(slot)
                slots = []
        for slot in slots:
            self._retire(slot)
        self._close_if_quiet(transfer, now)

    def _close_if_quiet(self, transfer: _Transfer, now: float) -> None:
        if transfer.num_filling:
            return
        ended = transfer.ended
        assert ended is not None
        del self._open[transfer.key]
        if self._attempt.get(transfer.key.transfer_id) == transfer.key:
            del self._attempt[transfer.key.transfer_id]
        self._history.end(transfer.key, ended, now)
        if ended.error is None:
            self.counters["kv_transfers_total"] += 1
            self.counters["kv_transfer_bytes_total"] += transfer.size_bytes
        elif isinstance(ended.error, Cancelled | DeadlineExceeded):
            self.counters["kv_transfers_cancelled_total"] += 1
        else:
            self.counters["kv_transfer_failures_total"] += 1
        seconds = now - transfer.opened_at
        self._deliver(Released(transfer.key, ended.error, transfer.size_bytes, seconds, transfer.transport))

    def _end_quarantine(self, key: TransferKey) -> None:
        held = self._quarantine.pop(key, None)
        for slot in held.slots if held is not None else ():
            self._retire(slot)

    def _retire(self, slot: int) -> None:
        self._actions.append(Retire(slot, self.ledger.retire(slot)))

    def _feed_starved(self) -> None:
        # First those whose chunks will leave their slots at once.
        for key in sorted(self._starved, key=lambda key: not self._open[key].is_granted):
            self._stage(self._open[key])

    def _send(self, link: Link, message: Message) -> None:
        self._actions.append(Send(link, message))

    def _deliver(self, event: Released) -> None:
        self._actions.append(Deliver(event))

    def check_integrity(self) -> None:
        """Raise AssertionError unless every busy slot belongs to a live chunk or a quarantine."""
        self.ledger.check_integrity()
        owned = [chunk.slot for transfer in self._open.values() for chunk in transfer.chunks.values()]
        owned += [slot for held in self._quarantine.values() for slot in held.slots]
        busy = [index for index, slot in enumerate(self.ledger.slots) if slot.state is not SlotState.FREE]
        assert sorted(owned) == busy, f"slots in use {busy}, owned {sorted(owned)}"
