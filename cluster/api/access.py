"""Who may call which route, and how often. Judged where a route was found, so that no spelling of a path leads around
it, and before the body is read.

Where there is no key at all (keys.py) everybody may do everything, and a request's tenant is what its header says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any

from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from diptych.cluster.config import LimitSettings, TenantSettings
from diptych.cluster.keys import ApiKeys, Key
from diptych.cluster.keys import Scope as Opens
from diptych.cluster.observability.metrics import RouterMetrics
from diptych.protos.errors import DiptychError, Forbidden, OverShare, RateLimited, StoreUnavailable, Unauthorized
from diptych.protos.trust import Refusals

from .body import label, refuse_body
from .errors import ROUTE
from .fair_thread import TENANT
from .limits import Headers, Limiter, Visit, together

TENANT_HEADER = "x-tenant"
OWN_SHARE = 7  # a tenant's open requests are at most so many times the connections that it leaves to others
_CALLER = "diptych.caller"
_MOST_URGENT = "diptych.most_urgent"


class Access(Enum):
    """What a route asks for: in words, the scope, and whether its POSTs count against limits, but for cancelling."""

    OPEN = "nothing", None, False
    TENANT = "any key", None, False
    INFERENCE = "requests to models", Opens.INFERENCE, True
    ANSWERS = "what belongs to such requests and computes none", Opens.INFERENCE, False
    FILES = "files and batches", Opens.FILES, True
    ADMIN = "pages of the whole cluster", Opens.ADMIN, False

    @property
    def opens(self) -> Opens | None:
        """The scope that a key must have; None: any."""
        scope: Opens | None = self.value[1]
        return scope

    @property
    def is_metered(self) -> bool:
        """Whether its POSTs count."""
        counts: bool = self.value[2]
        return counts


class Doorkeeper:
    """Knows the keys and the limits, and counts and logs whom it turned away."""

    def __init__(
        self,
        keys: ApiKeys | None,
        metrics: RouterMetrics,
        tenants: Mapping[str, TenantSettings] | None = None,
        *,
        most_open: int = LimitSettings().max_connections,
    ) -> None:
        """`keys` None: nobody is asked for one, whatever the store holds. `most_open`: requests, each a connection."""
        self.keys = keys
        self._most_open = most_open
        self._num_open = 0
        self._open: Counter[str] = Counter()  # requests of holders of keys, by tenant
        self._tenants = tenants or {}
        self._limiter = Limiter(tenants or {})
        self._counter = metrics.counters["refused"]
        self._refusals = Refusals("the API")

    async def judge(self, scope: Scope, access: Access) -> None:
        """Returns for who may. Raises Unauthorized, Forbidden, RateLimited after many wrong keys, StoreUnavailable
        where no key could be read yet, and InvalidRequest for a header that names no tenant.
        """
        if access is Access.OPEN:
            return
        if self.keys is not None:
            await self.keys.look()
            if self.keys.is_asked:
                key = scope[_CALLER] = self._caller(self.keys, scope, access)
                scope[_MOST_URGENT] = self._tenants.get(key.tenant, TenantSettings()).most_urgent
                TENANT.set(key.tenant)
                return
        TENANT.set(label(scope, TENANT_HEADER))

    def _caller(self, keys: ApiKeys, scope: Scope, access: Access) -> Key:
        shown = _shown(scope["headers"])
        key = keys.holder(next(iter(shown))) if len(shown) == 1 else None
        if key is None:
            if any(shown) and (refusal := self._limiter.failed(_address(scope))) is not None:
                raise refusal
            raise Unauthorized("this server asks for a key: send `Authorization: Bearer KEY`, or the header x-api-key")
        if access.opens is not None and access.opens not in key.scopes:
            raise Forbidden(
                "this page is for an admin's key"
                if access is Access.ADMIN
                else f"this needs a key with the scope {access.opens}; yours has {', '.join(sorted(key.scopes))}"
            )
        if label(scope, TENANT_HEADER) not in ("", key.tenant):
            raise Forbidden(f"the header {TENANT_HEADER} names another tenant than the key's; leave it out")
        return key

    @contextmanager
    def opened(self, scope: Scope) -> Iterator[OverShare | None]:
        """For as long as a request is open; what to answer instead of working on it. A tenant may take seven eighths of
        the connections: slow bodies and slow readers would keep everybody else out.
        """
        key: Key | None = scope.get(_CALLER)
        if key is None:
            yield None
            return
        own, free = self._open[key.tenant], self._most_open - self._num_open
        refusal = None
        if own >= OWN_SHARE * max(free, 0) and own:
            refusal = OverShare(f"{own} requests of this tenant are open, and others have the rest of the connections")
        self._num_open += 1
        self._open[key.tenant] += 1
        try:
            yield refusal
        finally:
            self._num_open -= 1
            self._open[key.tenant] -= 1
            if not self._open[key.tenant]:
                del self._open[key.tenant]

    def admit(self, scope: Scope) -> tuple[Visit | None, RateLimited | None, Headers]:
        """As Limiter's. Raises InvalidRequest for a header that names no tenant."""
        return self._limiter.admit(scope.get(_CALLER), tenant_of(scope))

    async def passes(self, scope: Scope, receive: Receive, send: Send, access: Access) -> bool:
        """Whether the request may go on; who may not was answered, and nothing of the body was looked at."""
        try:
            await self.judge(scope, access)
        except (Unauthorized, Forbidden, RateLimited, StoreUnavailable) as error:
            await self.refuse(error, scope, receive, send)
            return False
        return True

    async def refuse(
        self, error: DiptychError, scope: Scope, receive: Receive, send: Send, headers: Headers | None = None
    ) -> None:
        """Answer, count and log."""
        self._counter.labels(error.code).inc()
        if isinstance(error, (Unauthorized, Forbidden)):
            self._refusals.note(_address(scope), error.code)
        await refuse_body(error, scope, receive, _telling(send, headers) if headers else send)


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


