"""`pytest tests/kvtransfer --hypothesis-profile=nightly`: the state machines at 20,000 runs of 100 steps each."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile(
    "nightly",
    max_examples=20_000,
    stateful_step_count=100,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
