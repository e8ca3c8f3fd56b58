"""Batches from the file to the results: each request answered once, whoever dies meanwhile.

Guards against lost and doubled lines, against batches that hang, and against counts that do not add up.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from diptych.cluster.batches import results
from diptych.cluster.batches.run import BatchRun
from diptych.cluster.batches.targets import Attempt
from diptych.cluster.batches.testing import CHAT, Bench, Scripted, line
from diptych.cluster.gateway.accounts import BudgetExceeded
from diptych.cluster.gateway.matching import FOREVER_S
from diptych.cluster.router.call import GenerateCall, TokenDelta
from diptych.cluster.store.contents import Contents, StorageFull
from diptych.protos.errors import (
    DeadlineExceeded,
    EngineFault,
    EngineLost,
    InvalidRequest,
    Overloaded,
    StoreUnavailable,
)
from diptych.protos.wire_checks import JsonObject


async def test_a_batch_goes_through_all_its_states_to_a_file_of_answers(bench: Bench) -> None:
    batch = await bench.make([line(f"c{i}", f"text {i}") for i in range(40)], metadata={"of": "me"})
    assert batch["status"] == "validating"
    runner = bench.runner()
    told = await bench.over(batch["id"], runner)
    assert told["status"] == "completed"
    assert told["request_counts"] == {"total": 40, "completed": 40, "failed": 0}
    assert told["metadata"] == {"of": "me"}
    assert told["model"] == "echo"
    assert told["error_file_id"] is None
    assert told["created_at"] <= told["in_progress_at"] <= told["finalizing_at"] <= told["completed_at"]
    results = await bench.lines(told["output_file_id"])
    assert [one["custom_id"] for one in results] == [f"c{i}" for i in range(40)]
    assert all(one["response"]["status_code"] == 200 and one["error"] is None for one in results)
    bodies = [one["response"]["body"] for one in results]
    assert told["usage"]["output_tokens"] == sum(body["usage"]["completion_tokens"] for body in bodies) == 160
    assert told["usage"]["input_tokens"] == sum(body["usage"]["prompt_tokens"] for body in bodies)
    kept = (await bench.http.get(f"/v1/files/{told['output_file_id']}")).json()
    assert kept["purpose"] == "batch_output"
    assert kept["expires_at"] > kept["created_at"]


async def test_completions_and_responses_are_answered_too(bench: Bench) -> None:
    body = {"model": "echo", "prompt": "a b c", "max_tokens": 3}
    lines = [{"custom_id": "one", "method": "POST", "url": "/v1/completions", "body": body}]
    batch = await bench.make(lines, "/v1/completions")
    body = {"model": "echo", "input": "hello", "max_output_tokens": 3}
    lines = [{"custom_id": "two", "method": "POST", "url": "/v1/responses", "body": body}]
    other = await bench.make(lines, "/v1/responses")
    runner = bench.runner()
    for made, kind in ((batch, "text_completion"), (other, "response")):
        told = await bench.over(made["id"], runner)
        (result,) = await bench.lines(told["output_file_id"])
        assert result["response"]["body"]["object"] == kind
        assert told["usage"]["output_tokens"] == 3


async def test_a_line_is_answered_once_though_its_first_router_dies(bench: Bench) -> None:
    """The dead router's lease runs out; what it had settled stays, what it had begun is begun anew."""
    first, second = Scripted(), Scripted()
    batch = await bench.make([line(f"c{i}", f"t{i}") for i in range(60)])
    dead = bench.runner(**{CHAT: first})
    some = await bench.until(batch["id"], lambda told: told["request_counts"]["completed"] >= 10, dead)
    first.gate.clear()
    for task in [*dead._tasks.values()]:  # killed: nothing is let go of
        task.cancel()
    await asyncio.gather(*dead._tasks.values(), return_exceptions=True)
    dead._tasks.clear()
    await bench.door.store.write(lambda connection: None)  # what its writer had begun is done
    done = (await bench.batch(batch["id"]))["request_counts"]["completed"]
    assert done >= some["request_counts"]["completed"]
    heir = bench.runner(**{CHAT: second})
    await heir.look()
    assert not second.begun, "the lease of the dead router holds"
    bench.later_s += 5
    told = await bench.over(batch["id"], heir)
    assert told["request_counts"] == {"total": 60, "completed": 60, "failed": 0}
    assert len(second.begun) == 60 - done
    results = await bench.lines(told["output_file_id"])
    assert [one["custom_id"] for one in results] == [f"c{i}" for i in range(60)]
    assert told["usage"]["output_tokens"] == 180


