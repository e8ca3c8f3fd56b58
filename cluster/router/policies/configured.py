"""From the configuration's words to a placer."""

from __future__ import annotations

from collections.abc import Callable
from typing import assert_never

from diptych.cluster.config import PlacementSettings

from ..estimate import PairMeter
from ..placement import PlacementPolicy, Placer
from .cost import Cost
from .least_load import LeastLoad
from .prefix import Prefix
from .round_robin import RoundRobin
from .session import Session


def placer_of(settings: PlacementSettings, *, pairs: PairMeter, clock: Callable[[], float]) -> Placer:
    """`pairs` is what the router has learned of transfers."""
    return Placer(_policy(settings, pairs, clock), settings.local_prefill_below)


def _policy(settings: PlacementSettings, pairs: PairMeter, clock: Callable[[], float]) -> PlacementPolicy:
    match settings.policy:
        case "cost":
            return Cost(
                ttft_target_s=settings.ttft_target_s,
                itl_target_s=settings.itl_target_s,
                local_below=settings.local_prefill_below,
                pairs=pairs,
            )
        case "prefix":
            return Prefix()
        case "session":
            return Session(ttl_s=settings.session_ttl_s, clock=clock)
        case "least_load":
            return LeastLoad()
        case "round_robin":
            return RoundRobin()
        case other:
            assert_never(other)
