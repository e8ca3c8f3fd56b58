from __future__ import annotations

import dataclasses
import random

import pytest

from diptych.cluster.control.manager import EngineState, PoolManager
from diptych.protos.errors import Fenced
from diptych.protos.status import EngineInfo
from diptych.protos.types import EngineId, EngineRef, Role

P = EngineId("prefill-0")


class FakeStore:
    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def get(self, key: str) -> bytes | None:
        return self.values.get(key)

    def put(self, key: str, value: bytes) -> None:
        self.values[key] = value


def info(engine_id: EngineId, epoch: int) -> EngineInfo:
    return EngineInfo(
        ref=EngineRef(engine_id, epoch, f"unix:/run/{engine_id}-{epoch}.sock"),
        roles=frozenset({Role.PREFILL}),
        model="m",
        pid=1,
        host="h",
        block_tokens=16,
        num_blocks=10,
        max_context_tokens=100,
        dtype="float32",
        degraded=("slow",),
    )


def born(manager: PoolManager, engine_id: EngineId = P) -> int:
    return manager.register(engine_id, {Role.PREFILL}, "m")


def test_routers_are_told_of_ready_and_of_draining_engines_only() -> None:
    """A draining engine stays in the list: a router that loses sight of it ends what still runs there."""
    manager = PoolManager(FakeStore())
    epoch = born(manager)
    assert manager.engines() == []
    manager.report_ready(info(P, epoch))
    assert manager.engines() == [info(P, epoch)]
    manager.report_draining(P, epoch)
    assert manager.engines() == [dataclasses.replace(info(P, epoch), draining=True)]
    assert manager.report_dead(P, epoch, "gone")
    assert manager.engines() == []
    assert [m.state for m in manager.members()] == [EngineState.DEAD]


def test_an_engine_that_left_as_asked_is_forgotten() -> None:
    manager = PoolManager(FakeStore())
    old = born(manager)
    manager.report_left(P, old)
    assert manager.members() == []
    new = born(manager)
    manager.report_left(P, old)
    assert [m.epoch for m in manager.members()] == [new]


def test_names_are_reused_only_when_nobody_living_has_them() -> None:
    manager = PoolManager(FakeStore())
    epoch = born(manager)
    assert manager.free_id(Role.PREFILL) == "prefill-1"
    assert manager.free_id(Role.DECODE) == "decode-0"
    manager.report_dead(P, epoch, "gone")
    assert manager.free_id(Role.PREFILL) == P


def test_the_version_grows_exactly_with_what_routers_can_see() -> None:
    manager = PoolManager(FakeStore())
    start = manager.version
    epoch = born(manager)
    assert manager.version == start
    manager.report_ready(info(P, epoch))
    assert manager.version == start + 1
    manager.report_draining(P, epoch)
    manager.report_draining(P, epoch)
    assert manager.version == start + 2
    manager.report_dead(P, epoch, "gone")
    assert not manager.report_dead(P, epoch, "gone again")
    assert manager.version == start + 3


def test_a_new_life_fences_the_old_one() -> None:
    manager = PoolManager(FakeStore())
    old = born(manager)
    manager.report_ready(info(P, old))
    new = born(manager)
    assert new > old
    assert manager.engines() == []
    with pytest.raises(Fenced):
        manager.report_ready(info(P, old))
    with pytest.raises(Fenced):
        manager.report_draining(P, old)
    assert not manager.report_dead(P, old, "the death of the old life is no news about the new one")
    manager.report_ready(info(P, new))
    assert [i.ref.epoch for i in manager.engines()] == [new]


def test_the_dead_stay_dead() -> None:
    manager = PoolManager(FakeStore())
    epoch = born(manager)
    manager.report_dead(P, epoch, "gone")
    with pytest.raises(Fenced):
        manager.report_ready(info(P, epoch))


def test_an_unknown_engine_is_fenced() -> None:
    manager = PoolManager(FakeStore())
    with pytest.raises(Fenced):
        manager.report_ready(info(P, 1))
    assert not manager.report_dead(P, 1, "never seen")


def test_a_restarted_manager_adopts_members_and_never_repeats_an_epoch_or_a_version() -> None:
    store = FakeStore()
    first = PoolManager(store)
    epoch = born(first)
    first.report_ready(info(P, epoch))
    second = PoolManager(store)
    assert second.engines() == [info(P, epoch)]
    assert second.members() == first.members()
    assert second.version > first.version
    assert born(second) > epoch


def test_an_epoch_is_stored_before_it_is_used() -> None:
    """A manager that dies between minting and answering must not mint the same number in its next life."""

    class Crash(Exception):
        pass

    class CrashingStore(FakeStore):
        def put(self, key: str, value: bytes) -> None:
            super().put(key, value)
            if key == "epoch" and self.values.get("armed"):
                raise Crash

    store = CrashingStore()
    manager = PoolManager(store)
    before = born(manager)
    store.values["armed"] = b"1"
    with pytest.raises(Crash):
        born(manager)
    del store.values["armed"]
    assert born(PoolManager(store)) > before + 1


def test_epochs_and_versions_never_decrease_under_random_histories() -> None:
    rng = random.Random(7)
    store = FakeStore()
    manager = PoolManager(store)
    ids = [EngineId(f"e{i}") for i in range(4)]
    epochs: dict[EngineId, int] = {}
    last_epoch, last_version = 0, 0
    for _ in range(2000):
        engine_id = rng.choice(ids)
        epoch = epochs.get(engine_id, 0)
        action = rng.randrange(5)
        try:
            if action == 0:
                epochs[engine_id] = born(manager, engine_id)
                assert epochs[engine_id] > last_epoch
                last_epoch = epochs[engine_id]
            elif action == 1:
                manager.report_ready(info(engine_id, epoch))
            elif action == 2:
                manager.report_draining(engine_id, epoch)
            elif action == 3:
                manager.report_dead(engine_id, epoch, "x")
            elif rng.random() < 0.1:
                manager = PoolManager(store)
        except Fenced:
            pass
        assert manager.version >= last_version
        last_version = manager.version
        assert all(i.ref.epoch == epochs[i.ref.engine_id] for i in manager.engines())
