"""Batches on engines without router and Ray: what is left of one whose request failed, and of the engines' threads."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from diptych.cluster.bench.shapes import shape_of
from diptych.cluster.config import ModelSettings
from diptych.cluster.engine import offline
from diptych.cluster.engine.compose import Brain, model_brain
from diptych.cluster.engine.offline import OfflineEngines
from diptych.cluster.engine.spec import EngineSpec
from diptych.cluster.engine.thread import AsyncioThread
from diptych.cluster.models import ModelFolder
from diptych.kernels.testing import make_tiny_checkpoint
from diptych.protos.errors import EngineFault, Overloaded
from diptych.protos.ports import Runner
from diptych.protos.settings import DecodeSettings, KvSettings, PrefillSettings, TransferSettings
from diptych.protos.step import StepPlan, StepResult
from diptych.protos.types import GENERATING, EngineId, Role

BAD = 777  # the id that a row's first token must not be
SETTINGS = ModelSettings(
    source="tiny",
    weights="random",
    kv=KvSettings(memory_mib=1, block_tokens=16),
    prefill=PrefillSettings(step_tokens=32, threads=1),
    decode=DecodeSettings(step_tokens=32, threads=1, max_running=4),
)
LAYOUTS = {"colocated": (Role.DECODE,), "disaggregated": (Role.PREFILL, Role.DECODE)}


class FaultyRunner:
    """Another runner, whose every row that begins with BAD comes back among the faults."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._bad: list[frozenset[int]] = []
        self.max_slots, self.max_step_tokens = runner.max_slots, runner.max_step_tokens
        self.vocab_size, self.depth, self.cost = runner.vocab_size, runner.depth, runner.cost

    def launch(self, plan: StepPlan) -> None:
        bad = (at for at, row in enumerate(plan.rows) if row.tokens is not None and row.tokens[0] == BAD)
        self._bad.append(frozenset(bad))
        self._runner.launch(plan)

    def collect(self) -> StepResult:
        result, bad = self._runner.collect(), self._bad.pop(0)
        tokens = tuple(None if at in bad else token for at, token in enumerate(result.tokens))
        return dataclasses.replace(result, tokens=tokens, faults=result.faults | bad)

    def max_runs(self, rows: int) -> int:
        return self._runner.max_runs(rows)

    def idle(self) -> bool:
        return self._runner.idle()


def faulty_brain(spec: EngineSpec) -> Brain:
    brain = model_brain(spec)
    return dataclasses.replace(brain, runner=lambda *sizes: FaultyRunner(brain.runner(*sizes)))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """A shape without weights."""
    folder = tmp_path_factory.mktemp("model")
    config = make_tiny_checkpoint(folder / "whole", vocab_size=1000) / "config.json"
    (folder / "config.json").write_bytes(config.read_bytes())
    return shape_of(folder, "tiny")


Specs = Callable[..., list[EngineSpec]]


