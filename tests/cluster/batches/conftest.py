"""A front door per test, with batches that nobody works on but the test."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx2
import pytest

from diptych.cluster.api.testing import front_door
from diptych.cluster.batches.testing import Bench


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with front_door() as door, httpx2.AsyncClient(base_url=door.listener.url, timeout=20) as http:
        made = Bench(door, http)
        yield made
        for runner in made.runners:
            await runner.stop()
