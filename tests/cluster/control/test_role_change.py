"""An engine moves from one pool to the other of its model: out of the routers' sight meanwhile, and never half."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from diptych.cluster.config import load_config
from diptych.cluster.control.manager import PoolManager
from diptych.cluster.control.memory import MIB
from diptych.cluster.control.plan import plan_cluster
from diptych.cluster.control.pools import Pools
from diptych.cluster.engine.spec import EngineSpec, EngineStarted
from diptych.cluster.models import ModelFacts, ModelFolder
from diptych.protos.errors import DiptychError, EngineLost, InvalidRequest
from diptych.protos.status import EngineInfo, EngineStatus
from diptych.protos.types import EngineId, Role

FACTS = ModelFacts(
    name="m",
    architecture="LlamaForCausalLM",
    layers=2,
    kv_heads=1,
    head_dim=8,
    vocab_size=100,
    max_context_tokens=512,
    weights_bytes=1,
    num_parameters=100,
    eos_token_ids=(2,),
    bos_token_id=1,
    dtype="float32",
    chat_template=None,
)


class Store(dict[str, bytes]):
    def put(self, key: str, value: bytes) -> None:
        self[key] = value


class Process:
    """An engine that changes its roles when the test lets it."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self.info = EngineInfo(
            ref=spec.ref,
            roles=spec.roles,
            model=spec.model,
            pid=1,
            host="h",
            block_tokens=16,
            num_blocks=10,
            max_context_tokens=100,
            dtype="float32",
        )
        self.death: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.may_change = asyncio.Event()
        self.may_change.set()
        self.error: DiptychError | None = None

    async def start(self) -> EngineStarted:
        return EngineStarted(self.info, ())

    async def ended(self) -> str:
        return await asyncio.shield(self.death)

    async def ping(self) -> bool:
        return False

    def is_stopped(self) -> bool:
        return False

    async def status(self) -> EngineStatus:
        return EngineStatus()

    async def set_cores(self, cores: int) -> None:
        pass

    async def set_roles(self, roles: frozenset[Role], grace_s: float) -> EngineInfo:
        await self.may_change.wait()
        if self.error is not None:
            raise self.error
        assert roles <= self.spec.possible_roles
        self.info = EngineInfo(**{f: getattr(self.info, f) for f in EngineInfo.__slots__} | {"roles": roles})
        return self.info

    async def drain(self, grace_s: float) -> bool:
        return True

    async def stop(self) -> None:
        pass

    def kill(self) -> None:
        if not self.death.done():
            self.death.set_result("killed")


class Site:
    """Pools of one model, and what routers would see."""

    def __init__(self) -> None:
        self.store = Store()
        self.processes: dict[tuple[EngineId, int], Process] = {}
        self.manager = PoolManager(self.store)
        self.pools = Pools(
            self.manager, self.store, self, available=lambda pids: (100_000 * MIB, "memory"), changed=lambda: None
        )

    def launch(self, spec: EngineSpec) -> Process:
        self.processes[spec.engine_id, spec.epoch] = process = Process(spec)
        return process

    def find(self, engine_id: EngineId, epoch: int, pid: int | None = None) -> Process | None:
        return self.processes.get((engine_id, epoch))

    def process(self, name: str) -> Process:
        return max(((e, p) for (n, e), p in self.processes.items() if n == name), key=lambda pair: pair[0])[1]

    def routed(self) -> dict[str, str]:
        return {
            i.ref.engine_id: "draining" if i.draining else "-".join(sorted(i.roles)) for i in self.manager.engines()
        }

    async def until(self, wanted: dict[str, str], launched: int = 3) -> None:
        async with asyncio.timeout(10):
            while self.routed() != wanted or len(self.processes) != launched:  # noqa: ASYNC110 - fakes tell nobody
                await asyncio.sleep(0)


async def started(*overrides: str) -> Site:
    site = Site()
    config = load_config(None, ["models.m.source=/m", "models.m.prefill.engines=2", *overrides])
    only = config.model_copy(update={"models": {"m": config.models["m"]}})
    await site.pools.apply(plan_cluster(only, {"m": ModelFolder(Path("/m"), FACTS)}, Path("/r")))
    assert not (await site.pools.settled()).failed
    return site


