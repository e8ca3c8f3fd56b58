"""Forks of one reply. Guards against: requests one after another, a beginning that differs (its KV would be computed
again), answers that are all the same for one seed, and requests left running when one of them fails.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from diptych.agents import llm
from diptych.agents.llm.machine import Awaited, Machine, adrive, take
from diptych.agents.llm.testing import Said, ScriptedModel, failure, registry_of
from diptych.agents.llm.together import Done, Running, each, together


def first(model: ScriptedModel, **given: Any) -> llm.Reply[str]:
    @llm.call("test/m", registry=registry_of(test=model))
    def ask(topic: str) -> str:
        return f"Write about {topic}"

    return ask.with_(**given)("rain")


def test_a_reply_goes_on_several_ways_from_one_beginning() -> None:
    model = ScriptedModel(["a poem", "one", "two", "three"])
    reply = first(model, session="s", seed=7, temperature=1.0)
    found = reply.fork(3, "another line")
    assert sorted(one.value for one in found) == ["one", "three", "two"]
    assert len({str(body["messages"]) for body in model.requests[1:]}) == 1
    assert model.requests[1]["messages"][:2] == [
        {"role": "user", "content": "Write about rain"},
        {"role": "assistant", "content": "a poem"},
    ]
    assert [body["seed"] for body in model.requests] == [7, 7, 8, 9]
    assert [one.draft.params["seed"] for one in found] == [7, 8, 9]
    assert {headers["x-session-id"] for headers in model.headers} == {"s"}
    assert found[0].messages[:2] == reply.messages


def test_without_a_content_the_turn_itself_is_answered_anew() -> None:
    model = ScriptedModel(["a", "b", "c"])
    reply = first(model)
    found = reply.fork(2, temperature=1.5)
    assert [body["messages"] for body in model.requests] == [[{"role": "user", "content": "Write about rain"}]] * 3
    assert [body.get("temperature") for body in model.requests] == [None, 1.5, 1.5]
    assert all("seed" not in body for body in model.requests)
    sessions = [headers.get("x-session-id") for headers in model.headers]
    assert sessions[1] == sessions[2] is not None
    assert {one.value for one in found} == {"b", "c"}


async def test_all_of_them_are_on_their_way_at_once() -> None:
    both = asyncio.Barrier(4)

    class Meets(ScriptedModel):
        async def whole(self, *args: Any) -> Any:
            answer = await super().whole(*args)
            if len(self.requests) > 1:
                await both.wait()
            return answer

    model = Meets(["x"], then="y")
    reply = await asyncio.to_thread(first, model)
    assert [one.value for one in await reply.fork.aio(4, "go on")] == ["y"] * 4


async def test_one_that_fails_ends_the_others() -> None:
    ended: list[str] = []

    class Hangs(ScriptedModel):
        async def whole(self, *args: Any) -> Any:
            answer = await super().whole(*args)
            if answer.message.content == "hang":
                try:
                    await asyncio.Event().wait()
                finally:
                    ended.append("ended")
            return answer

    model = Hangs(["x", "hang", "hang", failure("bad_request")])
    reply = await asyncio.to_thread(first, model)
    with pytest.raises(llm.ProviderError):
        await reply.fork.aio(3, "go on")
    assert ended == ["ended", "ended"]
    assert [one for one in asyncio.all_tasks() if one is not asyncio.current_task()] == []


async def test_each_has_attempts_of_its_own() -> None:
    model = ScriptedModel(["x", failure("server"), "one", "two"])
    reply = await asyncio.to_thread(first, model, retries=llm.Retries(base_s=0))
    found = await reply.fork.aio(2, "go on")
    assert sorted(len(one.attempts) for one in found) == [1, 2]


@pytest.mark.parametrize("count", [0, -1, True, 1.5, "2"])
def test_counts_that_are_none(count: Any) -> None:
    model = ScriptedModel(["x"])
    with pytest.raises(llm.UsageError, match="how many answers"):
        first(model).fork(count)
    assert len(model.requests) == 1


def test_tools_must_be_answered_before_it_goes_on() -> None:
    model = ScriptedModel([Said(calls=(("look", {}),)), "a", "b"])

    def look() -> str:
        return "seen"

    @llm.call("test/m", registry=registry_of(test=model), tools=[look])
    def ask() -> str:
        return "?"

    reply = ask()
    with pytest.raises(llm.UsageError, match="the model calls look"):
        reply.fork(2, "go on")
    assert {one.value for one in reply.fork(2, reply.run_tools())} == {"a", "b"}


async def _told(log: list[str], word: str) -> str:
    await asyncio.sleep(0)
    log.append(word)
    return word


def _machine(log: list[str], *words: str) -> Machine[str]:
    found = ""
    for word in words:
        found += yield from take(Awaited(_told(log, word)))
    return found


async def test_machines_side_by_side_at_most_so_many() -> None:
    log: list[str] = []
    assert await adrive(together([_machine(log, "a", "b"), _machine(log, "c"), _machine(log)])) == ["ab", "c", ""]
    assert log.index("c") < log.index("b")
    log.clear()
    assert await adrive(together([_machine(log, "a", "b"), _machine(log, "c")], most=1)) == ["ab", "c"]
    assert log == ["a", "b", "c"]


async def test_leaving_them_ends_what_they_wait_for() -> None:
    ended: list[str] = []

    async def hang() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("ended")

    def waits() -> Machine[None]:
        yield from take(Awaited(hang()))

    def ends() -> Machine[str]:
        yield from ()
        return "now"

    running = Running()
    machines: list[Machine[Any]] = [waits(), _machine([], "x"), ends()]
    flow = each(machines, running)
    item: Any = next(flow)
    assert item == Done(2, "now")
    item = flow.send(None)
    item = flow.send(await item.perform())
    while not isinstance(item, Done):
        item = flow.send(await item.perform())
    assert item == Done(1, "x")
    flow.close()
    await running.close()
    assert ended == ["ended"]
