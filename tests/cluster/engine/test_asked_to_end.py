"""An engine process that gets SIGTERM waits to be taken away, and ends by itself only where nobody does."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import os, signal, threading
from types import SimpleNamespace
import diptych.cluster.engine.actor as actor

signal.signal(signal.SIGTERM, lambda *_: (print("ends", flush=True), os._exit(3)))  # as Ray has set one
actor.UNHEARD_S = {unheard_s}
engine = actor.EngineActor(SimpleNamespace(engine_id="decode-0"))
engine._engine = SimpleNamespace(drain=lambda grace_s: True)
print(engine.ping(), flush=True)
os.kill(os.getpid(), signal.SIGTERM)
print(engine.ping(), flush=True)
if {is_drained}:
    print(engine.drain(1.0), flush=True)
    for thread in threading.enumerate():
        if thread.name == "sigterm":
            thread.join()
    print("stays", flush=True)
    os._exit(0)
while True:
    signal.pause()
"""


@pytest.mark.parametrize(
    ("is_drained", "said", "code"),
    [(True, ["False", "True", "True", "stays"], 0), (False, ["False", "True", "ends"], 3)],
    ids=["by a manager", "by nobody"],
)
def test_an_engine_that_was_asked_to_end_ends_when_it_is_taken_away_or_nobody_is_there(
    is_drained: bool, said: list[str], code: int
) -> None:
    program = PROGRAM.format(unheard_s=1e9 if is_drained else 0, is_drained=is_drained)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout.split(), done.returncode) == (said, code), done.stderr


def test_an_engine_that_cannot_go_on_ends_though_the_thread_that_hangs_holds_the_log() -> None:
    program = (
        "import logging, threading\n"
        "from types import SimpleNamespace\n"
        "import diptych.cluster.engine.actor as actor\n"
        "actor.LAST_WORDS_S = 0.2\n"
        "engine = actor.EngineActor(SimpleNamespace(engine_id='decode-0'))\n"
        "held = threading.Event()\n"
        "def hang() -> None:\n"
        "    logging.getLogger().handlers[0].acquire()\n"
        "    held.set()\n"
        "    threading.Event().wait()\n"
        "threading.Thread(target=hang, daemon=True).start()\n"
        "held.wait()\n"
        "engine._fail(RuntimeError('it stands'))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 70, done.stderr
