"""The header Idempotency-Key: a request that is sent again with its key is worked on once, and answered each time.

Around the endpoints that generate and the making of batches, in app.py. The records are in the store, so that any
router replica answers a retry; one whose router died is begun again by the next that gets it. Knows no endpoint:
status, headers and bytes alone.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import os
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from sqlalchemy.exc import IntegrityError
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from diptych.cluster.router.life import State
from diptych.cluster.router.router import Router
from diptych.cluster.store import idempotency as records
from diptych.cluster.store.database import Store
from diptych.protos.errors import AnswerNotKept, InvalidRequest, KeyInWork, KeyReused, RequestTooLarge

from .access import tenant_of
from .body import read_body, refuse_body
from .errors import REQUEST_ID, BodyTimeout

HEADER = "Idempotency-Key"
MAX_KEY_CHARS = 255
KEPT_S = 24 * 3600
LEASE_S = 5.0  # a router that did not prolong it for so long has died, and its requests are begun anew
RENEW_S = 1.0
_REPLAYED = (b"idempotent-replayed", b"true")

log = logging.getLogger(__name__)


class Idempotency:
    """One per app. The wall clock counts: the replicas' clocks must agree to within a second or two."""

    def __init__(self, store: Store, router: Router) -> None:
        self._store = store
        self._router = router
        self._max_bytes = router.settings.limits.idempotency_bytes
        self._runs: set[str] = set()  # in work
        self._renewals: asyncio.Task[None] | None = None

    def around(self, app: ASGIApp) -> ASGIApp:
        """`app`, an endpoint that reads a JSON body, with the header honoured."""

        async def endpoint(scope: Scope, receive: Receive, send: Send) -> None:
            key = _key_of(scope)
            if key is None:
                await app(scope, receive, send)
            else:
                await self._answer(app, key, scope, receive, send)

        return _App(endpoint)

    async def _answer(self, app: ASGIApp, key: str, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await read_body(scope, receive, self._router.settings.limits)
        except (RequestTooLarge, BodyTimeout) as exc:
            await refuse_body(exc, scope, receive, send)
            return
        except ClientDisconnect:
            return
        claim = self._claim(key, scope, body)
        match await self._claimed(claim):
            case records.OtherRequest():
                raise KeyReused(
                    f"{HEADER} {key!r} was used for another request: the same key must come with the same path and "
                    "the same bytes; take a new key for a new request",
                    HEADER,
                )
            case records.InWork(left_ms):
                raise KeyInWork(f"the request with this {HEADER} is being answered", max(left_ms, 100) / 1000)
            case records.Answered(body=None):
                raise AnswerNotKept(
                    f"the request with this {HEADER} was answered, but its answer has more than {self._max_bytes} "
                    "bytes (router.limits.idempotency_bytes) and was not kept; a new key has it done again",
                    HEADER,
                )
            case records.Answered() as answer:
                await _replay(answer, send)
            case records.Mine():
                await self._work(app, claim, body, scope, send)

    def _claim(self, key: str, scope: Scope, body: bytes) -> records.Claim:
        request = hashlib.sha256(scope["path"].encode() + b"\n" + body)
        return records.Claim(
            tenant=tenant_of(scope),
            key_sha256=hashlib.sha256(key.encode()).hexdigest(),
            request_sha256=request.hexdigest(),
            holder=self._router.router_id,
            run=os.urandom(16).hex(),
            now_ms=_now_ms(),
            lease_ms=int(LEASE_S * 1000),
            kept_s=KEPT_S,
        )

    async def _claimed(
        self, claim: records.Claim
    ) -> records.Mine | records.InWork | records.OtherRequest | records.Answered:
        try:
            return await self._store.write(lambda connection: records.claim(connection, claim))
        except IntegrityError:  # another replica began it in this moment: now its row is there
            return await self._store.write(lambda connection: records.claim(connection, claim))

    async def _work(self, app: ASGIApp, claim: records.Claim, body: bytes, scope: Scope, send: Send) -> None:
        recording = _Recording(send, self._max_bytes, self._settle, claim, scope)
        self._runs.add(claim.run)
        if self._renewals is None:
            self._renewals = asyncio.create_task(self._renew(), name="idempotency leases")
        try:
            await app(scope, _once(body), recording)
        finally:
            self._runs.discard(claim.run)
            if not recording.is_settled:
                await self._released(claim)

    async def _settle(self, recording: _Recording) -> None:
        """Called before the answer's last bytes leave: who has all of an answer may count on what a retry will get."""
        recording.is_settled, claim = True, recording.claim
        if recording.status != 200 or not self._is_whole(recording.scope, claim.tenant):
            await self._released(claim)
            return
        kept = b"".join(recording.pieces) if recording.pieces is not None else None
        answer = records.Answered(recording.status, recording.headers, kept)
        expires_at = int(time.time()) + KEPT_S
        try:
            await self._store.write(lambda connection: records.finish(connection, claim, answer, expires_at))
        except Exception:  # the client has its answer; only a retry would be worked on again
            log.exception("an answer could not be kept for its %s", HEADER)

    def _is_whole(self, scope: Scope, tenant: str) -> bool:
        """Whether no choice of the answer has failed: a stream that broke is no answer to be told again. What is in
        work yet is a background response's, whose answer is that it has begun.
        """
        tracked = self._router.requests.find(scope.get(REQUEST_ID, ""), tenant)
        return tracked is None or all(life.state is State.FINISHED or not life.is_over for life in tracked.lives)

    async def _released(self, claim: records.Claim) -> None:
        try:
            await self._store.write(lambda connection: records.release(connection, claim))
        except Exception:  # its lease runs out, and then the key is free
            log.exception("an %s stays taken until its lease runs out", HEADER)

    async def _renew(self) -> None:
        """While anything with a key is in work."""
        try:
            while self._runs:
                await asyncio.sleep(RENEW_S)
                # Of those alone: one whose end could not be stored is to be free again.
                until_ms, runs = _now_ms() + int(LEASE_S * 1000), tuple(self._runs)
                prolong = partial(records.prolong, holder=self._router.router_id, runs=runs, until_ms=until_ms)
                try:
                    await self._store.write(prolong)
                except Exception:
                    log.exception("the leases of requests with an %s could not be prolonged", HEADER)
        finally:
            self._renewals = None


class _App:
    """An ASGI application that Starlette does not take for a function of a request."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


@dataclass
class _Recording:
    """A `send` that keeps what goes through it, and lets the end of an answer pass when `settle` has returned."""

    send: Send
    max_bytes: int
    settle: Callable[[_Recording], Awaitable[None]]
    claim: records.Claim
    scope: Scope
    status: int = 0
    headers: str = "[]"
    pieces: list[bytes] | None = field(default_factory=list)  # None: too many
    num_bytes: int = 0
    is_settled: bool = False

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            told = [(name, value) for name, value in message.get("headers", ()) if name != b"content-length"]
            self.headers = json.dumps([[_text(name), _text(value)] for name, value in told])
        else:
            body = message.get("body", b"")
            self.num_bytes += len(body)
            if self.num_bytes > self.max_bytes:
                self.pieces = None
            elif self.pieces is not None and body:
                self.pieces.append(body)
            if not message.get("more_body", False):
                await self.settle(self)
        await self.send(message)


def _text(value: bytes) -> str:
    return base64.b64encode(value).decode()


async def _replay(answer: records.Answered, send: Send) -> None:
    body = answer.body or b""
    headers = [(base64.b64decode(name), base64.b64decode(value)) for name, value in json.loads(answer.headers)]
    headers += [(b"content-length", str(len(body)).encode()), _REPLAYED]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _once(body: bytes) -> Receive:
    """The body, and then silence: who sends a key comes back for the answer, so that the work goes on without him."""
    is_told = False

    async def receive() -> MutableMapping[str, Any]:
        nonlocal is_told
        if is_told:
            await asyncio.Event().wait()
        is_told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


def _key_of(scope: Scope) -> str | None:
    name = HEADER.lower().encode()
    values = [value.decode("latin-1") for given, value in scope["headers"] if given == name]
    if not values:
        return None
    if len(values) > 1:
        raise InvalidRequest(f"the header {HEADER} is given {len(values)} times; send it once", HEADER)
    key: str = values[0]
    if not (0 < len(key) <= MAX_KEY_CHARS and key.isascii() and key.isprintable()):
        raise InvalidRequest(
            f"the header {HEADER} must have 1 to {MAX_KEY_CHARS} printable ASCII characters, such as a UUID", HEADER
        )
    return key


def _now_ms() -> int:
    return int(time.time() * 1000)
