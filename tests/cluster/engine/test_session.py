from __future__ import annotations

import grpc
import pytest

from diptych.cluster.engine import session as session_module
from diptych.cluster.engine.inbox import CancelRequest
from diptych.cluster.engine.testing import EPOCH, Router, Start, finish, key, output
from diptych.kvtransfer.prefix import NameChange
from diptych.protos import codec
from diptych.protos import engine_pb2 as pb
from diptych.protos.engine_pb2_grpc import EngineStub
from diptych.protos.status import EngineStatus
from diptych.protos.types import (
    DecodeOrder,
    FinishReason,
    PromptLogprobs,
    Role,
    StepOutput,
    TokenLogprobs,
)


async def test_a_session_opens_with_who_the_engine_is_and_its_status(start: Start) -> None:
    engine = await start()
    async with engine.router() as router:
        welcome = (await router.read()).welcome
        assert codec.ref_from_pb(welcome.me) == engine.info.ref
        assert (list(welcome.roles), welcome.model, welcome.num_blocks) == (["decode"], "m", 9)
        assert welcome.prefix_root == b"root"
        assert codec.status_from_pb((await router.read()).status) == engine.status


async def test_an_order_arrives_with_its_deadline_on_the_engines_own_clock(start: Start) -> None:
    engine = await start()
    async with engine.router() as router:
        await router.submit(3, 1)
        [order] = await engine.items(1)
    assert isinstance(order, DecodeOrder)
    assert order.request.key == key(1)
    assert order.request.deadline == pytest.approx(52.0)


async def test_one_step_is_one_message_with_the_columns_of_that_router_only(start: Start) -> None:
    engine = await start()
    async with engine.router() as first, engine.router() as second:
        await first.submit(11, 1)
        await first.submit(12, 2)
        await second.submit(11, 3)
        await engine.items(3)
        engine.outbox.put(Role.DECODE, output((1, 0, 100), (3, 4, 300), (2, 1, 200), finishes=[finish(2)]))
        mine, other = await first.tokens(), await second.tokens()
    assert (list(mine.handle), list(mine.index), list(mine.token)) == ([11, 12], [0, 1], [100, 200])
    assert [(f.handle, f.reason, f.times.decode) for f in mine.finishes] == [(12, "stop", 1.5)]
    assert (list(other.handle), list(other.index), list(other.token)) == ([11], [4], [300])
    assert not other.finishes


async def test_a_terminal_event_frees_handle_and_key(start: Start) -> None:
    engine = await start()
    async with engine.router() as router:
        for handle, n in ((5, 1), (5, 2), (6, 1)):
            await router.submit(handle, n)
            await engine.items(1)
            engine.outbox.put(Role.DECODE, output(finishes=[finish(n)]))
            assert [f.handle for f in (await router.tokens()).finishes] == [handle]
        assert engine.sessions.num_requests == 0


async def test_an_order_that_comes_twice_is_one_order_also_when_the_first_has_ended(start: Start) -> None:
    engine = await start()
    async with engine.router() as router:
        await router.submit(5, 1)
        await router.submit(5, 1)
        await engine.items(1)
        engine.outbox.put(Role.DECODE, output((1, 0, 9), finishes=[finish(1)]))
        assert [f.handle for f in (await router.tokens()).finishes] == [5]
        await router.submit(5, 1)
        await router.submit(6, 2)
        [order] = await engine.items(1)
        assert isinstance(order, DecodeOrder)
        assert order.request.key == key(2), "neither copy is in the inbox"
        assert engine.sessions.num_requests == 1
    assert engine.sessions.duplicates == 2


async def test_a_copy_of_an_order_that_was_refused_finds_no_room_later(start: Start) -> None:
    engine = await start()
    async with engine.router() as router:
        engine.sessions.draining = True
        await router.submit(5, 1)
        assert [f.error.code for f in (await router.tokens()).finishes] == ["shutting_down"]
        engine.sessions.draining = False
        await router.submit(5, 1)
        await router.submit(6, 2)
        [order] = await engine.items(1)
        assert isinstance(order, DecodeOrder)
        assert order.request.key == key(2)


async def test_a_session_remembers_a_bounded_number_of_ended_orders(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "MAX_ENDED", 3)
    engine = await start()
    async with engine.router() as router:
        await router.read()
        [session] = engine.sessions._sessions
        for n in range(10):
            session.give_up(n, key(n))
        assert list(session.ended) == [7, 8, 9]


