"""What is over goes: expired files, orphaned contents, lines and batches of long ago. What is needed stays.

Guards against disks that fill up over months, and against a sweep that takes what a batch still reads.
"""

from __future__ import annotations

import asyncio
import os
import time

import pytest
from sqlalchemy import func, select

from diptych.cluster.batches import sweep as sweeping
from diptych.cluster.batches.run import BatchRun
from diptych.cluster.batches.testing import CHAT, Bench, Scripted, line
from diptych.cluster.store.batches import BATCHES, LINES
from diptych.cluster.store.idempotency import IDEMPOTENCY
from diptych.cluster.store.responses import RESPONSES

DAY = 86_400


async def test_files_go_when_their_time_is_over(bench: Bench) -> None:
    fields = {"purpose": "user_data", "expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    mortal = (await bench.http.post("/v1/files", data=fields, files={"file": ("a", b"abc")})).json()
    assert mortal["expires_at"] == mortal["created_at"] + 3600
    lasting = await bench.upload(b"abc", purpose="user_data")
    place = bench.runner()._place
    await sweeping.sweep(place, kept_s=DAY)
    assert (await bench.http.get(f"/v1/files/{mortal['id']}")).status_code == 200
    bench.later_s = 3601
    await sweeping.sweep(place, kept_s=DAY)
    assert [one["id"] for one in (await bench.http.get("/v1/files")).json()["data"]] == [lasting["id"]]
    assert len(list((bench.door.store.folder / "files").iterdir())) == 1


async def test_contents_that_a_batch_reads_stay_until_it_is_over(bench: Bench) -> None:
    target = Scripted()
    target.gate.clear()
    batch = await bench.make([line("a", "t0")])
    runner = bench.runner(**{CHAT: target})
    await bench.until(batch["id"], lambda told: bool(target.begun), runner)
    await bench.http.delete(f"/v1/files/{batch['input_file_id']}")
    (content,) = (bench.door.store.folder / "files").iterdir()
    os.utime(content, (0, 0))
    await sweeping.sweep_contents(runner._place)
    assert content.exists()
    target.gate.set()
    await bench.over(batch["id"], runner)
    await sweeping.sweep_contents(runner._place)
    assert not content.exists()


async def test_what_a_dead_router_left_goes_and_what_is_new_stays(bench: Bench) -> None:
    kept = await bench.upload(b"abc", purpose="user_data")
    folder = bench.door.store.folder / "files"
    (content,) = folder.iterdir()
    old, draft, fresh, foreign = ("a" * 32, "b" * 32 + ".part", "c" * 32, "readme.txt")
    for name in (old, draft, fresh, foreign):
        (folder / name).write_bytes(b"x")
        if name != fresh:
            os.utime(folder / name, (time.time() - 10 * DAY,) * 2)
    os.utime(content, (time.time() - 10 * DAY,) * 2)
    await sweeping.sweep_contents(bench.runner()._place)
    assert {one.name for one in folder.iterdir()} == {content.name, fresh, foreign}
    assert (await bench.http.get(f"/v1/files/{kept['id']}/content")).content == b"abc"


async def test_lines_go_with_the_end_and_batches_long_after(bench: Bench) -> None:
    runner = bench.runner(**{CHAT: Scripted()})
    batch = await bench.make([line(f"c{i}", f"t{i}") for i in range(30)])
    await bench.over(batch["id"], runner)
    for run in [*runner._tasks.values()]:
        await run
    store = bench.door.store
    assert await store.read(lambda c: c.execute(select(func.count()).select_from(LINES)).scalar_one()) == 0
    await sweeping.sweep(runner._place, kept_s=DAY)
    assert (await bench.batch(batch["id"]))["status"] == "completed"
    bench.later_s = 2 * DAY
    await sweeping.sweep(runner._place, kept_s=DAY)
    assert await store.read(lambda c: c.execute(select(func.count()).select_from(BATCHES)).scalar_one()) == 0


async def test_a_batch_that_has_just_ended_clears_its_lines_away(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is nobody's from its end on: a look at that moment took it for another router's and left them to the sweep."""
    has_ended, goes_on = asyncio.Event(), asyncio.Event()
    forget = BatchRun._forget_lines

    async def held_up(run: BatchRun, *, is_over: bool = False) -> None:
        if is_over:
            has_ended.set()
            await goes_on.wait()
        await forget(run, is_over=is_over)

    monkeypatch.setattr(BatchRun, "_forget_lines", held_up)
    runner = bench.runner(**{CHAT: Scripted()})
    await bench.make([line("a", "t")])
    await runner.look()
    (run,) = runner._tasks.values()
    await has_ended.wait()
    await runner.look()
    goes_on.set()
    await run
    assert await bench.door.store.read(lambda c: c.execute(select(func.count()).select_from(LINES)).scalar_one()) == 0


async def test_what_was_kept_for_a_time_goes_though_nobody_asks_for_such_things_any_more(bench: Bench) -> None:
    """Guards against prompts that lie in the database for ever: endpoints drop only while they are used."""
    ask = {"model": "echo", "input": "hello", "max_output_tokens": 2}
    reply = await bench.http.post("/v1/responses", json=ask, headers={"Idempotency-Key": "k"})
    assert reply.status_code == 200

    async def kept() -> list[int]:
        tables = RESPONSES, IDEMPOTENCY
        return await bench.door.store.read(
            lambda c: [c.execute(select(func.count()).select_from(table)).scalar_one() for table in tables]
        )

    place = bench.runner()._place
    await sweeping.sweep(place, kept_s=DAY)
    assert await kept() == [1, 1]
    bench.later_s = DAY + 60
    await sweeping.sweep(place, kept_s=DAY)
    assert await kept() == [1, 0]
    bench.later_s = 32 * DAY
    await sweeping.sweep(place, kept_s=DAY)
    assert await kept() == [0, 0]


async def test_gauges_tell_what_is_kept(bench: Bench) -> None:
    runner = bench.runner(**{CHAT: Scripted()})
    await bench.over((await bench.make([line("a")]))["id"], runner)
    await bench.upload(b"x" * 1000, purpose="user_data")
    await sweeping.tell_metrics(runner._place)
    page = (await bench.http.get("/metrics")).text
    assert 'diptych_batches{state="completed"} 1.0' in page
    assert 'diptych_batch_lines_total{outcome="completed"} 1.0' in page
    assert "diptych_files 3.0" in page
