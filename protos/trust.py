"""Who may call whom inside a cluster: the secret, the proof of it that opens every call, its check, what was refused.

A proof names caller, method, the engine that is meant and the second, and is good once: nothing that a listener
receives lets it speak to another, and a recorded call is refused. Pure; channels.py puts it on gRPC.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import logging
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NoReturn

from .types import EngineRef

ROUTER = "router"  # a caller's name; engines are called by their roles, joined with '-'
SECRET_BYTES = 32
PROOF_KEY = "diptych-proof"  # of the gRPC metadata
MAX_AGE_S = 60.0  # how far the clocks of two hosts may be apart, the way included
CERTIFICATE_SUFFIX = ".diptych.internal"  # prefill.diptych.internal: the DNS name in a prefill engine's certificate
_MAX_SEEN = 1 << 18  # proofs remembered; 2,000 calls a second for twice MAX_AGE_S
_MAX_PEERS = 1024
_QUIET_S = 60.0
_MAX_CONNECTIONS = 1 << 16  # remembered by address and port
_PROOF = re.compile(r"1 ([a-z-]{1,64}) ([0-9]{1,12}) ([0-9a-f]{32}) ([0-9a-f]{64})")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TlsIdentity:
    """PEM texts: whom to believe, and what this process shows."""

    ca: bytes
    cert: bytes
    key: bytes = field(repr=False)


class Trust:
    """What one process proves and whom it believes. Shows its secret to nobody: no repr has it, no pickle is made."""

    def __init__(
        self,
        secret: bytes,
        name: str,
        *,
        tls: TlsIdentity | None = None,
        allow_plaintext: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`name`: ROUTER, or an engine's roles. `clock`: seconds since 1970, as all hosts of the cluster tell them."""
        if len(secret) != SECRET_BYTES:
            raise ValueError(f"the secret has {len(secret)} bytes, not {SECRET_BYTES}")
        self.name = name
        self.tls = tls
        self.allow_plaintext = allow_plaintext
        self._secret = secret
        self._clock = clock

    @classmethod
    def alone(cls, name: str) -> Trust:
        """A secret that nobody outside of this process has: what a component gets that is told none."""
        return cls(_own_secret(), name)

    @property
    def now(self) -> float:
        """The clock."""
        return self._clock()

    def proof(self, method: str, callee: EngineRef) -> tuple[tuple[str, str]]:
        """Metadata for one call of `method` (/package.Service/Name) at that life of an engine."""
        at, nonce = str(int(self._clock())), os.urandom(16).hex()
        return ((PROOF_KEY, f"1 {self.name} {at} {nonce} {self.seal(self.name, at, nonce, method, audience(callee))}"),)

    def seal(self, *words: str) -> str:
        """What only a holder of the secret can say about these words: 64 hexadecimal digits."""
        return hmac.new(self._secret, "\n".join(("diptych-proof-1", *words)).encode(), hashlib.sha256).hexdigest()

    def __repr__(self) -> str:
        return f"Trust({self.name}{', TLS' if self.tls else ''})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Trust holds the cluster's secret and does not leave its process")


@functools.cache
def _own_secret() -> bytes:
    return os.urandom(SECRET_BYTES)


def secret_id(secret: bytes) -> str:
    """Eight digits that tell two secrets apart and tell nothing about either."""
    return hmac.new(secret, b"diptych-secret-id", hashlib.sha256).hexdigest()[:8]


def audience(engine: EngineRef) -> str:
    """How a proof names the engine that is meant, this life of it only."""
    return f"{engine.engine_id}/{engine.epoch}"


class Refusal(StrEnum):
    """Why a call is turned away."""

    NO_PROOF = "no proof of the cluster's secret"
    MALFORMED = "a proof that cannot be read"
    WRONG = "a proof made with another secret, for another call or for another life of this engine"
    STALE = "a proof of another time: it was recorded, or the clocks of the two hosts differ"
    REPLAYED = "a proof that was used before"
    ROLE = "a caller whose role does not make this call"
    NO_MESSAGE = "bytes that are no message of this call"


