"""The KV path between two engines is cut, both ways or one, for long or for ever; their routers see nothing of it."""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from pathlib import Path

import pytest
from netrig import NetRig, net_rig

from diptych.protos.types import GENERATING, Role

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("namespaces"), pytest.mark.timeout(240)]

DOWN_S = float(os.environ.get("DIPTYCH_NETNS_DOWN_S", "8"))  # R05 asks for 30
MOST_WAIT_S, HEALED_S, DECIDED_S = 10.0, 15.0, 1.5


async def test_r05_link_down_no_request_waits_and_the_pair_comes_back_alone(authority: Path) -> None:
    async with net_rig(authority) as rig:
        rig.spaces["prefill"].ip("link", "set", "kv0", "down")
        answers = await rig.ask_for(DOWN_S, every_s=0.2)
        rig.spaces["prefill"].ip("link", "set", "kv0", "up")
        healed = await rig.transferred(HEALED_S)
        slowest = sorted((a.seconds for a in answers), reverse=True)
        later = [a.seconds for a in answers[len(answers) // 2 :]]
        print(
            f"\nR05: {len(answers)} requests, {DOWN_S:g} s without a link: slowest {slowest[0]:.2f} s, second half "
            f"at most {max(later):.2f} s, median {statistics.median(later):.3f} s; healed after {healed:.2f} s"
        )
        assert all(a.right for a in answers)
        assert slowest[0] <= MOST_WAIT_S
        assert not any(a.transport for a in answers[len(answers) // 2 :]), "the link was down"
        await rig.quiet()


@pytest.mark.parametrize("cut", ["to_a", "to_b", "both"])
async def test_f23_f24_a_partition_of_either_kind_takes_the_pair_down_at_both_ends_in_time(
    cut: str, authority: Path
) -> None:
    """Nothing is said to either end: packets vanish, in one direction or in both. `to_b` are the decode engine's."""
    async with net_rig(authority) as rig:
        before = {role: await rig.count(role, "kv_pairs_lost_total") for role in GENERATING}
        for way in (rig.cable.to_a, rig.cable.to_b) if cut == "both" else (getattr(rig.cable, cut),):
            way.cut = True
        lost = await asyncio.gather(*(_lost_after(rig, role, before[role]) for role in GENERATING))
        answers = await rig.ask_for(4.0, every_s=0.2)
        unreachable = await rig.count(Role.DECODE, "kv_unreachable_peers")
        rig.cable.calm()
        healed = await rig.transferred(HEALED_S)
        print(f"\nF23/F24 {cut}: pair down at the prefill engine after {lost[0]:.2f} s, at the decode engine after "
              f"{lost[1]:.2f} s; slowest of {len(answers)} requests {max(a.seconds for a in answers):.2f} s; "
              f"healed after {healed:.2f} s")  # fmt: skip
        assert all(a.right for a in answers)
        assert max(a.seconds for a in answers) <= MOST_WAIT_S
        assert unreachable == 1
        await rig.quiet()


async def test_f23_transfers_under_way_when_the_link_goes_are_answered_all_the_same(authority: Path) -> None:
    """Cut and healed again and again under load, slowly enough that every cut takes the pair down."""
    async with net_rig(authority) as rig:
        asking = asyncio.create_task(rig.ask_for(15.0, every_s=0.15, num_prompt=800))
        for number in range(3):
            await asyncio.sleep(2.0)
            way = (rig.cable.to_a, rig.cable.to_b)[number % 2]
            way.cut = True
            await asyncio.sleep(2.5)
            rig.cable.calm()
        answers = await asking
        over = sum(bool(a.transport) for a in answers)
        print(f"\nF23: {len(answers)} requests over three cuts, {over} by the wire, slowest "
              f"{max(a.seconds for a in answers):.2f} s")  # fmt: skip
        assert all(a.right for a in answers)
        assert 0 < over < len(answers)
        assert await rig.count(Role.DECODE, "kv_pairs_lost_total") >= 2
        await rig.quiet()


async def _lost_after(rig: NetRig, role: Role, before: float) -> float:
    """Seconds until an engine has given the pair up. Raises TimeoutError long after it should have."""
    began = time.monotonic()
    async with asyncio.timeout(4 * DECIDED_S):
        while await rig.count(role, "kv_pairs_lost_total") == before:  # noqa: ASYNC110 - an engine elsewhere
            await asyncio.sleep(0.02)
    return time.monotonic() - began