async def test_a_router_that_pinged_and_fell_silent_loses_its_session_and_its_requests(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "ROUTER_SILENCE_S", 0.3)
    engine = await start()
    async with engine.router() as silent, engine.router() as plain:
        await silent.submit(1, 1)
        await plain.submit(1, 2)
        await engine.items(2)
        await silent.send(pb.RouterFrame(ping=pb.Ping()))
        assert await silent.refused() == (grpc.StatusCode.UNAVAILABLE, "the router fell silent")
        assert await engine.items(1) == [CancelRequest(Role.DECODE, key(1))]
        assert engine.sessions.routers_lost == 1
        engine.outbox.put(Role.DECODE, output((2, 0, 20)))
        assert list((await plain.tokens()).token) == [20], "who never pinged is not expected to"


async def test_whatever_a_router_sends_shows_that_it_lives(start: Start) -> None:
    engine = await start()
    async with engine.router() as router:
        await router.send(pb.RouterFrame(ping=pb.Ping()))
        await engine.until(lambda: any(session.pings for session in engine.sessions._sessions))
        for n in range(1, 5):
            engine.sessions._end_silent(session_module.ROUTER_SILENCE_S - 1)
            await router.submit(n, n)
            await engine.items(1)
        assert engine.sessions.routers_lost == 0
        engine.sessions._end_silent(session_module.ROUTER_SILENCE_S + 1)
        engine.sessions._end_silent(session_module.ROUTER_SILENCE_S + 1)
        assert engine.sessions.routers_lost == 1, "a session is lost once"


async def test_status_comes_at_its_pace_though_every_frame_is_about_tokens(start: Start) -> None:
    engine = await start()
    async with engine.router() as router:
        await router.submit(1, 1)
        await engine.items(1)
        statuses = index = 0
        while statuses < 4:  # the first answers Open; the load never changes
            engine.outbox.put(Role.DECODE, output((1, index, index)))
            index += 1
            statuses += (await router.read()).WhichOneof("frame") == "status"


async def test_another_life_of_the_engine_is_fenced(start: Start) -> None:
    engine = await start()
    async with engine.router(epoch=EPOCH - 1) as router:
        code, details = await router.refused()
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert details.startswith(f"fenced: engine decode-0 lives in epoch {EPOCH}")
    async with engine.router(epoch=0) as router:
        assert (await router.read()).HasField("welcome")


@pytest.mark.parametrize(
    "frame",
    [
        pb.RouterFrame(),
        pb.RouterFrame(open=pb.Open(router_id="again")),
        pb.RouterFrame(cancel=pb.Cancel(transfer_id=b"short")),
    ],
)
async def test_a_frame_against_the_protocol_ends_the_session_and_its_requests(
    start: Start, frame: pb.RouterFrame
) -> None:
    engine = await start()
    async with engine.router() as router:
        await router.submit(1, 1)
        await engine.items(1)
        await router.send(frame)
        assert (await router.refused())[0] is grpc.StatusCode.INVALID_ARGUMENT
        assert await engine.items(1) == [CancelRequest(Role.DECODE, key(1))]


async def test_a_stream_must_begin_with_open(start: Start) -> None:
    engine = await start()
    async with grpc.aio.insecure_channel(engine.info.ref.target) as channel:
        router = Router(EngineStub(channel).Session())  # type: ignore[no-untyped-call]
        await router.submit(1, 1)
        assert (await router.refused())[0] is grpc.StatusCode.INVALID_ARGUMENT
    assert engine.inbox.take_all(0.0) == []


async def test_a_cancel_reaches_the_step_thread_for_requests_of_the_same_session_only(start: Start) -> None:
    engine = await start()
    async with engine.router() as owner, engine.router() as stranger:
        await owner.submit(1, 1)
        await engine.items(1)
        await stranger.cancel(1)
        await stranger.cancel(99)
        await stranger.submit(1, 2)
        [order] = await engine.items(1)  # what follows the strange cancels: they left nothing
        assert isinstance(order, DecodeOrder)
        await owner.cancel(1)
        assert await engine.items(1) == [CancelRequest(Role.DECODE, key(1))]


async def test_a_broken_stream_cancels_its_requests_and_their_late_output_goes_nowhere(start: Start) -> None:
    engine = await start()
    async with engine.router() as other:
        async with engine.router() as router:
            await router.submit(1, 1)
            await router.submit(2, 2)
            await other.submit(1, 3)
            await engine.items(3)
        cancels = await engine.items(2)
        assert sorted(cancels, key=str) == [CancelRequest(Role.DECODE, key(1)), CancelRequest(Role.DECODE, key(2))]
        engine.outbox.put(Role.DECODE, output((1, 0, 9), (3, 0, 30), finishes=[finish(1), finish(2)]))
        step = await other.tokens()
        assert (list(step.token), list(step.finishes)) == ([30], [])
        assert engine.sessions.num_requests == 1


