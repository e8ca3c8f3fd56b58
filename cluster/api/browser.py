"""What web pages may do, judged before anything else of a request: whose page sends it, and by which name it came.

A page of any site can have its visitor's browser ask servers on that visitor's machine. Its Origin says whose page it
is; a name that was made to point here (DNS rebinding) stands in Host. Programs that are no browser send no Origin.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from diptych.cluster.keys import ApiKeys
from diptych.cluster.observability.metrics import RouterMetrics
from diptych.protos.errors import Forbidden, StoreUnavailable
from diptych.protos.strict_json import printable

from .body import refuse_body

_METHODS = b"GET, POST, DELETE"
# What clients in pages send besides what every page may; a preflight names them.
_HEADERS = (
    b"anthropic-beta, anthropic-version, authorization, content-type, idempotency-key, traceparent, x-api-key, "
    b"x-session-id, x-tenant"
)
_EXPOSED = (
    b"idempotent-replayed, request-id, retry-after, x-request-id, x-schema-coverage, x-schema-unsupported, "
    b"x-should-retry"
)
MAX_AGE_S = 600


class ForeignPage(Forbidden):
    """A web page that this server is not for."""

    code = "foreign_page"


class BrowserGuard:
    """The app behind it gets requests of pages of `origins` alone; and where no key is asked for, by names alone that
    nobody else can make his own: `hosts`, addresses, localhost, and names without a dot, which no public server has.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: Collection[str],
        origins: Collection[str],
        keys: ApiKeys | None,
        metrics: RouterMetrics,
    ) -> None:
        self._app = app
        self._keys = keys
        self._hosts = frozenset(host.lower() for host in hosts)
        self._origins = frozenset(origins)
        self._counter = metrics.counters["refused"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        found: dict[bytes, list[str]] = {b"host": [], b"origin": []}
        for name, value in scope["headers"]:
            if name in found:
                found[name].append(value.decode("latin-1"))
        hosts, origins = found[b"host"], found[b"origin"]
        error = self._page_refusal(hosts, origins)
        if error is None and hosts and not self._is_ours(hosts[0]) and await self._is_open():
            error = _other_name(hosts[0])
        if error is not None:
            self._counter.labels(error.code).inc()
            await refuse_body(error, scope, receive, send)
        elif origins and origins[0] in self._origins:
            await self._share(origins[0], scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _page_refusal(self, hosts: list[str], origins: list[str]) -> Forbidden | None:
        if len(hosts) > 1 or len(origins) > 1:
            return ForeignPage("the headers host and origin may each be sent once")
        if not origins or origins[0] in self._origins:
            return None
        return ForeignPage(
            f"pages of {printable(origins[0])} may not use this server: router.browser.origins names those that may"
        )

    async def _is_open(self) -> bool:
        """Whether who comes needs no key. A page that came by another name has none."""
        if self._keys is None:
            return True
        try:
            await self._keys.look()
        except StoreUnavailable:
            return False  # nobody gets in now
        return not self._keys.is_asked

    def _is_ours(self, host: str) -> bool:
        name = _bare(host).lower().removesuffix(".")
        if name in self._hosts or "." not in name or name.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    async def _share(self, origin: str, scope: Scope, receive: Receive, send: Send) -> None:
        """For a page that may: its browser is told so, and what it may read. Nothing is said of credentials: there are
        no cookies here.
        """
        allowed = [(b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"origin")]
        asked = any(name == b"access-control-request-method" for name, _ in scope["headers"])
        if scope["method"] == "OPTIONS" and asked:
            headers = [
                *allowed,
                (b"access-control-allow-methods", _METHODS),
                (b"access-control-allow-headers", _HEADERS),
                (b"access-control-max-age", str(MAX_AGE_S).encode()),
            ]
            await send({"type": "http.response.start", "status": 204, "headers": headers})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return

        async def telling(message: Any) -> None:
            if message["type"] == "http.response.start":
                more = [*allowed, (b"access-control-expose-headers", _EXPOSED)]
                message = {**message, "headers": [*message.get("headers", ()), *more]}
            await send(message)

        await self._app(scope, receive, telling)


def _other_name(host: str) -> Forbidden:
    return ForeignPage(
        f"this server is not known as {printable(_bare(host))}: call it by its address or localhost, name the host in "
        "router.browser.hosts, or make API keys"
    )


def _bare(host: str) -> str:
    """Without port, and an address without brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    name, _, port = host.rpartition(":")
    return name if name and ":" not in name and port.isdigit() else host
