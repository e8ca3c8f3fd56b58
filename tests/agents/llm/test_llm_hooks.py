"""Who listens hears everything in its order, in the caller's thread, and can break nothing; nobody hears a key.

Guards against a handler that fails the call, events of one registry or call told to another, a key in an event's text,
and calls whose end nobody hears of because their caller left.
"""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict

from diptych.agents import llm
from diptych.agents.llm.testing.scripted import Said, ScriptedModel, failure, tool_call

FAST = llm.Retries(base_s=0.0, repair=False)


class Book(BaseModel):
    title: str
    year: int


def registry_of(*entries: Any, **settings: Any) -> tuple[llm.Registry, ScriptedModel]:
    registry, model = llm.Registry(environ={}, **settings), ScriptedModel(list(entries))
    registry.add("test", model)
    return registry, model


def heard(hooks: llm.Hooks) -> list[llm.HookEvent]:
    events: list[llm.HookEvent] = []
    hooks.on(llm.HookEvent, events.append)
    return events


def names(events: list[llm.HookEvent]) -> list[str]:
    return [type(event).__name__ for event in events]


def ask(registry: llm.Registry, **settings: Any) -> Any:
    @llm.call("test/m", registry=registry, retries=FAST, **settings)
    def recommend(topic: str) -> str:
        return f"A book about {topic}"

    return recommend


@pytest.mark.parametrize("way", ["call", "aio", "stream"])
async def test_all_that_happens_is_told_in_its_order(way: str) -> None:
    registry, _ = registry_of(failure("overloaded"), {"title": "Emma", "year": "soon"}, {"title": "Emma", "year": 1815})
    events = heard(registry.hooks)
    recommend = ask(registry, output=Book)
    if way == "call":
        reply = await asyncio.to_thread(recommend, "love")
    elif way == "aio":
        reply = await recommend.aio("love")
    else:
        reply = await recommend.stream("love").reply.aio()
    assert names(events) == [
        "RequestBegan",
        "AttemptFailed",
        "RequestBegan",
        "AnswerCame",
        "ValueInvalid",
        "AttemptFailed",
        "RequestBegan",
        "AnswerCame",
        "CallEnded",
    ]
    began = [event for event in events if isinstance(event, llm.RequestBegan)]
    assert [(event.number, event.why) for event in began][:2] == [(1, "first"), (2, "retry")]
    assert began[0].body["messages"][-1]["content"] == "A book about love"
    failed = [event for event in events if isinstance(event, llm.AttemptFailed)]
    assert [event.is_last for event in failed] == [False, False]
    assert failed[0].next_why == "retry"
    ended = events[-1]
    assert isinstance(ended, llm.CallEnded)
    assert ended.reply is not None
    assert ended.reply is reply
    assert ended.attempts == reply.attempts
    assert len(ended.draft.messages) == 1  # the developer's own


def test_the_last_failure_is_told_as_the_last() -> None:
    registry, _ = registry_of(failure("auth"))
    events = heard(registry.hooks)
    with pytest.raises(llm.ProviderError):
        ask(registry)("x")
    assert names(events) == ["RequestBegan", "AttemptFailed", "CallEnded"]
    assert isinstance(events[1], llm.AttemptFailed)
    assert events[1].is_last
    assert isinstance(events[2], llm.CallEnded)
    assert isinstance(events[2].error, llm.ProviderError)
    assert len(events[2].attempts) == 1


def test_a_call_that_never_went_out_ends_with_its_error() -> None:
    registry, _ = registry_of()
    events = heard(registry.hooks)
    with pytest.raises(llm.UsageError):
        ask(registry).with_("nobody/m")("x")
    (ended,) = events
    assert isinstance(ended, llm.CallEnded)
    assert isinstance(ended.error, llm.UsageError)
    assert ended.attempts == ()


def test_handlers_run_in_the_callers_thread_and_may_call_themselves() -> None:
    registry, _ = registry_of("one", "two")
    inner: list[str] = []
    threads: list[str] = []

    def again(event: llm.AnswerCame) -> None:
        threads.append(threading.current_thread().name)
        if not inner:
            inner.append("")
            inner[0] = ask(registry)("inner").text

    registry.hooks.on(llm.AnswerCame, again)
    assert ask(registry)("outer").text == "one"
    assert inner == ["two"]
    assert set(threads) == {threading.current_thread().name}