async def test_what_cannot_be_taken_ends_in_one_error_for_that_handle(start: Start) -> None:
    engine = await start()
    async with engine.router() as router:
        await router.submit(1, 1)
        await engine.items(1)
        await router.submit(2, 1)  # the key lives
        await router.submit(3, 2, role=Role.PREFILL)  # no such role here
        await router.send(pb.RouterFrame(submit=pb.Submit(handle=4, phase=pb.PHASE_DECODE, prompt=[1])))  # no key
        engine.sessions.draining = True
        await router.submit(5, 5)
        errors = [(await router.tokens()).finishes[0] for _ in range(4)]
    assert [(f.handle, f.reason, f.error.code) for f in errors] == [
        (2, "error", "invalid_request"),
        (3, "error", "engine_error"),
        (4, "error", "invalid_request"),
        (5, "error", "shutting_down"),
    ]


async def test_a_full_inbox_refuses_with_overloaded(start: Start) -> None:
    engine = await start()
    async with engine.router() as router:
        for n in range(1, 10):
            await router.submit(n, n)
        [refusal] = (await router.tokens()).finishes
    assert (refusal.handle, refusal.error.code) == (9, "overloaded")


async def test_a_handle_in_use_ends_the_session(start: Start) -> None:
    engine = await start()
    async with engine.router() as router:
        await router.submit(1, 1)
        await router.submit(1, 2)
        code, details = await router.refused()
    assert (code, details) == (grpc.StatusCode.INVALID_ARGUMENT, "handle 1 is in use")


async def test_both_phases_of_one_request_can_live_in_an_engine_of_both_roles(start: Start) -> None:
    engine = await start(frozenset(Role))
    async with engine.router() as router:
        await router.submit(1, 1, role=Role.PREFILL)
        await router.submit(2, 1, role=Role.DECODE)
        await engine.items(2)
        engine.outbox.put(Role.PREFILL, output((1, 0, 10), finishes=[finish(1, FinishReason.HANDOFF, Role.PREFILL)]))
        engine.outbox.put(Role.DECODE, output((1, 1, 11)))
        prefill, decode = await router.tokens(), await router.tokens()
    assert (list(prefill.handle), [f.handle for f in prefill.finishes]) == ([1], [1])
    assert (list(decode.handle), list(decode.index)) == ([2], [1])


async def test_status_follows_a_change_of_load(start: Start) -> None:
    engine = await start()
    async with engine.router() as router:
        engine.status = EngineStatus(running=3, counters={"engine_steps_total": 5.0})
        while True:
            frame = await router.read()
            if frame.WhichOneof("frame") == "status" and frame.status.running == 3:
                break
    assert dict(frame.status.counters) == {"engine_steps_total": 5.0}


