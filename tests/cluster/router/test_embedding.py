"""Router.embed over the real protocol and fake engines: who gets a request, and what follows when that one fails.

Guards: a call that waits for an engine that is gone; a cancelled one that is computed on; one that loses engine after
engine; two that meet on one engine while another is idle.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from diptych.cluster.config import LimitSettings, RouterSettings
from diptych.cluster.router.embedding import EmbedAnswer, EmbedCall
from diptych.cluster.router.rig import until
from diptych.cluster.router.router import Router
from diptych.cluster.router.testing import EchoEngine, StaticDirectory
from diptych.protos import engine_pb2 as pb
from diptych.protos.embedding import EmbedKind, EmbedTimes, TextRow, order_from_pb, part_of_error, parts_of
from diptych.protos.errors import (
    Cancelled,
    CapacityError,
    DeadlineExceeded,
    DiptychError,
    EngineError,
    EngineFault,
    EngineLost,
    Overloaded,
    ShuttingDown,
)
from diptych.protos.types import Role

MODEL = "texts"
ROWS = tuple(TextRow([number] * number) for number in (3, 1, 2))


class FakeTexts(EchoEngine):
    """Gives each text its length and its first token."""

    def __init__(self, target: str, engine_id: str) -> None:
        super().__init__(target, engine_id=engine_id, roles=frozenset({Role.EMBED}), model=MODEL)
        self.error: DiptychError | None = None
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.asked = 0
        self.given_up = 0
        self.is_short = False

    async def Embed(self, request: pb.EmbedOrder, context: Any) -> AsyncIterator[pb.EmbedPart]:
        self.asked += 1
        try:
            await self.may_answer.wait()
        except asyncio.CancelledError:
            self.given_up += 1
            raise
        if self.error is not None:
            yield part_of_error(self.error)
            return
        order = order_from_pb(request, 0.0)
        values = array("f", [number for row in order.rows for number in (len(row.ids), row.ids[0])])
        for part in parts_of(values.tobytes()[: -8 if self.is_short else None], 2, EmbedTimes(0.1, 0.2)):
            yield part


@dataclass
class Rig:
    router: Router
    directory: StaticDirectory
    engines: list[FakeTexts]

    async def ask(self, **fields: Any) -> EmbedAnswer:
        return await self.router.embed(
            EmbedCall(**({"model": MODEL, "kind": EmbedKind.VECTORS, "rows": ROWS} | fields))
        )


@asynccontextmanager
async def rig(folder: Path, number: int = 2, **limits: Any) -> AsyncIterator[Rig]:
    async with AsyncExitStack() as stack:
        engines = [FakeTexts(f"unix:{folder}/{i}", f"embed-{i}") for i in range(number)]
        for engine in engines:
            await engine.start()
            stack.push_async_callback(engine.stop)
        directory = StaticDirectory([engine.info for engine in engines])
        settings = RouterSettings(limits=LimitSettings(**limits), connect_timeout_s=1, silence_s=0.5)
        router = Router(directory=directory, settings=settings, is_strict=True)
        await router.start()
        stack.push_async_callback(router.stop)
        await until(lambda: router.view.is_complete and all(one.is_ready for one in router.view.sessions()))
        yield Rig(router, directory, engines)
        await until(lambda: router.in_flight == {} and router.admission.running == 0)
        assert all(session.in_flight == 0 for session in router.view.sessions())


async def test_numbers_come_in_the_order_of_the_texts(tmp_path: Path) -> None:
    async with rig(tmp_path) as made:
        answer = await made.ask()
        assert [list(row) for row in answer.values] == [[3, 3], [1, 1], [2, 2]]
        assert (answer.attempts, answer.times) == (1, EmbedTimes(0.1, 0.2))


async def test_requests_go_to_who_has_the_fewest_tokens(tmp_path: Path) -> None:
    async with rig(tmp_path) as made:
        for engine in made.engines:
            engine.may_answer.clear()
        large = asyncio.create_task(made.ask(rows=(TextRow([1] * 50),)))
        await until(lambda: sum(engine.asked for engine in made.engines) == 1)
        small = [asyncio.create_task(made.ask(rows=(TextRow([1] * 10),))) for _ in range(4)]
        await until(lambda: sum(engine.asked for engine in made.engines) == 5)
        assert sorted(engine.asked for engine in made.engines) == [1, 4]
        for engine in made.engines:
            engine.may_answer.set()
        await asyncio.gather(large, *small)


async def test_a_lost_engines_request_goes_to_another_once(tmp_path: Path) -> None:
    async with rig(tmp_path) as made:
        for engine in made.engines:
            engine.may_answer.clear()
        asked = asyncio.create_task(made.ask())
        await until(lambda: any(engine.asked for engine in made.engines))
        first, second = sorted(made.engines, key=lambda engine: -engine.asked)
        second.may_answer.set()
        first.die()
        answer = await asked
        assert (answer.attempts, answer.engine) == (2, second.info.ref.engine_id)


async def test_who_loses_a_second_engine_is_told(tmp_path: Path) -> None:
    async with rig(tmp_path, number=3) as made:
        for engine in made.engines:
            engine.may_answer.clear()
        asked = asyncio.create_task(made.ask())
        for number in (1, 2):
            await until(lambda number=number: sum(engine.asked for engine in made.engines) == number)
            next(engine for engine in made.engines if engine.asked and engine._death is None).die()
        with pytest.raises(EngineLost):
            await asked
        assert sum(engine.asked for engine in made.engines) == 2


async def test_a_silent_engine_is_lost_too(tmp_path: Path) -> None:
    """Its kernel keeps the connection of a stopped process open: only its session tells."""
    async with rig(tmp_path) as made:
        for engine in made.engines:
            engine.may_answer.clear()
        asked = asyncio.create_task(made.ask())
        await until(lambda: any(engine.asked for engine in made.engines))
        first, second = sorted(made.engines, key=lambda engine: -engine.asked)
        second.may_answer.set()
        first.faults.is_stopped = True
        assert (await asked).engine == second.info.ref.engine_id


@pytest.mark.parametrize("error", [Overloaded("full"), ShuttingDown("it goes")])
async def test_an_engine_that_cannot_take_it_is_passed_by(error: DiptychError, tmp_path: Path) -> None:
    async with rig(tmp_path) as made:
        made.engines[0].error = error
        answers = await asyncio.gather(*(made.ask() for _ in range(4)))
        assert {answer.engine for answer in answers} == {"embed-1"}


async def test_the_last_words_of_engines_are_the_answer(tmp_path: Path) -> None:
    async with rig(tmp_path) as made:
        for engine in made.engines:
            engine.error = Overloaded("full")
        with pytest.raises(CapacityError):
            await made.ask()
        for engine in made.engines:
            engine.error = EngineFault("it raised")
        before = sum(engine.asked for engine in made.engines)
        with pytest.raises(EngineFault, match="it raised"):
            await made.ask()
        assert sum(engine.asked for engine in made.engines) == before + 1, (
            "what may be the request's fault is not retried"
        )


async def test_an_answer_that_is_not_whole_is_an_error(tmp_path: Path) -> None:
    async with rig(tmp_path, number=1) as made:
        made.engines[0].is_short = True
        with pytest.raises(EngineError):
            await made.ask()


async def test_a_deadline_and_a_client_that_leaves_free_the_engine(tmp_path: Path) -> None:
    async with rig(tmp_path, number=1) as made:
        [engine] = made.engines
        engine.may_answer.clear()
        with pytest.raises(DeadlineExceeded):
            await made.ask(timeout_s=0.2)
        asked = asyncio.create_task(made.ask())
        await until(lambda: engine.asked == 2)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        await until(lambda: engine.given_up == 2)


async def test_it_is_cancelled_by_its_id(tmp_path: Path) -> None:
    async with rig(tmp_path, number=1) as made:
        [engine] = made.engines
        engine.may_answer.clear()
        with made.router.requests.request("embd-1", tenant="", endpoint="/v1/embeddings", born=0.0) as tracked:
            asked = asyncio.create_task(made.ask(tracked=tracked))
            await until(lambda: engine.asked == 1)
            assert tracked.cancel()
            with pytest.raises(Cancelled):
                await asked
        await until(lambda: engine.given_up == 1)


async def test_more_than_the_limit_waits_in_the_router(tmp_path: Path) -> None:
    async with rig(tmp_path, number=1, max_running=1, max_waiting=1) as made:
        [engine] = made.engines
        engine.may_answer.clear()
        first = asyncio.create_task(made.ask())
        await until(lambda: engine.asked == 1)
        second = asyncio.create_task(made.ask())
        await until(lambda: made.router.admission.waiting == 1)
        with pytest.raises(CapacityError):
            await made.ask()
        engine.may_answer.set()
        await asyncio.gather(first, second)


async def test_without_an_engine_it_waits_for_one_and_then_says_so(tmp_path: Path) -> None:
    async with rig(tmp_path, number=1) as made:
        made.directory.set([replace(made.engines[0].info, draining=True)])
        await until(lambda: not made.router.view.live(MODEL, Role.EMBED))
        assert not made.router.is_ready(MODEL)
        waiting = asyncio.create_task(made.ask())
        await asyncio.sleep(0)
        made.directory.set([made.engines[0].info])
        assert (await waiting).engine == "embed-0"
        made.directory.set([])
        await until(lambda: not made.router.view.has_pool(MODEL, Role.EMBED))
        with pytest.raises(EngineLost, match="no engine of texts"):
            await made.ask()
