"""Takes away what is over: expired files, lines of ended batches, old batches, contents that no row points to; stored
responses, and answers kept for an Idempotency-Key, which endpoints drop too, but only while they are used.

Called by runner.py in every router: each step may be done by several at once, or be left half done.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Final

from diptych.cluster.store import batches, files, idempotency, responses
from diptych.cluster.store.contents import at_disk
from diptych.protos.openai_batches import ENDED, LIVE

from .run import FORGET_LINES, Workplace

CHUNK: Final = 200
# Contents that were written this long ago and have no row belong to nobody: an upload writes its row within seconds.
ORPHAN_S: Final = 7200.0


async def sweep(place: Workplace, *, kept_s: float) -> None:
    """Rows, and the contents of the files among them."""
    store, now = place.store, place.now
    while gone := await store.write(lambda c: files.remove_expired(c, now=now, most=CHUNK)):
        await _remove_contents(place, gone)
    for number in await store.read(lambda c: batches.ended_with_lines(c, most=CHUNK)):
        while await store.write(partial(batches.forget_lines, number=number, most=FORGET_LINES)):
            pass
    while await store.write(lambda c: batches.forget_old(c, before=now - int(kept_s), most=CHUNK)):
        pass
    while await store.write(lambda c: idempotency.forget_expired(c, now, most=CHUNK)):
        pass
    while await store.write(lambda c: responses.purge(c, now)):
        pass
    while await store.write(lambda c: responses.purge(c, now)):
        pass


async def sweep_contents(place: Workplace) -> None:
    """What routers left behind that ended between a file's contents and its row, or between the ends of the two."""
    old = await at_disk(lambda: list(place.contents.older_than(ORPHAN_S)))
    names = iter(old)
    while chunk := list(itertools.islice(names, CHUNK)):
        with_row = await place.store.read(partial(files.named, contents=chunk))
        await _remove_contents(place, [name for name in chunk if name not in with_row])


async def _remove_contents(place: Workplace, names: list[str]) -> None:
    read = await place.store.read(lambda c: batches.reads(c, names))
    for name in names:
        if name not in read:
            await at_disk(place.contents.remove, name)


async def tell_metrics(place: Workplace) -> None:
    """What the store holds, as gauges of this replica."""
    by_state = await place.store.read(batches.by_state)
    number, size = await place.store.read(files.totals)
    gauges = place.metrics.gauges
    for state in (*LIVE, *ENDED):
        gauges["batches"].labels(state).set(by_state[state])
    gauges["files"].set(number)
    gauges["files_bytes"].set(size)
