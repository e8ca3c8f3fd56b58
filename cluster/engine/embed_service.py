"""The gRPC service of an engine of the role embed: sessions that tell routers it lives and how busy it is, and one
call per request. Lives in the asyncio thread; knows the line of texts, not what computes them.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from functools import partial
from typing import Any

import grpc

from diptych.cluster.models.texts import TextFacts
from diptych.cluster.observability.tracing import record_texts
from diptych.protos import engine_pb2 as pb
from diptych.protos.embedding import EmbedKind, EmbedOrder, order_from_pb, part_of_error, parts_of
from diptych.protos.errors import DiptychError, Fenced, InvalidRequest

from .embed_line import EmbedLine, Outcome
from .session import EngineSessions


class EmbedService(EngineSessions):
    """Sessions of this engine take no orders: their sum of roles has no worker for any."""

    def __init__(self, *, line: EmbedLine, facts: TextFacts, vocab_size: int, **sessions: Any) -> None:
        super().__init__(**sessions)
        self._line = line
        self._facts = facts
        self._vocab_size = vocab_size
        self._num_calls = 0

    @property
    def num_calls(self) -> int:
        """Requests whose answer has not gone out."""
        return self._num_calls

    async def Embed(self, request: pb.EmbedOrder, context: grpc.aio.ServicerContext) -> None:
        """One request (the name is the proto's). A call that its router cancels is computed no further."""
        self._num_calls += 1
        try:
            await self._answer(request, context)
        finally:
            self._num_calls -= 1

    async def _answer(self, request: pb.EmbedOrder, context: grpc.aio.ServicerContext) -> None:
        loop = asyncio.get_running_loop()
        told: asyncio.Future[Outcome] = loop.create_future()
        started_ns = time.time_ns()
        try:
            self._check_epoch(request.engine_epoch)
            order = order_from_pb(request, self._clock())
            self._check(order)
            job = self._line.put(order, partial(_tell, loop, told))
        except DiptychError as error:
            await context.write(part_of_error(error))
            return
        try:
            outcome = await told
        finally:
            self._line.cancel(job)
        if isinstance(outcome, DiptychError):
            await context.write(part_of_error(outcome))
            return
        values, times = outcome
        record_texts(order, times, engine=self.info.ref.engine_id, started_ns=started_ns, ended_ns=time.time_ns())
        for part in parts_of(values.astype("<f4", copy=False).tobytes(), values.shape[1], times):
            await context.write(part)

    def _check_epoch(self, epoch: int) -> None:
        me = self.info.ref
        if epoch not in (0, me.epoch):
            raise Fenced(f"engine {me.engine_id} lives in epoch {me.epoch}, not {epoch}")

    def _check(self, order: EmbedOrder) -> None:
        """Raises InvalidRequest for what this model cannot compute: one bad id would fail a whole step."""
        is_ranker = self._facts.task == "rerank"
        if is_ranker is not (order.kind is EmbedKind.SCORES):
            raise InvalidRequest(f"the model {self.info.model} gives {'scores of pairs' if is_ranker else 'vectors'}")
        if order.dimensions > self._facts.dimensions:
            raise InvalidRequest(f"the model's vectors have {self._facts.dimensions} dimensions", "dimensions")
        for row in order.rows:
            if len(row.ids) > self._facts.max_tokens:
                raise InvalidRequest(f"a text has {len(row.ids)} tokens, and the model reads {self._facts.max_tokens}")
            if max(row.ids) >= self._vocab_size:
                raise InvalidRequest(f"the token id {max(row.ids)} is not in the vocabulary of {self._vocab_size}")


def _tell(loop: asyncio.AbstractEventLoop, told: asyncio.Future[Outcome], outcome: Outcome) -> None:
    with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody waits
        loop.call_soon_threadsafe(_settle, told, outcome)


def _settle(told: asyncio.Future[Outcome], outcome: Outcome) -> None:
    if not told.done():
        told.set_result(outcome)
