"""Injected faults on both drivers over real gRPC: what each does, and that no wrong byte is ever committed."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from diptych.kvtransfer.arena import KvArena
from diptych.kvtransfer.layout import KvLayout
from diptych.kvtransfer.receive import ReceiveDriver
from diptych.kvtransfer.send import SendDriver
from diptych.protos.faults import FaultPlan, FaultSettings
from diptych.protos.ports import Committed, Failed, ReceiveEvent, Released, SendEvent, WantBlocks
from diptych.protos.settings import TransferSettings
from diptych.protos.types import EngineId, EngineRef, TransferKey

LAYOUT = KvLayout(layers=4, kv_heads=2, head_dim=16, dtype="float32", block_tokens=16)
TOKENS = 200  # seven chunks
BLOCKS = 13
WAIT_S = 20


@dataclass
class Pair:
    sender: SendDriver
    receiver: ReceiveDriver
    source: KvArena
    target: KvArena
    sent: queue.SimpleQueue[SendEvent]
    received: queue.SimpleQueue[ReceiveEvent]
    plans: dict[str, FaultPlan]
    _number: int = 0

    async def move(self) -> tuple[ReceiveEvent, Released]:
        """One whole transfer; how it ended at both ends."""
        self._number += 1
        key = TransferKey(self._number.to_bytes(16, "big"))
        self.receiver.expect(key, self.sender.me, TOKENS, 0)
        self.sender.open(key, self.receiver.me, TOKENS)
        self.sender.computed(key, TOKENS, range(BLOCKS))
        self.sender.finish(key, 42, final=False)
        while isinstance(event := await asyncio.to_thread(self.received.get, timeout=WAIT_S), WantBlocks):
            self.receiver.grant(key, range(40, 40 + BLOCKS))
        released = await asyncio.to_thread(self.sent.get, timeout=WAIT_S)
        assert isinstance(released, Released)
        assert event.key == released.key == key
        if isinstance(event, Committed):
            assert torch.equal(self.target.storage[:, :, 40 : 40 + BLOCKS - 1], self.source.storage[:, :, : BLOCKS - 1])
        self.target.storage.zero_()
        return event, released

    def fired(self) -> dict[str, int]:
        return {name: count for plan in self.plans.values() for name, count in plan.counts.items()}


@asynccontextmanager
async def make_pair(
    folder: Path, *rules: dict[str, Any], transport: str = "shm", serves: str | None = None, **more: float
) -> AsyncIterator[Pair]:
    """`serves`: the prefill engine's setting, where it is another one."""
    settings = TransferSettings.model_validate({"transport": transport, "slot_kib": 64, "slots": 4} | more)
    chosen = FaultSettings.model_validate({"rules": rules})
    plans = {name: FaultPlan(chosen, me=name, act=lambda fault: None) for name in ("p0", "d0")}
    sent: queue.SimpleQueue[SendEvent] = queue.SimpleQueue()
    received: queue.SimpleQueue[ReceiveEvent] = queue.SimpleQueue()
    source, target = KvArena(LAYOUT, 64), KvArena(LAYOUT, 64)
    source.storage.copy_(torch.randn(source.storage.shape))
    common: dict[str, Any] = {"layout": LAYOUT, "compat": b"same"}
    served = settings.model_copy(update={"transport": serves or transport})
    p0 = EngineRef(EngineId("p0"), 7, f"unix:{folder}/p0.sock")
    sender = SendDriver(
        me=p0, arena=source, run_dir=folder, deliver=sent.put, faults=plans["p0"], settings=served, **common
    )
    d0 = EngineRef(EngineId("d0"), 9, "")
    receiver = ReceiveDriver(me=d0, arena=target, deliver=received.put, faults=plans["d0"], settings=settings, **common)
    server = grpc.aio.server()
    sender.attach(server)
    server.add_insecure_port(p0.target)
    await server.start()
    sender.start()
    receiver.start(asyncio.get_running_loop())
    pair = Pair(sender, receiver, source, target, sent, received, plans)
    try:
        yield pair
        assert sender.open_transfers == receiver.open_transfers == 0
        for driver in (sender, receiver):
            assert driver.counters()["kv_thread_faults_total"] == 0
    finally:
        receiver.stop()
        await server.stop(None)
        sender.stop()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize("transport", ["shm", "grpc"])
