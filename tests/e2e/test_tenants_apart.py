"""Row S21: what one tenant has in the prefix caches is found by nobody else, by usage or by the engines' counters."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import httpx2
import pytest
from small_cluster import SETTINGS, SmallCluster, connected, small_cluster

from diptych.protos.settings import KvSettings
from diptych.protos.types import Role

SECRET_TOKENS = 2000
ROOMY = SETTINGS.model_copy(update={"kv": KvSettings(memory_mib=64, block_tokens=16)})


async def found(http: httpx2.AsyncClient, prompt: list[int], tenant: str) -> int:
    """Tokens of a prompt that were cached, as the answer tells; an empty tenant is nobody."""
    body: dict[str, Any] = {"model": "echo", "prompt": prompt, "max_tokens": 2, "temperature": 0}
    reply = await http.post("/v1/completions", json=body, headers={"x-tenant": tenant} if tenant else {})
    assert reply.status_code == 200, reply.text
    cached: int = reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return cached


def counted(cluster: SmallCluster) -> float:
    """Prompt tokens that any engine found in its cache so far."""
    return sum(cluster.count(role, f"{role.value}_cached_tokens_total") for role in (Role.PREFILL, Role.DECODE))


async def settled(cluster: SmallCluster, asked: int) -> float:
    """The same once both engines are through with so many requests: an answer is out before it is counted."""
    while any(  # noqa: ASYNC110
        status.counters[f"{role.value}_requests_total"] < asked or status.running or status.blocks.used
        for role, status in ((role, cluster.engines[role].status()) for role in (Role.PREFILL, Role.DECODE))
    ):
        await asyncio.sleep(0.01)
    return counted(cluster)


@pytest.mark.parametrize("owner", ["a", ""])
async def test_a_prefix_is_cached_for_its_tenant_alone(tmp_path: Path, owner: str) -> None:
    """Not for another tenant, not for who names none; and what nobody owns is not found by a tenant."""
    draw = random.Random(21)
    secret = [draw.randrange(10, 250) for _ in range(SECRET_TOKENS)]
    async with small_cluster(tmp_path, tmp_path, settings=ROOMY) as made:
        cluster = await connected(made)
        async with httpx2.AsyncClient(base_url=cluster.listener.url, timeout=60) as http:
            assert await found(http, secret, owner) == 0
            assert await found(http, [*secret, 11], owner) == SECRET_TOKENS // 16 * 16
            before = await settled(cluster, 2)
            for other in ["b", "A", "aa", "c", "" if owner else "a"]:  # once each: the second time it is their own
                guess = [*secret[: draw.randrange(64, SECRET_TOKENS)], draw.randrange(10, 250)]
                assert await found(http, guess, other) == 0
            assert await settled(cluster, 7) == before
            assert await found(http, secret, owner) > 0
