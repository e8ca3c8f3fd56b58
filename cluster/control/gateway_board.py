"""The board on which gateways of several router replicas tell each other what they found out: a small actor.

It belongs to the replica that made it and ends with it; the next report of another one makes a new one. Nothing is
kept: every report says all that is recent. Requests never wait for it (cluster/gateway/state_sync.py).
"""

from __future__ import annotations

import asyncio
from typing import Any, Final, cast

import ray

from diptych.cluster.gateway.shared_state import Board, Report, Snapshot

from .gcs import NAMESPACE

BOARD_NAME: Final = "gateway-board"


class GatewayBoardActor:
    """One per cluster."""

    def __init__(self) -> None:
        self._board = Board()

    async def exchange(self, report: Report) -> Snapshot:
        """See SharedState."""
        return self._board.exchange(report)


class ActorState:
    """SharedState by the actor. Needs a process that is connected to Ray."""

    def __init__(self) -> None:
        self._actor: Any = None

    async def exchange(self, report: Report) -> Snapshot:
        """See SharedState. Raises RayError where the actor is gone; the next call makes another."""
        if self._actor is None:
            self._actor = await asyncio.to_thread(_found_or_made)
        try:
            return cast("Snapshot", await self._actor.exchange.remote(report))
        except ray.exceptions.RayError:
            self._actor = None
            raise


def _found_or_made() -> Any:
    actor = cast("Any", ray.remote(GatewayBoardActor))
    return actor.options(
        name=BOARD_NAME, namespace=NAMESPACE, get_if_exists=True, num_cpus=0, max_restarts=0, max_concurrency=64
    ).remote()
