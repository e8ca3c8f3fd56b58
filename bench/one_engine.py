"""One decode engine in this process, stepped by hand: for structured_answers.py and mask_cost.py.

Guides are the engine's own, watched: which tokens they were certain of, and how long each call took.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from diptych.cluster.config import ModelSettings
from diptych.cluster.control.plan import choose_dtype
from diptych.cluster.engine.compose import EngineParts, brain_of
from diptych.cluster.engine.engine import build
from diptych.cluster.engine.spec import EngineSpec
from diptych.cluster.models import ModelFolder, resolve
from diptych.protos.constraint import Constraint, Guide, fill_masks
from diptych.protos.errors import DiptychError
from diptych.protos.settings import TransferSettings
from diptych.protos.types import (
    DecodeOrder,
    EngineId,
    Finish,
    GenerateRequest,
    Role,
    SamplingParams,
    TransferKey,
)

CACHE = Path.home() / ".cache" / "diptych"


class WatchedGuide:
    """A guide, and what it did. Times in seconds; of `accepts`, those that told it something new."""

    def __init__(self, guide: Guide, num_prompt: int) -> None:
        self._guide = guide
        self._num_prompt = num_prompt
        self._next = num_prompt
        self.forced: list[int] = []  # numbers in the answer
        self.fills: list[float] = []
        self.accepts: list[float] = []

    @property
    def error(self) -> DiptychError | None:
        return self._guide.error

    @error.setter
    def error(self, error: DiptychError | None) -> None:
        self._guide.error = error

    def accept(self, position: int, token: int) -> tuple[int, ...]:
        began = time.perf_counter()
        forced = self._guide.accept(position, token)
        if position == self._next:
            self.accepts.append(time.perf_counter() - began)
            self._next += 1 + len(forced)
            first = position + 1 - self._num_prompt
            self.forced.extend(range(first, first + len(forced)))
        return forced

    def fill(self, position: int, mask: memoryview) -> None:
        self.fill_all([(self, position)], mask)

    def fill_all(self, guided: Sequence[tuple[Guide, int]], masks: memoryview) -> None:
        """See constraint.FillsTogether; each has its share of the time."""
        watched = [(guide, position) for guide, position in guided if isinstance(guide, WatchedGuide)]
        assert len(watched) == len(guided)
        began = time.perf_counter()
        fill_masks([(guide._guide, position) for guide, position in watched], masks)
        seconds = (time.perf_counter() - began) / len(watched)
        for guide, _ in watched:
            guide.fills.append(seconds)


@dataclass(slots=True)
class Written:
    """An answer as it grows. `finish`: None until it has ended."""

    guide: WatchedGuide | None = None
    tokens: list[int] = field(default_factory=list)
    finish: Finish | None = None

    @property
    def num_forced(self) -> int:
        """Tokens that were not sampled."""
        return sum(at < len(self.tokens) for at in self.guide.forced) if self.guide else 0


class OneEngine:
    """`ask` any number of times and `step` until `num_open` is 0."""

    def __init__(self, parts: EngineParts, model: ModelFolder) -> None:
        self.model = model
        self.parts = parts
        self._worker = parts.workers[Role.DECODE]
        self._open: dict[TransferKey, Written] = {}
        self._numbers = count()

    @property
    def num_open(self) -> int:
        return len(self._open)

    async def ask(
        self, prompt: Sequence[int], sampling: SamplingParams, constraint: Constraint | None = None
    ) -> Written:
        """Raises what an engine refuses a constraint with."""
        key = TransferKey(next(self._numbers).to_bytes(16))
        request = GenerateRequest(key=key, prompt=tuple(prompt), sampling=sampling, constraint=constraint)
        written = self._open[key] = Written()
        if constraint is not None:
            written.guide = WatchedGuide(await self.parts.guides.open(request), len(prompt))
        self._worker.submit(DecodeOrder(request=request, prefill=None, guide=written.guide))
        return written

    def step(self) -> None:
        self._worker.step()
        for _, output in self.parts.outbox.drain()[0]:
            for key, token in zip(output.keys, output.tokens, strict=True):
                self._open[key].tokens.append(token)
            for finish in output.finishes:
                self._open.pop(finish.key).finish = finish


@contextlib.contextmanager
def one_engine(settings: ModelSettings, model: ModelFolder | None = None) -> Iterator[OneEngine]:
    """Loaded and warm. Raises StartupError."""
    model = model or resolve(settings.source, CACHE, echo=settings.echo)
    with tempfile.TemporaryDirectory(prefix="diptych-bench-") as folder:
        spec = EngineSpec(
            engine_id=EngineId("decode-0"),
            epoch=1,
            roles=frozenset({Role.DECODE}),
            model=model.facts.name,
            settings=settings,
            transfer=TransferSettings(),
            folder=model.path,
            facts=model.facts,
            dtype=choose_dtype(settings, "cpu")[0],
            run_dir=Path(folder),
        )
        parts = build(spec, brain_of(spec), lambda stage: None)
        try:
            yield OneEngine(parts, model)
        finally:
            parts.guides.close()
