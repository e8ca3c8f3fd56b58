"""Every test here runs twice: each step collected at once, and the next one launched before."""

from __future__ import annotations

import pytest

from diptych.decode.testing import DecodeBench
from diptych.prefill.testing import PrefillBench


@pytest.fixture(params=[1, 2], ids=["depth1", "depth2"], autouse=True)
def depth(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Of the runners of all benches."""
    found: int = request.param
    monkeypatch.setattr(DecodeBench, "depth", found)
    monkeypatch.setattr(PrefillBench, "depth", found)
    return found