BEFORE = {"prefill-0": "prefill", "prefill-1": "prefill", "decode-0": "decode"}
AFTER = BEFORE | {"prefill-1": "decode"}


async def test_an_engine_that_changes_drains_for_the_routers_until_it_has_its_new_role() -> None:
    site = await started()
    site.process("prefill-1").may_change.clear()
    change = asyncio.create_task(site.pools.set_role("prefill-1", Role.DECODE))
    await site.until(BEFORE | {"prefill-1": "draining"})
    site.process("prefill-1").may_change.set()
    assert (await change).roles == {Role.DECODE}
    assert site.routed() == AFTER
    assert len(site.processes) == 3, "nobody was started"


async def test_the_sizes_of_the_pools_follow_also_in_what_a_restarted_manager_reads() -> None:
    site = await started()
    await site.pools.set_role("prefill-1", Role.DECODE)
    site.manager = PoolManager(site.store)
    site.pools = Pools(
        site.manager, site.store, site, available=lambda pids: (100_000 * MIB, "memory"), changed=lambda: None
    )
    site.pools.adopt()
    assert site.routed() == AFTER
    assert not (await site.pools.scale("m", Role.DECODE, 2)).started, "it has two"
    done = await site.pools.scale("m", Role.DECODE, 1)
    assert done.ended == ("decode-0",), "the younger of the two"


async def test_one_that_dies_in_its_new_role_is_replaced_in_its_new_pool() -> None:
    site = await started()
    await site.pools.set_role("prefill-1", Role.DECODE)
    site.process("prefill-1").death.set_result("killed -9")
    await site.until(AFTER, launched=4)
    assert site.process("prefill-1").spec.roles == {Role.DECODE}


async def test_one_that_dies_while_it_changes_is_replaced_in_its_old_pool() -> None:
    site = await started()
    process = site.process("prefill-1")
    process.may_change.clear()
    change = asyncio.create_task(site.pools.set_role("prefill-1", Role.DECODE))
    await site.until(BEFORE | {"prefill-1": "draining"})
    process.error = EngineLost("it died")
    process.death.set_result("killed -9")
    process.may_change.set()
    with pytest.raises(EngineLost):
        await change
    await site.until(BEFORE, launched=4)
    assert site.process("prefill-1") is not process


async def test_a_role_that_the_engine_refuses_leaves_it_as_it_was() -> None:
    site = await started()
    site.process("prefill-1").error = InvalidRequest("engine prefill-1 can be prefill, not decode")
    with pytest.raises(InvalidRequest, match="can be prefill"):
        await site.pools.set_role("prefill-1", Role.DECODE)
    assert site.routed() == BEFORE
    assert not (await site.pools.scale("m", Role.PREFILL, 2)).started


async def test_a_caller_that_goes_away_does_not_leave_it_between_two_roles() -> None:
    site = await started()
    site.process("prefill-1").may_change.clear()
    change = asyncio.create_task(site.pools.set_role("prefill-1", Role.DECODE))
    await site.until(BEFORE | {"prefill-1": "draining"})
    change.cancel()
    site.process("prefill-1").may_change.set()
    await site.until(AFTER)


async def test_what_cannot_be_is_refused_by_name_and_changes_nothing() -> None:
    site = await started()
    with pytest.raises(InvalidRequest, match="no engine decode-7 is ready; ready here: decode-0, prefill-0, prefill-1"):
        await site.pools.set_role("decode-7", Role.PREFILL)
    with pytest.raises(InvalidRequest, match="decode-0 is the last decode engine of m"):
        await site.pools.set_role("decode-0", Role.PREFILL)
    assert (await site.pools.set_role("decode-0", Role.DECODE)).roles == {Role.DECODE}
    assert site.routed() == BEFORE


async def test_with_certificates_that_name_one_role_engines_are_made_for_one() -> None:
    plain = await started()
    assert plain.process("decode-0").spec.more_roles == {Role.PREFILL}
    tls = await started("security.tls={ca: /a, cert: /b, key: /c}")
    assert tls.process("decode-0").spec.more_roles == frozenset()
