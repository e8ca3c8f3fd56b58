"""A router replica's end of the holder of listening sockets (cluster/control/holder.py).

`HeldSocket.ask` gets the socket. Should the holder end first (its own replica of a Serve app was replaced), this end
serves on and shows the next holder at the same path the socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
from pathlib import Path
from typing import Any

from diptych.protos.errors import StartupError

from .holder import MESSAGE_BYTES

# The connection, what the holder says of the replicas before this one, and the listening socket.
_Dialled = tuple[socket.socket, dict[str, Any], socket.socket]

DIAL_TIMEOUT_S = 5.0
RETRY_S = 0.2

log = logging.getLogger(__name__)


class HeldSocket:
    """Made by `ask`; `close` once."""

    def __init__(self, path: Path, address: tuple[str, int], dialled: _Dialled) -> None:
        self._path = path
        self._address = address
        self._connection, before, self._sock = dialled
        self._states: list[str] = []
        self._successor: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._following = asyncio.create_task(self._follow(), name="socket holder")
        self.is_first: bool = before["is_first"]  # no replica has accepted there before
        self.replicas_before: dict[str, int] = {how: before[how] for how in ("handed_over", "died")}

    @classmethod
    async def ask(cls, path: Path, host: str, port: int) -> HeldSocket:
        """Raises StartupError as `bind` does, and OSError when no holder answers at `path`."""
        return cls(path, (host, port), await asyncio.to_thread(_dial, path, (host, port), None))

    def listening(self) -> socket.socket:
        """The listening socket, for a listener that will close it."""
        return self._sock.dup()

    async def accepts(self) -> None:
        """Tell that this replica accepts from now on: those that leave may stop."""
        await self._say("accepts")

    async def leaves(self) -> None:
        """Tell that another replica should take over."""
        await self._say("leaves")

    async def successor(self, timeout_s: float) -> int | None:
        """The pid of the replica that accepts instead of this one, which leaves; None when none did within
        `timeout_s`.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(self._successor)
        return None

    async def close(self) -> None:
        """The end of this replica is in order. The socket stays with the holder and other replicas."""
        await self._say("ends")
        self._following.cancel()
        await asyncio.gather(self._following, return_exceptions=True)
        self._connection.close()
        self._sock.close()

    async def _say(self, state: str) -> None:
        self._states.append(state)  # told again to the next holder
        with contextlib.suppress(OSError):
            await asyncio.get_running_loop().sock_sendall(self._connection, json.dumps({"state": state}).encode())

    async def _follow(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            with contextlib.suppress(OSError):
                while data := await loop.sock_recv(self._connection, MESSAGE_BYTES):
                    if not self._successor.done():
                        self._successor.set_result(int(json.loads(data)["successor"]))
            self._connection.close()
            log.warning("the holder of the listening socket has ended; this replica serves on")
            await self._find_next_holder()

    async def _find_next_holder(self) -> None:
        while True:
            await asyncio.sleep(RETRY_S)
            with contextlib.suppress(OSError, StartupError):
                self._connection, _, sock = await asyncio.to_thread(_dial, self._path, self._address, self._sock)
                sock.close()  # the same one
                break
        for state in self._states.copy():
            with contextlib.suppress(OSError):
                self._connection.send(json.dumps({"state": state}).encode())
        log.info("another holder has the listening socket")


def _dial(path: Path, address: tuple[str, int], shown: socket.socket | None) -> _Dialled:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.settimeout(DIAL_TIMEOUT_S)
        connection.connect(str(path))
        asked = json.dumps({"host": address[0], "port": address[1], "pid": os.getpid()}).encode()
        socket.send_fds(connection, [asked], [] if shown is None else [shown.fileno()])
        data, fds, _, _ = socket.recv_fds(connection, MESSAGE_BYTES, 1)
        if not data:
            raise ConnectionResetError("the holder closed the connection")
        told = json.loads(data)
        if not fds:
            raise StartupError(str(told["refused"]))
    except BaseException:
        connection.close()
        raise
    connection.setblocking(False)
    sock = socket.socket(fileno=fds[0])
    sock.set_inheritable(False)
    return connection, told, sock
