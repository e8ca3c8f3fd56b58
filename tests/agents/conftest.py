"""No test of this floor reaches a model: who needs an answer scripts one, or starts a server of its own on loopback."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from diptych.agents.llm.testing import forbid_network


@pytest.fixture(autouse=True)
def no_network() -> Iterator[None]:
    with forbid_network():
        yield
