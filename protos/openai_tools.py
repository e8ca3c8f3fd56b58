"""What a chat request says of functions: `tools`, `tool_choice`, `parallel_tool_calls` and what they replaced.

`read_tools` is called by openai.py. What the schemas mean, and how a call is written, is known elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from .errors import InvalidRequest
from .messages import Kept
from .wire_checks import JsonObject, a_flag, a_list, a_name, a_text, an_object, compact, may_fit, one_of, refuse

MAX_TOOLS = 128
MAX_SCHEMA_BYTES = 64 << 10  # JSON of all schemas of a request together: what a grammar is made of
MAX_DESCRIPTION_CHARS = 256 << 10  # all descriptions of functions together; those inside a schema count there
TOOL_FIELDS = frozenset({"tools", "tool_choice", "parallel_tool_calls", "functions", "function_call"})
# OpenAI takes no dots; names of servers of tools have them ("files.read"), and no format of calls is broken by one.
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_NAME_WORDS = "1 to 64 of the characters a-z, A-Z, 0-9, _, . and -"
_FUNCTION = frozenset({"name", "description", "parameters", "strict"})
_NAMED_SHAPE = '{"type": "function", "function": {"name": ...}}'

Mode = Literal["none", "auto", "required"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that the model may call. `parameters` is a schema of an object, with `type` and `properties`. `strict`
    as it was said: arguments follow their schema whatever it says, but bytes that are passed on say it to a provider.

    For errors: `path`, where it stands in the request (empty: as in chat), and `schema_field`, the schema's name there.
    """

    name: str
    description: str | None
    parameters: JsonObject
    kept: Kept = ""  # up to here, as of a message's part
    strict: bool | None = field(default=None, compare=False)
    path: str = field(default="", compare=False)
    schema_field: str = field(default="parameters", compare=False)

    def told(self) -> JsonObject:
        """As chat templates are told of it: OpenAI's shape."""
        function: JsonObject = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        return {"type": "function", "function": function | {"parameters": self.parameters}}


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """The tools of a request and what may be done with them.

    mode      none: no call; auto: calls or a text; required: at least one call
    names     the functions that may be called, in the order of `tools`; empty with mode none
    is_named  the request names one function, which is called exactly once
    is_legacy asked for with `functions`: the answer has `function_call` in place of `tool_calls`
    """

    tools: tuple[Tool, ...]
    mode: Mode
    names: tuple[str, ...]
    parallel: bool = True
    is_named: bool = False
    is_legacy: bool = False

    @property
    def allowed(self) -> tuple[Tool, ...]:
        """The tools behind `names`."""
        return tuple(tool for tool in self.tools if tool.name in self.names)

    @property
    def most_calls(self) -> int | None:
        """The calls that one answer may hold; None: any number."""
        if self.mode == "none":
            return 0
        return 1 if self.is_named or self.is_legacy or not self.parallel else None


def read_tools(fields: Mapping[str, object]) -> ToolUse | None:
    """The tools in a body's TOOL_FIELDS; None where there are none. Raises InvalidRequest naming the path."""
    parallel = a_flag(fields.get("parallel_tool_calls"), "parallel_tool_calls") is not False
    entries, is_legacy = _entries(fields)
    choice_path = "function_call" if is_legacy else "tool_choice"
    choice = fields.get(choice_path)
    other = "tool_choice" if is_legacy else "function_call"
    if fields.get(other) not in (None, "none"):
        raise _without_tools(other)
    if not entries:
        if choice not in (None, "none"):
            raise _without_tools(choice_path)
        return None
    tools = _tools(entries, is_legacy=is_legacy)
    mode, names = _choice(choice, tools, choice_path, is_legacy=is_legacy)
    return ToolUse(
        tools=tools,
        mode=mode,
        names=names,
        parallel=parallel,
        is_named=isinstance(choice, dict) and "allowed_tools" not in choice,
        is_legacy=is_legacy,
    )


def _without_tools(path: str) -> InvalidRequest:
    return refuse(path, f"chooses among {'tools' if path == 'tool_choice' else 'functions'}, and the request has none")


def _entries(fields: Mapping[str, object]) -> tuple[Sequence[object], bool]:
    given = {}
    for name in ("tools", "functions"):
        if fields.get(name) is not None:
            what = "functions" if name == "functions" else "tools"
            given[name] = a_list(fields[name], name, most=MAX_TOOLS, what=what, may_be_empty=True)
    if given.get("tools") and given.get("functions"):
        raise refuse("functions", "is the old name of tools: send one of them")
    if given.get("functions"):
        return given["functions"], True
    is_legacy = "functions" in given and "tools" not in given
    return given.get("tools", ()), is_legacy


def _tools(entries: Sequence[object], *, is_legacy: bool) -> tuple[Tool, ...]:
    if is_legacy:
        return checked_tools([(f"functions[{i}]", entry) for i, entry in enumerate(entries)])
    paths = [f"tools[{i}]" for i in range(len(entries))]
    inner = [(f"{path}.function", _function_of(entry, path)) for path, entry in zip(paths, entries, strict=True)]
    return checked_tools(inner)