def test_a_handler_that_raises_is_logged_and_the_others_hear(caplog: pytest.LogCaptureFixture) -> None:
    registry, _ = registry_of("hello")

    @registry.hooks.on(llm.CallEnded)
    def breaks(event: llm.CallEnded) -> None:
        raise RuntimeError("the handler's own")

    events = heard(registry.hooks)
    assert ask(registry)("x").text == "hello"
    assert names(events)[-1] == "CallEnded"
    assert "the call recommend goes on" in caplog.text


def test_a_call_has_hooks_of_its_own_beside_the_registrys() -> None:
    registry, _ = registry_of("a", "b")
    other, _ = registry_of("c")
    own = llm.Hooks()
    of_call, of_registry = heard(own), heard(registry.hooks)
    ask(registry, hooks=own)("x")
    assert names(of_call) == names(of_registry) != []
    ask(registry)("x")
    assert len(of_registry) == 2 * len(of_call)
    ask(other).with_(hooks=own)("x")
    assert len(of_registry) == len(of_call)


def test_handlers_leave_again() -> None:
    hooks = llm.Hooks()
    seen: list[llm.HookEvent] = []
    remove = hooks.on(llm.CallEnded, seen.append)
    hooks.on(llm.CallEnded, seen.append)
    remove()
    remove()
    hooks.off(llm.CallEnded, print)
    assert hooks
    hooks.off(llm.CallEnded, seen.append)
    assert not hooks
    hooks.on(llm.HookEvent, seen.append)
    hooks.clear()
    assert not hooks


def test_words_that_are_no_event_are_told_of() -> None:
    with pytest.raises(llm.UsageError, match="class of events"):
        llm.Hooks().on("completion:error", print)  # type: ignore[call-overload]
    with pytest.raises(llm.UsageError, match="no function"):
        llm.Hooks().on(llm.CallEnded, 3)  # type: ignore[call-overload]


async def test_who_leaves_a_stream_is_told_of_without_an_error() -> None:
    registry, model = registry_of("a long answer that nobody reads to its end")
    events = heard(registry.hooks)
    async with ask(registry).stream("x") as stream:
        async for _ in stream:
            break
    ended = events[-1]
    assert isinstance(ended, llm.CallEnded)
    assert ended.reply is None
    assert ended.error is None
    assert model.open_streams == 0


def test_tools_are_told_of() -> None:
    registry, _ = registry_of(tool_call("search", query="x"), "done")
    ran: list[llm.ToolRan] = []
    registry.hooks.on(llm.ToolRan, ran.append)

    @llm.tool
    def search(query: str) -> str:
        """Looks it up."""
        return query * 2

    reply = ask(registry, tools=[search])("x")
    reply = reply.resume(reply.run_tools())
    assert reply.text == "done"
    assert [(event.call.name, event.outcome) for event in ran] == [("search", llm.Ok("xx"))]


def test_no_event_shows_a_key() -> None:
    key = "sk-very-secret-0123456789"
    registry, _ = registry_of("hello", keys={"openai": key}, clusters={"own": llm.Cluster("http://h", key=key)})
    events = heard(registry.hooks)
    ask(registry)("x")
    assert key not in "".join(map(repr, events))


def test_the_processes_own_registry_is_heard_by_on(monkeypatch: pytest.MonkeyPatch) -> None:
    registry, _ = registry_of("hello")
    monkeypatch.setattr("diptych.agents.llm.registry._default", registry)
    seen: list[llm.CallEnded] = []
    remove = llm.on(llm.CallEnded, seen.append)

    @llm.call("test/m")
    def f() -> str:
        return "x"

    f()
    remove()
    assert [event.draft.name for event in seen] == ["f"]


class Wished(BaseModel):
    model_config = ConfigDict(populate_by_name=True)
    title: str
    year: int