@pytest.fixture
def specs(folder: Path, model: ModelFolder) -> Specs:
    def make(layout: str, settings: ModelSettings = SETTINGS) -> list[EngineSpec]:
        return [
            EngineSpec(
                engine_id=EngineId(f"{role}-0"),
                epoch=1,
                roles=frozenset({role}),
                model="tiny",
                settings=settings,
                transfer=TransferSettings(),
                folder=model.path,
                facts=model.facts,
                dtype="float32",
                run_dir=folder,
            )
            for role in LAYOUTS[layout]
        ]

    return make


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short one: unix socket paths hold 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="dt-", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture
def faulty(specs: Specs, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[OfflineEngines]:
    monkeypatch.setattr(offline, "brain_of", lambda spec: faulty_brain)
    engines = OfflineEngines(specs(request.param))
    engines.start()
    yield engines
    engines.stop()


def idle(engines: OfflineEngines) -> bool:
    loads = [worker.load() for parts in engines._parts.values() for worker in parts.workers.values()]
    return all(load.running + load.waiting == 0 for load in loads)


@pytest.mark.parametrize("faulty", LAYOUTS, indirect=True)
def test_after_a_failure_no_request_of_the_batch_is_left_and_the_next_batch_is_whole(faulty: OfflineEngines) -> None:
    long = [[3 + i, *range(40)] for i in range(12)]
    with pytest.raises(EngineFault, match="not finite"):
        faulty.generate([*long[:6], [BAD, 1], *long[6:]], 400, salt=b"a")
    assert idle(faulty)
    answers = faulty.generate(long, 5, salt=b"b")
    assert [answer.num_tokens for answer in answers] == [5] * 12
    assert all(0 < answer.first_token_s <= answer.last_token_s for answer in answers)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_that_does_not_fit_is_refused_and_its_part_that_did_is_cancelled(specs: Specs, layout: str) -> None:
    few = SETTINGS.model_copy(
        update={role.value: getattr(SETTINGS, role.value).model_copy(update={"max_waiting": 0}) for role in GENERATING}
    )
    engines = OfflineEngines(specs(layout, few))
    engines.start()
    with pytest.raises(Overloaded):
        engines.generate([[1, 2, 3]] * 500, 400, salt=b"")
    assert idle(engines)
    assert [answer.num_tokens for answer in engines.generate([[1, 2, 3]], 5, salt=b"")] == [5]
    engines.stop()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_traced_batch_ends_with_its_trace_and_the_next_one_is_whole(specs: Specs, layout: str) -> None:
    engines = OfflineEngines(specs(layout))
    engines.start()
    engines.settle()
    told: list[int] = []

    def batch() -> None:
        told.extend(one.num_tokens for one in engines.generate([[1, 2, 3]] * 3, 400, salt=b"a"))

    traced, pieces = engines.profile(2, 3, batch)
    assert (traced, told) == (3, []), "it did not run to its end"
    assert pieces
    assert idle(engines)
    answers = engines.generate([[1, 2, 3]] * 3, 5, salt=b"b")
    assert [answer.num_tokens for answer in answers] == [5] * 3
    engines.stop()


def test_a_dead_thread_is_told_when_engines_settle(specs: Specs, monkeypatch: pytest.MonkeyPatch) -> None:
    engines = OfflineEngines(specs("colocated"))
    engines.start()

    def defect() -> bool:
        raise RuntimeError("a defect")

    monkeypatch.setattr(engines._runners[0].runner, "idle", defect)
    with pytest.raises(RuntimeError, match="a defect"):
        engines.settle()
    engines.stop()


def test_an_engine_whose_thread_dies_ends_the_batch_with_its_error(
    specs: Specs, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = OfflineEngines(specs("disaggregated"))
    engines.start()

    def defect() -> bool:
        raise RuntimeError("a defect")

    monkeypatch.setattr(engines._parts[Role.PREFILL].workers[Role.PREFILL], "step", defect)
    with pytest.raises(RuntimeError, match="a defect"):
        engines.generate([[1, 2, 3]] * 8, 5, salt=b"")
    engines.stop()


def test_what_runs_in_the_loop_cleans_up_before_the_thread_ends() -> None:
    """A task that a stopped loop leaves behind fails when it is collected, in a test that has nothing to do with it."""
    thread = AsyncioThread()
    steps: list[str] = []

    async def channel() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            steps.append("closed")

    async def begin() -> None:
        tasks.append(asyncio.create_task(channel()))
        await asyncio.sleep(0)

    tasks: list[asyncio.Task[None]] = []
    thread.call(begin(), 10)
    thread.end(10)
    assert steps == ["closed"]
    assert tasks.pop().cancelled()
    gc.collect()
    assert thread.loop.is_closed()


def test_a_call_gives_what_it_raises() -> None:
    thread = AsyncioThread()
    assert thread.call(asyncio.sleep(0, "done"), 10) == "done"
    with pytest.raises(ZeroDivisionError):
        thread.call(_divide(1, 0), 10)
    thread.end(10)


async def _divide(a: int, b: int) -> float:
    return a / b
