"""What the collector does in an engine's process is rare, and counted."""

from __future__ import annotations

import gc
import subprocess
import sys

from diptych.cluster.engine.garbage import Pauses


def test_every_pass_is_counted_with_its_time_until_the_end() -> None:
    now = iter(range(100))
    pauses = Pauses(lambda: float(next(now)))
    was_on = gc.isenabled()
    gc.disable()  # no other pass between
    try:
        pauses.watch()
        gc.collect()
        gc.collect(0)
        pauses.end()
        pauses.end()
        gc.collect()
    finally:
        if was_on:
            gc.enable()
    assert (pauses.passes, pauses.seconds) == (2, 2.0)


def test_what_a_settled_process_holds_is_looked_through_no_more() -> None:
    code = """
import gc
from diptych.cluster.engine.garbage import settle
kept = [[] for _ in range(1000)]
before = gc.get_threshold()
undo = settle()
assert gc.get_freeze_count() > 1000, gc.get_freeze_count()
assert len(gc.get_objects()) < 1000, len(gc.get_objects())
assert gc.get_threshold()[0] > 10_000
loop = []
loop.append(loop)
del loop
assert gc.collect() >= 1, "what comes later is still collected"
undo()
assert gc.get_freeze_count() == 0
assert gc.get_threshold() == before
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "fine", done.stderr