@pytest.mark.parametrize("action", ["corrupt", "truncate"])
@pytest.mark.parametrize("point", ["hinge.fetch", "hinge.publish"])
async def test_altered_bytes_are_found_each_time_and_never_committed(
    point: str, action: str, transport: str, tmp_path: Path
) -> None:
    kind = "chunk" if point == "hinge.fetch" else "*"
    rule = {"point": point, "action": action, "nth": [2, 10], "message": kind}
    async with make_pair(tmp_path, rule, transport=transport) as pair:
        ends = [(await pair.move())[0] for _ in range(3)]
        found = pair.receiver.counters()["kv_checksum_failures_total"]
        fired = pair.fired()[f"{point}/{action}"]
        assert fired == 2
        if point == "hinge.fetch":  # read once more, and then it is right
            assert found == fired
            assert all(isinstance(end, Committed) for end in ends)
        else:  # what lies in the slot is wrong for good: two fetches, then the transfer fails
            assert found >= fired
            assert sum(isinstance(end, Failed) for end in ends) == 2


@pytest.mark.parametrize("point", ["hinge.out", "hinge.in"])
@pytest.mark.parametrize("action", ["delay", "duplicate", "reorder"])
async def test_late_doubled_and_overtaking_messages_change_nothing(point: str, action: str, tmp_path: Path) -> None:
    rule = {"point": point, "action": action, "probability": 0.5, "delay_s": 0.01}
    async with make_pair(tmp_path, rule) as pair:
        for _ in range(5):
            end, released = await pair.move()
            assert isinstance(end, Committed)
            assert released.error is None
        assert pair.fired()[f"{point}/{action}"] > 5


@pytest.mark.parametrize("message", ["expect", "ready", "ack", "finished", "final_ack"])
async def test_a_message_that_is_lost_ends_in_a_clean_failure_or_not_at_all(message: str, tmp_path: Path) -> None:
    rule = {"point": "hinge.out", "action": "drop", "message": message, "nth": [1]}
    async with make_pair(tmp_path, rule, stall_s=0.5, lease_s=1.0) as pair:
        await pair.move()
        end, released = await pair.move()
        assert isinstance(end, Committed)
        assert released.error is None
        assert pair.sender.ring_slots_busy == 0
        assert pair.fired() == {"hinge.out/drop": 1}


@pytest.mark.parametrize(
    "point", ["hinge.out", "hinge.in", "hinge.dial", "hinge.gather", "hinge.publish", "hinge.scatter"]
)
async def test_an_edge_that_breaks_fails_its_transfer_and_no_later_one(point: str, tmp_path: Path) -> None:
    engine = "p0" if point in ("hinge.gather", "hinge.publish") else "d0"
    rule = {"point": point, "action": "raise", "nth": [1], "engine": engine}
    async with make_pair(tmp_path, rule, lease_s=1.0) as pair:
        end, _ = await pair.move()
        assert isinstance(end, Failed)
        end, released = await pair.move()
        assert isinstance(end, Committed)
        assert released.error is None


async def test_a_fetch_that_fails_once_is_made_again(tmp_path: Path) -> None:
    rule = {"point": "hinge.fetch", "action": "raise", "nth": [1], "message": "chunk"}
    async with make_pair(tmp_path, rule) as pair:
        assert isinstance((await pair.move())[0], Committed)
        assert pair.receiver.counters()["kv_fetch_errors_total"] == 1


async def test_a_peer_whose_words_are_all_lost_is_gone_after_its_silence(tmp_path: Path) -> None:
    rule = {"point": "hinge.out", "action": "drop", "probability": 1.0, "engine": "p0"}
    async with make_pair(tmp_path, rule, stall_s=1000, lease_s=1000) as pair:
        end, released = await pair.move()
        assert isinstance(end, Failed)
        assert end.error.code == "peer_lost"
        assert released.error is not None
        assert pair.receiver.counters()["kv_pairs_lost_total"] == 1


