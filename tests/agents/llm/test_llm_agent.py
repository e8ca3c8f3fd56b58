"""The agent's loop. Guards against: a run without an end, a beginning of requests that changes (the KV of it would be
computed again), limits that lose what was done, a state that a run cannot go on from, and the loop doing what a
developer's own three lines could not.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from pydantic import BaseModel

from diptych.agents import llm
from diptych.agents.llm.testing import Said, ScriptedModel, cut, failure, registry_of, tool_call
from diptych.protos.messages import ToolCall


class Sum(BaseModel):
    total: int


@llm.tool
def add(a: int, b: int) -> int:
    """Adds."""
    return a + b


def subtract(a: int, b: int) -> int:
    return a - b


def calls(*pairs: tuple[str, dict[str, Any]]) -> Said:
    return Said(calls=pairs)


def scripted(*entries: Any) -> tuple[ScriptedModel, llm.Registry]:
    model = ScriptedModel(entries)
    return model, registry_of(test=model)


def test_three_lines_of_a_developers_own_do_what_the_agent_does() -> None:
    script = [tool_call("add", a=1, b=2), tool_call("add", a=3, b=3), "six"]
    own, registry = scripted(*script)

    @llm.call("test/m", tools=[add], registry=registry, session="s")
    def ask(question: str) -> list[llm.Message]:
        return [llm.system("Count."), llm.user(question)]

    reply = ask("1 + 2 + 3?")
    while reply.tool_calls:
        reply = reply.resume(reply.run_tools())

    theirs, registry = scripted(*script)
    agent = llm.Agent("test/m", name="counter", instructions="Count.", tools=[add], registry=registry, session="s")
    run = agent.run("1 + 2 + 3?")
    assert run.value == reply.value == "six"
    assert own.requests == theirs.requests
    assert own.headers == theirs.headers
    assert run.messages == reply.messages
    assert [step.outcomes[0].value for step in run.steps if step.outcomes] == [3, 6]


async def test_both_ways_and_streams_send_the_same() -> None:
    script = [tool_call("add", a=1, b=2), '{"total": 3}']
    bodies = []
    for way in ("plain", "aio", "for", "async for"):
        model, registry = scripted(*script)
        agent = llm.Agent("test/m", name="a", tools=[add], output=Sum, registry=registry, session="s")
        if way == "plain":
            run = await asyncio.to_thread(agent.run, "?")
        elif way == "aio":
            run = await agent.run.aio("?")
        else:
            stream = agent.stream("?")
            events: list[llm.AgentEvent] = []
            if way == "for":
                events = await asyncio.to_thread(list, stream)
            else:
                async for event in stream:
                    events.append(event)
            assert isinstance(events[-1], llm.RunEnded)
            run = events[-1].run
            assert run is stream.run() if way == "for" else run is await stream.run.aio()
        assert run.value == Sum(total=3)
        assert run.spent.requests == 2
        bodies.append([{k: v for k, v in body.items() if not k.startswith("stream")} for body in model.requests])
        assert model.open_streams == 0
    for body in bodies[2:]:  # a stream asks for parts of a JSON answer, too
        for one in body:
            one.pop("structured", None)
    assert bodies[0] == bodies[1] == bodies[2] == bodies[3]


def test_each_request_begins_with_the_one_before() -> None:
    asked = 0

    def instructions(ctx: llm.Context[str]) -> str:
        nonlocal asked
        asked += 1
        return f"You serve {ctx.deps}; asked {asked}"

    model, registry = scripted(
        tool_call("add", a=1, b=1), calls(("add", {"a": 1, "b": 2}), ("add", {"a": 2, "b": 2})), "4", "and more"
    )
    agent = llm.Agent("test/m", name="a", instructions=instructions, tools=[add], deps=str, registry=registry)
    run = agent.run("?", deps="Ana")
    agent.run("and?", state=run.state, deps="Ana")
    assert asked == 1
    turns = [body["messages"] for body in model.requests]
    for before, after in itertools.pairwise(turns):
        assert after[: len(before)] == before
    assert [turn["role"] for turn in turns[-1]] == [
        *("system", "user", "assistant", "tool", "assistant", "tool", "tool", "assistant", "user")
    ]
    assert {headers["x-session-id"] for headers in model.headers} == {run.state.session}
    assert all(body["tools"] == model.requests[0]["tools"] for body in model.requests)


def test_two_runs_have_two_sessions_unless_one_is_set() -> None:
    _, registry = scripted("a", "b", "c", "d")
    agent = llm.Agent("test/m", name="a", registry=registry)
    assert agent.run("?").state.session != agent.run("?").state.session
    agent = llm.Agent("test/m", name="a", registry=registry, session="mine")
    assert agent.run("?").state.session == agent.run("?").state.session == "mine"


def test_a_loop_that_does_not_end_is_ended_and_can_go_on() -> None:
    script = [tool_call("add", a=1, b=n) for n in range(3)]
    _, registry = scripted(*script, "done")
    agent = llm.Agent("test/m", name="a", tools=[add], limits=llm.Limits(turns=3), registry=registry)
    with pytest.raises(llm.BudgetExceeded, match="limit of 3 turns") as caught:
        agent.run("?")
    assert caught.value.limit == "turns"
    state = caught.value.state
    assert state is not None
    assert (state.turns, state.tool_calls, state.spent.requests) == (3, 3, 3)
    again = llm.AgentState.from_json(state.to_json())
    run = agent.run(state=again, limits=llm.Limits(turns=4))
    assert run.value == "done"
    assert run.spent.requests == 4


def test_too_many_calls_in_one_answer_run_none_of_them() -> None:
    ran: list[int] = []

    def note(n: int) -> str:
        ran.append(n)
        return "ok"

    _, registry = scripted(calls(*(("note", {"n": n}) for n in range(4))), "done")
    agent = llm.Agent("test/m", name="a", tools=[note], limits=llm.Limits(tool_calls=3), registry=registry)
    with pytest.raises(llm.BudgetExceeded) as caught:
        agent.run("?")
    assert caught.value.limit == "tool_calls"
    assert ran == []
    assert caught.value.state is not None
    run = agent.run(state=caught.value.state, limits=llm.Limits(tool_calls=4))
    assert sorted(ran) == [0, 1, 2, 3]
    assert run.state.tool_calls == 4


@pytest.mark.parametrize(("limit", "most"), [("tokens", 20), ("dollars", 0.0002)])
def test_tokens_and_dollars_of_a_run(limit: str, most: float) -> None:
    _, registry = scripted(tool_call("add", a=1, b=1), tool_call("add", a=1, b=1), "never asked")
    given: Any = {limit: most}
    agent = llm.Agent("test/m", name="a", tools=[add], limits=llm.Limits(**given), registry=registry)
    with pytest.raises(llm.BudgetExceeded) as caught:
        agent.run("?")
    assert caught.value.limit == limit
    assert caught.value.state is not None
    assert caught.value.state.spent.requests == 2


def test_an_answer_that_went_over_a_limit_counts() -> None:
    _, registry = scripted("the answer")
    agent = llm.Agent("test/m", name="a", limits=llm.Limits(tokens=3), registry=registry)
    assert agent.run("?").value == "the answer"


async def test_the_time_of_a_run_ends_tools_that_hang() -> None:
    ended = asyncio.Event()

    async def hang() -> str:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        return ""

    _, registry = scripted(tool_call("hang"))
    agent = llm.Agent("test/m", name="a", tools=[hang], limits=llm.Limits(seconds=0.05), registry=registry)
    with pytest.raises(llm.BudgetExceeded) as caught:
        await agent.run.aio("?")
    assert caught.value.limit == "seconds"
    assert ended.is_set()
    assert caught.value.state is not None
    assert caught.value.state.phase == "tools"
    assert caught.value.state.answered == {}


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_the_time_of_a_run_ends_a_model_that_hangs(is_streamed: bool) -> None:
    model, registry = scripted(Said(text="late", delay_s=60))
    agent = llm.Agent("test/m", name="a", limits=llm.Limits(seconds=0.05), registry=registry)
    with pytest.raises(llm.BudgetExceeded) as caught:
        await (agent.stream("?").run.aio() if is_streamed else agent.run.aio("?"))
    assert caught.value.limit == "seconds"
    assert caught.value.state is not None
    assert caught.value.state.phase == "model"
    assert model.open_streams == 0


def test_tools_that_come_late_are_there_after_a_crash() -> None:
    class Late:
        is_late = True

        def now(self) -> Sequence[llm.Tool]:
            return ()

        async def tools(self) -> Sequence[llm.Tool]:
            return [add]

    states: list[llm.AgentState] = []
    _, registry = scripted(tool_call("add", a=1, b=1), "never")
    agent = llm.Agent("test/m", name="a", tools=[Late()], registry=registry)
    agent.run("?", on_step=states.append)
    model, registry = scripted("two")
    agent = llm.Agent("test/m", name="a", tools=[Late()], registry=registry)
    assert agent.run(state=states[1]).value == "two"
    assert model.requests[0]["messages"][-1]["content"] == "2"


def test_sessions_of_contexts_and_registries() -> None:
    model, registry = scripted("a", "b")
    registry.params["session"] = "of the registry"
    agent = llm.Agent("test/m", name="a", registry=registry)
    assert agent.run("?").state.session == "of the registry"
    with llm.using(session="of the block"):
        assert agent.run("?").state.session == "of the block"
    assert model.headers[1]["x-session-id"] == "of the block"


def test_what_failed_attempts_cost_is_in_the_state_of_the_error() -> None:
    _, registry = scripted("no json", "still none")
    agent = llm.Agent("test/m", name="a", output=Sum, registry=registry, retries=llm.Retries(attempts=2))
    with pytest.raises(llm.InvalidOutput) as caught:
        agent.run("?")
    state = caught.value.state
    assert state is not None
    assert state.spent.requests == 2
    assert state.phase == "model"
    _, registry = scripted({"total": 2})
    agent = llm.Agent("test/m", name="a", output=Sum, registry=registry)
    run = agent.run(state=state)
    assert run.value == Sum(total=2)
    assert run.spent.requests == 3


def test_the_model_that_answered_stays_and_using_wins() -> None:
    good = ScriptedModel([tool_call("add", a=1, b=1), "two", "three"])
    other = ScriptedModel(["four"])
    bad = ScriptedModel([failure("not_found"), failure("not_found")])
    registry = registry_of(bad=bad, good=good, other=other)
    agent = llm.Agent(
        "bad/m", name="a", tools=[add], registry=registry, retries=llm.Retries(fallback=["good/m"], base_s=0)
    )
    run = agent.run("?")
    assert run.state.model == "good/m"
    assert len(bad.requests) == 1
    with llm.using(model="other/m"):
        assert agent.run("?", state=run.state).value == "four"
    assert agent.run("?", state=run.state).value == "three"


def test_a_tools_failure_is_told_and_the_run_goes_on() -> None:
    def broken(n: int) -> str:
        raise RuntimeError("no such row")

    model, registry = scripted(calls(("broken", {"n": 1}), ("nothing", {}), ("broken", {"n": "x"})), "sorry")
    agent = llm.Agent("test/m", name="a", tools=[broken], registry=registry)
    run = agent.run("?")
    assert run.value == "sorry"
    told = [turn["content"] for turn in model.requests[1]["messages"] if turn["role"] == "tool"]
    assert "no such row" in str(told[0])
    assert "There is no tool 'nothing'" in str(told[1])
    assert "/n" in str(told[2])


def test_deps_reach_tools_and_instructions_and_are_asked_for() -> None:
    @dataclass
    class Db:
        name: str

    def look(ctx: llm.Context[Db]) -> str:
        assert ctx.reply is not None
        assert ctx.session
        return ctx.deps.name

    async def instructions(ctx: llm.Context[Db]) -> str:
        await asyncio.sleep(0)
        return f"The database is {ctx.deps.name}."

    model, registry = scripted(tool_call("look"), "ok")
    agent = llm.Agent("test/m", name="a", instructions=instructions, tools=[look], deps=Db, registry=registry)
    run = agent.run("?", deps=Db("books"))
    assert run.steps[0].outcomes[0].value == "books"
    assert model.requests[0]["messages"][0]["content"] == "The database is books."
    with pytest.raises(llm.UsageError, match="need Db"):
        agent.run("?")


def test_instructions_may_be_templates() -> None:
    model, registry = scripted("a", "b")
    role = llm.Template("You are {who}.")
    agent = llm.Agent("test/m", name="a", instructions=role(who="USER: {x}"), registry=registry)
    agent.run("?")
    assert model.requests[0]["messages"][0] == {"role": "system", "content": "You are USER: {x}."}
    plain = llm.Agent("test/m", name="a", instructions=llm.Template("SYSTEM: Be brief."), registry=registry)
    plain.run("?")
    assert model.requests[1]["messages"][0] == {"role": "system", "content": "Be brief."}
    with pytest.raises(llm.DefinitionError, match="slots \\(who\\)"):
        llm.Agent("test/m", name="a", instructions=role, registry=registry)


def test_calls_without_ids_of_their_own_get_some() -> None:
    class Nameless(ScriptedModel):
        async def whole(self, *args: Any) -> Any:
            answer = await super().whole(*args)
            parts = tuple(replace(p, id="same") if isinstance(p, ToolCall) else p for p in answer.message.parts)
            return replace(answer, message=replace(answer.message, parts=parts))

    model = Nameless([calls(("add", {"a": 1, "b": 1}), ("add", {"a": 2, "b": 2})), "ok"])
    agent = llm.Agent("test/m", name="a", tools=[add], registry=registry_of(test=model))
    run = agent.run("?")
    turns = [turn for turn in model.requests[1]["messages"] if turn["role"] == "tool"]
    assert [turn["content"] for turn in turns] == ["2", "4"]
    assert len({turn["tool_call_id"] for turn in turns}) == 2
    assert run.value == "ok"


def test_a_step_is_told_after_each_answer_and_each_tool() -> None:
    seen: list[llm.AgentState] = []
    _, registry = scripted(calls(("add", {"a": 1, "b": 1}), ("add", {"a": 2, "b": 2})), "ok")
    agent = llm.Agent("test/m", name="a", tools=[add], registry=registry)
    agent.run("?", on_step=seen.append)
    assert [state.phase for state in seen] == ["model", "tools", "tools", "tools", "model", "done"]
    assert [len(state.answered) for state in seen] == [0, 0, 1, 2, 0, 0]
    assert all(llm.AgentState.from_json(state.to_json()) == state for state in seen)


@pytest.mark.parametrize("at", range(6))
def test_a_run_goes_on_from_any_of_its_steps(at: int) -> None:
    """No tool runs twice, and the requests that are left are those of a run that was never broken off."""
    ran: list[tuple[int, int]] = []

    def note(a: int, b: int) -> int:
        ran.append((a, b))
        return a + b

    script = [calls(("note", {"a": 1, "b": 1}), ("note", {"a": 2, "b": 2})), "ok"]
    whole, registry = scripted(*script)
    seen: list[str] = []
    settings: dict[str, Any] = {"name": "a", "tools": [llm.tool(parallel=False)(note)], "session": "s"}
    agent = llm.Agent("test/m", registry=registry, **settings)
    agent.run("?", on_step=lambda state: seen.append(state.to_json()))
    ran.clear()
    state = llm.AgentState.from_json(seen[at])
    rest, registry = scripted(*script[state.turns :])
    run = llm.Agent("test/m", registry=registry, **settings).run(state=state)
    assert run.value == "ok"
    assert rest.requests == whole.requests[state.turns :]
    assert len(ran) == max(0, [2, 2, 1, 0, 0, 0][at])
    assert run.spent.requests == 2


def test_what_on_step_raises_ends_the_run() -> None:
    class Disk(Exception):
        pass

    def on_step(state: llm.AgentState) -> None:
        raise Disk

    model, registry = scripted("never")
    with pytest.raises(Disk):
        llm.Agent("test/m", name="a", registry=registry).run("?", on_step=on_step)
    assert model.requests == []


async def test_on_step_and_synchronous_calls_inside_a_run() -> None:
    _, registry = scripted("inner", "outer")

    @llm.call("test/m", registry=registry)
    def helper() -> str:
        return "help"

    class Calls(llm.Processor):
        def before(self, messages: Sequence[llm.Message], ctx: llm.ProcessorContext) -> Sequence[llm.Message]:
            assert helper().value == "inner"
            return messages

    agent = llm.Agent("test/m", name="a", before=[Calls()], registry=registry)
    assert (await asyncio.to_thread(agent.run, "?")).value == "outer"
    seen: list[str] = []

    async def kept(state: llm.AgentState) -> None:
        await asyncio.sleep(0)
        seen.append(state.phase)

    _, registry = scripted("x")
    await llm.Agent("test/m", name="a", registry=registry).run.aio("?", on_step=kept)
    assert seen == ["model", "done"]


async def test_runs_of_one_agent_share_nothing() -> None:
    def answer(body: dict[str, Any]) -> Any:
        turns = body["messages"]
        question = turns[1]["content"]
        if turns[-1]["role"] == "user":
            return tool_call("echo", text=question)
        return f"{question}={turns[-1]['content']}"

    async def echo(text: str) -> str:
        await asyncio.sleep(0)
        return text

    model = ScriptedModel([], then=answer)
    agent = llm.Agent("test/m", name="a", instructions="i", tools=[echo], registry=registry_of(test=model))
    runs = await asyncio.gather(*(agent.run.aio(f"q{n}") for n in range(50)))
    assert [run.value for run in runs] == [f"q{n}=q{n}" for n in range(50)]
    assert len({run.state.session for run in runs}) == 50


async def test_cancelling_a_run_cancels_its_tools() -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def hang() -> str:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        return ""

    _, registry = scripted(tool_call("hang"))
    agent = llm.Agent("test/m", name="a", tools=[hang], registry=registry)
    task = asyncio.create_task(agent.run.aio("?"))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()
    gc.collect()
    assert [one for one in asyncio.all_tasks() if one is not asyncio.current_task()] == []


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"name": ""}, "Agent\\(name="),
        ({"name": "a/b"}, "without /"),
        ({"name": "a", "before": [print]}, "llm.Processor"),
        ({"name": "a", "before": [llm.Normalise(), llm.Normalise()]}, "two processors are named Normalise"),
        ({"name": "a", "before": llm.Normalise()}, "before is a list of processors"),
        ({"name": "a", "instructions": 7}, "instructions is a text"),
        ({"name": "a", "instructions": lambda: "x"}, "called with one argument, the Context"),
        ({"name": "a", "limits": {"turns": 1}}, r"limits is llm\.Limits"),
        ({"name": "a", "description": 3}, "description is a text"),
        ({"name": "a", "handoffs": llm.Agent("test/m", name="b")}, "handoffs is a list of agents"),
        ({"name": "a", "handoffs": [7]}, "handoffs holds agents"),
        ({"name": "a", "tools": [add, llm.tool(name="add")(subtract)]}, "two tools are named 'add'"),
        ({"name": "a", "temprature": 1}, "did you mean temperature"),
        ({"name": "a", "output": object()}, "output= takes a type, and this is a value, a object"),
    ],
)
def test_what_cannot_work_is_told_where_it_is_defined(given: dict[str, Any], words: str) -> None:
    with pytest.raises(llm.Error, match=words):
        llm.Agent("test/m", registry=registry_of(test=ScriptedModel([])), **given)


def test_arguments_that_cannot_be() -> None:
    _, registry = scripted(tool_call("add", a=1, b=1), "ok")
    agent = llm.Agent("test/m", name="a", tools=[add], registry=registry, limits=llm.Limits(turns=1))
    with pytest.raises(llm.UsageError, match="nothing to do"):
        agent.run()
    with pytest.raises(llm.BudgetExceeded) as caught:
        agent.run("?")
    state = caught.value.state
    assert state is not None
    with pytest.raises(llm.UsageError, match="not done yet"):
        agent.run("more", state=state)
    with pytest.raises(llm.UsageError, match="approvals names 'x'"):
        agent.run(state=state, approvals={"x": True})
    with pytest.raises(llm.UsageError, match="is of the agent 'a'; b leads to: b"):
        llm.Agent("test/m", name="b", registry=registry).run(state=state)
    with pytest.raises(llm.UsageError, match=r"Limits\(turns"):
        llm.Limits(turns=-1)
    for given, words in (
        ({"state": state.to_json()}, r"not a str: give llm\.AgentState\.from_json"),
        ({"limits": 5}, r"limits is llm\.Limits"),
        ({"on_step": 3}, "on_step is a function"),
        ({"approvals": ["x"]}, "approvals is a dict"),
    ):
        with pytest.raises(llm.UsageError, match=words):
            agent.run("?", **given)  # type: ignore[arg-type]


def test_a_state_that_is_done_gives_its_value_without_asking() -> None:
    model, registry = scripted({"total": 4})
    agent = llm.Agent("test/m", name="a", output=Sum, registry=registry)
    state = agent.run("?").state
    run = agent.run(state=llm.AgentState.from_json(state.to_json()))
    assert run.value == Sum(total=4)
    assert len(model.requests) == 1


def test_a_trace_has_the_run_above_its_calls_and_tools() -> None:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from diptych.agents.llm.tracing import Tracing

    kept, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    registry = llm.Registry(tracing=Tracing(tracer_provider=provider))
    registry.add("inner", ScriptedModel(["yes"]))
    registry.add("test", ScriptedModel([calls(("add", {"a": 1, "b": 1}), ("helper", {"request": "?"})), "two"]))
    helper = llm.Agent("inner/m", name="helper", registry=registry)
    run = llm.Agent("test/m", name="boss", tools=[add, helper.as_tool()], registry=registry).run("?")
    spans = {span.name: span for span in kept.get_finished_spans()}
    boss, inner = spans["invoke_agent boss"], spans["invoke_agent helper"]
    assert boss.attributes is not None
    assert boss.attributes["gen_ai.conversation.id"] == run.state.session
    assert boss.parent is None
    for span in (inner, spans["execute_tool add"]):
        assert span.parent is not None
        assert span.parent.span_id == boss.context.span_id
    assert len({span.context.trace_id for span in kept.get_finished_spans()}) == 1
    assert provider.force_flush()
    registry.add("test", ScriptedModel([failure("bad_request")]))
    with pytest.raises(llm.ProviderError):
        llm.Agent("test/m", name="bad", registry=registry).run("?")
    failed = next(span for span in kept.get_finished_spans() if span.name == "invoke_agent bad")
    assert failed.status.status_code.name == "ERROR"


def test_another_wire_format_makes_the_same_run() -> None:
    runs = []
    for codec in ("openai.chat", "anthropic.messages"):
        model = ScriptedModel([Said(thoughts="hm", calls=(("add", {"a": 1, "b": 1}),)), "two"], codec_name=codec)
        agent = llm.Agent(
            "test/m", name="a", instructions="i", tools=[add], registry=registry_of(test=model), max_tokens=9
        )
        runs.append(agent.run("?"))
        assert len(model.requests) == 2
    assert runs[0].messages == runs[1].messages
    assert runs[0].value == runs[1].value


def test_the_text_of_a_run_is_none_twice() -> None:
    """A turn that broke off and began anew was told as both texts in one."""
    model = ScriptedModel([cut("good morning", after=2), "good morning to you", cut("good mor", after=2), "hello"])
    agent = llm.Agent("test/m", name="greeter", registry=registry_of(test=model), retries=llm.Retries(base_s=0))
    assert "".join(agent.stream("hi").text()) == "good morning to you"
    with pytest.raises(llm.ProviderError):
        list(agent.stream("hi").text())
