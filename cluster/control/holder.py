"""The API's listening sockets, held by a process that outlives router replicas. Who holds one accepts from the kernel's
one queue for it; connections that come while no replica accepts wait there, also after a `kill -9`.

    replica -> holder   ask (host, port, pid; with a socket that it has already)   accepts   leaves   ends
    holder -> replica   given (with the socket; how replicas before it went) or refused     successor (pid)
    holder -> holder    inherits                                     its addresses, each with the socket, and an end

A replica that leaves goes on accepting until it is told that another one does. cluster/control/held.py is its end.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import selectors
import socket
import struct
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diptych.cluster.api.address import bind
from diptych.protos.errors import StartupError
from diptych.protos.trust import Refusals

MESSAGE_BYTES = 4096
MAX_REPLICAS = 64
JOIN_TIMEOUT_S = 5.0
INHERIT_TIMEOUT_S = 2.0

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Replica:
    connection: socket.socket
    pid: int
    accepts: bool = False
    leaves: bool = False
    ends: bool = False
    is_told: bool = False  # of its successor


@dataclass(slots=True)
class _Address:
    """One listening socket and who has it."""

    sock: socket.socket
    replicas: list[_Replica] = field(default_factory=list)
    had_one: bool = False  # some replica accepted there
    handed_over: int = 0
    died: int = 0


class SocketHolder:
    """`start` once, `close` once; a thread of its own does the rest. An address is bound when it is first asked for."""

    def __init__(self, path: Path) -> None:
        """`path` of the unix socket, in a folder that nobody else can enter: who reaches it may have the sockets."""
        self.path = path
        self._addresses: dict[tuple[str, int], _Address] = {}
        self._places: dict[socket.socket, tuple[_Address, _Replica]] = {}
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._inode = 0
        self._refusals = Refusals("the socket holder")
        self._thread = threading.Thread(target=self._run, name="socket holder", daemon=True)

    def start(self) -> None:
        """Raises StartupError. A file that an earlier holder left there is replaced; one that lives (Serve replaces its
        replica) shares what it has, or a replica that asks now would get another socket than those before it.
        """
        try:
            self._inherit()
        except OSError:  # none lives
            pass
        except (ValueError, LookupError, TypeError) as exc:  # one of another version
            log.warning("the socket holder before this one was not understood: %r", exc)
        try:
            self.path.unlink(missing_ok=True)
            self._door.bind(str(self.path))
            self._door.listen(MAX_REPLICAS)
            self._inode = self.path.stat().st_ino
        except OSError as exc:
            for sock in (self._door, self._wake, self._woken, *(one.sock for one in self._addresses.values())):
                sock.close()
            raise StartupError(f"cannot create {self.path}: {exc.strerror or exc}") from exc
        self._door.setblocking(False)
        for sock in (self._door, self._woken):
            self._selector.register(sock, selectors.EVENT_READ)
        self._thread.start()

    def close(self) -> None:
        """Hold nothing any more. An address goes when no replica has it either."""
        with contextlib.suppress(OSError):  # closed already
            self._wake.send(b"x")
        if self._thread.ident is not None:
            self._thread.join(JOIN_TIMEOUT_S)
        with contextlib.suppress(OSError):
            if self.path.stat().st_ino == self._inode:  # else a later holder's
                self.path.unlink()
        self._wake.close()

    def _inherit(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(INHERIT_TIMEOUT_S)
            connection.connect(str(self.path))
            connection.send(json.dumps({"inherits": True}).encode())
            while True:
                data, fds, _, _ = socket.recv_fds(connection, MESSAGE_BYTES, 1)
                if not fds:
                    return
                sock = socket.socket(fileno=fds[0])
                sock.set_inheritable(False)
                told = json.loads(data)
                key = str(told.pop("host")), int(told.pop("port"))
                self._addresses[key] = _Address(sock, **told)

    def _bequeath(self, connection: socket.socket) -> None:
        for (host, port), address in self._addresses.items():
            told = {"host": host, "port": port, "had_one": address.had_one}
            told |= {"handed_over": address.handed_over, "died": address.died}
            socket.send_fds(connection, [json.dumps(told).encode()], [address.sock.fileno()])
        connection.send(b"{}")

    def _run(self) -> None:
        try:
            while True:
                for key, _ in self._selector.select():
                    sock = key.fileobj
                    assert isinstance(sock, socket.socket)
                    if sock is self._woken:
                        return
                    try:
                        self._accept() if sock is self._door else self._read(sock)
                    except Exception as exc:
                        self._refusals.note("", f"what it said made no sense: {exc!r:.200}")
                        self._drop(sock)
        finally:
            for sock in (self._woken, self._door, *self._places, *(a.sock for a in self._addresses.values())):
                sock.close()
            self._selector.close()

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
            connection, _ = self._door.accept()
            pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if uid != os.getuid():
                self._refusals.note("", f"process {pid} belongs to user {uid}")
                connection.close()
                return
            connection.setblocking(False)
            self._selector.register(connection, selectors.EVENT_READ)

    def _drop(self, connection: socket.socket) -> None:
        if connection is self._door:
            return
        with contextlib.suppress(KeyError):
            self._selector.unregister(connection)
        connection.close()
        if (place := self._places.pop(connection, None)) is None:
            return
        address, replica = place
        address.replicas.remove(replica)
        if replica.accepts and not (replica.is_told or replica.ends):
            address.died += 1
            log.warning("router replica %d died; connections wait for the next one", replica.pid)

    def _read(self, connection: socket.socket) -> None:
        try:
            data, fds, flags, _ = socket.recv_fds(connection, MESSAGE_BYTES, 1)
        except BlockingIOError:
            return
        except OSError:
            data, fds, flags = b"", [], 0
        shown = [socket.socket(fileno=fd) for fd in fds]
        try:
            if not data or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                self._drop(connection)
            elif connection in self._places:
                self._note(connection, str(json.loads(data)["state"]))
            elif "inherits" in (asked := json.loads(data)):
                self._bequeath(connection)
            else:
                self._give(connection, asked, shown)
        finally:
            for sock in shown:
                sock.close()

    def _give(self, connection: socket.socket, asked: dict[str, Any], shown: list[socket.socket]) -> None:
        key = (str(asked["host"]), int(asked["port"]))
        address = self._addresses.get(key)
        if address is None:
            try:
                sock = shown.pop() if shown else bind(*key)
            except StartupError as exc:
                connection.send(json.dumps({"refused": str(exc)}).encode())
                return
            sock.set_inheritable(False)
            address = self._addresses[key] = _Address(sock)
        replica = _Replica(connection, int(asked["pid"]))
        address.replicas.append(replica)
        self._places[connection] = (address, replica)
        going = sum(one.accepts and one.leaves and not one.is_told for one in address.replicas)
        before = {
            "is_first": not address.had_one,
            "handed_over": address.handed_over + going,
            "died": address.died,
        }
        socket.send_fds(connection, [json.dumps(before).encode()], [address.sock.fileno()])

    def _note(self, connection: socket.socket, state: str) -> None:
        address, replica = self._places[connection]
        if state == "accepts":
            replica.accepts = address.had_one = True
        elif state == "leaves":
            replica.leaves = True
        elif state == "ends":
            replica.ends = True
        else:
            raise ValueError(f"a replica says {state[:40]!r}")
        serving = [one for one in address.replicas if one.accepts and not (one.leaves or one.ends)]
        for one in address.replicas if serving else []:
            if one.leaves and not one.is_told:
                one.is_told = True
                address.handed_over += one.accepts
                log.info("router replica %d hands over to %d", one.pid, serving[-1].pid)
                with contextlib.suppress(OSError):  # it has ended meanwhile
                    one.connection.send(json.dumps({"successor": serving[-1].pid}).encode())


def holder_path(folder: Path, cluster: str = "") -> Path:
    """Of the unix socket in `folder`; `cluster` tells apart those of several Ray clusters."""
    return folder / f"listen{cluster}.sock"
