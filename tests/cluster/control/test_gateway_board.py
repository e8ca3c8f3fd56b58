"""The actor on which gateways of several routers meet: found by all, lost with its maker, made anew by who is left."""

from __future__ import annotations

import subprocess
import sys
import tempfile

import pytest

# In a process of its own: Ray's settings of other tests do not hold here, and nothing of it stays.
PROGRAM = """
import asyncio, sys, time
import ray
from diptych.cluster.control.gateway_board import ActorState
from diptych.cluster.control.gcs import NAMESPACE
from diptych.cluster.gateway.shared_state import BreakerNews, Report

ray.init(num_cpus=2, include_dashboard=False, _temp_dir=sys.argv[1], configure_logging=False)
NEWS = BreakerNews(target="p/a", state="open", ago_s=0.0, opens_in_s=9.0, why="server")

@ray.remote(num_cpus=0)
class Router:
    def __init__(self):
        self.state = ActorState()
    async def tell(self):
        return (await self.state.exchange(Report(holder="maker", breakers=(NEWS,)))).num_others

async def told(state, seconds):
    # As state_sync does: what fails now is asked again a second later.
    deadline, lost = time.monotonic() + seconds, False
    while time.monotonic() < deadline:
        try:
            found = await state.exchange(Report(holder="other"))
        except ray.exceptions.RayError:
            lost = True
        else:
            if lost or not found.num_others:
                return lost, found
        await asyncio.sleep(0.1)
    raise SystemExit("no board was made anew")

async def main():
    maker = Router.remote()
    assert await maker.tell.remote() == 0
    state = ActorState()
    found = await state.exchange(Report(holder="other"))
    assert [news.target for news in found.breakers] == ["p/a"], found
    assert await maker.tell.remote() == 1
    ray.kill(maker)
    lost, found = await told(state, 60)
    assert lost and found.num_others == 0, (lost, found)
    print("made anew")

asyncio.run(main())
ray.shutdown()
"""


@pytest.mark.ray
def test_routers_meet_and_outlive_the_board() -> None:
    """A board that nobody made again after its maker's death would end all sharing until the cluster is restarted."""
    with tempfile.TemporaryDirectory(prefix="gb") as folder:  # short: Ray's sockets lie below it
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, folder], capture_output=True, text=True, timeout=240, check=False
        )
    assert "made anew" in done.stdout, done.stdout + done.stderr
