"""Kits of tools. Guards against: a wrapper that changes the tools it was made of, a renamed tool that is not run, an
approval that a later wrapper takes away, instances of one class that tell the model the same, and late tools that are
asked for at the wrong time.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest

from diptych.agents import llm
from diptych.agents.llm.testing.scripted import Said, ScriptedModel, tool_call
from diptych.agents.llm.tools import as_tools


@llm.tool
def read(path: str) -> str:
    """Reads a file."""
    return f"read {path}"


@llm.tool(timeout=5)
def write(path: str, text: str = "") -> str:
    """Writes a file."""
    return f"wrote {path}"


class Library:
    def __init__(self, name: str) -> None:
        self.name = name

    @llm.tool
    def find(self, title: str) -> str:
        """Finds a book in {self.name}. Braces {stay}."""
        return f"{self.name}: {title}"

    @llm.tool(needs_approval=True)
    async def lend(self, title: str, ctx: llm.Context[str]) -> str:
        return f"{ctx.deps} has {title}"

    def own(self) -> None: ...


class Branch(Library):
    @llm.tool
    def find(self, title: str) -> str:
        """Looks in the branch."""
        return "branch"


def names(kit: Any) -> list[str]:
    return [tool.name for tool in as_tools(kit)]


def test_each_step_gives_another_kit_and_changes_none() -> None:
    kit = llm.Toolkit([read, write])
    other = (
        kit.filtered(lambda one: one.name != "x").prefixed("fs_").renamed({"fs_read": "cat"})
        .approving(lambda one: one.name == "fs_write").with_timeout(9)
    )  # fmt: skip
    assert names(kit) == ["read", "write"]
    assert [(one.name, one.timeout, one.needs_approval) for one in other] == [
        ("cat", 9, False), ("fs_write", 5, True),
    ]  # fmt: skip
    assert [(one.name, one.timeout, one.needs_approval) for one in (read, write)] == [
        ("read", None, False), ("write", 5, False),
    ]  # fmt: skip
    assert read("x") == "read x"
    assert names(kit + other) == ["read", "write", "cat", "fs_write"]
    assert names([*kit, lambda_less]) == ["read", "write", "lambda_less"]
    assert names([kit.filtered(lambda one: one is read), other]) == ["read", "cat", "fs_write"]
    assert len(kit) == 2
    assert repr(kit) == "Toolkit(read, write)"


def lambda_less(x: int) -> int:
    return x


def test_names_are_looked_at_when_kits_are_made() -> None:
    kit = llm.Toolkit([read, write])
    with pytest.raises(llm.DefinitionError, match="two tools are named 'read'"):
        _ = kit + llm.Toolkit([llm.tool(name="read")(lambda_less)])
    with pytest.raises(llm.DefinitionError, match=r"there is no tool 'raed' in this kit: read, write"):
        kit.renamed({"raed": "x"})
    with pytest.raises(llm.DefinitionError, match="two tools are named 'read'"):
        kit.renamed({"write": "read"})
    with pytest.raises(llm.DefinitionError, match="1 to 64"):
        kit.prefixed("x" * 61)


def test_renamed_tools_run_by_their_new_names() -> None:
    model = ScriptedModel([tool_call("fs_cat", path="a"), "done"])
    registry = llm.Registry()
    registry.add("test", model)

    @llm.call("test/m", registry=registry, tools=llm.Toolkit([read, write]).renamed({"read": "cat"}).prefixed("fs_"))
    def ask() -> str:
        return "go"

    reply = ask()
    assert [one["function"]["name"] for one in model.requests[0]["tools"]] == ["fs_cat", "fs_write"]
    assert reply.resume(reply.run_tools()).messages[-2].content == "read a"


def test_an_instance_is_a_kit_of_its_marked_methods_with_its_own_words() -> None:
    north, south = llm.Toolkit(Library("North")), llm.Toolkit(Library("South"))
    assert [one.description for one in (*north, *south) if one.name == "find"] == [
        "Finds a book in North. Braces {stay}.", "Finds a book in South. Braces {stay}.",
    ]  # fmt: skip
    model = ScriptedModel([Said(calls=(("n_find", {"title": "Emma"}), ("s_lend", {"title": "Emma"}))), "done"])
    registry = llm.Registry()
    registry.add("test", model)

    @llm.call("test/m", registry=registry, tools=[north.prefixed("n_"), south.prefixed("s_")], deps="Ada")
    def ask() -> str:
        return "go"

    reply = ask()
    found, lent = reply.run_tools(approved={"call_1": True})
    assert (found.value, lent.value) == ("North: Emma", "Ada has Emma")
    assert [(one.name, one.description) for one in llm.Toolkit(Branch("b"))] == [
        ("find", "Looks in the branch."), ("lend", ""),
    ]  # fmt: skip


def test_things_that_are_no_kits_are_refused_in_words() -> None:
    class Bare:
        def f(self) -> None: ...

    class Lost:
        @llm.tool
        def f(self) -> None:
            """Says {self.word}."""

    with pytest.raises(llm.DefinitionError, match=r"Toolkit\(Library\): this is the class"):
        llm.Toolkit(Library)
    with pytest.raises(llm.DefinitionError, match=r"Bare instance\): none of its methods is marked with @llm\.tool"):
        llm.Toolkit(Bare())
    with pytest.raises(llm.DefinitionError, match=r"tool f: its docstring holds \{self\.word\}"):
        llm.Toolkit(Lost())


async def test_approvals_only_add_up() -> None:
    @llm.tool(needs_approval=lambda args: args["n"] > 10)
    def pay(n: int) -> None: ...

    (always,) = llm.Toolkit([llm.tool(needs_approval=True)(lambda_less)]).approving(lambda one: False)
    assert always.needs_approval is True
    (both,) = llm.Toolkit([pay]).approving(lambda one: lambda args: args["n"] < 0)
    check: Any = both.needs_approval
    assert [check({"n": n}) for n in (-1, 5, 11)] == [True, False, True]

    async def over(args: dict[str, Any]) -> bool:
        return bool(args["n"] > 10)

    waits = llm.tool(name="pay", needs_approval=over)(pay.function)
    (both,) = llm.Toolkit([waits]).approving(lambda one: lambda args: args["n"] < 0)
    check = both.needs_approval
    assert [await check({"n": n}) for n in (-1, 5, 11)] == [True, False, True]
    (all_,) = llm.Toolkit([pay]).approving(lambda one: True)
    assert all_.needs_approval is True


@pytest.mark.parametrize("is_async", [False, True])
async def test_late_tools_are_told_when_a_call_begins(is_async: bool) -> None:
    given: list[list[Any]] = [[read], [read, write]]

    def plain() -> list[Any]:
        return given.pop(0)

    async def waiting() -> list[Any]:
        return given.pop(0)

    kit = llm.Toolkit.late(waiting if is_async else plain).prefixed("x_")
    assert kit.is_late
    model = ScriptedModel([tool_call("x_read", path="a"), "done", "again"])
    registry = llm.Registry()
    registry.add("test", model)

    @llm.call("test/m", registry=registry, tools=[lambda_less, kit + llm.Toolkit([write])])
    def ask() -> str:
        return "go"

    assert len(given) == 2
    reply = await ask.aio()
    reply = await reply.resume.aio(await reply.run_tools.aio())
    assert reply.value == "done"
    await ask.aio()
    offered = [[one["function"]["name"] for one in body["tools"]] for body in model.requests]
    assert offered == [
        ["lambda_less", "write", "x_read"],
        ["lambda_less", "write", "x_read"],  # a conversation keeps those that it began with
        ["lambda_less", "write", "x_read", "x_write"],
    ]
    with pytest.raises(llm.UsageError, match=r"await kit\.tools\(\)"):
        len(kit)


def test_late_tools_in_synchronous_calls_and_their_collisions() -> None:
    model = ScriptedModel(["done"])
    registry = llm.Registry()
    registry.add("test", model)

    @llm.call("test/m", registry=registry, tools=[read, llm.Toolkit.late(lambda: [llm.tool(name="read")(lambda_less)])])
    def ask() -> str:
        return "go"

    with pytest.raises(llm.DefinitionError, match="two tools are named 'read'"):
        ask()
    assert ask.with_(tools=[llm.Toolkit.late(lambda: [write])])().value == "done"
    assert [one["function"]["name"] for one in model.requests[0]["tools"]] == ["write"]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda kit: kit.filtered(3),
        lambda kit: kit.approving(True),
        lambda kit: kit.changed(lambda tool: 3),
        lambda kit: llm.Toolkit.late(3),
        lambda kit: kit.prefixed(3),
    ],
)
def test_what_is_no_function_is_told_at_once(wrong: Any) -> None:
    @llm.tool
    def one() -> str:
        return "1"

    with pytest.raises(llm.DefinitionError, match=r"Toolkit: "):
        wrong(llm.Toolkit([one]))


def test_plain_checks_of_a_call_run_in_the_callers_thread() -> None:
    threads: list[threading.Thread] = []

    def check(args: dict[str, Any]) -> bool:
        threads.append(threading.current_thread())
        return len(threads) == 2

    @llm.tool(needs_approval=check)
    def pay(amount: int) -> str:
        return "paid"

    model = ScriptedModel([tool_call("pay", amount=1)])
    registry = llm.Registry()
    registry.add("test", model)

    @llm.call("test/m", registry=registry, tools=llm.Toolkit([pay]).approving(lambda tool: check))
    def ask() -> str:
        return "go"

    (outcome,) = ask().run_tools()
    assert isinstance(outcome.outcome, llm.NeedsApproval)
    assert threads == [threading.current_thread()] * 2
