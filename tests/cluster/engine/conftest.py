"""An engine's sessions, for the tests of what they say and take."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from diptych.cluster.engine.testing import Start, harnesses


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    async with harnesses(tmp_path) as make:
        yield make
