"""`pytest tests/kvtransfer -k stateful --hypothesis-profile=nightly --timeout 900`: the three state machines, 21,000
runs of 100 steps in all, ten to twenty minutes.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile(
    "nightly",
    max_examples=7_000,
    stateful_step_count=100,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
