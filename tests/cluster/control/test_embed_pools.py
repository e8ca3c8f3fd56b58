"""The pool of a model that embeds: it lives, grows and is replaced as others do, and has no other role beside its own.

Guards: a last engine that is scaled away; a role that it cannot have; a plan that a restarted manager cannot read.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from diptych.cluster.config import check_config
from diptych.cluster.control.cards import Cards
from diptych.cluster.control.memory import ENGINE_PROCESS, engine_bytes, plan_memory
from diptych.cluster.control.plan import ClusterPlan, plan_cluster
from diptych.cluster.control.testing import FACTS, World
from diptych.cluster.models import ModelFolder
from diptych.protos.errors import InvalidRequest, StartupError
from diptych.protos.types import Role

CONFIG = '{"architectures": ["BertModel"], "hidden_size": 8, "max_position_embeddings": 64}'


def plan(folder: Path, engines: int = 1) -> ClusterPlan:
    (folder / "config.json").write_text(CONFIG)
    facts = dataclasses.replace(FACTS, architecture="BertModel", task="embed")
    config = check_config({"models": {"m": {"embed": {"engines": engines}}}}, "test")
    return plan_cluster(config, {"m": ModelFolder(folder, facts)}, folder, present=Cards((), why_none="a test"))


async def started(folder: Path, engines: int = 1) -> World:
    world = World()
    await world.pools.apply(plan(folder, engines))
    assert not (await world.pools.settled()).failed
    return world


async def test_it_starts_grows_and_shrinks_but_never_to_nothing(tmp_path: Path) -> None:
    world = await started(tmp_path)
    assert world.states() == {"embed-0": "ready"}
    await world.pools.scale("m", Role.EMBED, 3)
    assert set(world.states()) == {"embed-0", "embed-1", "embed-2"}
    await world.pools.scale("m", Role.EMBED, 1)
    assert len(world.states()) == 1
    with pytest.raises(InvalidRequest, match="needs at least 1 engine"):
        await world.pools.scale("m", Role.EMBED, 0)
    with pytest.raises(InvalidRequest, match="has no decode pool; it has embed"):
        await world.pools.scale("m", Role.DECODE, 1)


async def test_it_is_restarted_with_and_without_its_role_named(tmp_path: Path) -> None:
    world = await started(tmp_path, engines=2)
    for role in (None, Role.EMBED):
        done = await world.pools.restart("m", role)
        assert (len(done.started), len(done.ended), done.failed) == (2, 2, ())


async def test_it_has_no_other_role(tmp_path: Path) -> None:
    world = await started(tmp_path)
    with pytest.raises(InvalidRequest, match="decode"):
        await world.pools.set_role("embed-0", Role.DECODE)


async def test_one_that_died_is_replaced_by_its_name(tmp_path: Path) -> None:
    world = await started(tmp_path)
    world.process("embed-0").death.set_result("killed")
    await world.until(lambda: len(world.made) == 2)
    assert world.made[1].spec.engine_id == "embed-0"
    assert world.made[1].spec.text == world.made[0].spec.text


async def test_a_restarted_manager_reads_its_plan(tmp_path: Path) -> None:
    world = await started(tmp_path, engines=2)
    world.begin()
    world.pools.adopt()
    await world.pools.apply(plan(tmp_path, 2))
    assert len(world.made) == 2, "the same plan again starts nothing"


def test_its_memory_is_weights_and_a_process(tmp_path: Path) -> None:
    [spec] = plan(tmp_path).engines()
    assert engine_bytes(spec) == ENGINE_PROCESS + 4 * FACTS.num_parameters
    with pytest.raises(StartupError):
        plan_memory([spec], (1, "nothing"), ray_is_ours=True).check()