def test_a_log_has_what_a_model_can_be_taught(tmp_path: Path) -> None:
    """Prompt and checked value, without the turns in which the model was told of its errors."""
    registry, _ = registry_of(
        {"title": "Emma", "year": "1815"},
        'Sure! ```json\n{"title": "Emma", "year": 1815}\n```',
        failure("auth"),
        Said(text="cut", finish="length"),
        "plain",
    )
    log = llm.CallLog(tmp_path / "calls.jsonl", with_calls=True)
    registry.hooks.on(llm.CallEnded, log)
    ask(registry, output=Wished)("love")
    with pytest.raises(llm.ProviderError):
        ask(registry)("x")
    ask(registry)("cut off")
    ask(registry)("x")
    first, second = llm.read_log(tmp_path / "calls.jsonl")
    assert [turn["role"] for turn in first["messages"]] == ["user", "assistant"]
    assert json.loads(first["messages"][1]["content"]) == {"title": "Emma", "year": 1815}
    assert first["metadata"]["attempts"] == 2
    assert second["messages"][1] == {"role": "assistant", "content": "plain"}
    assert log.num_lines == 2


def test_a_log_has_tools_and_their_turns(tmp_path: Path) -> None:
    registry, _ = registry_of(tool_call("search", query="x"), "done")
    registry.hooks.on(llm.CallEnded, llm.CallLog(tmp_path / "l"))

    @llm.tool
    def search(query: str) -> str:
        """Looks it up."""
        return "found"

    reply = ask(registry, tools=[search])("x")
    reply.resume(reply.run_tools())
    first, second = llm.read_log(tmp_path / "l")
    assert first["tools"][0]["function"]["name"] == "search"
    (call,) = first["messages"][-1]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"query": "x"}
    assert [turn["role"] for turn in second["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert second["messages"][2] == {"role": "tool", "tool_call_id": call["id"], "content": "found"}


def test_a_log_is_redacted_before_it_is_written(tmp_path: Path) -> None:
    registry, _ = registry_of("a", "b", "c")

    def redact(line: dict[str, Any]) -> dict[str, Any] | None:
        text = line["messages"][0]["content"]
        if "drop" in text:
            return None
        line["messages"][0]["content"] = text.replace("anne@x.org", "[mail]")
        return line

    registry.hooks.on(llm.CallEnded, llm.CallLog(tmp_path / "l", redact=redact))
    ask(registry)("anne@x.org")
    ask(registry)("drop")
    assert "anne" not in (tmp_path / "l").read_text()
    assert len(list(llm.read_log(tmp_path / "l"))) == 1


def test_a_redaction_that_fails_writes_nothing(tmp_path: Path) -> None:
    registry, _ = registry_of("a")

    def redact(line: dict[str, Any]) -> dict[str, Any]:
        raise KeyError("x")

    registry.hooks.on(llm.CallEnded, llm.CallLog(tmp_path / "l", redact=redact))
    assert ask(registry)("secret").text == "a"
    assert not (tmp_path / "l").exists()


async def test_lines_of_many_writers_are_whole(tmp_path: Path) -> None:
    """Two logs of one file stand for two processes: they share no lock."""
    registry, _ = registry_of(*["x" * 20_000] * 60)
    logs = [llm.CallLog(tmp_path / "l") for _ in range(2)]
    calls = [ask(registry, hooks=llm.Hooks()) for _ in logs]
    for call, log in zip(calls, logs, strict=True):
        call._settings.hooks.on(llm.CallEnded, log)
    await asyncio.gather(*(asyncio.to_thread(calls[at % 2], str(at)) for at in range(60)))
    lines = list(llm.read_log(tmp_path / "l"))
    assert len(lines) == 60
    assert {line["messages"][0]["content"] for line in lines} == {f"A book about {at}" for at in range(60)}


@pytest.mark.parametrize("text", ["{", "[]", '{"messages": [1]}', '{"messages": {}}'])
def test_a_line_that_is_no_call_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "l").write_text('{"messages": []}\n\n' + text + "\n")
    with pytest.raises(llm.UsageError, match="line 3"):
        list(llm.read_log(tmp_path / "l"))
