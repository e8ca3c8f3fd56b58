"""The one place where gRPC channels and servers of the cluster are made: proof, mutual TLS, limits.

Proof and role are checked once per call, before a byte of its body is parsed; messages on an open stream cost nothing.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any
from weakref import WeakKeyDictionary

import grpc
from google.protobuf.message import DecodeError

from . import engine_pb2, kv_pb2
from .errors import StartupError
from .trust import CERTIFICATE_SUFFIX, ROUTER, Connections, Gate, Refusal, Refusals, TlsIdentity, Trust
from .types import EngineRef, Role

ENGINE_SERVICE = engine_pb2.DESCRIPTOR.services_by_name["Engine"].full_name
KV_SERVICE = kv_pb2.DESCRIPTOR.services_by_name["KvChannel"].full_name
SESSION = f"/{ENGINE_SERVICE}/Session"
EMBED = f"/{ENGINE_SERVICE}/Embed"
KV_SESSION = f"/{KV_SERVICE}/Session"
FETCH_BYTES = f"/{KV_SERVICE}/FetchBytes"
CALLERS = {ENGINE_SERVICE: frozenset({ROUTER}), KV_SERVICE: frozenset({Role.DECODE.value})}

MAX_MESSAGE_BYTES = 16 << 20  # four times the largest HTTP body: a prompt's ids are shorter than their JSON
MAX_KV_MESSAGE_BYTES = 1 << 20  # a frame of KV is 256 KiB, control messages are smaller
_SERVER_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", 8 << 10),
    ("grpc.max_concurrent_streams", 256),  # of one connection
    # Another process of the same user could share the port and take half of the calls.
    ("grpc.so_reuseport", 0),
    # Routers ping idle sessions every 10 s to learn of a dead engine; gRPC's default would take that for an attack.
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    ("grpc.keepalive_permit_without_calls", 1),
)
_CODES = {
    Refusal.ROLE: grpc.StatusCode.PERMISSION_DENIED,
    Refusal.NO_MESSAGE: grpc.StatusCode.INVALID_ARGUMENT,
}

_SETTLE_S = 2.0  # after which a connection that was let in has made its first call; ours make it at once
_CONNECTIONS: WeakKeyDictionary[grpc.aio.Server, Connections] = WeakKeyDictionary()  # of servers with TLS

Option = tuple[str, int | str]


def leaves_host(target: str) -> bool:
    """Whether bytes for a gRPC target can be seen outside of this machine."""
    if target.startswith(("unix:", "unix-abstract:")):
        return False
    host = target.rpartition(":")[0].strip("[]")
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host != "localhost"


def open_channel(trust: Trust, target: str, *, role: str, options: Sequence[Option] = ()) -> grpc.aio.Channel:
    """A channel to an engine that must have `role`. Raises StartupError for plaintext that would leave the host."""
    allowed = _options(trust, target, role, options)
    if trust.tls is None:
        return grpc.aio.insecure_channel(target, options=allowed)
    return grpc.aio.secure_channel(target, _client_credentials(trust), options=allowed)


def open_blocking_channel(trust: Trust, target: str, *, role: str, options: Sequence[Option] = ()) -> grpc.Channel:
    """The same for threads."""
    allowed = _options(trust, target, role, options)
    if trust.tls is None:
        return grpc.insecure_channel(target, options=allowed)
    return grpc.secure_channel(target, _client_credentials(trust), options=allowed)


def _options(trust: Trust, target: str, role: str, options: Sequence[Option]) -> list[Option]:
    _refuse_plaintext(trust, target)
    limits: dict[str, int | str] = dict.fromkeys(
        ("grpc.max_receive_message_length", "grpc.max_send_message_length"), MAX_MESSAGE_BYTES
    )
    if trust.tls is not None:
        # The peer is known by its role, wherever it lives: addresses of pods are no names.
        limits["grpc.ssl_target_name_override"] = role + CERTIFICATE_SUFFIX
    return [*(limits | dict(options)).items()]


def _client_credentials(trust: Trust) -> grpc.ChannelCredentials:
    assert trust.tls is not None
    return grpc.ssl_channel_credentials(trust.tls.ca, trust.tls.key, trust.tls.cert)


def _refuse_plaintext(trust: Trust, target: str) -> None:
    if trust.tls is None and not trust.allow_plaintext and leaves_host(target):
        raise StartupError(
            f"{target} leaves this machine, and without TLS everybody on the way could read prompts and KV: set "
            "security.tls, or security.allow_plaintext: true where the network itself is trusted"
        )


def make_server(trust: Trust, me: EngineRef, refused: dict[str, Refusals]) -> grpc.aio.Server:
    """A server of the engine `me` that takes calls with a proof only. Call in the event loop that serves.

    `refused` counts by service name; calls of unknown services count for the Engine service, and so do connections over
    TCP that TLS turns away, two seconds later.
    """
    connections = Connections(refused[ENGINE_SERVICE]) if trust.tls is not None and ENGINE_SERVICE in refused else None
    guard = _Guard(Gate(trust, me, CALLERS), trust, refused, connections)
    server = grpc.aio.server(options=_SERVER_OPTIONS, interceptors=(guard,))
    if connections is not None:
        _CONNECTIONS[server] = connections
    return server


def listen(server: grpc.aio.Server, trust: Trust, target: str) -> None:
    """Bind; before `server.start`. Raises StartupError when it cannot, or when plaintext would leave the host."""
    _refuse_plaintext(trust, target)
    try:
        if trust.tls is None:
            server.add_insecure_port(target)
        else:
            server.add_secure_port(target, _server_credentials(trust.tls, _CONNECTIONS.get(server), target))
    except RuntimeError as exc:
        raise StartupError(f"an engine cannot listen on {target}: {exc}") from exc


def _server_credentials(tls: TlsIdentity, connections: Connections | None, target: str) -> grpc.ServerCredentials:
    pair = (tls.key, tls.cert)
    if connections is None or target.startswith("unix"):  # whose callers all have the same name
        return grpc.ssl_server_credentials([pair], tls.ca, require_client_auth=True)
    loop, settle = asyncio.get_running_loop(), connections.settle

    def begin() -> None:
        """gRPC asks at each handshake, in a thread of its own, for certificates to use from now on: None, the same."""
        number = connections.begin()
        with suppress(RuntimeError):  # the loop is closed: the server goes down
            loop.call_soon_threadsafe(loop.call_later, _SETTLE_S, settle, number)

    own = grpc.ssl_server_certificate_configuration([pair], tls.ca)
    return grpc.dynamic_ssl_server_credentials(own, begin, require_client_authentication=True)


@contextmanager
def _caller_may_be_gone() -> Iterator[None]:
    """gRPC cancels the call of a caller that leaves, but a word that it was about to send then fails first, and would
    be logged as an error of the server: cancelled as well.
    """
    try:
        yield
    except grpc.aio.InternalError as exc:
        raise asyncio.CancelledError from exc


class _Guard(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Stands before every handler of a server."""

    def __init__(self, gate: Gate, trust: Trust, refused: dict[str, Refusals], connections: Connections | None) -> None:
        self._gate = gate
        self._has_certificates = trust.tls is not None
        self._refused = refused
        self._connections = connections

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """gRPC calls it when headers have come and nothing else."""
        method = handler_call_details.method
        refusal = self._gate.judge(method, handler_call_details.invocation_metadata or ())
        if refusal is None:
            handler = await continuation(handler_call_details)
            return self._guarded(handler, method) if handler is not None else None

        async def refuse(_: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
            self._note_call(context)
            with _caller_may_be_gone():
                await self._abort(method, refusal, context)

        # Taken for a stream whatever it is: so nothing of the body is read.
        return grpc.stream_stream_rpc_method_handler(refuse)

    def _guarded(self, handler: Any, method: str) -> Any:
        """The handler, a coroutine that writes to its context, behind a look at the caller's certificate, which is not
        known before. Bytes that are no message end the call, without the traceback that gRPC would log.
        """

        async def stream(requests: Any, context: grpc.aio.ServicerContext) -> None:
            with _caller_may_be_gone():
                await self._check_role(method, context)
                try:
                    await handler.stream_stream(requests, context)
                except DecodeError:
                    await self._abort(method, Refusal.NO_MESSAGE, context)

        async def unary(body: bytes, context: grpc.aio.ServicerContext) -> None:
            with _caller_may_be_gone():
                await self._check_role(method, context)
                try:
                    request = handler.request_deserializer(body)
                except DecodeError:
                    await self._abort(method, Refusal.NO_MESSAGE, context)
                await handler.unary_stream(request, context)

        if not handler.request_streaming:
            return grpc.unary_stream_rpc_method_handler(unary, None, handler.response_serializer)
        return grpc.stream_stream_rpc_method_handler(stream, handler.request_deserializer, handler.response_serializer)

    def _note_call(self, context: grpc.aio.ServicerContext) -> None:
        if self._connections is not None:
            self._connections.call(context.peer())

    async def _check_role(self, method: str, context: grpc.aio.ServicerContext) -> None:
        self._note_call(context)
        if not self._has_certificates:
            return
        shown = {name.decode() for name in context.auth_context().get("x509_subject_alternative_name", ())}
        if shown.isdisjoint(caller + CERTIFICATE_SUFFIX for caller in self._gate.callers(method)):
            await self._abort(method, Refusal.ROLE, context)

    async def _abort(self, method: str, refusal: Refusal, context: grpc.aio.ServicerContext) -> None:
        service = KV_SERVICE if method.startswith(f"/{KV_SERVICE}/") else ENGINE_SERVICE
        self._refused[service].note(context.peer(), refusal.value)
        await context.abort(_CODES.get(refusal, grpc.StatusCode.UNAUTHENTICATED), f"refused: {refusal.value}")
