"""An engine of the role embed in this process: model, line, threads, service; its start and its end. Holds no KV.

step thread: takes texts from the line and computes them | asyncio thread: gRPC server, sessions, calls
"""

from __future__ import annotations

import dataclasses
import logging
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence

import grpc
import numpy as np
import torch
from numpy.typing import NDArray

from diptych.cluster.control.host import free_ports
from diptych.cluster.security import engine_name
from diptych.kernels.embedding import TextModel, TextSpec, load_text_model
from diptych.protos.channels import ENGINE_SERVICE, listen, make_server
from diptych.protos.embedding import TextRow
from diptych.protos.errors import DiptychError, EngineFault, InvalidRequest, ShuttingDown, StartupError
from diptych.protos.faults import Point, plan_of
from diptych.protos.status import EngineInfo, EngineStatus
from diptych.protos.trust import Refusals, Trust
from diptych.protos.types import Role

from .compose import RANDOM_SEED
from .embed_line import EmbedLine, Slice
from .embed_service import EmbedService
from .engine import BUSY_POLL_S, STOP_TIMEOUT_S, SWITCH_INTERVAL_S, TOLD_S
from .faults import pass_point
from .garbage import Pauses
from .inbox import Inbox
from .outbox import Outbox
from .spec import EngineSpec, EngineStarted
from .stall import StallWatch
from .thread import AsyncioThread, StepThread

WARM_UP_LENGTHS = (8, 32, 32)
_COUNTED = ("requests", "texts", "tokens", "steps", "step_faults", "row_faults")
IDLE_S = 0.5  # between looks at deadlines, while nothing waits

log = logging.getLogger(__name__)