def _address(scope: Scope) -> str:
    client = scope.get("client")
    return str(client[0]) if client else ""


def tenant_of(scope: Scope) -> str:
    """The tenant of a request: its key's, or without keys its header's; may be empty. Raises InvalidRequest."""
    key: Key | None = scope.get(_CALLER)
    return label(scope, TENANT_HEADER) if key is None else key.tenant


def caller_of(scope: Scope) -> Key | None:
    """The key that opened; None where nobody is asked for one."""
    key: Key | None = scope.get(_CALLER)
    return key


def may_administer(scope: Scope) -> bool:
    """Whether a request may see what is all tenants'; where no key is asked for, everybody may."""
    key: Key | None = scope.get(_CALLER)
    return key is None or Opens.ADMIN in key.scopes


def most_urgent_of(scope: Scope) -> int | None:
    """The lowest priority that a request may ask for; None where nobody showed a key: then all are one tenant's."""
    return scope.get(_MOST_URGENT)


class GuardedRoute(Route):
    """A route that says who may call it."""

    def __init__(
        self, path: str, endpoint: Callable[..., Any], *, method: str, access: Access, doorkeeper: Doorkeeper
    ) -> None:
        super().__init__(path, endpoint, methods=[method])
        self.access = access
        self._doorkeeper = doorkeeper
        # Who has used up his limit must be able to cancel.
        self._cancels = path.endswith("/cancel")
        self._is_metered = method == "POST" and access.is_metered and not self._cancels

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Starlette's, also for a wrong method; behind the doorkeeper."""
        scope[ROUTE] = self.path
        door = self._doorkeeper
        if not await door.passes(scope, receive, send, self.access):
            return
        with door.opened(scope) as over_share:
            if over_share is None or self._cancels:
                await self._meter(scope, receive, send)
            else:
                await door.refuse(over_share, scope, receive, send)

    async def _meter(self, scope: Scope, receive: Receive, send: Send) -> None:
        door = self._doorkeeper
        if not self._is_metered or scope["method"] != "POST":
            await super().handle(scope, receive, send)
            return
        visit, refusal, headers = door.admit(scope)
        if refusal is not None:
            await door.refuse(refusal, scope, receive, send, headers)
            return
        try:
            await super().handle(scope, receive, _telling(send, headers) if headers else send)
        finally:
            if visit is not None:
                visit.leave()


def _telling(send: Send, headers: Headers) -> Send:
    """`send` that adds headers to the answer's."""

    async def telling(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": together([*message.get("headers", ())], headers)}
        await send(message)

    return telling


def guarded_default(
    doorkeeper: Doorkeeper, default: Callable[[Scope, Receive, Send], Awaitable[None]]
) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    """What answers where there is no route: only who holds a key is told that."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or await doorkeeper.passes(scope, receive, send, Access.TENANT):
            await default(scope, receive, send)

    return answer
