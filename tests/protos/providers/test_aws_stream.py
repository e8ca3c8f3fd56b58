"""Amazon's binary framing: whatever pieces it comes in, its checksums, its bounds; botocore is the judge.

Guards against a message that is cut at a piece's border, a header of a rare type that ends the stream, and rubbish that
is waited for, because its first bytes say that much more is to come.
"""

from __future__ import annotations

import struct
import uuid
from binascii import crc32
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.protos.failures import FailureKind, ProviderFailure
from diptych.protos.providers.aws_stream import MAX_MESSAGE_BYTES, AwsEventStream, Value, encoded, encoded_event
from diptych.protos.providers.codec import ServerEvent

EVENTS = (ServerEvent('{"a":1}', "messageStart"), ServerEvent('{"\u00f6":""}', "x"), ServerEvent("", "messageStop"))
STREAM = b"".join(encoded_event(event.event, event.data.encode()) for event in EVENTS)


def told(*pieces: bytes) -> list[ServerEvent]:
    stream = AwsEventStream()
    return [event for piece in pieces for event in stream.feed(piece)]


def refused(data: bytes) -> str:
    with pytest.raises(ProviderFailure) as caught:
        told(data)
    assert caught.value.failure.kind is FailureKind.SERVER
    return caught.value.failure.message


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, len(STREAM)), max_size=8))
def test_any_pieces_are_the_same_events(cuts: list[int]) -> None:
    ends = sorted(cuts)
    pieces = [STREAM[start:end] for start, end in zip([0, *ends], [*ends, len(STREAM)], strict=True)]
    assert told(*pieces) == list(EVENTS)


def test_a_message_that_the_end_cuts_off_is_not_told() -> None:
    assert told(STREAM[:-1]) == list(EVENTS[:-1])
    assert told(b"") == []


def test_headers_of_all_types() -> None:
    headers: dict[str, Value] = {
        ":message-type": "event",
        ":event-type": "x",
        "yes": True,
        "no": False,
        "number": -5,
        "bytes": b"\x00",
        "time": datetime(2026, 1, 1, tzinfo=UTC),
        "id": uuid.UUID(int=7),
    }
    assert told(encoded(headers, b"{}")) == [ServerEvent("{}", "x")]
    small = b"\x01b\x02\xff" + b"\x01s\x03\x00\x01" + b"\x01i\x04\x00\x00\x00\x01"
    block = small + b"\x0b:event-type\x07\x00\x01y"
    prelude = struct.pack(">II", 16 + len(block), len(block))
    message = prelude + struct.pack(">I", crc32(prelude)) + block
    assert told(message + struct.pack(">I", crc32(message))) == [ServerEvent("", "y")]


def test_exceptions_and_errors_are_events() -> None:
    exception = encoded_event("throttlingException", b'{"message":"slow"}', is_exception=True)
    assert told(exception) == [ServerEvent('{"message":"slow"}', "throttlingException")]
    error = encoded({":message-type": "error", ":error-code": "InternalError", ":error-message": "no"}, b"")
    assert told(error) == [ServerEvent('{"code": "InternalError", "message": "no"}', "error")]
    assert told(encoded({":message-type": "news"}, b"")) == []


@settings(max_examples=40, deadline=None)
@given(st.integers(0, len(STREAM) - 1), st.integers(1, 255))
def test_a_wrong_byte_is_noticed(at: int, change: int) -> None:
    wrong = bytearray(STREAM)
    wrong[at] ^= change
    refused(bytes(wrong))


def test_what_is_no_such_stream_is_refused_at_once() -> None:
    assert "checksum" in refused(b"<html><body>Bad gateway</body></html>")
    for total, headers in ((MAX_MESSAGE_BYTES + 1, 0), (15, 0), (20, 5), (MAX_MESSAGE_BYTES, 200_000)):
        prelude = struct.pack(">II", total, headers)
        assert str(total) in refused(prelude + struct.pack(">I", crc32(prelude)))
    bad = struct.pack(">II", 18, 2)
    message = bad + struct.pack(">I", crc32(bad)) + b"\x05a"
    assert "headers" in refused(message + struct.pack(">I", crc32(message)))


def test_botocore_reads_the_same() -> None:
    eventstream = pytest.importorskip("botocore.eventstream")
    buffer = eventstream.EventStreamBuffer()
    headers: dict[str, Value] = {
        ":message-type": "event",
        "number": 2**40,
        "yes": True,
        "id": uuid.UUID(int=7),
        "bytes": b"\x00\x01",
    }
    buffer.add_data(STREAM + encoded(headers, b"p"))
    found = list(buffer)
    assert [(one.headers[":event-type"], one.payload.decode()) for one in found[:-1]] == [
        (event.event, event.data) for event in EVENTS
    ]
    assert found[-1].headers == headers | {"id": uuid.UUID(int=7).bytes}