class EmbedEngine:
    """`start` once, then `stop` once. The same to its Ray shell as Engine is. `on_failure` is called when the step
    thread cannot go on, or does not.
    """

    def __init__(
        self, spec: EngineSpec, *, on_failure: Callable[[BaseException], None], trust: Trust | None = None
    ) -> None:
        """Without `trust` it talks to this process alone."""
        if spec.host is not None and not spec.port:
            spec = dataclasses.replace(spec, port=free_ports(1, spec.host)[0])
        assert spec.text is not None
        self._spec = spec
        self._text = spec.text
        self._trust = trust or Trust.alone(engine_name(spec.roles))
        self._on_failure = on_failure
        self._line = EmbedLine(
            max_waiting=spec.settings.embed.max_waiting,
            step_tokens=spec.settings.embed.tokens_on(spec.device),
            clock=time.monotonic,
        )
        self._model: TextModel
        self._service: EmbedService
        self._server: grpc.aio.Server
        self._refused = {ENGINE_SERVICE: Refusals(f"engine {spec.engine_id} ({ENGINE_SERVICE})")}
        self._asyncio_thread = AsyncioThread()
        self._step_thread = StepThread()
        self._phase = 0  # odd within a step, see StallWatch
        self._threads = 0  # that torch is to have from the next step on; 0: as they are
        self._counts = Counter(dict.fromkeys(_COUNTED, 0))
        self._seconds = 0.0  # in steps
        self._stall_watch: StallWatch
        self._stopping = threading.Lock()
        self._faults = plan_of(spec.faults, spec.engine_id)
        self._pauses = Pauses(time.monotonic)

    def start(self) -> EngineStarted:
        """Load, warm up, listen, step. Seconds to minutes. Raises StartupError and what loading raises."""
        if self._faults is not None:
            pass_point(self._faults, Point.ENGINE_START)
        began = time.monotonic()
        self._model = self._step_thread.call(self._load)
        loaded = time.monotonic()
        info = self._info()
        self._service = EmbedService(
            line=self._line,
            facts=self._text,
            vocab_size=self._spec.facts.vocab_size,
            info=info,
            inbox=Inbox(0),
            outbox=Outbox(1),
            reading=self.status,
            faults=self._faults,
        )
        self._asyncio_thread.call(self._listen())
        self._stall_watch = StallWatch(
            lambda: self._phase, limit_s=self._spec.step_stall_s, on_stall=self._fail_stalled
        )
        self._stall_watch.start()
        self._pauses.watch()
        self._step_thread.begin(self._run_steps)
        return EngineStarted(info, (("weights", loaded - began), ("service", time.monotonic() - loaded)))

    def status(self) -> EngineStatus:
        """A reading; from any thread."""
        counters = {f"embed_{name}_total": float(count) for name, count in self._counts.items()}
        counters |= {
            "embed_step_seconds_total": self._seconds,
            "embed_queued_tokens": float(self._line.queued_tokens),
            "engine_steps_total": float(self._counts["steps"]),
            "engine_busy_seconds_total": self._seconds,
            "engine_collector_passes_total": float(self._pauses.passes),
            "engine_collector_seconds_total": self._pauses.seconds,
            "engine_routers_lost_total": float(self._service.routers_lost),
            "engine_refused_calls_total": float(self._refused[ENGINE_SERVICE].total),
        }
        waiting = self._line.num_waiting
        running = max(self._line.num_jobs - waiting, 0)
        return EngineStatus(running=running, waiting=waiting, steps=self._counts["steps"], counters=counters)

    def set_threads(self, count: int) -> None:
        """Compute with so many threads from the next step on."""
        self._threads = count

    def set_roles(self, roles: Collection[Role], grace_s: float) -> EngineInfo:
        """Raises InvalidRequest for any role but the one that it has."""
        if frozenset(roles) != self._spec.roles:
            wanted = " and ".join(sorted(roles)) or "nothing"
            raise InvalidRequest(f"engine {self._spec.engine_id} can be embed, not {wanted}")
        return self._service.info

    def drain(self, grace_s: float) -> bool:
        """Refuse new requests and wait for those in work. False: some were left after `grace_s`; they end with
        ShuttingDown, for other engines to compute.
        """
        if self._faults is not None:
            pass_point(self._faults, Point.ENGINE_DRAIN)
        self._line.is_draining = True
        self._asyncio_thread.call(self._service.refuse_all(), STOP_TIMEOUT_S)
        is_empty = self._wait_idle(grace_s)
        if not is_empty:
            self._line.end_all(ShuttingDown(f"engine {self._spec.engine_id} is shutting down"))
            self._wait_idle(TOLD_S)
        return is_empty

    def stop(self) -> None:
        """End calls and sessions, and the threads."""
        with self._stopping:
            self._stall_watch.stop()
            self._pauses.end()
            if self._faults is not None:
                self._faults.close()
            self._line.end_all(ShuttingDown(f"engine {self._spec.engine_id} is shutting down"))
            self._asyncio_thread.call(self._unlisten(), STOP_TIMEOUT_S)
            self._line.close()
            self._step_thread.end(STOP_TIMEOUT_S)
            self._asyncio_thread.end(STOP_TIMEOUT_S)

    # ---- the step thread ----

    def _load(self) -> TextModel:
        torch.set_num_threads(self._spec.threads)
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        facts, spec = self._text, self._spec
        wanted = TextSpec(scores=facts.task == "rerank", pooling=facts.pooling, normalize=facts.normalize)
        seed = None if spec.settings.has_weights else RANDOM_SEED
        try:
            model = load_text_model(spec.folder, wanted, dtype=spec.dtype, device=spec.device, random_seed=seed)
            longest = min(self._text.max_tokens, max(WARM_UP_LENGTHS))
            model.compute([TextRow([1] * min(length, longest)) for length in WARM_UP_LENGTHS])
        except torch.OutOfMemoryError as exc:
            raise StartupError(f"engine {spec.engine_id} ran out of its card's memory while it started: {exc}") from exc
        return model

    def _run_steps(self) -> None:
        try:
            while not self._line.is_closed:
                if (threads := self._threads) and threads != torch.get_num_threads():
                    torch.set_num_threads(threads)
                slices = self._line.take(IDLE_S)
                if slices:
                    self._step(slices)
        except BaseException as exc:
            log.exception("the step thread of engine %s ends", self._spec.engine_id)
            self._on_failure(exc)

    def _step(self, slices: Sequence[Slice]) -> None:
        """One forward for all, or one for each request after one for all has raised: who is to blame fails alone."""
        began = time.monotonic()
        self._phase += 1
        try:
            if not self._try(slices) and len(slices) > 1:
                for part in slices:
                    self._try([part])
        finally:
            self._phase += 1
            self._seconds += time.monotonic() - began

    def _try(self, slices: Sequence[Slice]) -> bool:
        """Whether it computed; a single request that raises ends with that."""
        self._counts["steps"] += 1
        rows = [row for part in slices for row in part.rows]
        try:
            if self._faults is not None:
                tokens = " ".join(str(token) for row in rows for token in row.ids)
                pass_point(self._faults, Point.ENGINE_STEP, message=f" {tokens} ")
            values = self._compute(slices, rows)
        except Exception as exc:  # whatever a model's code raises: other requests are not to blame
            log.warning("a step of %d texts raised", len(rows), exc_info=True)
            self._counts["step_faults"] += 1
            if len(slices) == 1:
                told = exc if isinstance(exc, DiptychError) else EngineFault("the engine's step raised", repr(exc))
                self._line.end(slices[0].job, told)
            return False
        begin = 0
        for part in slices:
            own = values[begin : begin + len(part.texts)]
            begin += len(part.texts)
            self._deliver(part, own)
        return True

    def _compute(self, slices: Sequence[Slice], rows: Sequence[TextRow]) -> NDArray[np.float32]:
        skips = {part.job.order.skip for part in slices}
        if len(skips) == 1:
            return self._model.compute(rows, skips.pop())
        return np.concatenate([self._model.compute(part.rows, part.job.order.skip) for part in slices])

    def _deliver(self, part: Slice, values: NDArray[np.float32]) -> None:
        order = part.job.order
        self._counts["texts"] += len(part.texts)
        self._counts["tokens"] += sum(len(row.ids) for row in part.rows)
        bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if len(bad):
            self._counts["row_faults"] += 1
            number = part.texts[int(bad[0])]
            self._line.end(part.job, EngineFault(f"the model's numbers for text {number} are not finite"))
            return
        if order.dimensions and order.dimensions < values.shape[1]:
            values = values[:, : order.dimensions]
            if self._text.normalize:
                values = values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
        self._line.finish(part, values)
        if part.job.is_over:
            self._counts["requests"] += 1

    def _fail_stalled(self, seconds: float) -> None:
        self._on_failure(EngineFault(f"a step has taken more than {seconds:.1f} s"))

    # ---- the asyncio thread ----

    async def _listen(self) -> None:
        self._server = make_server(self._trust, self._spec.ref, self._refused)
        self._service.attach(self._server)
        listen(self._server, self._trust, self._spec.ref.target)
        await self._server.start()

    async def _unlisten(self) -> None:
        await self._service.close()
        await self._server.stop(0.2)

    # ---- any thread ----

    def _wait_idle(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while self._service.num_calls:
            if time.monotonic() >= deadline:
                return False
            time.sleep(BUSY_POLL_S)
        return True

    def _info(self) -> EngineInfo:
        spec = self._spec
        noise = () if spec.settings.has_weights else ("weights are random: the vectors are noise",)
        return EngineInfo(
            ref=spec.ref,
            roles=spec.roles,
            model=spec.model,
            pid=os.getpid(),
            host=socket.gethostname(),
            block_tokens=1,
            num_blocks=0,
            max_context_tokens=self._text.max_tokens,
            dtype=spec.dtype,
            degraded=(*spec.degraded, *noise, *self._model.degraded),
            layout="texts",
        )
