"""Whether this process may reach models over the network: a switch for tests, and the one place that asks it.

upstream.py asks before each request, `testing` turns it. It knows neither requests nor pytest.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from urllib.parse import urlsplit

from .errors import Error

_lock = threading.Lock()
_bans: list[frozenset[str]] = []  # each with the hosts that it lets through; all of them must


class NetworkForbidden(Error, RuntimeError):
    """A test would have reached a real model."""

    code = "llm_network"


@contextmanager
def forbid_network(*, allow: Iterable[str] = ()) -> Iterator[None]:
    """Inside, no request of this process leaves this machine: it raises NetworkForbidden, which nothing tries again.
    Loopback stays open, and so do the hosts of `allow`. Blocks may lie in blocks; then all of them must allow a host.

    It guards models, and media behind addresses, that are reached through a registry; a program's own sockets it does
    not see.
    """
    ban = frozenset(host.lower() for host in allow)
    with _lock:
        _bans.append(ban)
    try:
        yield
    finally:
        with _lock:
            _bans.remove(ban)


def check_network(url: str, what: str) -> None:
    """Raises NetworkForbidden where `what` at `url` may not be reached now."""
    if not _bans:
        return
    host = (urlsplit(url).hostname or "").lower()
    if _is_here(host):
        return
    with _lock:
        is_allowed = all(host in ban for ban in _bans)
    if not is_allowed:
        raise NetworkForbidden(
            f"{what} ({host}) is not reached: forbid_network() holds here. Answer the reference's prefix by a "
            f"ScriptedModel, an EchoModel or a Player (registry.add, registry_of), or give "
            f"forbid_network(allow=[{host!r}])"
        )


def _is_here(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
