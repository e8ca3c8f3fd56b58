"""What type checkers know of tools, prompts and agents; test_llm_types.py has both checkers read it."""

from __future__ import annotations

from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Literal, assert_type

from pydantic import BaseModel

from diptych import llm
from diptych.protos.messages import Message


class Answer(BaseModel):
    words: str


@dataclass
class Deps:
    user: str


@llm.tool
def add(first: int, second: int = 2) -> int:
    """Adds."""
    return first + second


@llm.tool(timeout=2.0, needs_approval=lambda args: args["path"] != "/tmp", retries=2)
async def remove(path: str) -> Literal["gone"]:
    """Removes."""
    return "gone"


@llm.tool
def whoami(ctx: llm.Context[Deps], loud: bool = False) -> str | llm.Retry | llm.NeedsApproval:
    """Tells who asks."""
    return ctx.deps.user.upper() if loud else ctx.deps.user


class Notes:
    @llm.tool
    def put(self, text: str) -> int:
        """Keeps."""
        return len(text)


@llm.prompt
def ask(topic: str, *, size: int = 3) -> str:
    return f"{topic} {size}"


@llm.prompt
async def ask_later(topic: str) -> list[llm.Message]:
    return [llm.user(topic)]


@llm.prompt(template=llm.Template("{{topic}}"))
def filled(topic: str) -> None: ...


class Asking:
    @llm.prompt
    def about(self, topic: str) -> str:
        return topic


async def tools() -> None:
    assert_type(add(1), int)
    assert_type(add(1, second=3), int)
    assert_type(await remove("x"), Literal["gone"])
    assert_type(whoami(llm.Context(deps=Deps("emma"))), str | llm.Retry | llm.NeedsApproval)
    assert_type(Notes().put("x"), int)
    kit: llm.Toolkit = llm.Toolkit([add, remove]).prefixed("fs_") + llm.Toolkit(Notes())
    offered: list[llm.Tool] = [add, remove, Notes().put]

    @llm.call("pool/m", tools=[add, remove, whoami, Notes().put, len, kit, *offered], deps=Deps("emma"))
    def asked(topic: str) -> str:
        return topic

    assert_type(asked("x"), llm.Reply[str])
    for outcome in asked("x").run_tools(on_error="raise", at_once=2):
        assert_type(outcome, llm.ToolOutcome)
        assert_type(
            outcome.outcome,
            llm.Ok[Any] | llm.Retry | llm.Failed | llm.NeedsApproval | llm.Deferred,
        )


async def prompts() -> None:
    assert_type(ask("x", size=1), tuple[Message, ...])
    assert_type(await ask_later("x"), tuple[Message, ...])
    assert_type(await ask.aio("x"), tuple[Message, ...])
    assert_type(filled("x"), tuple[Message, ...])
    assert_type(Asking().about("x"), tuple[Message, ...])
    assert_type(Asking().about.call("pool/m")("x"), llm.Reply[str])
    assert_type(ask.call("pool/m")("x", size=1), llm.Reply[str])
    assert_type(ask.call("pool/m", output=Answer, temperature=0.1)("x").value, Answer)
    assert_type(ask.call("pool/m", output=list[Answer])("x").value, list[Answer])
    assert_type(ask.call("pool/m", output=Answer | int)("x").value, Answer | int)
    pending = [ask_later.call("pool/m", output=Answer)("x")]
    assert_type(pending, list[Coroutine[Any, Any, llm.Reply[Answer]]])
    assert_type((await pending[0]).value, Answer)
    assert_type((await ask_later.call("pool/m")("x")).value, str)
    assert_type(ask.call().stream("x"), llm.Stream[str])
    assert_type(ask.version, str)


plain = llm.Agent("pool/m", name="plain")
typed = llm.Agent(
    "pool/m",
    name="typed",
    output=Answer,
    deps=Deps,
    instructions=lambda ctx: f"the user is {ctx.deps.user}",
    tools=[add, remove, whoami],
    limits=llm.Limits(turns=4),
    temperature=0.1,
)
either = llm.Agent("pool/m", name="either", output=Answer | int)


async def agents() -> None:
    assert_type(plain, llm.Agent[str, Any])
    assert_type(typed, llm.Agent[Answer, Deps])
    assert_type(either, llm.Agent[Answer | int, Any])
    assert_type(plain.run("x"), llm.Run[str])
    assert_type(plain.run("x", deps=object()).value, str)
    run = typed.run("x", deps=Deps("emma"), limits=llm.Limits(turns=1))
    assert_type(run, llm.Run[Answer])
    assert_type(run.value, Answer)
    assert_type(run.state, llm.AgentState)
    assert_type(run.spent, llm.Spent)
    assert_type((await typed.run.aio("x", deps=Deps("emma"))).value, Answer)
    assert_type(typed.run(state=run.state, deps=Deps("emma"), approvals={"call-1": True}).value, Answer)
    assert_type(either.run([llm.user("x")]).value, Answer | int)
    assert_type(typed.as_tool(input=Answer), llm.Tool)
    first = llm.Agent("pool/m", name="first", handoffs=[plain, llm.Handoff(agent=plain, name="other")])
    assert_type(first.run("x").value, str)


async def events() -> None:
    for event in typed.stream("x", deps=Deps("emma")):
        if isinstance(event, llm.RunEnded):
            assert_type(event.run, llm.Run[Answer])
        elif isinstance(event, llm.ToolEnded):
            assert_type(event.outcome, llm.ToolOutcome)
    async with typed.stream("x", deps=Deps("emma")) as stream:
        async for text in stream.text():
            assert_type(text, str)
        assert_type((await stream.run.aio()).value, Answer)


class Loud(llm.Processor):
    pass


def processors() -> None:
    llm.Agent("pool/m", name="x", before=[llm.Normalise(), Loud()], after=[llm.RedactSecrets()])
