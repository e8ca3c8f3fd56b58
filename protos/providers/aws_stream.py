"""Amazon's application/vnd.amazon.eventstream taken apart into its events, whatever pieces it comes in.

    4 bytes      4             4            ...      ...      4
    | length of all | of headers | crc of these | headers | payload | crc of all before |

The providers' client feeds what it reads. `encoded` is the way back, for whoever plays the provider. Format:
docs.aws.amazon.com/transcribe/latest/dg/event-stream.html (all services share it), read 2026-11-23.
"""

from __future__ import annotations

import json
import struct
import uuid
from binascii import crc32
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime

from diptych.protos.failures import Failure, FailureKind, ProviderFailure

from .codec import ServerEvent

MAX_MESSAGE_BYTES = 4 << 20
MAX_HEADERS_BYTES = 128 << 10
_PRELUDE = struct.Struct(">III")
_LEAST_BYTES = _PRELUDE.size + 4
_NUMBERS = {2: struct.Struct(">b"), 3: struct.Struct(">h"), 4: struct.Struct(">i"), 5: struct.Struct(">q")}
_LENGTH = struct.Struct(">H")
_TRUE, _FALSE, _BYTES, _STRING, _TIME, _UUID = 0, 1, 6, 7, 8, 9
Value = bool | int | bytes | str | datetime | uuid.UUID


class AwsEventStream:
    """One stream. A message that the stream's end cuts off is never told."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, piece: bytes) -> list[ServerEvent]:
        """The events that are complete with `piece`: an event's type and payload, an exception's alike, and an error as
        the event `error` with `code` and `message`. Raises ProviderFailure (SERVER) for what is no such stream, a
        checksum that is wrong, a message of more than 4 MiB; then the stream is not to be fed again.
        """
        self._rest += piece
        found: list[ServerEvent] = []
        start = 0
        while len(self._rest) - start >= _PRELUDE.size:
            total, headers, checksum = _PRELUDE.unpack_from(self._rest, start)
            if crc32(memoryview(self._rest)[start : start + 8]) != checksum:
                raise _broken("a checksum is wrong")
            if not _LEAST_BYTES + headers <= total <= MAX_MESSAGE_BYTES or headers > MAX_HEADERS_BYTES:
                raise _broken(f"a message of {total} bytes with {headers} of headers")
            if len(self._rest) - start < total:
                break
            message = bytes(self._rest[start : start + total])
            start += total
            if (event := _event(message, headers)) is not None:
                found.append(event)
        del self._rest[:start]
        return found


def _event(message: bytes, headers_bytes: int) -> ServerEvent | None:
    (checksum,) = struct.unpack_from(">I", message, len(message) - 4)
    if crc32(memoryview(message)[:-4]) != checksum:
        raise _broken("a checksum is wrong")
    end = _PRELUDE.size + headers_bytes
    headers = dict(_headers(message[_PRELUDE.size : end]))
    payload = message[end:-4].decode("utf-8", "replace")
    match headers.get(":message-type", "event"):
        case "event":
            return ServerEvent(payload, str(headers.get(":event-type", "")))
        case "exception":
            return ServerEvent(payload, str(headers.get(":exception-type", "exception")))
        case "error":
            told = {"code": str(headers.get(":error-code", "")), "message": str(headers.get(":error-message", ""))}
            return ServerEvent(json.dumps(told), "error")
    return None  # of a kind that is not known yet


def _headers(data: bytes) -> Iterator[tuple[str, Value]]:
    at = 0
    try:
        while at < len(data):
            name_bytes = data[at]
            name = data[at + 1 : at + 1 + name_bytes].decode()
            at += 1 + name_bytes
            value, at = _value(data, at)
            yield name, value
    except (IndexError, UnicodeError, struct.error, ValueError, OverflowError):
        raise _broken("its headers cannot be read") from None


def _value(data: bytes, at: int) -> tuple[Value, int]:
    kind = data[at]
    at += 1
    if kind in (_TRUE, _FALSE):
        return kind == _TRUE, at
    if kind in _NUMBERS:
        number: int = _NUMBERS[kind].unpack_from(data, at)[0]
        return number, at + _NUMBERS[kind].size
    if kind in (_BYTES, _STRING):
        (size,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        content = data[at : at + size]
        if len(content) != size:
            raise ValueError(size)
        return (content.decode() if kind == _STRING else content), at + size
    if kind == _TIME:
        (milliseconds,) = _NUMBERS[5].unpack_from(data, at)
        return datetime.fromtimestamp(milliseconds / 1000, UTC), at + 8
    if kind == _UUID:
        return uuid.UUID(bytes=data[at : at + 16]), at + 16
    raise ValueError(kind)


def encoded(headers: Mapping[str, Value], payload: bytes) -> bytes:
    """One message."""
    block = b"".join(_header(name, value) for name, value in headers.items())
    total = _LEAST_BYTES + len(block) + len(payload)
    prelude = struct.pack(">II", total, len(block))
    message = prelude + struct.pack(">I", crc32(prelude)) + block + payload
    return message + struct.pack(">I", crc32(message))


def encoded_event(kind: str, payload: bytes, *, is_exception: bool = False) -> bytes:
    """One message as Bedrock sends it."""
    told = "exception" if is_exception else "event"
    headers = {f":{told}-type": kind, ":content-type": "application/json", ":message-type": told}
    return encoded(headers, payload)


def _header(name: str, value: Value) -> bytes:
    start = bytes([len(name.encode())]) + name.encode()
    match value:
        case bool():
            return start + bytes([_TRUE if value else _FALSE])
        case int():
            return start + bytes([5]) + _NUMBERS[5].pack(value)
        case bytes():
            return start + bytes([_BYTES]) + _LENGTH.pack(len(value)) + value
        case str():
            text = value.encode()
            return start + bytes([_STRING]) + _LENGTH.pack(len(text)) + text
        case datetime():
            return start + bytes([_TIME]) + _NUMBERS[5].pack(round(value.timestamp() * 1000))
    return start + bytes([_UUID]) + value.bytes


def _broken(words: str) -> ProviderFailure:
    message = f"the provider's stream is no application/vnd.amazon.eventstream: {words}"
    return ProviderFailure(Failure(kind=FailureKind.SERVER, message=message))
