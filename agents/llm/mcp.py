"""`llm.mcp(command=[...])`, `llm.mcp(url=...)`: the tools of a server of the Model Context Protocol, as a toolkit.

A connection lives on the loop behind synchronous calls, whoever opens it, so that its tools run in synchronous and in
asynchronous programs alike. The protocol itself is the official package's (`pip install 'diptych[mcp]'`).
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import re
import shlex
import sys
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from diptych.protos.messages import Media, Text

from .background import background
from .errors import ToolFailed, UsageError
from .outcomes import Failed
from .tool_context import Context
from .toolkits import Toolkit
from .tools import Tool

if TYPE_CHECKING:
    from mcp import Client
    from mcp.types import CallToolResult, ContentBlock
    from mcp.types import Tool as Offered

T = TypeVar("T")
logger = logging.getLogger(__name__)
_MOST_PAGES = 1_000
_SHOWN = re.compile(r"-m|@?[\w./-]*mcp[\w./-]*|[\w./-]+\.(py|js|cjs|mjs|ts|jar)", re.IGNORECASE | re.ASCII)
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_-]")


def mcp(
    *,
    command: Sequence[str] | None = None,
    url: str = "",
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    headers: Mapping[str, str] | None = None,
    timeout: float = 60.0,
    start_timeout: float = 30.0,
) -> McpServer:
    """A server's tools, for the time of a `with`, or an `async with`: `with llm.mcp(command=["my-server"]) as kit:`.

    command         a program that speaks the protocol on its standard input and output; `env` is added to the few
                    variables that it gets, `cwd` is where it runs
    url             a server over HTTP; `headers` go with every request
    timeout         seconds of one call
    start_timeout   seconds until the server must have told its tools

    Raises UsageError; entering it, ToolFailed.
    """
    if (command is None) == (not url):
        raise UsageError("llm.mcp(...): say either command=[...] or url=...", "command")
    if command is not None and (isinstance(command, str) or not command or not all(map(_is_text, command))):
        raise UsageError(
            f"llm.mcp(...): command is a list of the program and its arguments, not {command!r}", "command"
        )
    if url and not url.startswith(("http://", "https://")):
        raise UsageError(f"llm.mcp(...): url begins with http:// or https://, not {url!r}", "url")
    for name, given, other in (("headers", headers, command), ("env", env, url), ("cwd", cwd, url)):
        if given is not None and other:
            raise UsageError(f"llm.mcp(...): {name} means nothing {'with a command' if command else 'of a url'}", name)
    for name, given in (("env", env), ("headers", headers)):
        if given is not None and not all(_is_text(key) and _is_text(value) for key, value in given.items()):
            raise UsageError(f"llm.mcp(...): {name} is a dict of texts by their names", name)
    for name, seconds in (("timeout", timeout), ("start_timeout", start_timeout)):
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds > 0:
            raise UsageError(f"llm.mcp(...): {name} is a number of seconds above 0, not {seconds!r}", name)
    return McpServer(_Address(tuple(command or ()), url, env, cwd, headers), timeout, start_timeout)


def _is_text(one: object) -> bool:
    return isinstance(one, str)


@dataclass(frozen=True, slots=True)
class _Address:
    command: tuple[str, ...]
    url: str
    env: Mapping[str, str] | None = field(repr=False)
    cwd: str | None
    headers: Mapping[str, str] | None = field(repr=False)

    def __str__(self) -> str:
        """Without what may be a secret: models, logs and errors are told of it."""
        if self.url:
            found = urlsplit(self.url)
            return f"{found.scheme}://{found.netloc.rpartition('@')[2]}{found.path}"
        program, *rest = self.command
        shown = [one if _SHOWN.fullmatch(one) else "..." for one in rest]
        return shlex.join([program]) + "".join(f" {one}" for one, _ in itertools.groupby(shown))

    async def connect(self, stack: AsyncExitStack) -> Client:
        from mcp import Client, StdioServerParameters, stdio_client
        from mcp.client.streamable_http import streamable_http_client
        from mcp.shared._httpx_utils import create_mcp_http_client

        if self.url:
            http = await stack.enter_async_context(create_mcp_http_client(dict(self.headers or {})))
            return await stack.enter_async_context(Client(streamable_http_client(self.url, http_client=http)))
        program = StdioServerParameters(
            command=self.command[0], args=list(self.command[1:]), env=dict(self.env or {}), cwd=self.cwd
        )
        errors = sys.__stderr__ if sys.__stderr__ is not None else sys.stderr
        return await stack.enter_async_context(Client(stdio_client(program, errlog=errors)))


class McpServer:
    """A connection; see `mcp`. It can be opened once at a time."""

    def __init__(self, address: _Address, timeout_s: float, start_timeout_s: float) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._start_timeout_s = start_timeout_s
        self._client: Client | None = None
        self._owner: asyncio.Task[None] | None = None
        self._stop: asyncio.Event | None = None

    def __repr__(self) -> str:
        return f"McpServer({self.address})"

    def __enter__(self) -> Toolkit:
        return background.run(self._open())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        background.run(self._close())

    async def __aenter__(self) -> Toolkit:
        return await _there(self._open())

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await _there(self._close())

    async def _open(self) -> Toolkit:
        if self._owner is not None:
            raise UsageError(f"the MCP server {self.address} is open already: call llm.mcp(...) once more for another")
        try:
            import mcp  # noqa: F401  to tell of its absence before anything is started
        except ImportError as exc:
            raise UsageError("llm.mcp(...) needs the package mcp: pip install 'diptych[mcp]'") from exc
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[list[Offered]] = loop.create_future()
        self._stop = asyncio.Event()
        # One task enters and leaves the connection: the protocol's package holds its scopes to a task.
        self._owner = loop.create_task(self._own(ready, self._stop))
        try:
            async with asyncio.timeout(self._start_timeout_s):
                offered = await asyncio.shield(ready)
        except TimeoutError as exc:
            await self._close()
            words = f"the MCP server {self.address} told no tools within {self._start_timeout_s:g} s"
            raise ToolFailed(words) from exc
        except BaseException:
            await self._close()
            raise
        return Toolkit(_tools(self, offered, self._timeout_s))

    async def _own(self, ready: asyncio.Future[list[Offered]], stop: asyncio.Event) -> None:
        try:
            async with AsyncExitStack() as stack:
                self._client = await self.address.connect(stack)
                ready.set_result(await _listed(self._client, str(self.address)))
                await stop.wait()
        except asyncio.CancelledError:
            ready.cancel()
            raise
        except Exception as exc:
            cause = _cause(exc)
            if ready.done():
                logger.warning("the MCP server %s did not close well: %s", self.address, cause)
            elif isinstance(cause, ToolFailed):
                ready.set_exception(cause)
            else:
                words = f"the MCP server {self.address} cannot be reached: {type(cause).__name__}: {cause}"
                error = ToolFailed(words)
                error.__cause__ = exc
                ready.set_exception(error)
        finally:
            self._client = None

    async def _close(self) -> None:
        owner, self._owner = self._owner, None
        if owner is None or self._stop is None:
            return
        if self._client is None:  # it has not come to its waiting
            owner.cancel()
        self._stop.set()
        await asyncio.gather(owner, return_exceptions=True)

    async def call(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """What the server's tool gives: Failed where it says so, or is gone."""
        return await _there(self._call(name, arguments))

    async def _call(self, name: str, arguments: Mapping[str, Any]) -> Any:
        from mcp import MCPError
        from mcp.types import CONNECTION_CLOSED, REQUEST_TIMEOUT

        if self._client is None:
            return Failed(f"the MCP server {self.address} is gone: its connection was closed")
        try:
            found = await self._client.call_tool(name, dict(arguments))
        except MCPError as exc:
            if exc.code == CONNECTION_CLOSED:
                return Failed(f"the MCP server {self.address} is gone: it ended while, or before, {name} was called")
            if exc.code == REQUEST_TIMEOUT:
                return Failed(f"the MCP server {self.address} did not answer the call of {name} in time")
            return Failed(f"the MCP server {self.address} refused the call of {name}: {exc.message}")
        return _value(found)