async def test_outputs_lost_on_the_way_end_the_sessions_instead_of_leaving_holes(start: Start) -> None:
    engine = await start(max_outputs=2)
    async with engine.router() as router:
        await router.submit(1, 1)
        await engine.items(1)
        for index in range(5):  # no await in between: the reader cannot run
            engine.outbox.put(Role.DECODE, output((1, index, index)))
        assert (await router.refused())[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await engine.items(1) == [CancelRequest(Role.DECODE, key(1))]
    assert engine.outbox.outputs_lost == 3


async def test_a_lost_terminal_event_still_ends_the_books_of_its_request(start: Start) -> None:
    engine = await start(max_outputs=2)
    async with engine.router() as router:
        await router.submit(1, 1)
        await engine.items(1)
        for index in range(4):
            engine.outbox.put(Role.DECODE, output((1, index, index)))
        engine.outbox.put(Role.DECODE, output((1, 4, 4), finishes=[finish(1, FinishReason.LENGTH)]))
        assert (await router.refused())[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert engine.sessions.num_requests == 0


async def test_a_prefill_order_refused_at_the_door_is_abandoned_for_its_decode_engine_too(start: Start) -> None:
    engine = await start(frozenset(Role))
    async with engine.router() as router:
        await router.submit(1, 1, role=Role.PREFILL)
        await engine.items(1)
        engine.sessions.draining = True
        await router.submit(2, 1, role=Role.PREFILL)  # lives: its transfer must not be touched
        await router.submit(3, 2, role=Role.PREFILL)
        await router.submit(4, 3, role=Role.DECODE)
        codes = [(await router.tokens()).finishes[0].error.code for _ in range(3)]
    assert codes == ["invalid_request", "shutting_down", "shutting_down"]
    assert engine.abandoned == [(key(2), "shutting_down")]


async def test_a_router_that_reads_nothing_loses_its_session_only(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diptych.cluster.engine.session.MAX_FRAMES_BEHIND", 50)
    engine = await start(max_outputs=100_000)
    async with engine.router() as slow, engine.router() as good:
        await slow.submit(1, 1)
        await good.submit(1, 2)
        await engine.items(2)
        step = output(*[(1, index, index) for index in range(2000)])
        for _ in range(400):  # more than a session may be behind here, and more bytes than gRPC takes unread
            engine.outbox.put(Role.DECODE, step)
        await engine.until(lambda: engine.sessions.num_sessions == 1)
        assert await engine.items(1) == [CancelRequest(Role.DECODE, key(1))]
        engine.outbox.put(Role.DECODE, output((2, 0, 20)))
        assert list((await good.tokens()).token) == [20]
        # It is told when it reads again: else it would go on submitting to nobody.
        assert (await slow.refused())[0] is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_closing_tells_routers_that_the_engine_goes(start: Start) -> None:
    engine = await start()
    async with engine.router() as router:
        await router.read()
        await engine.sessions.close()
        assert (await router.refused())[0] is grpc.StatusCode.UNAVAILABLE


def logprobs(value: float) -> TokenLogprobs:
    return TokenLogprobs(value, 2, ((5, -0.5), (6, -1.25)))


async def test_logprobs_stay_beside_their_tokens_though_a_step_is_split_between_routers(start: Start) -> None:
    engine = await start()
    async with engine.router() as first, engine.router() as second:
        await first.submit(11, 1)
        await second.submit(11, 2)
        await first.submit(12, 3)
        await engine.items(3)
        out = output((2, 0, 200), (1, 0, 100))
        out.add(key(3), 0, 300, logprobs(-3.0))
        out.logprobs[0] = logprobs(-2.0)
        out.prompt_logprobs.append(PromptLogprobs(key(3), 1, (logprobs(-0.5), logprobs(-0.25))))
        engine.outbox.put(Role.DECODE, out)
        mine, other = await first.tokens(), await second.tokens()
    assert list(mine.handle) == [11, 12]
    assert {m.row: codec.logprobs_from_pb(m) for m in mine.logprobs} == {1: logprobs(-3.0)}
    assert {m.row: codec.logprobs_from_pb(m) for m in other.logprobs} == {0: logprobs(-2.0)}
    [piece] = mine.prompt_logprobs
    assert piece.handle == 12
    told = codec.prompt_logprobs_from_pb(piece, key(3))
    assert told == PromptLogprobs(key(3), 1, (logprobs(-0.5), logprobs(-0.25)))
    assert not other.prompt_logprobs


async def test_prompt_logprobs_alone_are_a_message(start: Start) -> None:
    engine = await start()
    async with engine.router() as router:
        await router.submit(4, 1)
        await engine.items(1)
        piece = PromptLogprobs(key(1), 3, (logprobs(-1.0),))
        engine.outbox.put(Role.DECODE, StepOutput(prompt_logprobs=[piece]))
        step = await router.tokens()
    assert (len(step.handle), len(step.prompt_logprobs)) == (0, 1)


async def test_a_new_session_is_told_all_block_names_and_then_what_changes(start: Start) -> None:
    engine = await start()
    async with engine.router() as first:
        assert await first.names() == (True, [], [])
        engine.outbox.put_names(NameChange((1, 2, 3), reset=True))
        assert await first.names() == (True, [1, 2, 3], [])
        engine.outbox.put_names(NameChange((4,), (2,)))
        assert await first.names() == (False, [4], [2])
        async with engine.router() as second:
            assert await second.names() == (True, [1, 3, 4], [])
            engine.outbox.put_names(NameChange((9,), reset=True))
            assert await second.names() == (True, [9], [])
            assert await first.names() == (True, [9], [])
    assert engine.outbox.takes_names


async def test_many_block_names_travel_in_frames_of_bounded_size(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "MAX_NAMES_PER_FRAME", 2)
    engine = await start()
    async with engine.router() as router:
        await router.names()
        engine.outbox.put_names(NameChange((1, 2, 3, 4, 5), reset=True))
        pieces = [await router.names() for _ in range(3)]
        assert [reset for reset, _, _ in pieces] == [True, False, False]
        assert sorted(name for _, added, _ in pieces for name in added) == [1, 2, 3, 4, 5]
        engine.outbox.put_names(NameChange((6,), (1, 2, 3)))
        assert [await router.names() for _ in range(2)] == [(False, [6], [1, 2]), (False, [], [3])]


async def test_a_router_that_missed_a_change_is_told_everything_again(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await start()
    async with engine.router() as router:
        await router.names()
        [session] = engine.sessions._sessions
        monkeypatch.setattr(type(session), "is_slow", True)
        engine.outbox.put_names(NameChange((1,)))
        await engine.until(lambda: engine.outbox.takes_names)
        engine.outbox.put_names(NameChange((2,)))
        await engine.until(lambda: engine.outbox.takes_names)
        monkeypatch.setattr(type(session), "is_slow", False)
        assert await router.names() == (True, [1, 2], [])
