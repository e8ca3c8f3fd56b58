"""Several agents, and people. Guards against: a delegated agent whose tokens, approvals or progress are lost, agents
that call one another without end, a hand-off that leaves calls unanswered, and approvals that reach another call.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from pydantic import BaseModel

from diptych.agents import llm
from diptych.agents.llm.background import background
from diptych.agents.llm.testing import Said, ScriptedModel, failure, registry_of, tool_call


def calls(*pairs: tuple[str, dict[str, Any]]) -> Said:
    return Said(calls=pairs)


def told(model: ScriptedModel, request: int = -1) -> list[str]:
    """Results that a request brings back."""
    return [str(turn["content"]) for turn in model.requests[request]["messages"] if turn["role"] == "tool"]


class Question(BaseModel):
    city: str
    days: int = 1


def test_an_agent_as_a_tool_spends_for_the_one_above() -> None:
    inner = ScriptedModel([tool_call("look", city="Paris"), "sunny"])
    outer = ScriptedModel([tool_call("weather", city="Paris", days=2), "take a hat"])
    registry = registry_of(inner=inner, outer=outer)
    seen: list[tuple[str, Any]] = []

    def look(city: str, ctx: llm.Context[str]) -> str:
        seen.append((city, ctx.deps))
        return "20 degrees"

    weather = llm.Agent("inner/m", name="weather", instructions="Tell.", tools=[look], registry=registry)
    guide = llm.Agent(
        "outer/m", name="guide", tools=[weather.as_tool(input=Question, deps=str.upper)], registry=registry
    )
    run = guide.run("hat?", deps="key")
    assert run.value == "take a hat"
    assert seen == [("Paris", "KEY")]
    assert run.spent.requests == 4
    assert (run.state.turns, run.state.tool_calls) == (2, 1)
    assert told(outer) == ["sunny"]
    assert inner.requests[0]["messages"][1]["content"] == '{"city":"Paris","days":2}'
    schema = outer.requests[0]["tools"][0]["function"]["parameters"]
    assert schema["required"] == ["city"]
    sessions = {headers["x-session-id"] for model in (inner, outer) for headers in model.headers}
    assert sessions == {run.state.session}


def test_arguments_that_an_agent_cannot_take_are_told() -> None:
    outer = ScriptedModel([calls(("inner", {"days": "x"}), ("plain", {"request": " "})), "ok"])
    registry = registry_of(inner=ScriptedModel([]), outer=outer)
    inner = llm.Agent("inner/m", name="inner", registry=registry)
    plain = llm.Agent("inner/m", name="plain", registry=registry)
    tools = [inner.as_tool(input=Question), plain.as_tool()]
    assert llm.Agent("outer/m", name="o", tools=tools, registry=registry).run("?").value == "ok"
    first, second = told(outer)
    assert "/city" in first
    assert '{"request": "..."}' in second


def test_what_ends_a_delegated_run_is_told_to_the_model_above() -> None:
    inner = ScriptedModel([tool_call("again"), tool_call("again"), failure("bad_request")])
    outer = ScriptedModel([tool_call("helper", request="x"), tool_call("helper", request="y"), "alone then"])
    registry = registry_of(inner=inner, outer=outer)

    def again() -> str:
        return "more"

    helper = llm.Agent("inner/m", name="helper", tools=[again], limits=llm.Limits(turns=2), registry=registry)
    run = llm.Agent("outer/m", name="boss", tools=[helper.as_tool()], registry=registry).run("?")
    assert run.value == "alone then"
    first, second = told(outer)
    assert "helper gave no answer" in first
    assert "its limit of turns is reached" in first
    assert "scripted" in second
    assert run.spent.requests == 6


def test_the_limits_above_hold_below() -> None:
    inner = ScriptedModel([], then=tool_call("again"))
    outer = ScriptedModel([tool_call("helper", request="x")])
    registry = registry_of(inner=inner, outer=outer)

    def again() -> str:
        return "more"

    helper = llm.Agent("inner/m", name="helper", tools=[again], limits=llm.Limits(turns=None), registry=registry)
    boss = llm.Agent("outer/m", name="boss", tools=[helper.as_tool()], limits=llm.Limits(tokens=100), registry=registry)
    with pytest.raises(llm.BudgetExceeded) as caught:
        boss.run("?")
    assert caught.value.limit == "tokens"
    assert len(inner.requests) < 10
    assert caught.value.state is not None
    assert caught.value.state.agent == "boss"


@pytest.mark.parametrize("is_plain", [False, True])
def test_agents_that_call_one_another_come_to_an_end(is_plain: bool) -> None:
    model = ScriptedModel([], then=lambda body: _down(body))
    registry = registry_of(test=model)
    tools: list[llm.Tool] = []

    class Late:
        is_late = True

        def now(self) -> Sequence[llm.Tool]:
            return ()

        async def tools(self) -> Sequence[llm.Tool]:
            return tools

    agent = llm.Agent("test/m", name="mirror", tools=[Late()], registry=registry)
    tools.append(agent.as_tool(depth=3))
    if is_plain:
        ask = llm.call("test/m", tools=tools, registry=registry)(lambda: "down")
        reply = ask()
        reply.run_tools()
    else:
        assert agent.run("down").value == "up"
    assert any("more than 3 deep" in text for at in range(len(model.requests)) for text in told(model, at))
    assert len(model.requests) < 12


@pytest.mark.parametrize("is_two", [False, True])
def test_agents_that_would_ask_one_another_for_ever_share_one_limit(is_two: bool) -> None:
    """Ten turns at each of five depths were 111,110 requests."""
    model = ScriptedModel([], then=tool_call("other", request="again"))
    registry = registry_of(test=model)
    kits: list[list[llm.Tool]] = [[], []]

    class Late:
        is_late = True

        def __init__(self, at: int) -> None:
            self.at = at

        def now(self) -> Sequence[llm.Tool]:
            return ()

        async def tools(self) -> Sequence[llm.Tool]:
            return kits[self.at]

    here, there = (llm.Agent("test/m", name=f"a{at}", tools=[Late(at)], registry=registry) for at in range(2))
    kits[0].append((there if is_two else here).as_tool(name="other"))
    kits[1].append(here.as_tool(name="other"))
    with pytest.raises(llm.BudgetExceeded, match=r"a0: the run's limit of 100 requests .*Limits\(requests=") as caught:
        here.run("?")
    assert caught.value.limit == "requests"
    assert len(model.requests) == 100
    assert caught.value.state is not None
    assert (caught.value.state.agent, caught.value.state.spent.requests) == ("a0", 100)
    before = len(model.requests)
    with pytest.raises(llm.BudgetExceeded, match="limit of 103 requests"):
        here.run(state=caught.value.state, limits=llm.Limits(requests=103))
    assert len(model.requests) == before + 3


def _down(body: dict[str, Any]) -> Any:
    return "up" if body["messages"][-1]["role"] == "tool" else tool_call("mirror", request="down")


def test_an_agent_is_a_tool_of_a_plain_call_too() -> None:
    """What lies between its waits runs in a thread of its own, where synchronous calls may be made."""
    inner = ScriptedModel(["pre", "inner answer"])
    outer = ScriptedModel([tool_call("helper", request="x"), "outer answer"])
    registry = registry_of(inner=inner, outer=outer)
    threads: list[bool] = []

    @llm.call("inner/m", registry=registry)
    def check() -> str:
        return "check"

    class Calls(llm.Processor):
        def before(self, messages: Sequence[llm.Message], ctx: llm.ProcessorContext) -> Sequence[llm.Message]:
            threads.append(background.is_here)
            assert check().value == "pre"
            return messages

    helper = llm.Agent("inner/m", name="helper", before=[Calls()], registry=registry)
    ask = llm.call("outer/m", tools=[helper.as_tool()], registry=registry)(lambda: "go")
    reply = ask()
    assert reply.resume(reply.run_tools()).value == "outer answer"
    assert told(outer) == ["inner answer"]
    assert threads == [False]


def test_a_hand_off_changes_the_instructions_and_keeps_what_was_said() -> None:
    model = ScriptedModel([calls(("look", {}), ("transfer_to_Billing_team", {"reason": "money"})), "paid back"])
    registry = registry_of(test=model)

    def look() -> str:
        return "an invoice"

    billing = llm.Agent(
        "test/b", name="Billing team", instructions="You are billing.", registry=registry, description="Knows money."
    )
    desk = llm.Agent(
        "test/a", name="desk", instructions="You are the desk.", tools=[look], handoffs=[billing], registry=registry
    )
    run = desk.run("my money!")
    assert run.value == "paid back"
    assert run.agent == "Billing team"
    first, second = model.requests
    assert (first["model"], second["model"]) == ("a", "b")
    assert "Knows money." in first["tools"][1]["function"]["description"]
    roles = [turn["role"] for turn in second["messages"]]
    assert roles == ["system", "user", "assistant", "tool", "tool"]
    assert second["messages"][0]["content"] == "You are billing."
    assert told(model) == ["an invoice", "Billing team has the conversation now."]
    assert "tools" not in second
    assert model.headers[0]["x-session-id"] == model.headers[1]["x-session-id"]
    model.entries = ()
    follow = ScriptedModel(["still billing"])
    registry.add("test", follow)
    assert desk.run("thanks", state=llm.AgentState.from_json(run.state.to_json())).agent == "Billing team"


def test_hand_offs_in_a_circle_with_a_filter_and_only_one_of_an_answer() -> None:
    model = ScriptedModel(
        [calls(("transfer_to_b", {}), ("transfer_to_b2", {})), calls(("transfer_to_a", {})), "home again"]
    )
    registry = registry_of(test=model)
    a: llm.Agent[str] = llm.Agent("test/m", name="a", handoffs=lambda: [b, b2], instructions="A", registry=registry)
    b: llm.Agent[str] = llm.Agent("test/m", name="b", handoffs=lambda: [back], instructions="B", registry=registry)
    b2: llm.Agent[str] = llm.Agent("test/m", name="b2", registry=registry)
    back: llm.Handoff = llm.Handoff(agent=a, filter=llm.without_tool_turns)
    run = a.run("go")
    assert run.value == "home again"
    assert told(model, 1)[1].startswith("Error: another call of this answer hands")
    assert [turn["content"] for turn in model.requests[2]["messages"]] == ["A", "go"]


def test_a_hand_off_to_another_kind_of_answer_is_refused() -> None:
    other = llm.Agent("test/m", name="other", output=Question, registry=registry_of(test=ScriptedModel([])))
    with pytest.raises(llm.DefinitionError, match=r"other, which answers with Question.*promises a text"):
        llm.Agent("test/m", name="a", handoffs=[other])


@llm.tool(needs_approval=True)
def delete(path: str) -> str:
    """Deletes."""
    return f"deleted {path}"


@llm.tool
def ship(order: int) -> llm.Deferred:
    """Takes days."""
    return llm.Deferred(f"job-{order}")


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (True, "deleted /a"),
        (False, "not approved"),
        ({"args": {"path": "/b"}}, "deleted /b"),
    ],
)
def test_a_run_waits_for_a_person_and_goes_on_in_another_process(said: Any, words: str) -> None:
    ran: list[str] = []

    def safe() -> str:
        ran.append("safe")
        return "done"

    model = ScriptedModel([calls(("safe", {}), ("delete", {"path": "/a"}), ("ship", {"order": 7})), "all done"])
    agent = llm.Agent("test/m", name="a", tools=[safe, delete, ship], registry=registry_of(test=model))
    run = agent.run("?")
    assert not run.is_done
    assert [(one.call_id, one.kind, one.token) for one in run.pending] == [
        ("call_1", "approval", ""),
        ("call_2", "result", "job-7"),
    ]
    assert run.pending[0].arguments == {"path": "/a"}
    with pytest.raises(llm.UsageError, match=r"waits for delete \(call_1: approval\), ship"):
        _ = run.value
    state = llm.AgentState.from_json(run.state.to_json())
    half = agent.run(state=state, approvals={"call_1": said})
    assert [one.call_id for one in half.pending] == ["call_2"]
    run = agent.run(state=half.state, results={"call_2": {"at": "noon"}})
    assert run.value == "all done"
    assert ran == ["safe"]
    results = told(model)
    assert results[0] == "done"
    assert words in results[1]
    assert results[2] == '{"at":"noon"}'
    assert run.state.tool_calls == 3


def test_answers_for_calls_that_do_not_wait_are_refused() -> None:
    model = ScriptedModel([calls(("delete", {"path": "/a"}), ("ship", {"order": 7}))])
    agent = llm.Agent("test/m", name="a", tools=[delete, ship], registry=registry_of(test=model))
    state = agent.run("?").state
    for given, words in (
        ({"approvals": {"call_9": True}}, "names 'call_9'; what waits is: call_0 .delete: approval., call_1"),
        ({"approvals": {"call_1": True}}, "call_1 waits for its result"),
        ({"approvals": {"call_0": "yes"}}, "is True, False or"),
        ({"results": {"nothing": 1}}, "results names 'nothing'"),
    ):
        with pytest.raises(llm.UsageError, match=words):
            agent.run(state=state, **given)
    again = agent.run(state=state)  # nobody answered: it waits as before
    assert {one.call_id for one in again.pending} == {"call_0", "call_1"}


def test_approvals_reach_into_delegated_agents() -> None:
    inner = ScriptedModel([calls(("delete", {"path": "/a"}), ("ship", {"order": 1})), "gone"])
    outer = ScriptedModel([tool_call("cleaner", request="clean"), "clean now"])
    registry = registry_of(inner=inner, outer=outer)
    cleaner = llm.Agent("inner/m", name="cleaner", tools=[delete, ship], registry=registry)
    boss = llm.Agent("outer/m", name="boss", tools=[cleaner.as_tool(needs_approval=True)], registry=registry)
    run = boss.run("?")
    assert [(one.call_id, one.tool, one.agent) for one in run.pending] == [("call_0", "cleaner", "boss")]
    run = boss.run(state=run.state, approvals={"call_0": True})
    assert [(one.call_id, one.agent) for one in run.pending] == [
        ("call_0/call_0", "cleaner"),
        ("call_0/call_1", "cleaner"),
    ]
    state = llm.AgentState.from_json(run.state.to_json())
    run = boss.run(state=state, approvals={"call_0/call_0": True}, results={"call_0/call_1": "shipped"})
    assert run.value == "clean now"
    assert told(inner) == ["deleted /a", "shipped"]
    assert told(outer) == ["gone"]
    assert run.spent.requests == 4
    assert run.state.children == {}


def test_events_of_a_delegated_agent_are_told_as_such() -> None:
    inner, outer = ScriptedModel(["sunny"]), ScriptedModel([tool_call("helper", request="x"), "hat"])
    registry = registry_of(inner=inner, outer=outer)
    helper = llm.Agent("inner/m", name="helper", registry=registry)
    boss = llm.Agent("outer/m", name="boss", tools=[helper.as_tool()], registry=registry)
    events = list(boss.stream("?"))
    below = [event.event for event in events if isinstance(event, llm.Delegated)]
    assert "".join(event.text for event in below if isinstance(event, llm.TextDelta)) == "sunny"
    assert "".join(event.text for event in events if isinstance(event, llm.TextDelta)) == "hat"
    assert sum(isinstance(event, llm.RunEnded) for event in events) == 1
    assert inner.open_streams == outer.open_streams == 0


async def test_delegated_agents_run_at_the_same_time() -> None:
    both = asyncio.Barrier(2)

    async def meet() -> str:
        await both.wait()
        return "met"

    def answer(body: dict[str, Any]) -> Any:
        return "ok" if body["messages"][-1]["role"] == "tool" else tool_call("meet")

    inner = ScriptedModel([], then=answer)
    outer = ScriptedModel([calls(("one", {"request": "x"}), ("two", {"request": "y"})), "both"])
    registry = registry_of(inner=inner, outer=outer)
    tools = [llm.Agent("inner/m", name=name, tools=[meet], registry=registry).as_tool() for name in ("one", "two")]
    run = await llm.Agent("outer/m", name="boss", tools=tools, registry=registry).run.aio("?")
    assert run.value == "both"
    assert run.spent.requests == 6


async def test_cancelling_closes_streams_and_tools_of_all_of_them() -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def hang() -> str:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        return ""

    opened = asyncio.Event()

    class Slow(ScriptedModel):
        async def stream(self, *args: Any) -> Any:
            opened.set()
            async for event in super().stream(*args):
                yield event

    slow = Slow(["never seen"], delay_s=60)
    outer = ScriptedModel([calls(("one", {"request": "x"}), ("hang", {}))])
    registry = registry_of(inner=slow, outer=outer)
    one = llm.Agent("inner/m", name="one", registry=registry)
    boss = llm.Agent("outer/m", name="boss", tools=[one.as_tool(), hang], registry=registry)

    async def read() -> None:
        async for _ in boss.stream("?"):
            pass

    task = asyncio.create_task(read())
    await begun.wait()
    await opened.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()
    assert slow.open_streams == 0
    assert [one for one in asyncio.all_tasks() if one is not asyncio.current_task()] == []


@pytest.mark.parametrize("after", [llm.TurnBegan, llm.TextDelta, llm.ToolBegan, llm.ToolEnded])
def test_leaving_a_stream_closes_it(after: type) -> None:
    begun, ended = asyncio.Event(), threading.Event()

    async def slow(n: int) -> str:
        if n:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()
        await begun.wait()
        return ""

    model = ScriptedModel([Said(text="I look", calls=(("slow", {"n": 0}), ("slow", {"n": 1})))])
    agent = llm.Agent("test/m", name="a", tools=[slow], registry=registry_of(test=model))
    with agent.stream("?") as stream:
        for event in stream:
            if isinstance(event, after):
                break
    assert model.open_streams == 0
    if after is llm.ToolEnded:
        assert ended.is_set()
    with pytest.raises(llm.UsageError, match=r"left before its end|being read already"):
        stream.run()


def test_a_restart_is_told() -> None:
    from diptych.agents.llm.testing import cut

    model = ScriptedModel([cut("hello world", after=3), "good"])
    agent = llm.Agent("test/m", name="a", registry=registry_of(test=model), retries=llm.Retries(base_s=0))
    events = list(agent.stream("?"))
    at = next(at for at, event in enumerate(events) if isinstance(event, llm.Restarted))
    assert "".join(event.text for event in events[at:] if isinstance(event, llm.TextDelta)) == "good"
    run = agent.stream("?")  # begins nothing before it is read
    assert len(model.requests) == 2
    assert run.name == "a"


def test_a_stream_of_a_run_that_waits_says_so() -> None:
    model = ScriptedModel([tool_call("delete", path="/a"), "ok"])
    agent = llm.Agent("test/m", name="a", tools=[delete], registry=registry_of(test=model))
    stream = agent.stream("?")
    events = list(stream)
    assert isinstance(events[-2], llm.Paused)
    state = stream.run().state
    pieces = list(agent.stream(state=state, approvals={"call_0": True}).text())
    assert "".join(pieces) == "ok"


def broken(_: object) -> Any:
    raise ZeroDivisionError("oops")


@pytest.mark.parametrize("what", ["prompt", "deps"])
def test_a_function_of_a_delegation_that_breaks_is_told_to_the_model(what: str) -> None:
    inner, outer = ScriptedModel(["x"]), ScriptedModel([tool_call("child", request="?"), "done"])
    registry = registry_of(inner=inner, outer=outer)
    child = llm.Agent("inner/m", name="child", registry=registry)
    tool = child.as_tool(prompt=broken) if what == "prompt" else child.as_tool(deps=broken)
    run = llm.Agent("outer/m", name="a", tools=[tool], registry=registry).run("?", deps=1)
    assert run.value == "done"
    assert told(outer) == [f"Error: the {what} of child cannot be made: ZeroDivisionError: oops"]
    assert not inner.requests


def test_a_check_of_a_delegation_that_breaks_asks_a_person() -> None:
    inner, outer = ScriptedModel(["x"]), ScriptedModel([tool_call("child", request="?"), "done"])
    registry = registry_of(inner=inner, outer=outer)
    tool = llm.Agent("inner/m", name="child", registry=registry).as_tool(needs_approval=broken)
    agent = llm.Agent("outer/m", name="a", tools=[tool], registry=registry)
    run = agent.run("?")
    (waits,) = run.pending
    assert "ZeroDivisionError" in waits.reason
    assert agent.run(state=run.state, approvals={waits.call_id: True}).value == "done"


def test_two_agents_of_one_name_cannot_be_told_apart_and_do_not_run() -> None:
    model = ScriptedModel([])
    registry = registry_of(test=model)
    first, second = (llm.Agent("test/m", name="same", instructions=word, registry=registry) for word in ("1", "2"))
    handoffs = [llm.Handoff(agent=first, name="one"), llm.Handoff(agent=second, name="two")]
    agent = llm.Agent("test/m", name="a", handoffs=handoffs, registry=registry)
    with pytest.raises(llm.DefinitionError, match="two agents that are named 'same'"):
        agent.run("?")
    assert not model.requests


@pytest.mark.parametrize(("given", "words"), [(None, "the filter of transfer_to_b gave is None"), ([], "left nothing")])
def test_a_filter_that_leaves_nothing_is_named(given: Any, words: str) -> None:
    registry = registry_of(test=ScriptedModel([tool_call("transfer_to_b")]))
    other = llm.Handoff(agent=llm.Agent("test/m", name="b", registry=registry), filter=lambda _: given)
    with pytest.raises(llm.UsageError, match=words):
        llm.Agent("test/m", name="a", handoffs=[other], registry=registry).run("?")


async def test_a_coroutine_that_wants_to_end_the_program_ends_its_call_alone() -> None:
    async def leave(_: object) -> None:
        raise SystemExit(4)

    agent = llm.Agent("test/m", name="a", registry=registry_of(test=ScriptedModel(["y"])))
    with pytest.raises(SystemExit):
        await asyncio.to_thread(_as_threads_can, agent, leave)
    assert (await asyncio.wait_for(asyncio.to_thread(agent.run, "?"), 20)).value == "y"


def _as_threads_can(agent: llm.Agent[str, Any], on_step: Any) -> None:
    agent.run("?", on_step=on_step)


def test_every_call_that_ends_was_told_to_begin() -> None:
    registry = registry_of(test=ScriptedModel([calls(("transfer_to_b", {}), ("transfer_to_b", {})), "done"]))
    other = llm.Agent("test/m", name="b", registry=registry)
    events = list(llm.Agent("test/m", name="a", handoffs=[other], registry=registry).stream("?"))
    begun = [one.call.id for one in events if isinstance(one, llm.ToolBegan)]
    assert sorted(begun) == sorted(one.outcome.call.id for one in events if isinstance(one, llm.ToolEnded))
    assert len(begun) == 2


def test_a_limit_above_keeps_what_the_agent_below_had_done() -> None:
    runs: list[int] = []

    def add(a: int) -> int:
        runs.append(a)
        return a

    inner = ScriptedModel([tool_call("add", a=1), tool_call("add", a=2), "sum"])
    outer = ScriptedModel([tool_call("kid", request="?"), "done"])
    registry = registry_of(inner=inner, outer=outer)
    kid = llm.Agent("inner/m", name="kid", tools=[add], registry=registry)
    agent = llm.Agent("outer/m", name="a", tools=[kid.as_tool()], registry=registry)
    with pytest.raises(llm.BudgetExceeded, match="a: the run's limit of 45 tokens") as caught:
        agent.run("?", limits=llm.Limits(tokens=45))
    state = caught.value.state
    assert state is not None
    assert (state.agent, state.phase, [one.turns for one in state.children.values()]) == ("a", "tools", [2])
    run = agent.run(state=llm.AgentState.from_json(state.to_json()), limits=llm.Limits())
    assert run.value == "done"
    assert told(outer) == ["sum"]
    assert runs == [1, 2]
    assert run.spent.requests == 5
