"""Tools of MCP servers, against a real server behind pipes and behind HTTP. Guards against: a session that outlives its
block or hangs without its server, results and errors that arrive as something else, and names that no provider takes.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diptych.agents import llm
from diptych.agents.llm.mcp import _listed, _value
from diptych.agents.llm.testing.scripted import Said, ScriptedModel
from diptych.protos.messages import Media, Text

pytest.importorskip("mcp")

SERVER = '''
import base64, os, sys
from mcp.server.mcpserver import Image, MCPServer

server = MCPServer("things", log_level="INFO" if len(sys.argv) > 1 else "CRITICAL")

@server.tool()
def add(a: int, b: int = 2) -> int:
    """Adds."""
    return a + b

@server.tool(name="files.read/all", description="Reads.")
def read(path: str) -> dict[str, str]:
    return {"path": path, "token": os.environ.get("TOKEN", "none")}

@server.tool()
def photo() -> Image:
    return Image(data=base64.b64decode("iVBORw0KGgo="), format="png")

@server.tool()
def boom() -> str:
    raise ValueError("no such thing")

@server.tool()
async def wait() -> str:
    import anyio
    await anyio.sleep(60)
    return "late"

@server.tool()
def die() -> str:
    os._exit(3)

if len(sys.argv) > 1:
    server.run(transport="streamable-http", host="127.0.0.1", port=int(sys.argv[1]))
else:
    server.run()
'''


@pytest.fixture
def program(tmp_path: Path) -> list[str]:
    path = tmp_path / "server.py"
    path.write_text(SERVER)
    return [sys.executable, str(path)]


def asked(tools: Any, *calls: tuple[str, dict[str, Any]]) -> Any:
    model = ScriptedModel([Said(calls=calls), "done"])
    registry = llm.Registry()
    registry.add("test", model)

    @llm.call("test/m", registry=registry, tools=tools)
    def ask() -> str:
        return "go"

    return ask()


def test_tools_of_a_server_behind_pipes(program: list[str]) -> None:
    with llm.mcp(command=program, env={"TOKEN": "t"}, timeout=20) as kit:
        assert [one.name for one in kit] == ["add", "files_read_all", "photo", "boom", "wait", "die"]
        assert kit.now()[0].description == "Adds."
        assert kit.now()[0].parameters["required"] == ["a"]
        assert "title" not in kit.now()[0].parameters
        reply = asked(
            [kit.prefixed("m_").with_timeout(10)],
            ("m_add", {"a": 1}), ("m_files_read_all", {"path": "x"}), ("m_photo", {}), ("m_boom", {}),
            ("m_add", {"a": "many"}), ("m_add", {"c": 1}),
        )  # fmt: skip
        outcomes = reply.run_tools()
        assert outcomes[0].value == {"result": 3}
        assert outcomes[1].value == {"path": "x", "token": "t"}
        assert outcomes[2].parts == (Media(kind="image", path="", media_type="image/png", data="iVBORw0KGgo="),)
        assert "boom" in outcomes[3].outcome.message
        assert isinstance(outcomes[3].outcome, llm.Failed)
        assert "a" in outcomes[4].outcome.message
        assert reply.resume(outcomes).value == "done"
    late = asked(kit, ("add", {"a": 1})).run_tools()[0].outcome
    assert late == llm.Failed(f"the MCP server {program[0]} {program[1]} is gone: its connection was closed")


async def test_an_asynchronous_program_a_timeout_and_a_server_that_dies(program: list[str]) -> None:
    async with llm.mcp(command=program) as kit:
        hurried = kit.filtered(lambda one: one.name == "wait").with_timeout(0.2)
        reply = asked([hurried, kit.filtered(lambda one: one.name == "add")], ("wait", {}), ("add", {"a": 1}))
        late, quick = await reply.run_tools.aio()
        assert late.outcome == llm.Failed("wait took longer than 0.2 s")
        assert quick.value == {"result": 3}
        with pytest.raises(llm.UsageError, match="open already"):
            await one_more(kit)
        (gone,) = await asked(kit, ("die", {})).run_tools.aio()
        words = f"the MCP server {program[0]} {program[1]} is gone: it ended while, or before, "
        assert gone.outcome == llm.Failed(f"{words}die was called")
        (after,) = await asked(kit, ("add", {"a": 1})).run_tools.aio()
        assert after.outcome == llm.Failed(f"{words}add was called")


async def one_more(kit: Any) -> None:
    async with kit.now()[0].body.server:
        pass


def test_servers_that_cannot_be_reached(tmp_path: Path) -> None:
    with pytest.raises(llm.ToolFailed, match=r"the MCP server /no/such/program cannot be reached: FileNotFoundError"):  # noqa: SIM117
        with llm.mcp(command=["/no/such/program"]):
            pass
    silent = tmp_path / "silent.py"
    silent.write_text("import sys\nsys.stdin.read()\n")
    with pytest.raises(llm.ToolFailed, match=r"told no tools within 0\.1 s"):  # noqa: SIM117
        with llm.mcp(command=[sys.executable, str(silent)], start_timeout=0.1):
            pass
    with pytest.raises(llm.ToolFailed, match=r"the MCP server \S+ \.\.\. cannot be reached"):  # noqa: SIM117
        with llm.mcp(command=[sys.executable, "-c", "pass"]):
            pass


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "either command"),
        ({"command": ["x"], "url": "http://x"}, "either command"),
        ({"command": "python server.py"}, "command is a list"),
        ({"command": []}, "command is a list"),
        ({"url": "ftp://x"}, "url begins with"),
        ({"url": "http://x", "env": {}}, "env means nothing of a url"),
        ({"command": ["x"], "headers": {}}, "headers means nothing with a command"),
    ],
)
def test_arguments_are_looked_at_before_anything_is_started(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(llm.UsageError, match=words):
        llm.mcp(**arguments)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mcp", None)
    with pytest.raises(llm.UsageError, match=r"pip install 'diptych\[mcp\]'"):  # noqa: SIM117
        with llm.mcp(command=["x"]):
            pass


@pytest.fixture
def address(program: list[str]) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environ = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    with subprocess.Popen([*program, str(port)], stderr=subprocess.PIPE, text=True, env=environ) as server:
        try:
            assert server.stderr is not None
            next(line for line in server.stderr if "running on" in line)
            yield f"http://127.0.0.1:{port}/mcp"
        finally:
            server.kill()


def test_tools_of_a_server_behind_http(address: str) -> None:
    with llm.mcp(url=address, headers={"x-key": "secret"}) as kit:
        assert "secret" not in repr(kit.now()[0].body)
        (outcome,) = asked(kit, ("add", {"a": 4})).run_tools()
        assert outcome.value == {"result": 6}
    with pytest.raises(llm.ToolFailed, match=r"the MCP server http://127\.0\.0\.1:9/mcp cannot be reached"):  # noqa: SIM117
        with llm.mcp(url="http://127.0.0.1:9/mcp?key=secret"):
            pass


class _Pages:
    def __init__(self, cursors: list[str | None]) -> None:
        self.cursors = cursors
        self.asked: list[str | None] = []

    async def list_tools(self, *, cursor: str | None = None) -> Any:
        from mcp.types import ListToolsResult, Tool

        self.asked.append(cursor)
        at = len(self.asked) - 1
        return ListToolsResult(
            tools=[Tool(name=f"t{at}", input_schema={"type": "object"})],
            next_cursor=self.cursors[at % len(self.cursors)],
        )


async def test_pages_are_followed_and_those_without_an_end_are_not() -> None:
    pages: Any = _Pages(["a", "b", None])
    assert [one.name for one in await _listed(pages, "s")] == ["t0", "t1", "t2"]
    assert pages.asked == [None, "a", "b"]
    circle: Any = _Pages(["a", "b"])
    with pytest.raises(llm.ToolFailed, match=r"after 3 pages it names the page 'a' again"):
        await _listed(circle, "s")


def test_every_kind_of_content_becomes_a_part() -> None:
    from mcp.types import CallToolResult

    def value(*content: dict[str, Any], **rest: Any) -> Any:
        return _value(CallToolResult.model_validate({"content": content, **rest}))

    text = {"type": "text", "text": "t"}
    sound = {"type": "audio", "data": "AA==", "mimeType": "audio/wav"}
    link = {"type": "resource_link", "name": "n", "uri": "file:///a"}
    words = {"type": "resource", "resource": {"uri": "file:///b", "text": "words"}}
    blob = {"type": "resource", "resource": {"uri": "file:///c.pdf", "blob": "AA==", "mimeType": "application/pdf"}}
    assert value(text) == "t"
    assert value() == []
    assert value(text, structuredContent={"a": 1}) == {"a": 1}
    assert value(isError=True) == llm.Failed("the server says that the call failed, and not why")
    assert value(text, sound, link, words, blob, structuredContent={"a": 1}) == [
        Text("t"),
        Media(kind="audio", path="", media_type="audio/wav", data="AA=="),
        Text("[n: file:///a]"),
        Text("file:///b:\nwords"),
        Media(kind="file", path="", media_type="application/pdf", data="AA==", name="c.pdf"),
    ]


def test_what_may_be_a_secret_is_not_told() -> None:
    command = ["/bin/serve", "mcp-shop", "--api-key", "sk-1234567890", "postgres://me:word@host/db", "--token=abc"]
    assert repr(llm.mcp(command=command)) == "McpServer(/bin/serve mcp-shop ...)"
    url = "https://me:word@tools.example:8443/mcp?key=abc"
    assert repr(llm.mcp(url=url, headers={"authorization": "Bearer x"})) == "McpServer(https://tools.example:8443/mcp)"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"timeout": "5"}, "timeout is a number of seconds above 0"),
        ({"start_timeout": 0}, "start_timeout is a number of seconds above 0"),
        ({"env": {"A": 1}}, "env is a dict of texts"),
    ],
)
def test_what_cannot_be_is_told_before_a_server_is_begun(given: dict[str, Any], words: str) -> None:
    with pytest.raises(llm.UsageError, match=words):
        llm.mcp(command=["/no/such/program"], **given)
