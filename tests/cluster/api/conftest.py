"""A front door per test, and a client to it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx2
import pytest

from diptych.cluster.api.testing import FrontDoor, front_door


@pytest.fixture
async def door() -> AsyncIterator[FrontDoor]:
    async with front_door() as door:
        yield door


@pytest.fixture
async def http(door: FrontDoor) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(base_url=door.listener.url, timeout=20) as client:
        yield client
