"""What goes wrong on the way to a provider and back, as ProviderFailures: of the network, of time, of answers that are
none. Errors that a provider tells are its codec's.
"""

from __future__ import annotations

import ssl
from typing import Final

import httpcore2

from diptych.protos.failures import Failure, FailureKind, ProviderFailure

from .network import AddressRefused, NameUnknown, TlsFailed
from .terms import HttpExchange, Terms

MAX_MESSAGE_CHARS: Final = 500


def failed(kind: FailureKind, message: str, code: str, status: int = 0) -> ProviderFailure:
    """A failure that no provider told."""
    return ProviderFailure(Failure(kind=kind, message=message, code=code, status=status))


def before_headers(name: str, exc: Exception) -> ProviderFailure:
    """An exception of httpcore2 while a request was being sent, or before the answer's headers."""
    match exc:
        case NameUnknown():
            return failed(FailureKind.CONNECT, f"{name}: {exc}", "dns")
        case AddressRefused():
            return failed(FailureKind.CONNECT, f"{name}: {exc}", "address")
        case TlsFailed():
            return failed(FailureKind.CONNECT, f"{name}: {exc}", "tls")
        case httpcore2.ConnectTimeout():
            return failed(FailureKind.CONNECT, f"{name} could not be reached in time", "connect_timeout")
        case httpcore2.ConnectError():
            code = "tls" if isinstance(exc.__cause__, ssl.SSLError) else "refused"
            return failed(FailureKind.CONNECT, f"{name}: {exc}", code)
        case httpcore2.ProxyError():
            return failed(FailureKind.CONNECT, f"{name}: the proxy in front of it refused: {exc}", "proxy")
        case httpcore2.PoolTimeout():
            return failed(FailureKind.OVERLOADED, f"{name}: all connections to it are in use", "connections")
        case httpcore2.LocalProtocolError():
            return failed(FailureKind.BAD_REQUEST, f"{name}: the request cannot be written as HTTP", "unsendable")
        case httpcore2.RemoteProtocolError() if "disconnected" not in str(exc):
            return failed(FailureKind.SERVER, f"{name} answered something that is not HTTP", "not_http")
        case _:
            words = f"{name} closed the connection without an answer"
            return failed(FailureKind.SERVER, words, "disconnected")


def in_body(name: str, exc: Exception) -> ProviderFailure:
    """An exception of httpcore2 behind the headers, a wait that was too long aside."""
    if isinstance(exc, httpcore2.RemoteProtocolError) and "peer closed" not in str(exc):
        return failed(FailureKind.SERVER, f"{name} answered something that is not HTTP", "not_http")
    return failed(FailureKind.SERVER, f"{name} broke its answer off", "cut")


def too_late(name: str, terms: Terms, now: float, exchange: HttpExchange, *, is_stream: bool) -> ProviderFailure:
    """A wait was too long: by which of the terms' ends?"""
    timeouts = terms.timeouts
    if now >= terms.deadline:
        return failed(FailureKind.TOTAL_TIMEOUT, f"{name} did not finish its answer in time", "total_timeout")
    if exchange.headers_at is None:
        limit_s = timeouts.headers_s if is_stream else timeouts.answer_s
        words = f"{name} did not answer within {limit_s:g} s"
        return failed(FailureKind.FIRST_TOKEN_TIMEOUT, words, "headers_timeout")
    if is_stream and exchange.first_token_at is None:
        began_at = exchange.began_at if exchange.began_at is not None else now
        if now - began_at >= timeouts.first_token_s:
            words = f"{name} sent no token within {timeouts.first_token_s:g} s"
            return failed(FailureKind.FIRST_TOKEN_TIMEOUT, words, "first_token_timeout")
    words = f"{name} sent nothing for {timeouts.idle_s:g} s in the middle of its answer"
    return failed(FailureKind.IDLE_TIMEOUT, words, "idle_timeout")


def one_line(text: str) -> str:
    """Bounded and printable."""
    flat = "".join(letter if letter.isprintable() else " " for letter in text[: 4 * MAX_MESSAGE_CHARS])
    flat = " ".join(flat.split())
    return flat if len(flat) <= MAX_MESSAGE_CHARS else flat[: MAX_MESSAGE_CHARS - 3] + "..."
