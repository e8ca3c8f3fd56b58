"""The Ray shell of an engine. control/engines.py makes an actor of it: named, detached, never restarted by Ray."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from diptych.cluster.control.sigterm import on_first_sigterm
from diptych.cluster.observability.logs import log_as_json
from diptych.protos.status import EngineInfo, EngineStatus
from diptych.protos.types import Role

from .spec import EngineSpec, EngineStarted

if TYPE_CHECKING:
    from diptych.protos.trust import Trust

    from .embed_engine import EmbedEngine
    from .engine import Engine

UNHEARD_S = 5.0  # a manager pings more often
LAST_WORDS_S = 2.0
FAILED = 70  # the exit code of a process whose engine cannot go on


class EngineActor:
    """Decodes nothing, decides nothing: calls the Engine."""

    def __init__(self, spec: EngineSpec) -> None:
        log_as_json()
        self._spec = spec
        self._ended = threading.Event()
        self._starting = threading.Lock()
        self._started: EngineStarted | None = None
        self._is_asked = False
        self._is_taken = threading.Event()  # away, by a manager that drains it
        self._pinged_at = time.monotonic()
        on_first_sigterm(self._ask)

    def start(self) -> EngineStarted:
        """Load and listen; see Engine.start. Asked again, also by a restarted manager, it gives the same answer."""
        with self._starting:
            if self._started is None:
                self._started = self._start()
            return self._started

    def _start(self) -> EngineStarted:
        began = time.monotonic()
        os.environ["OMP_NUM_THREADS"] = str(self._spec.threads)  # read when torch is loaded
        os.environ["HF_HUB_OFFLINE"] = "1"
        from diptych.cluster.control.gcs import GcsStore
        from diptych.cluster.control.keyring import fetch
        from diptych.cluster.observability.tracing import configure_tracing
        from diptych.cluster.security import engine_name, trust_of

        from .garbage import settle

        configure_tracing(self._spec.trace_file, self._spec.engine_id)
        trust = trust_of(self._spec.security, fetch(GcsStore()), engine_name(self._spec.possible_roles))
        self._engine = self._made(trust)
        imports = ("imports", time.monotonic() - began)
        started = self._engine.start()
        settle()
        return replace(started, timeline=(imports, *started.timeline))

    def _made(self, trust: Trust) -> Engine | EmbedEngine:
        if Role.EMBED in self._spec.roles:
            from .embed_engine import EmbedEngine

            return EmbedEngine(self._spec, on_failure=self._fail, trust=trust)
        from .engine import Engine

        return Engine(self._spec, on_failure=self._fail, trust=trust)

    def pid(self) -> int:
        """Of its process."""
        return os.getpid()

    def wait_ended(self, timeout_s: float) -> bool:
        """True after `stop`, False after `timeout_s`; raises at the caller when the process dies: the cheapest death
        notice that Ray has.
        """
        return self._ended.wait(timeout_s)

    def ping(self) -> bool:
        """Answers while the process gets time. Whether it was asked to end, by SIGTERM: the manager then takes it away
        as it does at a restart, with another engine in its place first.
        """
        self._pinged_at = time.monotonic()
        return self._is_asked

    def status(self) -> EngineStatus:
        """A reading of the engine."""
        return self._engine.status()

    def set_cores(self, cores: int) -> None:
        """The engine's share of the machine has changed; threads that the configuration names stay."""
        self._engine.set_threads(replace(self._spec, cores=cores).threads)

    def set_roles(self, roles: frozenset[Role], grace_s: float) -> EngineInfo:
        """See Engine.set_roles."""
        info = self._engine.set_roles(roles, grace_s)
        if self._started is not None:
            self._started = replace(self._started, info=info)
        return info

    def drain(self, grace_s: float) -> bool:
        """See Engine.drain."""
        self._is_taken.set()
        return self._engine.drain(grace_s)

    def stop(self) -> None:
        """End everything but the process, which ends with the actor."""
        from diptych.cluster.observability.tracing import flush_tracing

        self._engine.stop()
        flush_tracing()
        self._ended.set()

    def _ask(self) -> None:
        self._is_asked = True
        threading.Thread(target=self._end_unheard, name="sigterm", daemon=True).start()

    def _end_unheard(self) -> None:
        """Without a manager nobody takes the engine away."""
        while not self._is_taken.wait(1.0):
            if time.monotonic() - self._pinged_at > UNHEARD_S:
                os.kill(os.getpid(), signal.SIGTERM)

    def _fail(self, error: BaseException) -> None:
        # An engine without its step thread is dead; the process must be, too, so that everyone learns of it at once. A
        # thread that hangs may hold what logging waits for.
        last = threading.Timer(LAST_WORDS_S, os._exit, (FAILED,))
        last.daemon = True
        last.start()
        logging.getLogger(__name__).critical("engine %s ends: %r", self._spec.engine_id, error)
        logging.shutdown()
        os._exit(FAILED)
