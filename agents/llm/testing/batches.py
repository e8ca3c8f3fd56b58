"""Batches of a scripted model: each request takes the next entry when the batch is submitted.

batch_places.py finds it where a ScriptedModel is asked for a batch. It lives with the model, in this process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from diptych.protos.failures import Failure, FailureKind, ProviderFailure
from diptych.protos.providers.codec import Outgoing

from ..batch_places import BatchStatus, Line
from ..machine import Machine, take
from ..upstream import Limits, Wire

if TYPE_CHECKING:
    from .scripted import ScriptedModel


@dataclass(slots=True)
class _Answering:
    """A step: all requests, one after another."""

    model: ScriptedModel
    requests: Mapping[str, Outgoing]

    async def perform(self) -> dict[str, Line]:
        """Ask for them."""
        found: dict[str, Line] = {}
        for name, outgoing in self.requests.items():
            try:
                found[name] = Line(answer=await self.model.whole(outgoing, Limits(), Wire()))
            except ProviderFailure as exc:
                found[name] = Line(failure=exc.failure)
        return found


class ScriptedBatches:
    """See Place. A batch is over when it is asked about for the second time, unless it was cancelled before."""

    def __init__(self, model: ScriptedModel) -> None:
        self._model = model
        self._batches: dict[str, tuple[BatchStatus, dict[str, Line]]] = {}

    def check(self, ids: Sequence[str]) -> None:
        """Takes all."""

    def submit(self, requests: Mapping[str, Outgoing], window: str, metadata: Mapping[str, str]) -> Machine[str]:
        """See Place."""
        name = f"batch_{len(self._batches) + 1}"
        lines = yield from take(_Answering(self._model, requests))
        told, model = metadata.get("diptych_call", ""), metadata.get("diptych_model", "")
        status = BatchStatus(
            id=name, state="working", native="in_progress", total=len(requests), call=told, model=model
        )
        self._batches[name] = status, lines
        return name

    def status(self, batch: str) -> Machine[BatchStatus]:
        """See Place."""
        yield from ()
        if batch not in self._batches:
            raise ProviderFailure(Failure(kind=FailureKind.NOT_FOUND, message=f"there is no batch {batch}", status=404))
        told, lines = self._batches[batch]
        if not told.is_over:
            num_failed = sum(line.failure is not None for line in lines.values())
            num_good = len(lines) - num_failed
            over = replace(told, state="completed", native="completed", completed=num_good, failed=num_failed)
            self._batches[batch] = over, lines
        return told

    def ids(self, status: BatchStatus) -> Machine[tuple[str, ...]]:
        """See Place."""
        yield from ()
        return tuple(self._batches[status.id][1])

    def listed(self, limit: int) -> Machine[list[BatchStatus]]:
        """See Place."""
        yield from ()
        return [status for status, _ in reversed(self._batches.values())][:limit]

    def cancel(self, batch: str) -> Machine[BatchStatus]:
        """See Place."""
        told = yield from self.status(batch)
        if not told.is_over:
            told = replace(told, state="cancelled", native="cancelled")
            lost = Line(failure=Failure(kind=FailureKind.CANCELLED, message="the batch was cancelled before it came"))
            self._batches[batch] = told, dict.fromkeys(self._batches[batch][1], lost)
        return told

    def lines(self, status: BatchStatus) -> Machine[dict[str, Line]]:
        """See Place."""
        yield from ()
        return self._batches[status.id][1]