async def test_two_routers_that_both_think_a_batch_theirs_settle_each_line_once(bench: Bench) -> None:
    """A router that stood still longer than its lease wakes up beside its successor."""
    slow, quick = Scripted(), Scripted()
    batch = await bench.make([line(f"c{i}", f"t{i}") for i in range(30)])
    stalled = bench.runner(**{CHAT: slow})
    slow.gate.clear()
    await bench.until(batch["id"], lambda told: bool(slow.begun), stalled)
    bench.later_s += 5
    heir = bench.runner(**{CHAT: quick})
    quick.gate.clear()
    await bench.until(batch["id"], lambda told: bool(quick.begun), heir)
    slow.gate.set()
    await bench.until(batch["id"], lambda told: told["request_counts"]["completed"] >= 16)
    await stalled.look()
    assert not stalled._runs, "it sees that the batch is another's"
    quick.gate.set()
    told = await bench.over(batch["id"], heir)
    assert told["request_counts"] == {"total": 30, "completed": 30, "failed": 0}
    assert told["usage"]["output_tokens"] == 90, "no answer was counted twice"
    assert len(await bench.lines(told["output_file_id"])) == 30


async def test_a_router_that_slept_through_its_lease_takes_no_lines_from_the_next(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against results without lines: a router that is stopped as it begins, and goes on when another one has the
    batch in work, cleared what it took for the rest of a dead one.
    """
    batch = await bench.make([line(f"c{i}", f"t{i}") for i in range(20)])
    sleeper, next_one = bench.runner(), bench.runner()
    awake, slept = asyncio.Event(), asyncio.Event()
    forget = BatchRun._forget_lines

    async def late(run: BatchRun, **how: bool) -> None:
        if run._place is sleeper._place and not awake.is_set():
            slept.set()
            await awake.wait()
        await forget(run, **how)

    monkeypatch.setattr(BatchRun, "_forget_lines", late)
    await sleeper.look()
    await slept.wait()
    bench.later_s = 60
    target = Scripted()
    target.gate.clear()
    next_one._place.targets[CHAT] = target
    await bench.until(batch["id"], lambda told: bool(target.begun), next_one)
    awake.set()
    (task,) = sleeper._tasks.values()
    await task
    target.gate.set()
    told = await bench.over(batch["id"], next_one)
    assert told["request_counts"] == {"total": 20, "completed": 20, "failed": 0}
    assert len(await bench.lines(told["output_file_id"])) == 20


async def test_a_router_that_stops_lets_go_at_once(bench: Bench) -> None:
    target = Scripted()
    target.gate.clear()
    batch = await bench.make([line("a", "t0")])
    leaving = bench.runner(**{CHAT: target})
    await bench.until(batch["id"], lambda told: bool(target.begun), leaving)
    await leaving.stop()
    target.gate.set()
    told = await bench.over(batch["id"], bench.runner(**{CHAT: target}))
    assert told["status"] == "completed"
    assert target.begun == ["t0", "t0"]


async def test_a_death_in_the_middle_of_validating_is_no_harm(bench: Bench) -> None:
    lines = [line(f"c{i}", f"t{i}") for i in range(700)]
    batch = await bench.make(lines)
    target = Scripted()
    dead = bench.runner(**{CHAT: target})
    await dead.look()
    for task in [*dead._tasks.values()]:
        await asyncio.sleep(0.02)
        task.cancel()
    await asyncio.gather(*dead._tasks.values(), return_exceptions=True)
    dead._tasks.clear()
    bench.later_s += 5
    told = await bench.over(batch["id"], bench.runner(**{CHAT: target}))
    assert told["request_counts"] == {"total": 700, "completed": 700, "failed": 0}
    assert len(await bench.lines(told["output_file_id"])) == 700


async def test_a_cancelled_batch_gives_what_it_has(bench: Bench) -> None:
    target = Scripted()
    batch = await bench.make([line(f"c{i}", f"t{i}") for i in range(50)])
    runner = bench.runner(**{CHAT: target})
    await bench.until(batch["id"], lambda told: told["request_counts"]["completed"] >= 5, runner)
    target.gate.clear()
    asked = (await bench.http.post(f"/v1/batches/{batch['id']}/cancel")).json()
    assert asked["status"] == "cancelling"
    again = await bench.http.post(f"/v1/batches/{batch['id']}/cancel")
    assert again.json()["cancelling_at"] == asked["cancelling_at"]
    told = await bench.over(batch["id"], runner)
    assert told["status"] == "cancelled"
    counts = told["request_counts"]
    assert counts["completed"] + counts["failed"] == 50
    done, rest = await bench.lines(told["output_file_id"]), await bench.lines(told["error_file_id"])
    assert len(done) == counts["completed"]
    assert len(rest) == counts["failed"]
    assert {one["error"]["code"] for one in rest} <= {"batch_cancelled"}
    assert not {one["custom_id"] for one in done} & {one["custom_id"] for one in rest}
    assert (await bench.http.post(f"/v1/batches/{batch['id']}/cancel")).json()["status"] == "cancelled"


async def test_a_batch_can_be_cancelled_before_anybody_looked_at_it(bench: Bench) -> None:
    batch = await bench.make([line("a")])
    await bench.http.post(f"/v1/batches/{batch['id']}/cancel")
    told = await bench.over(batch["id"], bench.runner())
    assert told["status"] == "cancelled"
    assert told["output_file_id"] is told["error_file_id"] is None
    assert told["request_counts"] == {"total": 0, "completed": 0, "failed": 0}


async def test_a_batch_that_is_over_cannot_be_cancelled(bench: Bench) -> None:
    batch = await bench.make([line("a")])
    await bench.over(batch["id"], bench.runner())
    reply = await bench.http.post(f"/v1/batches/{batch['id']}/cancel")
    assert reply.status_code == 409
    assert reply.json()["error"]["code"] == "batch_over"


@pytest.mark.parametrize("is_begun", [True, False])
async def test_a_window_that_is_over_ends_the_batch_with_what_is_done(bench: Bench, is_begun: bool) -> None:
    target = Scripted()
    batch = await bench.make([line(f"c{i}", f"t{i}") for i in range(50)], completion_window="2h")
    assert batch["expires_at"] == batch["created_at"] + 7200
    runner = bench.runner(**{CHAT: target})
    if is_begun:
        await bench.until(batch["id"], lambda told: told["request_counts"]["completed"] >= 5, runner)
        target.gate.clear()
    bench.later_s += 7300
    told = await bench.over(batch["id"], runner)
    assert told["status"] == "expired"
    assert told["expired_at"] is not None
    counts = told["request_counts"]
    rest = await bench.lines(told["error_file_id"])
    assert len(rest) == counts["failed"]
    if is_begun:
        assert counts["completed"] + counts["failed"] == 50
        assert {one["error"]["code"] for one in rest} == {"batch_expired"}
        assert all(one["response"] is None for one in rest)


async def test_refusals_are_told_in_the_error_file_with_the_rest_answered(bench: Bench) -> None:
    """One request of many that is too long, or that an engine cannot do, is its own affair."""
    target = Scripted()
    target.script = {"t1": [InvalidRequest("too much", "messages")], "t2": [EngineFault("a step raised")] * 9}
    target.script["t3"] = [RuntimeError("a defect")]
    batch = await bench.make([line(f"c{i}", f"t{i}") for i in range(5)])
    told = await bench.over(batch["id"], bench.runner(**{CHAT: target}))
    assert told["status"] == "completed"
    assert told["request_counts"] == {"total": 5, "completed": 2, "failed": 3}
    one, two, three = await bench.lines(told["error_file_id"])
    assert (one["custom_id"], one["response"]["status_code"]) == ("c1", 400)
    assert one["response"]["body"]["error"]["param"] == "messages"
    assert two["response"]["body"]["error"]["code"] == "engine_fault"
    assert target.begun.count("t2") == bench.door.router.settings.batches.max_attempts
    assert three["response"]["status_code"] == 500
    assert "defect" not in json.dumps(three)


async def test_lack_of_room_and_lost_engines_are_waited_for(bench: Bench) -> None:
    """A batch is no reason to give up because interactive requests fill the router for a while."""
    target = Scripted()
    target.script = {"t0": [Overloaded("full", 0.01)] * 8}
    batch = await bench.make([line(f"c{i}", f"t{i}") for i in range(4)])
    told = await bench.over(batch["id"], bench.runner(**{CHAT: target}))
    assert told["request_counts"]["completed"] == 4
    lonely = Scripted()
    lonely.placed = False
    lonely.script = {"t0": [EngineLost("no decode engine")] * 3, "t1": [DeadlineExceeded("in the line")] * 30}
    batch = await bench.make([line(f"c{i}", f"t{i}") for i in range(4)])
    told = await bench.over(batch["id"], bench.runner(**{CHAT: lonely}))
    assert told["request_counts"]["completed"] == 4


async def test_a_line_waits_for_money_as_long_as_there_may_be_some(bench: Bench) -> None:
    """One that no budget could pay for held its whole batch up until the window was over, without a word."""
    target = Scripted()
    later, never = BudgetExceeded("until tomorrow", 0.01), BudgetExceeded("no more", FOREVER_S)
    target.script = {"t0": [later], "t1": [never]}
    batch = await bench.make([line(f"c{i}", f"t{i}") for i in range(3)])
    told = await bench.over(batch["id"], bench.runner(**{CHAT: target}))
    assert told["request_counts"] == {"total": 3, "completed": 2, "failed": 1}
    (refused,) = await bench.lines(told["error_file_id"])
    assert (refused["custom_id"], refused["response"]["body"]["error"]["code"]) == ("c1", "insufficient_quota")


async def test_a_line_that_never_gets_a_token_in_its_time_is_given_up(bench: Bench) -> None:
    target = Scripted()
    target.script = {"t0": [DeadlineExceeded("the request's deadline passed")] * 100}
    batch = await bench.make([line("a", "t0")])
    told = await bench.over(batch["id"], bench.runner(**{CHAT: target}))
    (result,) = await bench.lines(told["error_file_id"])
    assert result["error"]["code"] == "request_timeout"
    assert result["response"] is None


async def test_an_answer_that_fails_its_schema_is_told_with_what_failed(bench: Bench) -> None:
    class Wrong(Scripted):
        async def answer(self, body: bytes, attempt: Attempt, tenant: str) -> JsonObject:
            return {"choices": [{"index": 0, "schema_errors": ["/year is no integer"]}], "usage": {}}

    batch = await bench.make([line("a")])
    told = await bench.over(batch["id"], bench.runner(**{CHAT: Wrong()}))
    assert told["request_counts"] == {"total": 1, "completed": 0, "failed": 1}
    (result,) = await bench.lines(told["error_file_id"])
    assert result["error"] == {"code": "schema_mismatch", "message": "the answer fails its schema: /year is no integer"}
    assert result["response"]["body"]["choices"], "the answer is there to be looked at"


async def test_a_line_in_whose_work_routers_die_is_not_begun_for_ever(bench: Bench) -> None:
    """The line may be what kills them."""
    target = Scripted()
    target.gate.clear()
    batch = await bench.make([line("a", "t0"), line("b", "t1")])
    for _ in range(20):
        mortal = bench.runner(**{CHAT: target})
        target.begun.clear()
        await bench.until(batch["id"], lambda told: len(target.begun) == 2, mortal)
        for task in [*mortal._tasks.values()]:
            task.cancel()
        await asyncio.gather(*mortal._tasks.values(), return_exceptions=True)
        mortal._tasks.clear()
        bench.later_s += 5
    told = await bench.over(batch["id"], bench.runner(**{CHAT: target}))
    assert [one["error"]["code"] for one in await bench.lines(told["error_file_id"])] == ["request_lost"] * 2


async def test_work_is_bounded_per_batch_and_in_all_and_shared_among_tenants(bench: Bench) -> None:
    settings = bench.door.router.settings.batches
    targets = Scripted()
    targets.gate.clear()
    made = [await bench.make([line(f"c{i}", f"t{n}-{i}") for i in range(40)]) for n in range(5)]
    runner = bench.runner(**{CHAT: targets})
    await bench.until(made[0]["id"], lambda told: targets.running >= settings.concurrency, runner)
    assert targets.most_running == settings.concurrency == 64
    assert sum(text.startswith("t0-") for text in targets.begun) == settings.batch_concurrency
    targets.gate.set()
    for batch in made:
        assert (await bench.over(batch["id"], runner))["request_counts"]["completed"] == 40
    assert targets.most_running == settings.concurrency


async def test_who_has_no_batch_in_work_waits_for_nobody_elses(bench: Bench) -> None:
    """Batches may last a day: sixteen of one tenant held up those of all others for so long."""
    most = bench.door.router.settings.batches.at_once
    target = Scripted()
    target.gate.clear()
    runner = bench.runner(**{CHAT: target})
    for n in range(most + 2):
        await bench.make([line(f"c{i}", f"a{n}-{i}") for i in range(40)])
    await runner.look()
    assert len(runner._runs) == most
    bench.http.headers["x-tenant"] = "b"
    mine = [await bench.make([line("c", f"b{n}")]) for n in range(2)]
    await bench.until(mine[0]["id"], lambda told: told["status"] == "in_progress", runner)
    assert len(runner._runs) == most + 1
    assert (await bench.batch(mine[1]["id"]))["status"] == "validating"
    target.gate.set()
    assert (await bench.over(mine[1]["id"], runner))["request_counts"]["completed"] == 1


@pytest.mark.parametrize("how", ["cancelled", "expired"])
async def test_a_batch_that_only_has_to_end_waits_for_none_that_work(bench: Bench, how: str) -> None:
    settings = bench.door.router.settings.batches
    target = Scripted()
    target.gate.clear()
    for n in range(settings.at_once):
        await bench.make([line(f"c{i}", f"a{n}-{i}") for i in range(40)])
    late = await bench.make([line("c")], completion_window="1h")
    runner = bench.runner(**{CHAT: target})
    await bench.until(late["id"], lambda told: len(runner._runs) == settings.at_once, runner)
    if how == "cancelled":
        assert (await bench.http.post(f"/v1/batches/{late['id']}/cancel")).json()["status"] == "cancelling"
    else:
        bench.later_s += 3700
    assert (await bench.over(late["id"], runner))["status"] == how
    assert len(runner._runs) >= settings.at_once


async def test_results_are_written_in_pieces_of_bounded_size(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hundred answers with logprobs are a gigabyte."""
    sizes: list[int] = []
    write = results._write

    def noting(contents: Contents, drafts: Any, batch_id: str, rows: list[tuple[int, str, str, bytes]]) -> None:
        sizes.append(len(rows))
        write(contents, drafts, batch_id, rows)

    monkeypatch.setattr(results, "_write", noting)
    monkeypatch.setattr(results, "PIECE_BYTES", 500)
    told = await bench.over((await bench.make([line(f"c{i}", "x" * 150) for i in range(20)]))["id"], bench.runner())
    assert told["error_file_id"] is None, await bench.lines(told["error_file_id"])
    assert [one["custom_id"] for one in await bench.lines(told["output_file_id"])] == [f"c{i}" for i in range(20)]
    assert sum(sizes) == 20
    assert max(sizes) <= 3


async def test_the_input_may_be_deleted_while_it_is_read(bench: Bench) -> None:
    target = Scripted()
    batch = await bench.make([line(f"c{i}", f"t{i}") for i in range(50)])
    assert (await bench.http.delete(f"/v1/files/{batch['input_file_id']}")).json()["deleted"]
    assert (await bench.http.get(f"/v1/files/{batch['input_file_id']}")).status_code == 404
    told = await bench.over(batch["id"], bench.runner(**{CHAT: target}))
    assert told["request_counts"]["completed"] == 50


@pytest.mark.parametrize("damage", ["gone", "altered"])
async def test_contents_that_were_lost_on_the_disk_fail_the_batch(bench: Bench, damage: str) -> None:
    batch = await bench.make([line("a")])
    (content,) = (bench.door.store.folder / "files").iterdir()
    if damage == "gone":
        content.unlink()
    else:
        content.write_bytes(content.read_bytes().replace(b"hello", b"jello"))
    told = await bench.over(batch["id"], bench.runner())
    assert told["status"] == "failed"
    assert [error["code"] for error in told["errors"]["data"]] == ["input_lost"]


WRONG: list[tuple[bytes, str, str | None, int | None]] = [
    (b"", "empty_file", None, None),
    (b"\n \n", "empty_file", None, None),
    (b"not json", "invalid_json_line", None, 1),
    (b"[]", "invalid_json_line", None, 1),
    (json.dumps({**line("a"), "method": "GET"}).encode(), "invalid_method", "method", 1),
    (json.dumps({**line("a"), "url": "/v1/completions"}).encode(), "invalid_url", "url", 1),
    (json.dumps({**line("a"), "custom_id": ""}).encode(), "invalid_custom_id", "custom_id", 1),
    (json.dumps({**line("a"), "custom_id": 5}).encode(), "invalid_custom_id", "custom_id", 1),
    (json.dumps({**line("a"), "more": 1}).encode(), "unknown_parameter", "more", 1),
    (json.dumps({**line("a"), "body": []}).encode(), "invalid_body", "body", 1),
    (json.dumps({"custom_id": "a"}).encode(), "missing_required_parameter", "method", 1),
    (json.dumps(line("a", max_tokens=-1)).encode(), "invalid_request", "body.max_tokens", 1),
    (json.dumps(line("a", stream=True)).encode(), "invalid_request", "body.stream", 1),
    (json.dumps(line("a", model="other")).encode(), "model_not_found", "body.model", 1),
    (b"\n".join([json.dumps(line("a")).encode()] * 2), "duplicate_custom_id", "custom_id", 2),
    (b'{"custom_id": "' + b"x" * (1 << 20) + b'"}', "line_too_long", None, 1),
]


@pytest.mark.parametrize(("data", "code", "param", "number"), WRONG, ids=range(len(WRONG)))
async def test_a_wrong_input_fails_the_batch_and_says_where(
    bench: Bench, data: bytes, code: str, param: str | None, number: int | None
) -> None:
    batch = await bench.make(data)
    told = await bench.over(batch["id"], bench.runner())
    assert told["status"] == "failed"
    (error,) = told["errors"]["data"]
    assert (error["code"], error["param"], error["line"]) == (code, param, number), error
    assert error["message"]
    assert told["request_counts"]["total"] == 0


async def test_lines_behind_a_wrong_one_are_looked_at_too_up_to_a_limit(bench: Bench) -> None:
    lines: list[Any] = [line("a"), {}, line("b"), 5, line("c")]
    told = await bench.over((await bench.make(lines))["id"], bench.runner())
    assert [error["line"] for error in told["errors"]["data"]] == [2, 4]
    told = await bench.over((await bench.make([{}] * 500))["id"], bench.runner())
    assert len(told["errors"]["data"]) == bench.door.router.settings.batches.max_errors


async def test_a_file_of_blank_lines_is_not_read_to_its_end(bench: Bench) -> None:
    """200 MiB of them cost a minute of the interpreter, again and again."""
    most = bench.door.router.settings.batches.max_lines
    told = await bench.over((await bench.make(b"\n" * (3 * most)))["id"], bench.runner())
    (error,) = told["errors"]["data"]
    assert (error["code"], error["line"]) == ("too_many_requests", 2 * most + 3)


async def test_blank_lines_a_byte_order_mark_and_windows_line_ends_are_no_mistake(bench: Bench) -> None:
    rows = [json.dumps(line(f"c{i}", f"t{i}")).encode() for i in range(3)]
    data = b"\xef\xbb\xbf" + b"\r\n\r\n".join(rows) + b"\r\n"
    told = await bench.over((await bench.make(data))["id"], bench.runner())
    assert told["request_counts"] == {"total": 3, "completed": 3, "failed": 0}


def watched(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> list[GenerateCall]:
    """The calls of the router from now on."""
    router, seen = bench.door.router, list[GenerateCall]()
    generate = router.generate

    def noting(call: GenerateCall) -> AsyncGenerator[TokenDelta, bool | None]:
        seen.append(call)
        return generate(call)

    monkeypatch.setattr(router, "generate", noting)
    return seen


async def test_lines_go_behind_whoever_waits_at_a_connection(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of thousands must not stand before one chat."""
    seen = watched(bench, monkeypatch)
    batch = await bench.make([line("a"), line("b", priority=3), line("c", priority=-5)])
    told = await bench.over(batch["id"], bench.runner())
    assert told["request_counts"]["completed"] == 3
    assert sorted(call.priority for call in seen) == [100, 100, 103]
    assert (await bench.http.get("/v1/requests")).json()["data"] == [], "they would push out what somebody waits for"


async def test_lines_are_their_tenants(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watched(bench, monkeypatch)
    bench.http.headers["x-tenant"] = "b"
    await bench.over((await bench.make([line("a")]))["id"], bench.runner())
    assert [(call.tenant, call.salt) for call in seen] == [("b", b"b")]


async def test_a_store_that_cannot_be_reached_for_a_while_loses_no_answer(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, target, refused = bench.door.store, Scripted(), list[int]()
    batch = await bench.make([line(f"c{i}", f"t{i}") for i in range(40)])
    runner = bench.runner(**{CHAT: target})
    target.gate.clear()
    await bench.until(batch["id"], lambda told: len(target.begun) == 16, runner)
    write = store.write

    async def failing(job: Any) -> Any:
        if len(refused) < 40:
            refused.append(1)
            raise StoreUnavailable("the database is away", 0.01)
        return await write(job)

    monkeypatch.setattr(store, "write", failing)
    target.gate.set()
    await bench.until(batch["id"], lambda told: len(refused) == 40)
    told = await bench.over(batch["id"], runner)
    assert told["request_counts"] == {"total": 40, "completed": 40, "failed": 0}
    assert len(target.begun) == len(set(target.begun)) == 40, "nothing is computed twice for that"


async def test_results_wait_for_room_on_the_disk(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(contents: Contents) -> None:
        raise StorageFull("full", 60.0)

    batch = await bench.make([line("a"), line("b")])
    runner = bench.runner(**{CHAT: Scripted()})
    with monkeypatch.context() as patch:
        patch.setattr(Contents, "check_room", full)
        await bench.until(batch["id"], lambda told: told["status"] == "finalizing" and not runner._runs, runner)
    assert len(list((bench.door.store.folder / "files").iterdir())) == 1, "the input alone"
    await runner.look()
    assert not runner._runs, "it is not tried again and again"
    bench.later_s += 61
    told = await bench.over(batch["id"], runner)
    assert told["request_counts"]["completed"] == 2
