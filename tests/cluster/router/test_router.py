"""The router against echo engines over real gRPC: order, loss, retries, cancellation, membership."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

from diptych.cluster.config import PlacementSettings, RouterSettings
from diptych.cluster.observability.tracing import json_lines
from diptych.cluster.router import router as router_module
from diptych.cluster.router.rig import PAIR, PROMPT, D, P, call, rig, until, wanted
from diptych.cluster.router.router import Router
from diptych.cluster.router.session import EngineSession
from diptych.cluster.router.testing import ECHO_ROOT, EchoEngine, StaticDirectory
from diptych.kvtransfer.prefix import block_name, root_name, short_name
from diptych.protos import engine_pb2 as pb
from diptych.protos.errors import (
    DeadlineExceeded,
    EngineLost,
    NoBlocks,
    RequestError,
)
from diptych.protos.types import (
    DecodeOrder,
    EngineId,
    EngineRef,
    FinishReason,
    PrefillOrder,
    Role,
)


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 50])
@pytest.mark.parametrize("tokens_per_step", [1, 7])
async def test_the_answer_is_whole_and_explained(tmp_path: Path, max_tokens: int, tokens_per_step: int) -> None:
    async with rig(tmp_path, PAIR, tokens_per_step=tokens_per_step) as r:
        tokens, finish = await r.ask(max_tokens)
        assert tokens == wanted(max_tokens)
        assert (finish.reason, finish.num_tokens, finish.attempts) == (FinishReason.LENGTH, max_tokens, 1)
        assert (finish.prefill_engine, finish.decode_engine) == ("p", "d")
        assert finish.cached_tokens == 16
        order = r.engines["p"].orders[0], r.engines["d"].orders[0]
        assert isinstance(order[0], PrefillOrder)
        assert isinstance(order[1], DecodeOrder)
        assert order[0].request.key == order[1].request.key
        assert len(order[0].request.key.transfer_id) == 16
        assert order[0].decode == r.engines["d"].info.ref
        assert order[1].prefill == r.engines["p"].info.ref
        assert order[1].allow_local_prefill


@pytest.mark.parametrize("fault", ["swap_pairs", "also_first_token"])
async def test_unordered_and_repeated_tokens_are_put_right(tmp_path: Path, fault: str) -> None:
    async with rig(tmp_path, PAIR) as r:
        setattr(r.engines["d"].faults, fault, True)
        assert (await r.ask(9))[0] == wanted(9)


async def test_decode_may_be_first(tmp_path: Path) -> None:
    async with rig(tmp_path, PAIR) as r:
        r.engines["p"].faults.silent = True
        task = asyncio.create_task(r.ask(4))
        await until(lambda: r.engines["d"].status().steps == 3 and bool(r.engines["p"].orders))
        assert not task.done()
        frames = r.engines["p"]
        frames.faults.silent = False
        order = frames.orders[0]
        session = next(iter(frames._sessions))
        await frames._work(session, 1, order)
        assert (await task)[0] == wanted(4)


async def test_a_prefill_engine_lost_on_the_last_attempt_leaves_the_answer_to_decode(tmp_path: Path) -> None:
    async with rig(tmp_path, PAIR, step_s=0.002, max_attempts=1) as r:
        r.engines["p"].faults.drop_stream_at = 0
        r.engines["d"].faults.also_first_token = True  # what a decode engine does when the transfer fails
        assert (await r.ask(20))[0] == wanted(20)
        assert r.metric("diptych_engine_sessions_lost_total") == 1


async def test_an_order_lost_with_the_prefill_stream_does_not_hold_the_answer_up(tmp_path: Path) -> None:
    """The decode engine waited for a prefill engine that never got the order, as long as a lease lasts."""
    async with rig(tmp_path, PAIR) as r:
        r.engines["p"].faults.drop_stream_at = 0
        r.engines["d"].on_order = lambda: setattr(r.engines["d"].faults, "silent", len(r.engines["d"].orders) < 2)
        tokens, finish = await r.ask()
        assert tokens == wanted(8)
        assert (finish.attempts, finish.prefill_engine, finish.path) == (2, "", "local")
        first, second = (order.request.key for order in r.engines["d"].orders)
        assert second == replace(first, attempt=1)
        await until(lambda: r.engines["d"].cancels == [first])


async def test_the_other_prefill_engine_is_tried_when_one_is_lost(tmp_path: Path) -> None:
    async with rig(tmp_path, {"p0": P, "p1": P, "d": D}) as r:
        r.engines["p0"].faults.drop_stream_at = 0
        tokens, finish = await r.ask()
        assert tokens == wanted(8)
        assert (finish.attempts, finish.prefill_engine) == (2, "p1")


async def test_without_a_prefill_engine_decode_gets_the_whole_request(tmp_path: Path) -> None:
    async with rig(tmp_path, {"d": D}) as r:
        assert (await r.ask())[0] == wanted(8)
        order = r.engines["d"].orders[0]
        assert isinstance(order, DecodeOrder)
        assert order.prefill is None


async def test_one_engine_with_both_roles_is_asked_once(tmp_path: Path) -> None:
    async with rig(tmp_path, {"both": P | D}) as r:
        assert (await r.ask())[0] == wanted(8)
        assert len(r.engines["both"].orders) == 1


async def test_two_engines_with_both_roles_share_the_work(tmp_path: Path) -> None:
    async with rig(tmp_path, {"a": P | D, "b": P | D}) as r:
        answers = await asyncio.gather(*(r.ask(20) for _ in range(8)))
        assert all(tokens == wanted(20) for tokens, _ in answers)
        assert {finish.decode_engine for _, finish in answers} == {"a", "b"}
        assert all(finish.prefill_engine != finish.decode_engine for _, finish in answers)


async def test_a_retryable_error_before_the_first_token_is_tried_elsewhere(tmp_path: Path) -> None:
    async with rig(tmp_path, {"d0": D, "d1": D}) as r:
        r.engines["d0"].faults.error = NoBlocks("full")
        tokens, finish = await r.ask()
        assert tokens == wanted(8)
        assert (finish.decode_engine, finish.attempts) == ("d1", 2)
        first, second = r.engines["d0"].orders[0].request.key, r.engines["d1"].orders[0].request.key
        assert second == replace(first, attempt=1)
        assert r.metric("diptych_retries_total") == 1


async def test_a_full_engine_without_a_sibling_is_not_asked_again(tmp_path: Path) -> None:
    async with rig(tmp_path, {"d": D}) as r:
        r.engines["d"].faults.error = NoBlocks("full")
        with pytest.raises(NoBlocks):
            await r.ask()
        assert len(r.engines["d"].orders) == 1


async def test_an_error_that_a_retry_cannot_mend_is_not_retried(tmp_path: Path) -> None:
    async with rig(tmp_path, {"d0": D, "d1": D}) as r:
        r.engines["d0"].faults.error = RequestError("no")
        with pytest.raises(RequestError):
            await r.ask()
        assert r.engines["d1"].orders == []


async def test_a_stream_that_breaks_before_the_first_token_is_retried_on_the_same_engine_when_it_is_back(
    tmp_path: Path,
) -> None:
    async with rig(tmp_path, {"d": D}) as r:
        engine = r.engines["d"]
        engine.faults.drop_stream_at = 0
        engine.on_order = lambda: setattr(engine.faults, "drop_stream_at", 0 if len(engine.orders) < 2 else None)
        tokens, finish = await r.ask()
        assert tokens == wanted(8)
        assert finish.attempts == 2


async def test_a_write_into_a_stream_that_has_just_ended_costs_one_connection_and_not_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_all, ended = EngineSession._write_all, asyncio.InvalidStateError("RPC already finished.")

    async def write_too_late(session: EngineSession, call: object) -> None:
        monkeypatch.setattr(EngineSession, "_write_all", write_all)
        await write_all(session, Mock(write=Mock(side_effect=ended)))

    async with rig(tmp_path, {"d0": D}) as r:
        r.engines["d0"].drop_streams()
        await until(lambda: r.ready() == 0)
        monkeypatch.setattr(EngineSession, "_write_all", write_too_late)
        await until(lambda: r.ready() == 1)
        assert (await r.ask())[0] == wanted(8)


async def test_retries_are_bounded(tmp_path: Path) -> None:
    async with rig(tmp_path, {"d": D}) as r:
        r.engines["d"].faults.drop_stream_at = 0
        with pytest.raises(EngineLost):
            await r.ask()
        assert len(r.engines["d"].orders) == r.router.settings.max_attempts


async def test_a_lost_first_token_is_retried(tmp_path: Path) -> None:
    async with rig(tmp_path, PAIR) as r:
        engine = r.engines["p"]
        engine.faults.no_first_token = True
        engine.on_order = lambda: setattr(engine.faults, "no_first_token", len(engine.orders) < 2)
        tokens, finish = await r.ask()
        assert tokens == wanted(8)
        assert finish.attempts == 2


async def test_closing_the_iterator_cancels_on_both_engines(tmp_path: Path) -> None:
    async with rig(tmp_path, PAIR, step_s=0.005) as r:
        r.engines["p"].faults.silent = True
        r.engines["d"].faults.also_first_token = True
        async with aclosing(r.router.generate(call(1000))) as deltas:
            await anext(deltas)
        key = r.engines["d"].orders[0].request.key
        await until(lambda: r.engines["p"].cancels == [key] and r.engines["d"].cancels == [key])
        await until(lambda: r.engines["d"].open_orders == 0)


async def test_sending_true_ends_the_answer_with_an_explanation(tmp_path: Path) -> None:
    async with rig(tmp_path, PAIR, step_s=0.002) as r:
        async with aclosing(r.router.generate(call(1000))) as deltas:
            delta, got = await anext(deltas), list[int]()
            while delta.finish is None:
                got += delta.tokens
                delta = await deltas.asend(len(got) >= 5)
        assert delta.finish.reason is FinishReason.STOP
        assert delta.finish.num_tokens == len(got)
        assert delta.finish.cached_tokens == 16
        await until(lambda: bool(r.engines["d"].cancels))
        assert r.metric("diptych_requests_total") == 1


async def test_a_deadline_ends_the_request_and_its_work(tmp_path: Path) -> None:
    async with rig(tmp_path, PAIR) as r:
        r.engines["p"].faults.silent = r.engines["d"].faults.silent = True
        with pytest.raises(DeadlineExceeded):
            async for _ in r.router.generate(call(timeout_s=0.1)):
                pass
        await until(lambda: bool(r.engines["p"].cancels) and bool(r.engines["d"].cancels))


async def test_a_new_life_of_an_engine_replaces_the_old_one(tmp_path: Path) -> None:
    async with rig(tmp_path, {"d": D}) as r:
        old = r.engines["d"]
        r.directory.set([])
        await until(lambda: not r.router.is_ready("echo"))
        with pytest.raises(EngineLost):
            await r.ask()
        await old.stop()
        new = EchoEngine(f"unix:{tmp_path}/d2", engine_id="d", roles=D, epoch=2)
        await new.start()
        r.directory.set([new.info])
        await until(lambda: r.router.is_ready("echo"))
        assert (await r.ask())[0] == wanted(8)
        assert len(new.orders) == 1
        await r.router.stop()
        await new.stop()


async def test_a_stale_epoch_is_never_used(tmp_path: Path) -> None:
    async with rig(tmp_path, {"d": D}) as r:
        info = r.engines["d"].info
        r.directory.set([replace(info, ref=replace(info.ref, epoch=7))])
        await until(lambda: not r.router.is_ready("echo"))
        with pytest.raises(EngineLost):
            await r.ask()
        assert r.engines["d"].orders == []


async def test_a_router_is_ready_when_it_has_seen_all_engines_that_were_starting_and_stays_so(tmp_path: Path) -> None:
    prefill, decode = (EchoEngine(f"unix:{tmp_path}/{n}", engine_id=n, roles=r) for n, r in (("p", P), ("d", D)))
    directory = StaticDirectory([decode.info])
    directory.is_settled.clear()
    router = Router(directory=directory, settings=RouterSettings(connect_timeout_s=20))
    await decode.start()
    await router.start()
    await until(lambda: router.view.live("echo", Role.DECODE))
    assert not router.is_ready("echo"), "the prefill engine is starting"
    directory.set([decode.info, prefill.info])
    directory.is_settled.set()
    await until(lambda: router.view.has_pool("echo", Role.PREFILL))
    assert not router.is_ready("echo"), "the prefill engine is not connected"
    await prefill.start()
    await until(lambda: router.is_ready("echo"))
    assert router.view.live("echo", Role.PREFILL)
    await prefill.stop()
    directory.set([decode.info])
    await until(lambda: not router.view.live("echo", Role.PREFILL))
    assert router.is_ready("echo"), "decode engines compute the prompts now"
    await router.stop()
    await decode.stop()


@pytest.mark.parametrize("leaves", [True, False])
async def test_an_engine_that_is_gone_or_hangs_keeps_no_router_from_being_ready(tmp_path: Path, leaves: bool) -> None:
    decode = EchoEngine(f"unix:{tmp_path}/d", engine_id="d", roles=D)
    nobody = replace(decode.info, ref=EngineRef(EngineId("p"), 1, f"unix:{tmp_path}/p"), roles=P)
    directory = StaticDirectory([decode.info, nobody])
    await decode.start()
    settings = RouterSettings(connect_timeout_s=60 if leaves else 0.1)
    router = Router(directory=directory, settings=settings)
    await router.start()
    if leaves:
        await until(lambda: router.view.live("echo", Role.DECODE))
        assert not router.is_ready("echo")
        directory.set([decode.info])
    await until(lambda: router.is_ready("echo"))
    await router.stop()
    await decode.stop()


async def test_a_directory_that_fails_leaves_the_known_engines_in_use(tmp_path: Path) -> None:
    async with rig(tmp_path, {"d": D}) as r:

        async def broken(version: int) -> None:
            raise RuntimeError("the manager is gone")

        r.directory.wait_change = broken  # type: ignore[assignment, method-assign]
        r.directory.set([r.engines["d"].info])
        await asyncio.sleep(0)
        assert (await r.ask())[0] == wanted(8)


async def test_200_requests_with_a_fifth_cancelled_leave_nothing_behind(tmp_path: Path) -> None:
    async with rig(tmp_path, PAIR, step_s=0.0005) as r:

        async def one(number: int) -> None:
            if number % 5:
                assert (await r.ask(10))[0] == wanted(10)
                return
            async with aclosing(r.router.generate(call(1000))) as deltas:
                for _ in range(number % 7 + 1):
                    await anext(deltas)

        await asyncio.gather(*(one(number) for number in range(200)))
        await until(lambda: all(engine.open_orders == 0 for engine in r.engines.values()))
        assert r.metric("diptych_requests_in_flight") == 0


async def test_stopping_the_router_fails_open_requests_and_leaves_no_task(tmp_path: Path) -> None:
    before = asyncio.all_tasks()
    async with rig(tmp_path, PAIR) as r:
        r.engines["d"].faults.silent = True
        task = asyncio.create_task(r.ask())
        await until(lambda: len(r.engines["d"].orders) > 0)
        await r.router.stop()
        with pytest.raises(EngineLost):
            await task
    await until(lambda: not {t for t in asyncio.all_tasks() - before if "grpc" not in repr(t)})


async def test_spans_join_the_callers_trace_and_travel_to_the_engines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = TracerProvider(shutdown_on_exit=False)
    file = tmp_path / "spans.jsonl"
    exporter = json_lines(file)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(router_module, "_TRACER", provider.get_tracer("test"))
    trace_id, span_id = "ab" * 16, "cd" * 8
    async with rig(tmp_path, PAIR) as r:
        async for _ in r.router.generate(call(traceparent=f"00-{trace_id}-{span_id}-01")):
            pass
        sent = r.engines["p"].orders[0].request.traceparent.split("-")
    provider.shutdown()
    exporter.out.close()
    spans = {span["name"]: span for span in map(json.loads, file.read_text().splitlines())}
    assert spans.keys() == {"router", "queue"}
    assert spans["router"]["parent_id"] == f"0x{span_id}"
    assert spans["queue"]["parent_id"] == spans["router"]["context"]["span_id"]
    assert {span["context"]["trace_id"] for span in spans.values()} == {f"0x{trace_id}"}
    assert spans["router"]["attributes"]["outcome"] == "ok"
    assert sent[1:3] == [trace_id, spans["router"]["context"]["span_id"].removeprefix("0x")]
    assert file.stat().st_mode & 0o777 == 0o600


async def test_without_a_tracer_the_callers_traceparent_still_reaches_the_engines(tmp_path: Path) -> None:
    header = f"00-{'12' * 16}-{'34' * 8}-01"
    async with rig(tmp_path, PAIR) as r:
        async for _ in r.router.generate(call(traceparent=header)):
            pass
        assert r.engines["d"].orders[0].request.traceparent == header


async def test_a_step_that_makes_no_sense_costs_the_connection_and_not_the_session(tmp_path: Path) -> None:
    async with rig(tmp_path, {"d": D}) as r:
        [session] = r.engines["d"]._sessions
        session.outbox.put_nowait(pb.EngineFrame(tokens=pb.StepTokens(handle=[1, 2], index=[0], token=[3])))
        await until(lambda: r.metric("diptych_engine_sessions_lost_total") == 1)
        await until(lambda: r.ready() == 1)
        assert (await r.ask())[0] == wanted(8)


async def test_later_choices_join_the_first_ones_engines(tmp_path: Path) -> None:
    async with rig(
        tmp_path, {"p0": P, "p1": P, "d0": D, "d1": D}, placement=PlacementSettings(policy="round_robin")
    ) as r:
        first = await r.deltas(call())
        pin = first[0].placement
        assert pin is not None
        assert {delta.placement for delta in first} == {pin}
        for _ in range(3):
            deltas = await r.deltas(replace(call(), pin=pin))
            assert deltas[-1].placement == pin
            assert deltas[-1].finish is not None
            assert (deltas[-1].finish.policy, deltas[-1].finish.attempts) == ("pin", 1)


def block_names(count: int) -> tuple[int, ...]:
    names, parent = [], root_name(ECHO_ROOT, b"")
    for start in range(0, count * 16, 16):
        parent = block_name(parent, PROMPT[start : start + 16])
        names.append(short_name(parent))
    return tuple(names)


async def test_what_engines_tell_of_their_caches_decides_the_placement(tmp_path: Path) -> None:
    placement = PlacementSettings(policy="prefix", local_prefill_below=5)
    async with rig(tmp_path, {"p": P, "d0": D, "d1": D}, placement=placement) as r:
        _, far = await r.ask()
        assert (far.path, far.decode_engine, far.policy) == ("pd", "d0", "prefix")
        r.engines["d1"].tell_names(block_names(1))
        mirror = r.router.view.session(r.engines["d1"].info.ref).mirror  # type: ignore[union-attr]
        await until(lambda: len(mirror.names) == 1)
        _, near = await r.ask()
        assert (near.path, near.decode_engine, near.choice) == ("local", "d1", "local: 4 tokens < 5")
        r.engines["d1"].tell_names((), block_names(1))
        await until(lambda: not mirror.names)
        assert (await r.ask())[1].path == "pd"
        r.engines["d1"].tell_names(block_names(1), reset=True)
        await until(lambda: bool(mirror.names))
        r.engines["d1"].drop_streams()
        await until(lambda: not mirror.names)
        await until(lambda: r.ready() == 3)
        assert not mirror.names
        kinds = r.metric("diptych_router_decisions_total")
        assert kinds == 3


async def test_priority_tenant_and_weight_reach_both_engines(tmp_path: Path) -> None:
    async with rig(tmp_path, PAIR) as r:
        for tenant, weight in (("gold", 4.0), ("nobody knows", 1.0)):
            await r.deltas(replace(call(), tenant=tenant, priority=-3))
            for engine in r.engines.values():
                request = engine.orders[-1].request
                assert (request.tenant, request.weight, request.priority) == (tenant, weight, -3)
        labels = {
            sample.labels["tenant"]
            for family in r.router.metrics.registry.collect()
            for sample in family.samples
            if "tenant" in sample.labels
        }
        assert labels == {"gold", "other"}, "clients choose tenant names: they must not become time series"


async def test_the_explanation_says_where_why_and_how_long(tmp_path: Path) -> None:
    async with rig(tmp_path, PAIR, step_s=0.002) as r:
        _, told = await r.ask()
        assert (told.policy, told.path, told.choice.split(":")[0]) == ("cost", "pd", "cost")
        assert (told.prefill_cached_tokens, told.decode_cached_tokens, told.preemptions) == (16, 0, 0)
        assert (told.transfer_bytes, told.transport) == (1024 * len(PROMPT), "echo")
        assert 0 <= told.queue_s < told.ttft_s < told.total_s
        assert r.router.recent[-1] == told


async def test_colocated_engines_get_whole_requests_under_every_policy(tmp_path: Path) -> None:
    for policy in ("cost", "prefix", "session", "least_load", "round_robin"):
        folder = tmp_path / policy
        folder.mkdir()
        placement = PlacementSettings(policy=policy)
        async with rig(folder, {"d0": D, "d1": D}, placement=placement) as r:
            _, told = await r.ask()
            assert (told.prefill_engine, told.path) == ("", "local")
            assert r.metric("diptych_local_fallbacks_total") == 0
