"""What is async is seen wherever a function may be given: an async def, an object whose __call__ is one, a partial of
either. Guards against a coroutine that is taken for the prompt or the result, and against one that nobody awaits.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest

from diptych.agents import llm
from diptych.agents.llm.machine import is_async
from diptych.agents.llm.testing import EchoModel, ScriptedModel, registry_of, tool_call


class Asks:
    """An object that is a function."""

    def __init__(self) -> None:
        self.called: list[str] = []

    async def __call__(self, text: str) -> str:
        """Takes a while."""
        await asyncio.sleep(0)
        self.called.append(text)
        return f"<{text}>"


async def asks(text: str) -> str:
    """Takes a while."""
    await asyncio.sleep(0)
    return f"<{text}>"


def _forms() -> list[Callable[..., Any]]:
    return [asks, Asks(), Asks().__call__, functools.partial(asks), functools.partial(Asks()), functools.partial(
        functools.partial(Asks())
    )]  # fmt: skip


forms = pytest.mark.parametrize("form", _forms(), ids=lambda form: type(form).__name__)


@forms
def test_it_is_seen(form: Any) -> None:
    assert is_async(form)
    assert not is_async(lambda: asks)
    assert not is_async(Asks)
    assert not is_async(functools.partial(Asks))


@forms
def test_as_a_call_of_a_model(form: Any) -> None:
    call = llm.call("echo/m", registry=registry_of(echo=EchoModel()))(form)
    found: Any = call("a")
    assert inspect.iscoroutine(found)
    assert asyncio.run(found).value == "<a>"
    assert asyncio.run(call.aio("b")).value == "<b>"
    assert "".join(call.stream("c").text()) == "<c>"


@forms
def test_as_a_prompt(form: Any) -> None:
    found: Any = llm.prompt(form)("a")
    assert [one.content for one in asyncio.run(found)] == ["<a>"]


@forms
def test_beside_a_template(form: Any) -> None:
    class Fills:
        async def __call__(self, topic: str) -> dict[str, Any]:
            return {"extra": await form(topic)}

    template = llm.Template("{topic} {extra}")
    call = llm.call("echo/m", template=template, registry=registry_of(echo=EchoModel()))(Fills())
    reply: Any = asyncio.run(call.aio("a"))
    assert reply.value == "a <a>"


@forms
def test_as_a_tool(form: Any) -> None:
    offered = llm.tool(name="look")(form)
    model = ScriptedModel([tool_call("look", text="a"), "done"])
    reply = llm.call("lab/m", registry=registry_of(lab=model), tools=[offered])(lambda: "go")()
    assert reply.run_tools()[0].outcome == llm.Ok("<a>")


@forms
def test_as_a_hook_of_moderation_and_of_an_agents_steps(form: Any) -> None:
    steps: list[Any] = []

    class Step:
        async def __call__(self, state: llm.AgentState) -> None:
            await asyncio.sleep(0)
            steps.append(state.phase)

    class Look:
        async def __call__(self, text: str) -> str | None:
            await form(text)
            return "no" if "bad" in text else None

    class Told:
        async def __call__(self, ctx: llm.Context[Any]) -> str:
            return str(await form("be short"))

    model = ScriptedModel(["fine"])
    agent = llm.Agent(
        "lab/m", name="clerk", registry=registry_of(lab=model), before=[llm.Moderation(Look())], instructions=Told()
    )
    assert agent.run("good", on_step=Step()).value == "fine"
    assert steps == ["model", "done"]
    assert model.requests[0]["messages"][0] == {"role": "system", "content": "<be short>"}
    with pytest.raises(llm.Blocked, match="no"):
        agent.run("bad")


@forms
def test_an_approval_is_awaited(form: Any) -> None:
    class Approves:
        async def __call__(self, values: dict[str, Any]) -> bool:
            await form("?")
            return bool(values["text"] == "a")

    offered = llm.tool(name="look", needs_approval=Approves())(form)
    model = ScriptedModel([tool_call("look", text="a"), tool_call("look", text="b")])
    call = llm.call("lab/m", registry=registry_of(lab=model), tools=[offered])(lambda: "go")
    assert isinstance(call().run_tools()[0].outcome, llm.NeedsApproval)
    assert call().run_tools()[0].outcome == llm.Ok("<b>")


@forms
def test_a_handler_that_nobody_would_await_is_refused_where_it_is_given(form: Any) -> None:
    with pytest.raises(llm.UsageError, match=r"hooks\.on\(CallEnded, \.\.\.\): the handler is async"):
        llm.Hooks().on(llm.CallEnded, form)
    with pytest.raises(llm.UsageError, match="called, not awaited"):
        llm.WrapHooks().on("completion:usage", form)
