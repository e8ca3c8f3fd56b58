"""A drain misses no order that was taken, and no token that was made."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from diptych.cluster.config import ModelSettings
from diptych.cluster.engine.engine import STOP_TIMEOUT_S, Engine
from diptych.cluster.engine.inbox import InboxItem
from diptych.cluster.engine.session import _Session
from diptych.cluster.engine.spec import EngineSpec
from diptych.cluster.models import ModelFacts
from diptych.protos import codec
from diptych.protos import engine_pb2 as pb
from diptych.protos.settings import DecodeSettings, EchoSettings, KvSettings, PrefillSettings, TransferSettings
from diptych.protos.types import DecodeOrder, EngineId, GenerateRequest, Role, SamplingParams, TransferKey

WAIT_S = 20.0
FACTS = ModelFacts(
    name="tiny",
    architecture="LlamaForCausalLM",
    layers=2,
    kv_heads=2,
    head_dim=8,
    vocab_size=1000,
    max_context_tokens=512,
    weights_bytes=0,
    num_parameters=0,
    eos_token_ids=(),
    bos_token_id=None,
    dtype="float32",
    chat_template=None,
)
SETTINGS = ModelSettings(
    source="echo",
    kv=KvSettings(memory_mib=1, block_tokens=16),
    prefill=PrefillSettings(step_tokens=32, threads=1),
    decode=DecodeSettings(step_tokens=32, threads=1),
    echo=EchoSettings(step_s=0.02),
)
ORDER = DecodeOrder(
    request=GenerateRequest(
        key=TransferKey(bytes(16)), prompt=(5, 6, 7), sampling=SamplingParams(max_tokens=20, temperature=0.0)
    ),
    prefill=None,
)


@pytest.fixture
def engine() -> Iterator[Engine]:
    folder = Path(tempfile.mkdtemp(prefix="dt-", dir="/tmp"))  # unix socket paths hold 107 bytes
    spec = EngineSpec(
        engine_id=EngineId("d"),
        epoch=3,
        roles=frozenset({Role.DECODE}),
        model="tiny",
        settings=SETTINGS,
        transfer=TransferSettings(),
        folder=Path("/nowhere"),
        facts=FACTS,
        dtype="float32",
        run_dir=folder,
    )
    failures: list[BaseException] = []
    made = Engine(spec, on_failure=failures.append)
    made.start()
    yield made
    made.stop()
    shutil.rmtree(folder)
    assert not failures


def session_of(engine: Engine) -> _Session:
    """A router's stream whose frames nobody sends."""

    async def begin() -> _Session:
        handler = asyncio.current_task()
        assert handler is not None
        session = _Session("router", handler)
        engine._sessions._sessions.add(session)
        return session

    return engine._asyncio_thread.call(begin(), STOP_TIMEOUT_S)


def submit(engine: Engine, session: _Session, order: DecodeOrder = ORDER) -> None:
    async def arrive() -> None:
        engine._sessions._submit(session, codec.submit_to_pb(1, order, 0.0))

    engine._asyncio_thread.call(arrive(), STOP_TIMEOUT_S)


def test_an_order_that_is_just_being_taken_is_waited_for(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    session, inbox, pool = session_of(engine), engine._parts.inbox, ThreadPoolExecutor(1)
    put, drains, early = inbox.try_put, list[Future[bool]](), list[bool]()

    def slowly(item: InboxItem) -> bool:
        if isinstance(item, DecodeOrder):  # it was not refused, and stands in no book yet
            drains.append(pool.submit(engine.drain, WAIT_S))
            while not drains[0].running():
                pass
            try:
                early.append(drains[0].result(0.2))
            except TimeoutError:
                session.frames.clear()
        return put(item)

    monkeypatch.setattr(inbox, "try_put", slowly)
    submit(engine, session)
    assert not early, "the engine was told to be empty while it took an order"
    while not any(frame.tokens.finishes for frame in list(session.frames)):
        pass
    session.frames.clear()
    engine._asyncio_thread.call(_forget(engine, session), STOP_TIMEOUT_S)
    assert drains[0].result(WAIT_S)
    pool.shutdown()


async def _forget(engine: Engine, session: _Session) -> None:
    engine._sessions._forget(session)


def test_frames_that_no_router_has_read_are_waited_for(engine: Engine) -> None:
    session = session_of(engine)
    session.put(pb.EngineFrame(tokens=pb.StepTokens(handle=[1], index=[0], token=[5])))
    assert not engine.drain(0.1)
    engine._asyncio_thread.call(_forget(engine, session), STOP_TIMEOUT_S)
    assert engine.drain(WAIT_S)


def test_what_a_drain_leaves_is_given_back_for_others_to_go_on_with(engine: Engine) -> None:
    """A stream that just breaks costs a request one of its few moves; a whole pool may be restarted under it."""
    session = session_of(engine)
    long = replace(ORDER.request, sampling=replace(ORDER.request.sampling, max_tokens=400))
    submit(engine, session, replace(ORDER, request=long))
    while not any(frame.tokens.token for frame in list(session.frames)):
        pass
    assert not engine.drain(0.0)
    deadline = time.monotonic() + WAIT_S
    while (engine.status().blocks.used or engine._sessions.num_requests) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.status().blocks.used == 0
    [end] = [finish for frame in list(session.frames) for finish in frame.tokens.finishes]
    assert (end.handle, end.error.code) == (1, "shutting_down"), "it is told once"
    engine._asyncio_thread.call(_forget(engine, session), STOP_TIMEOUT_S)
