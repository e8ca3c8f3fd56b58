"""One cell from end to end on a fake cluster: what it does wrong is in the tally, what it does right is not blamed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import drive
import pytest
from cancels import run_cancels
from cells import Act, Cell
from drive import Stage, run_cell, run_rounds
from fake_front import FakeFront, fake_front
from load import Asks
from rig import Kill, Rig
from tally import Tally


def engine(name: str, role: str, used: int = 0) -> dict[str, Any]:
    return {
        "engine": name,
        "roles": [role],
        "pid": 1,
        "epoch": 1,
        "connected": True,
        "draining": False,
        "blocks": {"used": used},
        "transfers": 0,
        "ring_slots_busy": 0,
        "running": 0,
        "waiting": 0,
        "counters": {"kv_thread_faults_total": 0.0},
    }


class FakeRig(Rig):
    """Its engines cannot be killed; it writes down who should have been."""

    def kill(self, name: str, number: Any = None) -> Kill:
        self.killed.append(name)
        raise ProcessLookupError(name)

    killed: list[str]


@contextmanager
def staged(folder: Path, used: int = 0, **settings: Any) -> Iterator[tuple[Stage, FakeFront]]:
    """A fake front in a thread of its own."""
    engines = [engine("prefill-3", "prefill"), engine("decode-0", "decode", used)]
    up, down = threading.Event(), threading.Event()
    fronts: list[FakeFront] = []

    async def serve() -> None:
        async with fake_front(engines=engines, **settings) as front:
            fronts.append(front)
            up.set()
            await asyncio.to_thread(down.wait)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    up.wait(30)
    try:
        rig = FakeRig(fronts[0].url, "echo", "echo", folder, 1)
        rig.killed = []
        yield Stage(rig, Asks(rig.expected, seed=1, prompt_tokens=(2, 6), max_tokens=(3, 9)), engines=2), fronts[0]
    finally:
        down.set()
        thread.join()


CELL = Cell("kill", ("F9",), "decode", "kill", (Act("kill", "prefill-0", after_tokens=2),), over_s=0.0)


def test_a_right_cluster_gets_zeros_and_the_act_goes_to_an_engine_that_is_there(tmp_path: Path) -> None:
    with staged(tmp_path) as (stage, _):
        tally = run_cell(stage, CELL, requests=5, seed=1)
        assert isinstance(stage.rig, FakeRig)
        assert stage.rig.killed == ["prefill-3"]
    assert tally.requests == tally.whole == 5
    assert not tally.is_broken
    assert tally.problems == ["kill prefill-3: prefill-3"]
    assert tally.moves == 5


def test_doubled_tokens_and_held_blocks_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drive, "QUIET_S", 0.0)
    with staged(tmp_path, used=3, spoil=lambda tokens: tokens[:1] + tokens) as (stage, _):
        tally = run_cell(stage, CELL, requests=5, seed=1)
    assert tally.verdict.doubled == 5 + drive.PROBES
    assert tally.leaked == ["decode-0: blocks_used 3"]
    assert len(tally.examples) == 5


def test_refusals_are_failures_and_the_act_that_never_came_is_told(tmp_path: Path) -> None:
    with staged(tmp_path, status=503) as (stage, _):
        tally = run_cell(stage, CELL, requests=4, seed=1)
    assert tally.failed == {"overloaded": 4}
    assert "never came to kill prefill-3" in tally.problems
    assert sum("afterwards failed" in problem for problem in tally.problems) == drive.PROBES


def test_the_storm_counts_those_who_left_and_those_who_stayed(tmp_path: Path) -> None:
    with staged(tmp_path) as (stage, _):
        tally = run_cancels(stage, number=40, seed=2)
    assert tally.requests >= 44
    assert tally.left + tally.whole == tally.requests
    assert tally.left > 5
    assert not tally.is_broken


def test_engines_that_do_not_come_back_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drive, "BACK_S", 0.0)
    with staged(tmp_path) as (stage, _):
        stage.engines = 4
        tally = run_cell(stage, CELL, requests=2, seed=1)
    assert any("do not come back" in problem for problem in tally.problems)


@pytest.mark.parametrize(
    ("killed", "made", "missed"),
    [((1, 1, 1), 3, []), ((1, 0, 1, 0, 1), 5, []), ((0,) * 9, 3 + drive.AGAIN, ["0 engines ended instead of 3"])],
)
def test_a_round_that_missed_its_fault_is_made_again_a_few_times(
    killed: tuple[int, ...], made: int, missed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []

    def fake(stage: Stage, cell: Cell, *, requests: int, seed: int) -> Tally:
        seeds.append(seed)
        return Tally(cell.id, requests=requests, wanted_deaths=1, deaths=killed[len(seeds) - 1])

    monkeypatch.setattr(drive, "run_cell", fake)
    cell = Cell("step", (), "prefill", "kill", deaths=1, rounds=3, each=4)
    total = run_rounds(cast("Stage", None), cell, seed=7)
    assert len(seeds) == len(set(seeds)) == made
    assert (total.requests, total.missed()) == (4 * made, missed)
