"""The verb `diptych serve`: prints, waits for signals, ends the cluster. control/cluster.py does the rest."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import TextIO

from diptych.cluster.config import DiptychConfig
from diptych.cluster.control.cluster import Cluster
from diptych.cluster.control.launch import kill_family
from diptych.cluster.control.state import ClusterState
from diptych.cluster.control.timeline import Timeline
from diptych.cluster.observability.logs import log_as_text
from diptych.protos.errors import StartupError

POLL_S = 0.25
INTERRUPTED = 130


class Interrupted(BaseException):
    """The first Ctrl-C or SIGTERM, while starting."""


class Signals:
    """First signal: end in order. Second: end at once."""

    def __init__(self) -> None:
        self.cleanup: Callable[[], None] = lambda: None  # for the second signal
        self.came = False
        self.is_serving = False
        self.is_ending = False

    def install(self) -> None:
        """For SIGINT and SIGTERM; ray.init installs its own, so call again after it."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.came:
            say("stopping at once")
            kill_family()
            self.cleanup()
            os._exit(INTERRUPTED)
        self.came = True
        if not self.is_serving and not self.is_ending:
            raise Interrupted


def say(line: str) -> None:
    """To the terminal, at once; to nobody when it is gone."""
    _print(line, sys.stdout)


def _print(line: str, stream: TextIO) -> None:
    try:
        print(line, file=stream, flush=True)
    except OSError:  # of `serve | tee log` Ctrl-C ends tee first, and the cluster must still be ended in order
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def run_serve(config: DiptychConfig, began: float) -> int:
    """Serve until a signal; the exit code. `began` is the monotonic time at which the command started."""
    log_as_text()
    timeline = Timeline(began, say)
    timeline.add("command", time.monotonic() - began)
    signals = Signals()
    signals.install()
    cluster = Cluster(config, timeline, say, on_joined=signals.install)
    signals.cleanup = cluster.remove_folder
    try:
        say(f"Diptych starts: {', '.join(config.models)}")
        state = cluster.start()
        signals.is_serving = True
        signals.install()
        _print_ready(state, timeline, cluster.degraded, is_of_texts=state.models[0] in cluster.of_texts)
        while not signals.came:
            time.sleep(POLL_S)
            for sentence in cluster.poll():
                _print(sentence, sys.stderr)
        code = 0
    except BaseException as exc:
        if signals.came:  # what was raised need not be Interrupted: out of Ray's C code it comes as a SystemError
            code = INTERRUPTED
            say("interrupted")
        elif isinstance(exc, StartupError):
            code = 1
            _print(f"diptych: {exc}", sys.stderr)
        else:
            raise
    finally:
        signals.is_ending = True
        signals.install()
        cluster.stop()
    if code == 0:
        say("stopped")
    return code


def _print_ready(state: ClusterState, timeline: Timeline, degraded: list[str], *, is_of_texts: bool) -> None:
    say("\nstart-up")
    say(timeline.table())
    say("\ndegraded choices")
    for choice in degraded or ["none"]:
        say(f"  {choice}")
    say(f"\nready: {state.url}  (OpenAI API; also /info, /metrics)")
    say(f"       {state.serve_url}  (the same through Ray Serve)")
    client = f", for Ray clients {state.ray_client_address}" if state.ray_client_address else ""
    say(f"       ray address {state.ray_address}{client}; state in {state.folder}")
    path, body = "chat/completions", '"messages": [{"role": "user", "content": "Why is the sky blue?"}], "stream": true'
    if is_of_texts:
        path, body = "rerank", '"query": "Why is the sky blue?", "documents": ["Rayleigh scattering", "a blue bird"]'
    say("\ntry it:")
    say(f"  curl -N {state.url}/v1/{path} -H 'Content-Type: application/json' \\")
    say(f'    -d \'{{"model": "{state.models[0]}", {body}}}\'')
    say("\nCtrl-C drains and stops; a second Ctrl-C stops at once.")
