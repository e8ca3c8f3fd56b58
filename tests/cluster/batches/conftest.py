"""A front door per test, with batches that nobody works on but the test."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from diptych.cluster.batches.testing import Bench, batch_bench


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with batch_bench() as made:
        yield made