def checked_tools(entries: Sequence[tuple[str, object]]) -> tuple[Tool, ...]:
    """The tools in objects with name, description, parameters and strict, each with its path; their names differ, and
    all of them together have a bearable size. Raises InvalidRequest.
    """
    tools: list[Tool] = []
    places: dict[str, str] = {}
    schema_bytes = description_chars = 0
    for path, entry in entries:
        tool = _tool(entry, path)
        if tool.name in places:
            raise refuse(f"{path}.name", f"is {tool.name}, as {places[tool.name]} is: a call could mean either")
        places[tool.name] = f"{path}.name"
        is_short = may_fit(tool.parameters, MAX_SCHEMA_BYTES - schema_bytes)
        schema_bytes += len(compact(tool.parameters).encode()) if is_short else 0
        if not is_short or schema_bytes > MAX_SCHEMA_BYTES:
            told = f"together have more than {MAX_SCHEMA_BYTES} bytes of JSON: offer fewer or simpler functions"
            raise refuse(f"{path}.parameters", f"and the schemas before it {told}")
        description_chars += len(tool.description or "")
        if description_chars > MAX_DESCRIPTION_CHARS:
            told = f"and the descriptions before it have more than {MAX_DESCRIPTION_CHARS} characters"
            raise refuse(f"{path}.description", told)
        tools.append(tool)
    return tuple(tools)


def _function_of(entry: object, path: str) -> object:
    if not isinstance(entry, dict):
        raise refuse(path, "must be an object")
    if (kind := entry.get("type")) != "function":
        told = "must be function: tools that a server runs, and tools without a schema, do not exist here"
        words = "is missing" if kind is None else told
        raise refuse(f"{path}.type", words)
    if "function" not in entry:
        raise refuse(f"{path}.function", "is missing: name, description and parameters stand in it")
    return an_object(entry, path, {"type", "function"})["function"]


def _tool(entry: object, path: str) -> Tool:
    function = an_object(entry, path, _FUNCTION)
    name = a_name(function.get("name"), f"{path}.name", _NAME, _NAME_WORDS)
    description = function.get("description")
    if description is not None:
        description = a_text(description, f"{path}.description", least=0)
    strict = a_flag(function.get("strict"), f"{path}.strict")
    parameters = _parameters(function.get("parameters"), path)
    return Tool(name=name, description=description, parameters=parameters, strict=strict, path=path)


def _parameters(value: object, path: str) -> JsonObject:
    path += ".parameters"
    # As at OpenAI, a function without `parameters` takes none.
    given = {"type": "object", "additionalProperties": False} if value is None else an_object(value, path)
    if given.get("type", "object") != "object":
        raise refuse(f"{path}.type", "must be object: the arguments of a call are one object")
    if not isinstance(given.get("properties", {}), dict):
        raise refuse(f"{path}.properties", "must be an object from names to schemas")
    # Many chat templates read both without asking whether they are there.
    schema = given if "type" in given else {"type": "object", **given}
    return schema if "properties" in schema else {**schema, "properties": {}}


def _choice(value: object, tools: Sequence[Tool], path: str, *, is_legacy: bool) -> tuple[Mode, tuple[str, ...]]:
    every = tuple(tool.name for tool in tools)
    if value is None or value == "auto":
        return "auto", every
    if value == "none":
        return "none", ()
    if is_legacy:
        if not isinstance(value, dict):
            raise refuse(path, 'must be "none", "auto" or {"name": ...}')
        return "required", (_known(an_object(value, path, {"name"}).get("name"), f"{path}.name", every),)
    if value == "required":
        return "required", every
    if isinstance(value, dict) and value.get("type") == "allowed_tools":
        return _allowed(value, path, every)
    if not isinstance(value, dict) or value.get("type") != "function":
        raise refuse(path, f'must be "none", "auto", "required", {_NAMED_SHAPE} or an object of type allowed_tools')
    return "required", (_known_function(value, path, every),)


def _allowed(value: JsonObject, path: str, every: tuple[str, ...]) -> tuple[Mode, tuple[str, ...]]:
    inner = f"{path}.allowed_tools"
    allowed = an_object(
        an_object(value, path, {"type", "allowed_tools"}).get("allowed_tools"), inner, {"mode", "tools"}
    )
    modes: tuple[Mode, ...] = ("auto", "required")
    mode = one_of(allowed.get("mode"), f"{inner}.mode", modes)
    entries = a_list(allowed.get("tools"), f"{inner}.tools", most=MAX_TOOLS, what="tools")
    names = {_known_function(entry, f"{inner}.tools[{i}]", every) for i, entry in enumerate(entries)}
    return mode, tuple(name for name in every if name in names)


def _known_function(value: object, path: str, every: tuple[str, ...]) -> str:
    if not isinstance(value, dict) or value.get("type") != "function" or not isinstance(value.get("function"), dict):
        raise refuse(path, f"must have the shape {_NAMED_SHAPE}")
    an_object(value, path, {"type", "function"})
    function = an_object(value["function"], f"{path}.function", {"name"})
    return _known(function.get("name"), f"{path}.function.name", every)


def _known(name: object, path: str, every: tuple[str, ...]) -> str:
    if not isinstance(name, str):
        raise refuse(path, "is missing" if name is None else "must be a string")
    if name not in every:
        told = ", ".join(every[:4]) + (", ..." if len(every) > 4 else "")
        raise refuse(path, f"is none of the request's functions: {told}")
    return name
