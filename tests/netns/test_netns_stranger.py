"""S02: who reaches the port that KV and sessions share and is not of the cluster gets nothing, and is counted."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cable import said
from netrig import PORT, NetRig, net_rig

from diptych.protos.types import Role

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("namespaces"), pytest.mark.timeout(240)]

REFUSED_S = 1.0


async def captured(rig: NetRig) -> list[bytes]:
    """What a decode engine says to a prefill engine when they meet: by an eavesdropper on the cable."""
    pairs = await rig.count(Role.DECODE, "kv_pairs_grpc_total")
    rig.cable.to_a.cut = rig.cable.to_b.cut = True
    await asyncio.sleep(2.0)
    packets: list[bytes] = []
    rig.cable.captured = packets
    rig.cable.calm()
    await rig.transferred(15.0)
    assert await rig.count(Role.DECODE, "kv_pairs_grpc_total") > pairs
    rig.cable.captured = None
    connections = [words for words in said(packets, PORT) if words.startswith(b"\x16\x03") and len(words) > 1500]
    assert len(connections) >= 2, "one for messages, one for bytes"
    return connections[-2:]


def attack(rig: NetRig, order: dict[str, Any]) -> list[dict[str, Any]]:
    program = Path(__file__).with_name("stranger_process.py")
    command = rig.spaces["stranger"].command([sys.executable, str(program)])
    done = subprocess.run(command, input=json.dumps(order), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    results: list[dict[str, Any]] = json.loads(done.stdout)
    return results


async def refused(rig: NetRig) -> float:
    counters = (await rig.status(Role.PREFILL)).counters
    return counters["engine_refused_calls_total"] + counters["kv_refused_calls_total"]


async def test_s02_who_has_no_right_certificate_or_repeats_what_it_heard_gets_nothing(
    authority: Path, stranger: Path, expired: Path
) -> None:
    async with net_rig(authority) as rig:
        replays = await captured(rig)
        ref = rig.infos[Role.PREFILL].ref
        order = {
            "engine_id": ref.engine_id,
            "epoch": ref.epoch,
            "target": ref.target,
            "secret": rig.secret.hex(),
            "authority": str(authority),
            "stranger": str(stranger),
            "expired": str(expired),
            "captured": [words.hex() for words in replays],
        }
        await asyncio.sleep(2.5)  # what has begun before is settled
        before = await refused(rig)
        out = await rig.count(Role.PREFILL, "kv_transfer_bytes_total")
        results = await asyncio.to_thread(attack, rig, order)
        for result in results:
            print(
                f"\nS02 {result['what']}, {result['method']}: {result['seconds']:.3f} s, {result['words'][:90]}", end=""
            )
        assert len(results) == 17
        for result in results:
            assert result["messages"] == result["num_bytes"] == 0, result
            assert not result["words"].startswith("OK"), result
            assert result["seconds"] < REFUSED_S, result
        async with asyncio.timeout(10):
            while await refused(rig) - before < len(results):  # noqa: ASYNC110 - an engine elsewhere
                await asyncio.sleep(0.1)
        await asyncio.sleep(2.5)
        assert await refused(rig) - before == len(results), "one each"
        assert await rig.count(Role.PREFILL, "kv_transfer_bytes_total") == out
        assert (await rig.ask()).transport, "the pair has noticed nothing"
        await rig.quiet()
