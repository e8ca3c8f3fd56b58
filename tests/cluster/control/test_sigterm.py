"""The first SIGTERM lets a process of Ray finish, the second ends it as Ray does. In child processes of these tests."""

from __future__ import annotations

import subprocess
import sys


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)


def test_the_first_sigterm_asks_and_the_second_ends() -> None:
    done = run(
        "import os, signal; from diptych.cluster.control.sigterm import on_first_sigterm\n"
        "signal.signal(signal.SIGTERM, lambda *_: os._exit(7))\n"  # as Ray has set one
        "on_first_sigterm(lambda: print('asked', flush=True))\n"
        "os.kill(os.getpid(), signal.SIGTERM); print('alive', flush=True); os.kill(os.getpid(), signal.SIGTERM)\n"
        "signal.pause()"
    )
    assert (done.stdout.split(), done.returncode) == (["asked", "alive"], 7), done.stderr


WORKER = """
import os, signal, sys, threading
from ray._private import worker
from diptych.cluster.control.sigterm import work_before_sigterm_ends

def handler(number, frame):  # as Worker.main_loop has it
    worker.raise_sys_exit_with_custom_error_message("The process receives a SIGTERM.", exit_code=3)

signal.signal(signal.SIGTERM, handler)
going = threading.Event()
work = lambda: (print("works", flush=True), going.wait({wait}), print("done", flush=True))
thread = threading.Thread(target=work_before_sigterm_ends, args=(work,))  # an actor's constructor has another thread
thread.start(); thread.join()
os.kill(os.getpid(), signal.SIGTERM)
{then}
while True: signal.pause()
"""


def test_the_work_is_done_before_a_worker_of_ray_ends() -> None:
    done = run(WORKER.format(wait=3600, then="going.set()"))
    assert (done.stdout.split(), done.returncode) == (["works", "done"], 3), done.stderr


def test_a_second_sigterm_does_not_wait_for_the_work() -> None:
    done = run(WORKER.format(wait=3600, then="os.kill(os.getpid(), signal.SIGTERM)"))
    assert "done" not in done.stdout
    assert done.returncode == 3, done.stderr


def test_ray_still_has_the_function_that_this_replaces() -> None:
    import inspect

    from ray._private.worker import Worker

    assert "raise_sys_exit_with_custom_error_message(" in inspect.getsource(Worker.main_loop)
