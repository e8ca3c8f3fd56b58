"""The cable of the KV path: a thread that carries IP packets between two tun devices and does to them what it is told.

Packets, not streams: what is lost here is lost to TCP, which sends it again, waits longer each time and gives up.
"""

from __future__ import annotations

import heapq
import itertools
import os
import random
import select
import struct
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

_MAX_PACKET = 65536
_TCP, _RST = 6, 0x04


@dataclass
class Way:
    """What happens to packets in one direction; tests change it while the cable is in. Probabilities are per packet."""

    cut: bool = False
    loss: float = 0.0
    delay_s: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0  # so many come `REORDER_S` later than they should
    flip: float = 0.0  # one bit of the payload, under a checksum that is right again; of `flips` packets at most
    flips: int = 1 << 30
    reset: float = 0.0  # the packet becomes a TCP reset; of `resets` at most
    resets: int = 1 << 30
    count: Counter[str] = field(default_factory=Counter)  # packets, bytes, lost, duplicated, reordered, flipped, reset

    def calm(self) -> None:
        """Carry everything again."""
        fresh = Way()
        for name in ("cut", "loss", "delay_s", "duplicate", "reorder", "flip", "reset"):
            setattr(self, name, getattr(fresh, name))


REORDER_S = 0.03


class Cable:
    """Owns both descriptors. `to_b` is what comes out of a."""

    def __init__(self, a: int, b: int, *, seed: int = 0) -> None:
        self.to_a, self.to_b = Way(), Way()
        self.captured: list[bytes] | None = None  # set to a list: every packet to b is kept
        self._fds = (a, b)
        self._rng = random.Random(seed)
        self._late: list[tuple[float, int, int, bytes]] = []
        self._order = itertools.count()
        self._wake_read, self._wake_write = os.pipe()
        self._thread = threading.Thread(target=self._run, name="cable", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread and take the cable out."""
        os.write(self._wake_write, b"x")
        self._thread.join()
        for fd in (*self._fds, self._wake_read, self._wake_write):
            os.close(fd)

    def calm(self) -> None:
        """Both ways."""
        self.to_a.calm()
        self.to_b.calm()

    def _run(self) -> None:
        a, b = self._fds
        while True:
            wait_s = max(self._late[0][0] - time.monotonic(), 0.0) if self._late else None
            ready, _, _ = select.select([a, b, self._wake_read], [], [], wait_s)
            if self._wake_read in ready:
                return
            for source, target, way in ((a, b, self.to_b), (b, a, self.to_a)):
                if source in ready:
                    self._carry(source, target, way)
            while self._late and self._late[0][0] <= time.monotonic():
                _, _, target, packet = heapq.heappop(self._late)
                _put(target, packet)

    def _carry(self, source: int, target: int, way: Way) -> None:
        try:
            packet = os.read(source, _MAX_PACKET)
        except OSError:  # the link was taken down meanwhile
            return
        way.count["packets"] += 1
        way.count["bytes"] += len(packet)
        if way is self.to_b and self.captured is not None:
            self.captured.append(packet)
        draw = self._rng.random
        if way.cut or draw() < way.loss:
            way.count["lost"] += 1
            return
        if draw() < way.reset and way.count["reset"] < way.resets and _payload_at(packet) is not None:
            packet = _reset(packet)
            way.count["reset"] += 1
        elif draw() < way.flip and way.count["flipped"] < way.flips and _payload_at(packet):
            packet = _flipped(packet, draw())
            way.count["flipped"] += 1
        delay_s = way.delay_s
        if draw() < way.reorder:
            way.count["reordered"] += 1
            delay_s += REORDER_S
        copies = 1 + (draw() < way.duplicate)
        way.count["duplicated"] += copies - 1
        for _ in range(copies):
            if delay_s:
                heapq.heappush(self._late, (time.monotonic() + delay_s, next(self._order), target, packet))
            else:
                _put(target, packet)


def said(packets: list[bytes], port: int) -> list[bytes]:
    """What each TCP client said to `port`, connection by connection, put together again from its packets."""
    pieces: dict[int, dict[int, bytes]] = {}
    for packet in packets:
        at = _payload_at(packet)
        if at is None or not packet[at:]:
            continue
        header = (packet[0] & 15) * 4
        source, target, number = struct.unpack_from("!HHI", packet, header)
        if target == port:
            pieces.setdefault(source, {}).setdefault(number, packet[at:])
    return [b"".join(by_number[number] for number in sorted(by_number)) for by_number in pieces.values()]


def _put(fd: int, packet: bytes) -> None:
    try:
        os.write(fd, packet)
    except OSError:  # the link is down at that end
        pass


def _payload_at(packet: bytes) -> int | None:
    """Where the payload of a TCP packet begins, which may be at its end; None for other packets."""
    if packet[0] >> 4 != 4 or packet[9] != _TCP:
        return None
    header = (packet[0] & 15) * 4
    return header + (packet[header + 12] >> 4) * 4


def _flipped(packet: bytes, draw: float) -> bytes:
    at = _payload_at(packet)
    assert at is not None
    if at == len(packet):
        return packet
    data = bytearray(packet)
    data[at + int(draw * (len(data) - at))] ^= 1
    return _summed(data)


def _reset(packet: bytes) -> bytes:
    """The same packet without its payload, as a reset by its sender."""
    at = _payload_at(packet)
    assert at is not None
    data = bytearray(packet[:at])
    header = (data[0] & 15) * 4
    data[header + 13] |= _RST
    struct.pack_into("!H", data, 2, len(data))
    struct.pack_into("!H", data, 10, 0)
    struct.pack_into("!H", data, 10, _checksum(bytes(data[:header])))
    return _summed(data)


def _summed(data: bytearray) -> bytes:
    """With the TCP checksum that belongs to it."""
    header = (data[0] & 15) * 4
    struct.pack_into("!H", data, header + 16, 0)
    segment = bytes(data[header:])
    pseudo = bytes(data[12:20]) + struct.pack("!BBH", 0, _TCP, len(segment))
    struct.pack_into("!H", data, header + 16, _checksum(pseudo + segment))
    return bytes(data)


def _checksum(data: bytes) -> int:
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