async def _there(work: Coroutine[Any, Any, T]) -> T:
    """On the loop of connections."""
    if background.is_here:
        return await work
    return await asyncio.wrap_future(background.submit(work))


def _cause(error: BaseException) -> BaseException:
    """The first real error in groups of them."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def _listed(client: Client, where: str) -> list[Offered]:
    """All pages. Raises ToolFailed where they have no end."""
    found: list[Offered] = []
    cursor: str | None = None
    seen: set[str] = set()
    while True:
        page = await client.list_tools(cursor=cursor)
        found += page.tools
        cursor = page.next_cursor
        if cursor is None:
            return found
        if cursor in seen or len(seen) >= _MOST_PAGES:
            raise ToolFailed(
                f"the MCP server {where} lists its tools without an end: after {len(seen) + 1} pages it names the page "
                f"{cursor!r} {'again' if cursor in seen else 'as the next'}"
            )
        seen.add(cursor)


@dataclass(frozen=True, slots=True, eq=False)
class McpBody:
    """One of a server's tools. `offered` is as the server told it, annotations (`read_only_hint`, ...) included."""

    server: McpServer
    offered: Offered
    is_async: bool = True

    def read(self, document: str) -> dict[str, Any]:
        """See Body; the server itself looks at the arguments. Raises ValueError."""
        found = json.loads(document)
        if not isinstance(found, dict):
            raise ValueError("the arguments of a tool are one JSON object")
        return found

    def with_defaults(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """See Body."""
        return dict(values)

    def start(self, values: Mapping[str, Any], context: Context[Any]) -> Any:
        """See Body."""
        return self.server.call(self.offered.name, values)


def _tools(server: McpServer, offered: Sequence[Offered], timeout_s: float) -> list[Tool]:
    found: dict[str, Tool] = {}
    for one in offered:
        name = _free(_NOT_IN_NAMES.sub("_", one.name)[:64] or "tool", found)
        schema = {"type": "object", "properties": {}, **one.input_schema}
        found[name] = Tool(
            name=name,
            description=one.description or one.title or "",
            parameters={key: value for key, value in schema.items() if key not in ("$schema", "title")},
            timeout=timeout_s,
            body=McpBody(server, one),
        )
    return list(found.values())


def _free(name: str, taken: Mapping[str, Tool]) -> str:
    """`name`, or the first of name_2, name_3, ... that nobody has: names may differ only in what is left out."""
    if name not in taken and name not in ("auto", "none", "required"):
        return name
    number = 2
    while (other := f"{name[: 63 - len(str(number))]}_{number}") in taken:
        number += 1
    return other


def _value(found: CallToolResult) -> Any:
    parts = [_part(block) for block in found.content]
    if found.is_error:
        words = "\n".join(part.text for part in parts if isinstance(part, Text))
        return Failed(words or "the server says that the call failed, and not why")
    if found.structured_content is not None and not any(isinstance(part, Media) for part in parts):
        return found.structured_content
    if len(parts) == 1 and isinstance(parts[0], Text):
        return parts[0].text
    return parts


def _part(block: ContentBlock) -> Text | Media:
    match block.type:
        case "text":
            return Text(block.text)
        case "image" | "audio":
            return Media(kind=block.type, path="content", media_type=block.mime_type, data=block.data)
        case "resource_link":
            return Text(f"[{block.name}: {block.uri}]")
        case "resource":
            held = block.resource
            if "text" in type(held).model_fields:
                return Text(f"{held.uri}:\n{getattr(held, 'text', '')}")
            kind = (held.mime_type or "").partition("/")[0]
            return Media(
                kind="image" if kind == "image" else "audio" if kind == "audio" else "file",
                path="content",
                media_type=held.mime_type or "application/octet-stream",
                data=getattr(held, "blob", ""),
                name=str(held.uri).rpartition("/")[2],
            )
