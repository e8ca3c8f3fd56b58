"""An address to listen at, bound by whoever keeps it: the listener itself, or a holder that hands it to listeners."""

from __future__ import annotations

import errno
import socket

from diptych.protos.errors import StartupError

BACKLOG = 1024


def bind(host: str, port: int) -> socket.socket:
    """A non-blocking socket that listens at host:port; port 0 takes a free one. Raises StartupError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends without delay on what a socket accepts only where that names its protocol; else the second answer of
    # a connection waits 40 ms for the client's acknowledgement.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(BACKLOG)
    except OSError as exc:
        sock.close()
        if exc.errno == errno.EADDRINUSE:
            raise StartupError(
                f"port {port} on {host} is in use by another program; stop it or choose another port with router.port"
            ) from exc
        raise StartupError(f"cannot listen on {host}:{port}: {exc.strerror}") from exc
    sock.setblocking(False)
    return sock
