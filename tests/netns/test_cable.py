"""The cable's packets without a network: what it alters has a right checksum, and what it hears it can put together."""

from __future__ import annotations

import random
import struct

import pytest
from cable import _checksum, _flipped, _reset, _summed, said

IP, TCP = 20, 20
PORT = 7000


def packet(payload: bytes, *, source: int = 40000, number: int = 1) -> bytes:
    size = IP + TCP + len(payload)
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, size, 0, 0, 64, 6, 0, bytes((10, 0, 0, 1)), bytes((10, 0, 0, 2)))
    head = head[:10] + struct.pack("!H", _checksum(head)) + head[12:]
    body = struct.pack("!HHIIBBHHH", source, PORT, number, 0, 5 << 4, 0x18, 1000, 0, 0)
    return _summed(bytearray(head + body + payload))


def is_sound(data: bytes) -> bool:
    """As a receiving kernel sees it."""
    pseudo = data[12:20] + struct.pack("!BBH", 0, 6, len(data) - IP)
    whole = struct.unpack_from("!H", data, 2)[0] == len(data)
    return whole and _checksum(data[:IP]) == 0 and _checksum(pseudo + data[IP:]) == 0


@pytest.mark.parametrize("size", [1, 2, 3, 100, 1399, 1400])
def test_one_bit_of_the_payload_flips_and_the_kernel_cannot_tell(size: int) -> None:
    before = packet(random.Random(size).randbytes(size))
    assert is_sound(before)
    assert not is_sound(before[:-1] + bytes((before[-1] ^ 1,)))
    for draw in (0.0, 0.5, 0.999):
        after = _flipped(before, draw)
        assert is_sound(after)
        payloads = zip(before[IP + TCP :], after[IP + TCP :], strict=True)
        assert sum((a ^ b).bit_count() for a, b in payloads) == 1


@pytest.mark.parametrize("size", [0, 1, 500])
def test_a_reset_has_no_payload_and_is_taken(size: int) -> None:
    after = _reset(packet(bytes(size)))
    assert is_sound(after)
    assert len(after) == IP + TCP
    assert after[IP + 13] & 0x04


def test_what_clients_said_is_put_together_whatever_the_order_of_their_packets() -> None:
    texts = {40000: b"first words, then more, then the end", 40001: b"another one says this"}
    packets = [
        packet(text[at : at + 7], source=source, number=1000 + at)
        for source, text in texts.items()
        for at in range(0, len(text), 7)
    ]
    packets += [*packets[:5], packet(b"", number=999), b"\x60 not of this kind of network".ljust(40)]
    random.Random(1).shuffle(packets)
    assert sorted(said(packets, PORT)) == sorted(texts.values())
    assert said(packets, PORT + 1) == []
