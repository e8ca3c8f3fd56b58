"""Who may call which route. Judged where a route was found, so that no spelling of a path leads around it.

Without keys (`security.api_keys`) everybody may do everything, and a request's tenant is what its header says.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from enum import Enum
from typing import Any

from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from diptych.cluster.keys import ApiKeys, Caller
from diptych.cluster.observability.metrics import RouterMetrics
from diptych.protos.errors import Forbidden, Unauthorized
from diptych.protos.trust import Refusals

from .body import label, refuse_body

TENANT_HEADER = "x-tenant"
_CALLER = "diptych.caller"


class Access(Enum):
    """Who may call a route."""

    OPEN = "everybody"
    TENANT = "who holds a key"
    ADMIN = "who holds an admin's key"


class Doorkeeper:
    """Knows the keys, and counts and logs whom it turned away."""

    def __init__(self, keys: ApiKeys | None, metrics: RouterMetrics) -> None:
        self.keys = keys
        self._counter = metrics.counters["refused"]
        self._refusals = Refusals("the API")

    def judge(self, scope: Scope, access: Access) -> None:
        """Returns for who may. Raises Unauthorized, Forbidden, and InvalidRequest for a header that names no tenant."""
        if self.keys is None or access is Access.OPEN:
            return
        try:
            scope[_CALLER] = self._caller(self.keys, scope, access)
        except (Unauthorized, Forbidden) as error:
            self._counter.labels(error.code).inc()
            client = scope.get("client")
            self._refusals.note(client[0] if client else "", error.code)
            raise

    def _caller(self, keys: ApiKeys, scope: Scope, access: Access) -> Caller:
        shown = _shown(scope["headers"])
        caller = keys.caller(shown.pop()) if len(shown) == 1 else None
        if caller is None:
            raise Unauthorized("this server asks for a key: send `Authorization: Bearer KEY`, or the header x-api-key")
        if access is Access.ADMIN and not caller.is_admin:
            raise Forbidden("this page is for an admin's key")
        if label(scope, TENANT_HEADER) not in ("", caller.tenant):
            raise Forbidden(f"the header {TENANT_HEADER} names another tenant than the key's; leave it out")
        return caller

    async def passes(self, scope: Scope, receive: Receive, send: Send, access: Access) -> bool:
        """Whether the request may go on; who may not was answered, and nothing of the body was looked at."""
        try:
            self.judge(scope, access)
        except (Unauthorized, Forbidden) as error:
            await refuse_body(error, receive, send)
            return False
        return True


def _shown(headers: Sequence[tuple[bytes, bytes]]) -> set[bytes]:
    """The different keys in a request's headers; what is not of the form of one counts as one that nobody has."""
    found = set()
    for name, value in headers:
        if name == b"authorization":
            scheme, _, key = value.partition(b" ")
            found.add(key.strip() if scheme.lower() == b"bearer" else b"")
        elif name == b"x-api-key":
            found.add(value.strip())
    return found


def tenant_of(scope: Scope) -> str:
    """The tenant of a request: its key's, or without keys its header's; may be empty. Raises InvalidRequest."""
    caller: Caller | None = scope.get(_CALLER)
    return label(scope, TENANT_HEADER) if caller is None else caller.tenant


class GuardedRoute(Route):
    """A route that says who may call it."""

    def __init__(
        self, path: str, endpoint: Callable[..., Any], *, method: str, access: Access, doorkeeper: Doorkeeper
    ) -> None:
        super().__init__(path, endpoint, methods=[method])
        self._access = access
        self._doorkeeper = doorkeeper

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Starlette's, also for a wrong method; behind the doorkeeper."""
        if await self._doorkeeper.passes(scope, receive, send, self._access):
            await super().handle(scope, receive, send)


def guarded_default(
    doorkeeper: Doorkeeper, default: Callable[[Scope, Receive, Send], Awaitable[None]]
) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    """What answers where there is no route: only who holds a key is told that."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or await doorkeeper.passes(scope, receive, send, Access.TENANT):
            await default(scope, receive, send)

    return answer
