"""The KV path loses packets, is slow, or does worse: answers come later, never others, and nothing stays held."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from netrig import Answer, net_rig

from diptych.protos.types import Role

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("namespaces"), pytest.mark.timeout(240)]

LOAD_S = 12.0


def tell(what: str, answers: list[Answer]) -> str:
    seconds = sorted(a.seconds for a in answers)
    over = sum(bool(a.transport) for a in answers)
    errors = sorted({a.error for a in answers if a.error})
    return (
        f"\n{what}: {len(answers)} requests, {sum(a.right for a in answers)} right, {over} by the wire, "
        f"errors {errors}, median {seconds[len(seconds) // 2]:.2f} s, slowest {seconds[-1]:.2f} s"
    )


@pytest.mark.parametrize(("loss", "least"), [(0.05, 1.0), (0.20, 0.95)])
async def test_r06_lost_packets_make_answers_late_and_never_wrong(loss: float, least: float, authority: Path) -> None:
    """True loss: TCP sends again. At 20 % a pair is seldom up for long: the decode engine computes prompts."""
    async with net_rig(authority) as rig:
        rig.cable.to_a.loss = rig.cable.to_b.loss = loss
        answers = await rig.ask_for(LOAD_S)
        print(tell(f"R06 {loss:.0%} loss", answers))
        lost = rig.cable.to_a.count["lost"] + rig.cable.to_b.count["lost"]
        assert lost > 20, "nothing was lost"
        assert not any(a.bad for a in answers)
        assert sum(a.right for a in answers) >= least * len(answers)
        rig.cable.calm()
        await rig.transferred(15.0)
        await rig.quiet()


async def test_r06_a_narrow_link_makes_answers_late_and_never_wrong(authority: Path) -> None:
    """1 Mbit/s each way, by the kernel, whose short queue drops what does not fit. A prompt's KV takes 0.6 s of it."""
    async with net_rig(authority) as rig:
        for name in ("prefill", "decode"):
            limit = ("tbf", "rate", "1mbit", "burst", "16kb", "latency", "400ms")
            rig.spaces[name].tc("qdisc", "add", "dev", "kv0", "root", *limit)
        answers = await rig.ask_for(LOAD_S, every_s=1.0)
        print(tell("R06 1 Mbit/s", answers))
        assert all(a.right for a in answers)
        for name in ("prefill", "decode"):
            rig.spaces[name].tc("qdisc", "del", "dev", "kv0", "root")
        await rig.transferred(15.0)
        await rig.quiet()


async def test_late_doubled_and_disordered_packets_are_tcp_s_business(authority: Path) -> None:
    async with net_rig(authority) as rig:
        for way in (rig.cable.to_a, rig.cable.to_b):
            way.delay_s, way.duplicate, way.reorder = 0.01, 0.1, 0.1
        answers = await rig.ask_for(LOAD_S / 2)
        print(tell("late, doubled, disordered", answers))
        assert all(a.right for a in answers)
        assert sum(bool(a.transport) for a in answers) > len(answers) / 2
        await rig.quiet()


@pytest.mark.parametrize("harm", ["flip", "reset"])
async def test_a_wire_that_alters_or_resets_ends_connections_and_brings_no_other_byte(
    harm: str, authority: Path
) -> None:
    """Bits flip under checksums that are right again, so that TLS alone can notice; or somebody forges resets."""
    async with net_rig(authority) as rig:
        pairs = await rig.count(Role.DECODE, "kv_pairs_grpc_total")
        asking = asyncio.create_task(rig.ask_for(LOAD_S))
        for way in (rig.cable.to_a, rig.cable.to_b):
            setattr(way, harm, 0.02)
        answers = await asking
        print(tell(f"wire with {harm}", answers))
        done = "flipped" if harm == "flip" else "reset"
        assert rig.cable.to_a.count[done] + rig.cable.to_b.count[done] > 5
        assert all(a.right for a in answers)
        rig.cable.calm()
        await rig.transferred(15.0)
        assert await rig.count(Role.DECODE, "kv_pairs_grpc_total") > pairs
        assert await rig.count(Role.DECODE, "kv_checksum_failures_total") == 0, "TLS lets no altered byte through"
        await rig.quiet()