class Gate:
    """The check of one listener. Thread-safe. `callers`: service name to the names that may call it."""

    def __init__(self, trust: Trust, me: EngineRef, callers: Mapping[str, frozenset[str]]) -> None:
        self._trust = trust
        self._audience = audience(me)
        self._callers = callers
        self._seen: dict[str, None] = {}
        self._expiry: deque[tuple[float, str]] = deque()
        self._lock = threading.Lock()

    def callers(self, method: str) -> frozenset[str]:
        """The names that may call it; none for an unknown service."""
        return self._callers.get(method.split("/")[1] if method.startswith("/") else "", frozenset())

    def judge(self, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> Refusal | None:
        """None: the caller holds the secret, means this call and this engine, now, for the first time, and may."""
        proofs = [value for key, value in metadata if key == PROOF_KEY]
        if not proofs:
            return Refusal.NO_PROOF
        found = _PROOF.fullmatch(proofs[0]) if len(proofs) == 1 and isinstance(proofs[0], str) else None
        if found is None:
            return Refusal.MALFORMED
        name, at, nonce, seal = found.groups()
        if not hmac.compare_digest(seal, self._trust.seal(name, at, nonce, method, self._audience)):
            return Refusal.WRONG
        now = self._trust.now
        if abs(now - int(at)) > MAX_AGE_S:
            return Refusal.STALE
        if not self._is_new(nonce, now):
            return Refusal.REPLAYED
        if self.callers(method).isdisjoint(name.split("-")):
            return Refusal.ROLE
        return None

    def _is_new(self, nonce: str, now: float) -> bool:
        """A nonce is kept for as long as its proof would be taken. When the memory is full nothing is taken."""
        with self._lock:
            while self._expiry and self._expiry[0][0] < now:
                del self._seen[self._expiry.popleft()[1]]
            if nonce in self._seen or len(self._seen) >= _MAX_SEEN:
                return False
            self._seen[nonce] = None
            self._expiry.append((now + 2 * MAX_AGE_S + 1, nonce))
            return True


class Refusals:
    """What one listener turned away: counted always, logged once per peer and minute. Thread-safe."""

    def __init__(self, listener: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.total = 0
        self._listener = listener
        self._clock = clock
        self._quiet_until: dict[str, float] = {}
        self._lock = threading.Lock()

    def note(self, peer: str, reason: str) -> None:
        """`peer` as gRPC writes it, or an address; its port does not count."""
        host = re.sub(r":\d+$", "", peer) or "a local process"
        now = self._clock()
        with self._lock:
            self.total += 1
            if self._quiet_until.get(host, now) > now:
                return
            if len(self._quiet_until) >= _MAX_PEERS:
                self._quiet_until = {name: until for name, until in self._quiet_until.items() if until > now}
            if len(self._quiet_until) >= _MAX_PEERS:
                return  # an attack from everywhere: the counter tells of it
            self._quiet_until[host] = now + _QUIET_S
        log.warning("%s refused %r: %s (for a minute more from there is only counted)", self._listener, host, reason)


class Connections:
    """Finds those that TLS turns away, of which gRPC tells nobody: they began and made no call. Thread-safe.

    Counts only: which of several connections it was that made no call stays unknown.
    """

    def __init__(self, refused: Refusals) -> None:
        self._refused = refused
        self._callers: dict[str, None] = {}
        self._num_begun = 0
        self._num_called = 0
        self._num_told = 0
        self._lock = threading.Lock()

    def begin(self) -> int:
        """One more handshake begins; its number is for `settle`."""
        with self._lock:
            self._num_begun += 1
            return self._num_begun

    def call(self, peer: str) -> None:
        """A call came. `peer`: address and port, which tell connections apart."""
        with self._lock:
            if peer in self._callers:
                return
            if len(self._callers) >= _MAX_CONNECTIONS:
                del self._callers[next(iter(self._callers))]
            self._callers[peer] = None
            self._num_called += 1

    def settle(self, number: int) -> None:
        """By now a caller that was let in would have called: what has begun until `number` and did not is refused."""
        with self._lock:
            fresh = number - self._num_called - self._num_told
            self._num_told += max(fresh, 0)
        for _ in range(fresh):
            self._refused.note("an unknown address", "a connection without a certificate that is good here, or idle")
