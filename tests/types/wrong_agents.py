"""Wrong uses of tools, prompts and agents, each of which both type checkers must refuse: see wrong_calls.py."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false, reportUntypedFunctionDecorator=false, reportUntypedClassDecorator=false

from __future__ import annotations

from diptych import llm

from .right_agents import Answer, Asking, Deps, Notes, add, ask, ask_later, filled, plain, remove, typed, whoami


async def tools() -> None:
    add()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    add("1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    add(1, third=3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await add(1)  # type: ignore[misc]  # pyright: ignore[reportGeneralTypeIssues]
    remove("x").upper()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    remove("x")  # type: ignore[unused-coroutine]  # pyright: ignore[reportUnusedCoroutine]
    await remove(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    whoami(loud=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    whoami(llm.Context(deps=3))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Notes().put()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Notes().put(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    text: str = add(1)  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    print(text)
    llm.tool(timeout="2")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    llm.tool(name=3)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    llm.tool(needs_approval="always")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    llm.tool(needs_approval=lambda args, ctx: True)  # type: ignore[arg-type,misc]  # pyright: ignore[reportArgumentType]
    llm.tool(retry=2)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    llm.tool("search")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    llm.Toolkit([add]).prefixed(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    llm.Toolkit([add]).filtered(lambda one: one.nme)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    llm.Ok()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    llm.Retry()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    llm.Context[Deps](deps="emma")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def offered() -> None:
    llm.call("pool/m", tools=add)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    llm.call("pool/m", tools=[3])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
    llm.Agent("pool/m", name="x", tools=["add"])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]


async def prompts() -> None:
    ask()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    ask(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    ask("x", sise=1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    ask("x").upper()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    await ask("x")  # type: ignore[misc]  # pyright: ignore[reportGeneralTypeIssues]
    ask_later("x")  # type: ignore[unused-coroutine]  # pyright: ignore[reportUnusedCoroutine]
    ask_later("x").version  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    filled(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Asking().about(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    ask.call(3)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    ask.call("pool/m", temprature=1)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    ask.call("pool/m", output=3)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    ask.call("pool/m")()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    ask.call("pool/m")("x", size="1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    number: int = ask.call("pool/m")("x").value  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    print(number)
    await ask.call("pool/m")("x")  # type: ignore[misc]  # pyright: ignore[reportGeneralTypeIssues]
    ask_later.call("pool/m")("x").value  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


@llm.prompt  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]
def says_a_number(topic: str) -> int:
    return len(topic)


@llm.prompt(template="{{x}}")  # type: ignore[call-overload,untyped-decorator]  # pyright: ignore[reportArgumentType]
def says_nothing(topic: str) -> None: ...


async def agents() -> None:
    llm.Agent("pool/m")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    llm.Agent("pool/m", name=3)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    llm.Agent("pool/m", name="x", output=3)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    llm.Agent("pool/m", name="x", deps=Deps("emma"))  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    llm.Agent("pool/m", name="x", limits=3)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    llm.Agent("pool/m", name="x", temprature=0.5)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    llm.Agent("pool/m", name="x", handoffs=["plain"])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
    llm.Agent("pool/m", name="x", before=[len])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
    llm.Agent("pool/m", name="x", instructions=3)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    llm.Agent("pool/m", name="x", deps=Deps, instructions=lambda ctx: ctx.deps.name)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    llm.Limits(turn=3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    typed.run("x", deps="emma")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    typed.run(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    typed.run("x", dep=Deps("emma"))  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    typed.run("x", deps=Deps("emma"), limits=3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await typed.run("x", deps=Deps("emma"))  # type: ignore[misc]  # pyright: ignore[reportGeneralTypeIssues]
    typed.run.aio("x", deps=Deps("emma")).value  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    text: str = typed.run("x", deps=Deps("emma")).value  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    typed.run("x", deps=Deps("emma")).value.text  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    answer: Answer = plain.run("x").value  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    narrow: llm.Agent[str, Deps] = typed  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    typed.stream("x", deps=3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    typed.stream("x").value  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    typed.stream("x").run.value  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    for event in typed.stream("x", deps=Deps("emma")):
        event.text  # type: ignore[union-attr]  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(event, llm.RunEnded):
            event.run.value.text  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    typed.as_tool(depth="4")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    print(text, answer, narrow)
