"""One host: the ring's memfd is passed over a unix socket, once for each capability that a HelloAck carried.

Nothing has a name but the socket, in the 0700 run directory: when both processes are gone, so is the memory.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import struct
import threading
from pathlib import Path

from diptych.protos.errors import PeerLost, StartupError
from diptych.protos.trust import Refusals

from ..ring import RingMemory, RingView, SlotRef

log = logging.getLogger(__name__)

_CAPABILITY_BYTES = 16
_HANDSHAKE_S = 2.0
_RETRY_S = 0.1
_MAX_PATH = 107  # of a unix socket on Linux
_MAX_INVITES = 1024  # outstanding; the oldest is forgotten


class ShmOwner:
    """Listens in `run_dir` on a thread of its own and hands the ring's descriptor to invited peers of the same user."""

    def __init__(self, ring: RingMemory, run_dir: Path) -> None:
        self._ring = ring
        self.refused = Refusals("the staging ring")
        self._path = run_dir / f"kv-{secrets.token_hex(4)}.sock"
        if len(os.fsencode(self._path)) > _MAX_PATH:
            raise StartupError(
                f"The run directory's path is too long for a unix socket: {self._path}. Use a shorter one."
            )
        self._invites: dict[bytes, None] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(self._path))
        os.chmod(self._path, 0o600)
        self._listener.listen(64)
        # Readers get a descriptor that cannot be mapped writable.
        self._read_fd = os.open(f"/proc/self/fd/{ring.fd}", os.O_RDONLY | os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._serve, name="kv-shm-owner", daemon=True)
        self._thread.start()

    def invite(self) -> bytes:
        """See RingOwner: a one-time capability and the socket's path."""
        capability = secrets.token_bytes(_CAPABILITY_BYTES)
        with self._lock:
            self._invites[capability] = None
            while len(self._invites) > _MAX_INVITES:
                del self._invites[next(iter(self._invites))]
        return capability + os.fsencode(self._path)

    def close(self) -> None:
        """See RingOwner."""
        if self._read_fd < 0:
            return
        self._closing.set()
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread, which `close` alone would not
        self._thread.join()
        self._listener.close()
        os.close(self._read_fd)
        self._read_fd = -1
        self._path.unlink(missing_ok=True)

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError as exc:
                if self._closing.is_set():
                    return
                log.warning("a peer could not be taken: %s", exc)  # no descriptor is free, for one
                self._closing.wait(_RETRY_S)
                continue
            with peer:
                try:
                    self._hand_over(peer)
                except OSError:
                    continue  # the peer went away or was silent: its business

    def _hand_over(self, peer: socket.socket) -> None:
        peer.settimeout(_HANDSHAKE_S)
        credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        _pid, uid, _gid = struct.unpack("3i", credentials)
        try:
            capability = peer.recv(_CAPABILITY_BYTES, socket.MSG_WAITALL)
        except OSError:  # silent for too long
            capability = b""
        with self._lock:
            invited = capability in self._invites
            self._invites.pop(capability, None)
        if invited and uid == os.geteuid():
            socket.send_fds(peer, [b"+"], [self._read_fd])
        else:
            self.refused.note(f"user {uid}", "a caller without an invitation")
            peer.sendall(b"-")


class ShmReader:
    """Maps the ring that `blob` invites to. Blocks for up to two seconds; raises PeerLost when it cannot be had."""

    inline = True

    def __init__(self, blob: bytes, num_slots: int, slot_bytes: int) -> None:
        fds: list[int] = []
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
                peer.settimeout(_HANDSHAKE_S)
                peer.connect(os.fsdecode(blob[_CAPABILITY_BYTES:]))
                peer.sendall(blob[:_CAPABILITY_BYTES])
                _data, fds, _flags, _address = socket.recv_fds(peer, 1, 1)
            if not fds:
                raise PeerLost("the prefill engine did not hand over its staging ring")
            self._view: RingView | None = RingView(fds[0], num_slots, slot_bytes, writable=False)
        except (OSError, ValueError) as exc:
            raise PeerLost(f"the prefill engine's staging ring cannot be mapped: {exc}") from exc
        finally:
            for fd in fds:
                os.close(fd)

    def read(self, ref: SlotRef, out: memoryview) -> None:
        """See RingReader. The mapping outlives its owner: a dead peer gives stale bytes at worst, never a fault."""
        if self._view is None:
            raise PeerLost("the ring is closed")
        self._view.read(ref, out)

    def close(self) -> None:
        """See RingReader."""
        view, self._view = self._view, None
        if view is not None:
            view.close()
