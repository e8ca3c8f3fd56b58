"""`llm.batch` over a front door of ours, with its files, its store and its runner; and over Anthropic's batches.

Guards against results under the wrong item, a failed line that hides the good ones, a batch that is paid for twice
because its program was killed, answers that are read by another schema than they were asked for by, and jobs that no
other process can go on with.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from diptych.agents import llm
from diptych.agents.llm import batch_places
from diptych.agents.llm.testing import ScriptedModel, failure, tool_call
from diptych.agents.llm.testing import registry_of as registry_with
from diptych.cluster.batches.testing import Bench, batch_bench


class Book(BaseModel):
    title: str
    pages: int = 1


@llm.call("pool/echo", max_tokens=6)
def repeat(text: str, mark: str = "!") -> str:
    return f"{text}{mark}"


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with batch_bench() as made:
        yield made


def registry_of(bench: Bench) -> llm.Registry:
    return llm.Registry(clusters={"pool": llm.Cluster(url=bench.door.listener.url)}, environ={})


async def test_a_batch_of_an_own_cluster_from_items_to_typed_results(bench: Bench) -> None:
    runner = bench.runner()
    await runner.start()
    call = repeat.with_(registry=registry_of(bench))
    seen: list[llm.BatchStatus] = []
    items: dict[str, Any] = {"one": ("abc",), "two": {"text": "abc", "mark": "?"}, "three": "xyz"}
    async with asyncio.timeout(60):
        results = await llm.batch.aio(call, items, poll_s=0.05, on_progress=seen.append)
    assert [result.id for result in results] == ["one", "two", "three"]
    assert not results.failed
    assert results.by_id("one").value == results[0].value == results.values["one"]
    alone = await asyncio.gather(*(call.aio(*arguments) for arguments in (("abc",), ("abc", "?"), ("xyz",))))
    assert [result.value for result in results] == [reply.value for reply in alone]
    reply = results[1].reply
    assert reply is not None
    assert [message.content for message in reply.messages] == ["abc?", reply.text]
    assert (reply.usage, reply.finish) == (alone[1].usage, alone[1].finish)
    assert (reply.attempts[0].number, len(reply.attempts)) == (1, 1)
    assert results.spent.requests == 3
    assert (seen[-1].state, seen[-1].done, seen[-1].total) == ("completed", 3, 3)
    assert results.status.is_over


async def test_a_job_goes_on_in_another_process(bench: Bench) -> None:
    call = repeat.with_(registry=registry_of(bench))
    job = await llm.batch_begin.aio(call, ["abc", "xyz"])
    status = await job.status.aio()
    assert not status.is_over
    with pytest.raises(llm.UsageError, match=r"job\.wait\(\) first"):
        await job.results.aio()
    told = job.to_json()
    assert json.loads(told)["id"] == job.id == status.id
    await bench.runner().start()
    again = llm.batch_resume(told, call)
    async with asyncio.timeout(60):
        await again.wait.aio(poll_s=0.05)
    ours, theirs = await job.results.aio(), await again.results.aio()
    assert [result.value for result in ours] == [result.value for result in theirs]
    assert [result.id for result in theirs] == ["item-0000", "item-0001"]
    assert theirs[0].reply is not None
    assert [message.role for message in theirs[0].reply.messages] == ["assistant"]
    for wrong in ("{}", "no", json.dumps({**json.loads(told), "version": 9})):
        with pytest.raises(llm.UsageError):
            llm.batch_resume(wrong, call)
    with pytest.raises(llm.UsageError, match="the job is of repeat"):
        llm.batch_resume(told, shelve)


async def test_a_reference_is_enough_to_go_on(bench: Bench) -> None:
    """Of a machine that knows neither the items nor the job's text: order and ids are the place's."""
    call = repeat.with_(registry=registry_of(bench))
    job = await llm.batch_begin.aio(call, {"z": "abc", "a": "xyz"})
    assert job.reference == f"pool/echo@{job.id}"
    await bench.runner().start()
    again = llm.batch_resume(job.reference, call)
    async with asyncio.timeout(60):
        assert (await again.wait.aio(poll_s=0.05)).call == "repeat"
    ours, theirs = await job.results.aio(), await again.results.aio()
    assert [(one.id, one.value) for one in ours] == [(one.id, one.value) for one in theirs]
    with llm.using(registry=registry_of(bench)):
        texts = await llm.batch_resume(job.reference).results.aio()
        assert texts.values == ours.values
        assert (await llm.batch_resume(f"pool/@{job.id}", call).results.aio()).values == ours.values
    with pytest.raises(llm.UsageError, match=r"is of repeat, not of shelve"):
        await llm.batch_resume(job.reference, shelve.with_(registry=registry_of(bench))).results.aio()
    await bench.http.delete(f"/v1/files/{ours.status.raw['input_file_id']}")
    assert (await again.results.aio()).values == ours.values
    for wrong in ("pool@b", "pool/m", "pool/m@", "/m@b", ""):
        with pytest.raises(llm.UsageError, match="PREFIX/MODEL@ID"):
            llm.batch_resume(wrong, call)


async def test_batches_of_a_place_are_listed_over_its_pages(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_places, "_MOST_LISTED", 2)
    registry = registry_of(bench)
    call = repeat.with_(registry=registry)
    jobs = [await llm.batch_begin.aio(call, ["abc"], model=f"pool/m{at}") for at in range(5)]
    listed = await llm.batch_list.aio(registry=registry)
    assert set(listed) == {job.reference for job in jobs}
    assert {(one.call, one.state) for one in listed.values()} == {("repeat", "working")}
    assert all(one.created_at > 1.7e9 for one in listed.values())
    assert list(await llm.batch_list.aio("pool", limit=3, registry=registry)) == list(listed)[:3]
    with pytest.raises(llm.UsageError, match="limit is a number of batches above 0"):
        llm.batch_list(limit=0)


async def test_anthropics_batches_are_listed_over_their_pages_and_found_by_reference() -> None:
    place = Anthropic({"b": message('{"title": "Emma"}'), "a": message('{"title": "Faust"}')}, num_asked=9)

    def answer(method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, bytes]:
        listing, _, query = path.partition("?")
        if not listing.endswith("/messages/batches"):
            return place.answer(method, path, headers, body)
        assert headers["anthropic-version"]
        ids = ["msgbatch_2"] if "after_id=msgbatch_3" in query else ["msgbatch_4", "msgbatch_3"]
        told = [{"id": name, "processing_status": "ended", "created_at": "2026-01-02T03:04:05Z"} for name in ids]
        return 200, json.dumps({"data": told, "has_more": len(told) == 2}).encode()

    async with served(answer) as url, asyncio.timeout(60):
        listed = await llm.batch_list.aio("claude", registry=claude_at(url))
        assert list(listed) == ["claude/@msgbatch_4", "claude/@msgbatch_3", "claude/@msgbatch_2"]
        assert listed["claude/@msgbatch_4"].created_at == 1767323045
        results = await llm.batch_resume("claude/@msgbatch_4", shelve.with_(registry=claude_at(url))).results.aio()
        assert results.values == {"a": Book(title="Faust"), "b": Book(title="Emma")}


async def test_a_program_that_is_run_again_pays_once(bench: Bench, tmp_path: Path) -> None:
    call, file = repeat.with_(registry=registry_of(bench)), tmp_path / "batch.json"
    job = asyncio.create_task(llm.batch.aio(call, ["abc"], poll_s=0.05, state_file=file))
    async with asyncio.timeout(60):
        while not file.exists():  # noqa: ASYNC110  it is another's file
            await asyncio.sleep(0)
        job.cancel()
        await asyncio.gather(job, return_exceptions=True)
        await bench.runner().start()
        first = await llm.batch.aio(call, ["abc"], poll_s=0.05, state_file=file)
        second = await llm.batch.aio(call, ["abc"], poll_s=0.05, state_file=file)
    assert first[0].value == second[0].value
    assert first[0].reply is not None
    assert first[0].reply.messages[0].content == "abc!"
    listed = (await bench.http.get("/v1/batches")).json()["data"]
    assert [one["id"] for one in listed] == [json.loads(file.read_text())["id"]]
    with pytest.raises(llm.UsageError, match="has other requests"):
        await llm.batch.aio(call, ["another"], state_file=file)


async def test_a_cancelled_batch_tells_what_was_answered_and_names_the_rest(bench: Bench) -> None:
    call = repeat.with_(registry=registry_of(bench))
    job = await llm.batch_begin.aio(call, ["abc", "xyz"])
    assert (await job.cancel.aio()).state in ("cancelling", "cancelled")
    await bench.runner().start()
    async with asyncio.timeout(60):
        assert (await job.wait.aio(poll_s=0.05)).state == "cancelled"
    results = await job.results.aio()
    assert len(results.failed) == 2
    error = results[0].error
    assert isinstance(error, llm.ProviderError)
    assert error.failure.kind == "cancelled"
    with pytest.raises(llm.ProviderError):
        results[0].value  # noqa: B018


async def test_a_batch_that_is_refused_as_a_whole_says_why(bench: Bench) -> None:
    @llm.call("pool/nobody", registry=registry_of(bench))
    def ask(text: str) -> str:
        return text

    job = await llm.batch_begin.aio(ask, ["abc"])
    await bench.runner().start()
    async with asyncio.timeout(60):
        await job.wait.aio(poll_s=0.05)
    with pytest.raises(llm.ProviderError, match="nobody"):
        (await job.results.aio())[0].value  # noqa: B018


def test_synchronous_code_has_the_same(tmp_path: Path) -> None:
    with pytest.raises(llm.UsageError, match=r"decorated with @llm\.call"):
        llm.batch(print, ["a"])  # type: ignore[arg-type]
    with pytest.raises(llm.UsageError, match="there are no items"):
        llm.batch(repeat, [])
    with pytest.raises(llm.UsageError, match="'item-0000' does not fit"):
        llm.batch(repeat, [("a", "b", "c")])
    with pytest.raises(llm.UsageError, match="items is a list"):
        llm.batch(repeat, "abc")


@llm.call("claude/claude-sonnet-4-6", output=Book, max_tokens=100)
def shelve(text: str) -> str:
    return f"Which book? {text}"


Handler = Callable[[str, str, dict[str, str], bytes], tuple[int, bytes]]


@dataclass
class Anthropic:
    """Its message batches: `results` by custom_id, told once the batch was asked about twice."""

    results: dict[str, dict[str, Any]]
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    num_asked: int = 0
    is_cancelled: bool = False
    failures: list[int] = field(default_factory=list)  # statuses of the next answers

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, bytes]:
        self.headers = headers
        if self.failures:
            return self.failures.pop(0), b'{"type": "error", "error": {"type": "api_error", "message": "down"}}'
        if path.endswith("/results"):
            lines = [{"custom_id": name, "result": result} for name, result in self.results.items()]
            return 200, b"\n".join(json.dumps(line, ensure_ascii=False).encode() for line in lines)
        if method == "POST" and path.endswith("/cancel"):
            self.is_cancelled = True
        elif method == "POST":
            self.requests = json.loads(body)["requests"]
        self.num_asked += 1
        is_over = self.num_asked > 2
        kinds = [result["type"] for result in self.results.values()]
        counts = {kind: kinds.count(kind) if is_over else 0 for kind in ("succeeded", "errored", "canceled", "expired")}
        told = {
            "id": "msgbatch_1",
            "processing_status": "ended" if is_over else "in_progress",
            "request_counts": {**counts, "processing": 0 if is_over else len(kinds)},
            "cancel_initiated_at": "2026-01-01T00:00:00Z" if self.is_cancelled else None,
        }
        return 200, json.dumps(told).encode()


@asynccontextmanager
async def served(handler: Handler) -> AsyncIterator[str]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                first, *lines = head.decode().split("\r\n")[:-2]
                headers = {name.lower(): text.strip() for name, _, text in (line.partition(":") for line in lines)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                method, path, _ = first.split()
                status, content = handler(method, path, headers, body)
                told = (
                    f"HTTP/1.1 {status} -\r\ncontent-length: {len(content)}\r\ncontent-type: application/json\r\n\r\n"
                )
                writer.write(told.encode() + content)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"


def message(text: str, stop: str = "end_turn") -> dict[str, Any]:
    content = [{"type": "text", "text": text}]
    usage = {"input_tokens": 3, "output_tokens": 2}
    told = {"id": "msg_1", "type": "message", "role": "assistant", "model": "m", "content": content, "usage": usage}
    return {"type": "succeeded", "message": {**told, "stop_reason": stop, "stop_sequence": None}}


def claude_at(url: str) -> llm.Registry:
    settings = {"base_url": url, "codec": "anthropic.messages", "api_key": "env:KEY"}
    return llm.Registry(providers={"claude": settings}, environ={"KEY": "sk-ant-secret-0123456789"})


async def test_anthropics_batches_with_every_way_that_a_request_can_end() -> None:
    error = {"type": "error", "error": {"type": "invalid_request_error", "message": "max_tokens: too many"}}
    place = Anthropic(
        {
            "expired": {"type": "expired"},
            "wrong": message('{"title": "Emma", "pages": "many"}'),
            "cut": message('{"title": "Em', "max_tokens"),
            "good": message('{"title": "Emma\u2028", "pages": 3}'),
            "errored": {"type": "errored", "error": error},
        }
    )
    async with served(place.answer) as url, asyncio.timeout(60):
        names = ["good", "wrong", "cut", "errored", "expired", "lost"]
        items = {name: (f"about {name}",) for name in names}
        job = await llm.batch_begin.aio(shelve.with_(registry=claude_at(url)), items)
        place.failures = [503, 529]
        status = await job.wait.aio(poll_s=0.01)
        results = await job.results.aio()
        assert [request["custom_id"] for request in place.requests] == names
        assert place.headers["x-api-key"].startswith("sk-ant")
        assert place.headers["anthropic-version"]
        first = place.requests[0]["params"]
        assert first["output_config"]["format"]["schema"]["properties"].keys() == {"title", "pages"}
        assert "about good" in json.dumps(first["messages"])
        assert (status.state, status.completed, status.failed) == ("expired", 3, 2)
        assert results.by_id("good").value == Book(title="Emma\u2028", pages=3)
        kinds = {result.id: type(result.error) for result in results.failed}
        assert kinds == {
            "wrong": llm.InvalidOutput,
            "cut": llm.Truncated,
            "errored": llm.ProviderError,
            "expired": llm.ProviderError,
            "lost": llm.ProviderError,
        }
        wrong = results.by_id("wrong").error
        assert isinstance(wrong, llm.InvalidOutput)
        assert wrong.report.paths == ("/pages",)
        assert wrong.attempts[0].answer is not None
        assert "too many" in str(results.by_id("errored").error)
        assert "no line" in str(results.by_id("lost").error)
        assert len(results) == 6
        place.failures = [401]
        with pytest.raises(llm.ProviderError) as failed:
            await job.wait.aio(poll_s=0.01)
        assert failed.value.failure.kind == "auth"
        assert "is not lost" in failed.value.__notes__[0]
        with pytest.raises(llm.UsageError, match="letters, digits"):
            await llm.batch_begin.aio(shelve.with_(registry=claude_at(url)), {"a b": ("x",)})
        with pytest.raises(llm.UsageError, match="24h"):
            await llm.batch_begin.aio(shelve.with_(registry=claude_at(url)), ["x"], window="2h")


def test_code_with_batches_is_tested_with_a_scripted_model() -> None:
    model = ScriptedModel([{"title": "Emma", "pages": 3}, failure("rate_limited"), {"title": 1}])
    call = shelve.with_("test/any", registry=registry_with(test=model))
    seen: list[str] = []
    results = llm.batch(call, ["a", "b", "c"], poll_s=0.01, on_progress=lambda status: seen.append(status.state))
    assert seen == ["working", "completed"]
    assert results.values == {"item-0000": Book(title="Emma", pages=3)}
    assert [type(one.error) for one in results.failed] == [llm.ProviderError, llm.InvalidOutput]
    assert [body["messages"][0]["content"] for body in model.requests] == [f"Which book? {name}" for name in "abc"]
    assert repr(results) == "BatchResults(1 good, 2 failed, completed)"
    job = llm.batch_begin(call.with_(registry=registry_with(test=ScriptedModel(["x"]))), ["a"])
    assert job.cancel().state == "cancelled"
    assert job.results()[0].error is not None


async def test_where_there_are_no_batches_nothing_is_sent() -> None:
    registry = llm.Registry(environ={"GOOGLE_API_KEY": "k", "GEMINI_API_KEY": "k"})
    with pytest.raises(llm.Unsupported, match="no batches there"):
        await llm.batch.aio(repeat.with_("google/gemini-3-flash", registry=registry), ["a"])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"state_file": "no/such/folder/job.json"}, "cannot be written to .No such file"),
        ({"poll_s": "1"}, "poll_s is a number of seconds above 0"),
        ({"poll_s": 0}, "poll_s is a number of seconds above 0"),
        ({"on_progress": 3}, "on_progress is a function"),
        ({"items": {1: "a", "1": "b"}}, "two items have the id '1'"),
    ],
)
def test_what_would_lose_a_batch_is_told_before_it_is_paid_for(given: dict[str, Any], words: str) -> None:
    model = ScriptedModel([{"title": "Emma"}])
    call = shelve.with_("test/any", registry=registry_with(test=model))
    with pytest.raises(llm.UsageError, match=words):
        llm.batch(call, given.pop("items", ["a"]), **given)
    assert not model.requests


def test_two_programs_that_begin_at_once_pay_once_and_a_job_that_cannot_be_kept_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "job.json"
    second: list[BaseException] = []

    class Slow(ScriptedModel):
        async def whole(self, *given: Any) -> Any:
            if not second:
                second.append(RuntimeError("nobody"))
                try:
                    await llm.batch_begin.aio(call, ["a"], state_file=file)
                except llm.UsageError as exc:
                    second[0] = exc
            return await super().whole(*given)

    model = Slow(["x", "y", "z"])
    call = repeat.with_("test/any", registry=registry_with(test=model))
    job = llm.batch_begin(call, ["a"], state_file=file)
    assert "another program begins the batch right now" in str(second[0])
    assert [one.name for one in tmp_path.iterdir()] == ["job.json"]
    assert llm.batch_begin(call, ["a"], state_file=file).id == job.id
    assert model.left == 2

    def full(*given: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space") as raised:
        llm.batch_begin(call, ["b"], state_file=tmp_path / "other.json")
    assert raised.value.__notes__ == ["the batch is not lost: test/any@batch_2"]
    assert [one.name for one in tmp_path.iterdir()] == ["job.json"]


def test_an_item_that_calls_tools_does_not_hide_the_values_of_others() -> None:
    model = ScriptedModel([tool_call("look"), {"title": "Emma"}])
    call = shelve.with_("test/any", registry=registry_with(test=model))
    results = llm.batch(call, {"a": "x", "b": "y"}, poll_s=0.01)
    assert results.values == {"b": Book(title="Emma")}
    assert results.by_id("a").reply is not None
    assert [one.id for one in results.good] == ["a", "b"]


def test_a_state_file_that_is_something_else_is_named(tmp_path: Path) -> None:
    file = tmp_path / "job.json"
    file.write_bytes(b"\xff")
    call = shelve.with_("test/any", registry=registry_with(test=ScriptedModel([])))
    with pytest.raises(llm.UsageError, match=r"job\.json"):
        llm.batch(call, ["a"], state_file=file)
