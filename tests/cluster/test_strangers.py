"""A process of another cluster, with another secret, gets nothing, and those that it calls go on."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_cluster import ECHO, WAIT_S, connected, small_cluster

from diptych.protos.trust import Trust
from diptych.protos.types import GENERATING, Role

PROMPT = "t1 t2 t3 t4 t5 t6 t7 t8 " * 20
OURS, THEIRS = bytes(range(32)), bytes(32)


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A short one: unix socket paths hold 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="dt-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


async def test_a_decode_engine_of_another_cluster_gets_no_kv_and_computes_the_prompt_itself(run_dir: Path) -> None:
    """The router holds both secrets: it reaches both engines, and they do not reach each other."""
    async with small_cluster(run_dir, run_dir) as whole:
        expected = await (await connected(whole)).answer(PROMPT)

    class TwoFaced(Trust):
        """Proves each secret to the engine that has it."""

        def proof(self, method: str, callee: object) -> tuple[tuple[str, str]]:
            secret = THEIRS if callee.engine_id == "decode-0" else OURS  # type: ignore[attr-defined]
            return Trust(secret, "router").proof(method, callee)  # type: ignore[arg-type]

    def trust(name: str) -> Trust:
        return TwoFaced(OURS, name) if name == "router" else Trust(THEIRS if name == "decode" else OURS, name)

    async with small_cluster(run_dir, run_dir, trust=trust) as cluster:
        await connected(cluster)
        async with asyncio.timeout(WAIT_S):
            assert await cluster.answer(PROMPT) == expected
        assert cluster.count(Role.DECODE, "decode_local_prefills_total") == 1
        assert cluster.count(Role.DECODE, "kv_thread_faults_total") == 0
        assert cluster.count(Role.PREFILL, "kv_refused_calls_total") >= 1
        assert cluster.count(Role.PREFILL, "kv_transfer_bytes_total") == 0
        await cluster.at_rest()


async def test_a_router_of_another_cluster_is_never_ready(run_dir: Path) -> None:
    def trust(name: str) -> Trust:
        return Trust(THEIRS if name == "router" else OURS, name)

    async with small_cluster(run_dir, run_dir, trust=trust) as cluster:
        async with asyncio.timeout(WAIT_S):
            while not all(cluster.count(role, "engine_refused_calls_total") >= 2 for role in GENERATING):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert not cluster.router.is_ready(ECHO)
        assert all(engine._sessions.num_sessions == 0 for engine in cluster.engines.values())
