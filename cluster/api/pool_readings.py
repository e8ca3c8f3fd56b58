"""What a router sees of its engines' counters, for the prices of own pools (cluster/gateway/devices.py)."""

from __future__ import annotations

from collections.abc import Iterator

from diptych.cluster.gateway.devices import DeviceMeter, Reading
from diptych.cluster.router.router import Router


def meter_of(router: Router) -> DeviceMeter:
    """For money_ports(meter=...)."""

    def readings() -> Iterator[Reading]:
        for session in router.view.sessions():
            ref = session.info.ref
            yield Reading(session.info.model, f"{ref.engine_id}@{ref.epoch}", session.status.counters)

    return DeviceMeter(readings=readings)