@pytest.mark.parametrize(
    ("rule", "used", "downgrades"),
    [
        ({"action": "corrupt", "nth": [1]}, "shm", 1),
        ({"action": "truncate", "nth": [3]}, "shm", 1),
        ({"action": "raise", "nth": [1, 2]}, "grpc", 2),
        ({"action": "delay", "delay_s": 0.12, "nth": [1, 2, 3]}, "shm", 1),
        ({"action": "delay", "delay_s": 0.12, "probability": 1.0}, "grpc", 2),  # the last one may be slow
    ],
)
async def test_a_transport_that_fails_its_probe_is_left_before_it_carries_anything(
    rule: dict[str, Any], used: str, downgrades: int, tmp_path: Path
) -> None:
    least = 4.0 if rule["action"] == "delay" else 0.0  # 256 KiB in 0.12 s are 2 MiB/s
    rule = {"point": "hinge.fetch", "message": "probe"} | rule
    async with make_pair(tmp_path, rule, transport="auto", min_mib_s=least, silence_s=20) as pair:
        end, _ = await pair.move()
        assert isinstance(end, Committed)
        assert end.transport == used
        counters = pair.receiver.counters()
        assert counters["kv_transport_downgrades_total"] == counters["kv_probe_failures_total"] == downgrades
        assert counters["kv_checksum_failures_total"] == 0
        assert counters["kv_pair_probed_mib_s"] > 0


async def test_the_only_transport_is_not_used_while_it_alters_bytes(tmp_path: Path) -> None:
    rule = {"point": "hinge.fetch", "action": "corrupt", "message": "probe", "nth": [1]}
    async with make_pair(tmp_path, rule, lease_s=1.0) as pair:
        end, _ = await pair.move()
        assert isinstance(end, Failed)
        assert end.error.code == "peer_lost"
        assert isinstance((await pair.move())[0], Committed)


@pytest.mark.parametrize("serves", ["shm", "grpc"])
async def test_the_only_transport_that_the_peer_serves_is_taken_though_it_is_slow(serves: str, tmp_path: Path) -> None:
    """Not asked for the others alone, which the peer would refuse for as long as both live."""
    rule = {"point": "hinge.fetch", "message": "probe", "action": "delay", "delay_s": 0.12, "probability": 1.0}
    async with make_pair(tmp_path, rule, transport="auto", serves=serves, min_mib_s=4.0, silence_s=20) as pair:
        end, _ = await pair.move()
        assert isinstance(end, Committed)
        assert end.transport == serves


@pytest.mark.parametrize("serves", ["shm", "grpc"])
async def test_the_only_transport_that_the_peer_serves_is_taken_again_when_its_bytes_are_right(
    serves: str, tmp_path: Path
) -> None:
    """Both probes of the first dial find other bytes; that is a bad moment, not a misconfiguration."""
    rule = {"point": "hinge.fetch", "message": "probe", "action": "corrupt", "nth": [1, 2]}
    async with make_pair(tmp_path, rule, transport="auto", serves=serves, lease_s=1.0) as pair:
        end, _ = await pair.move()
        assert isinstance(end, Failed)
        assert end.error.code == "peer_lost"
        await _reached(pair)
        assert isinstance((await pair.move())[0], Committed)


async def test_a_transport_that_is_blamed_is_taken_again_where_the_peer_serves_no_other(tmp_path: Path) -> None:
    rule = {"point": "hinge.publish", "action": "corrupt", "nth": list(range(1, 30)), "limit": 29}
    async with make_pair(tmp_path, rule, transport="auto", serves="shm", lease_s=1.0) as pair:
        ends = [(await pair.move())[0] for _ in range(12)]
        assert pair.receiver.counters()["kv_transports_blamed_total"] == 1
        assert not any(isinstance(end, Failed) and end.error.code == "layout_mismatch" for end in ends)
        assert isinstance(ends[0], Failed)
        assert isinstance(ends[-1], Committed)


async def test_the_link_to_a_peer_that_could_not_be_dialed_comes_back_alone(tmp_path: Path) -> None:
    rule = {"point": "hinge.dial", "action": "raise", "nth": [1, 2, 3]}
    async with make_pair(tmp_path, rule, lease_s=0.5) as pair:
        assert isinstance((await pair.move())[0], Failed)
        await _reached(pair)
        assert pair.fired()["hinge.dial/raise"] == 3
        end, _ = await pair.move()
        assert isinstance(end, Committed)
        assert pair.receiver.counters()["kv_pairs_shm_total"] == 1


async def _reached(pair: Pair) -> None:
    """Once the receiver has dialed again by itself."""
    async with asyncio.timeout(WAIT_S):
        while pair.receiver.counters()["kv_unreachable_peers"]:  # noqa: ASYNC110, it lives in another thread
            await asyncio.sleep(0.01)
