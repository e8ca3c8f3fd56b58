"""What a request in Anthropic's form says of tools: `tools` and `tool_choice`.

`read_tools` is called by anthropic_messages.py. Only tools that the client runs and describes itself exist here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from .anthropic_blocks import read_cache
from .errors import InvalidRequest
from .openai_tools import MAX_TOOLS, Mode, Tool, ToolUse, checked_tools
from .strict_json import printable
from .wire_checks import JsonObject, a_flag, a_list, a_text, an_object, compact, one_of, refuse

MAX_EXAMPLES = 16  # of the input of one tool
_TOOL = frozenset(
    {
        "allowed_callers",
        "cache_control",
        "defer_loading",
        "description",
        "eager_input_streaming",
        "input_examples",
        "input_schema",
        "name",
        "strict",
        "type",
    }
)
_DATED = re.compile(r"([a-z_]+?)_[0-9]{8}")  # web_search_20250305
_RUN_BY_SERVER = frozenset(
    {"advisor", "code_execution", "mcp_toolset", "tool_search_tool_bm25", "tool_search_tool_regex", "web_fetch"}
    | {"web_search"}
)
_CHOICES = ("auto", "any", "tool", "none")
_SCHEMA_PLACE = re.compile(r"(tools\[[0-9]+\])\.parameters")


def read_tools(tools: object, choice: object) -> ToolUse | None:
    """The tools; None where there are none. Raises InvalidRequest naming the path."""
    entries = [] if tools is None else a_list(tools, "tools", most=MAX_TOOLS, what="tools", may_be_empty=True)
    given = {"type": "auto"} if choice is None else an_object(choice, "tool_choice")
    kind = one_of(given.get("type"), "tool_choice.type", _CHOICES)
    if not entries:
        if kind in ("any", "tool"):
            raise refuse("tool_choice", "chooses among tools, and the request has none")
        _check_choice(given, kind)
        return None
    found = _tools(entries)
    is_serial = _check_choice(given, kind)
    mode, names = _chosen(given, kind, [tool.name for tool in found])
    return ToolUse(tools=found, mode=mode, names=names, parallel=not is_serial, is_named=kind == "tool")


def _check_choice(given: JsonObject, kind: str) -> bool:
    """Whether at most one call may be made."""
    known = {"type"} if kind == "none" else {"type", "disable_parallel_tool_use"}
    an_object(given, "tool_choice", known | ({"name"} if kind == "tool" else set()))
    path = "tool_choice.disable_parallel_tool_use"
    return a_flag(given.get("disable_parallel_tool_use"), path) is True


def _chosen(given: JsonObject, kind: str, every: Sequence[str]) -> tuple[Mode, tuple[str, ...]]:
    match kind:
        case "none":
            return "none", ()
        case "auto":
            return "auto", tuple(every)
        case "any":
            return "required", tuple(every)
    name = a_text(given.get("name"), "tool_choice.name")
    if name not in every:
        told = ", ".join(every[:4]) + (", ..." if len(every) > 4 else "")
        raise refuse("tool_choice.name", f"is none of the request's tools: {told}")
    return "required", (name,)


def _tools(entries: Sequence[object]) -> tuple[Tool, ...]:
    plain = [(f"tools[{i}]", _plain(entry, f"tools[{i}]")) for i, entry in enumerate(entries)]
    try:
        tools = checked_tools(plain)
    except InvalidRequest as exc:
        message, param = (_SCHEMA_PLACE.sub(r"\1.input_schema", text) for text in (exc.message, exc.param or ""))
        raise InvalidRequest(message, param) from None
    marks = [read_cache(an_object(entry, path), path) for entry, (path, _) in zip(entries, plain, strict=True)]
    return tuple(
        dataclasses.replace(tool, schema_field="input_schema", kept=kept)
        for tool, kept in zip(tools, marks, strict=True)
    )


def _plain(entry: object, path: str) -> JsonObject:
    """The same under the names of a function."""
    tool = an_object(entry, path)
    _check_kind(tool.get("type"), f"{path}.type")
    an_object(tool, path, _TOOL)
    read_cache(tool, path)
    if a_flag(tool.get("defer_loading"), f"{path}.defer_loading"):
        raise refuse(f"{path}.defer_loading", "needs a search among tools, which this server has not: leave it out")
    if tool.get("allowed_callers") not in (None, ["direct"]):
        raise refuse(f"{path}.allowed_callers", 'must be ["direct"]: no program calls tools here')
    a_flag(tool.get("eager_input_streaming"), f"{path}.eager_input_streaming")  # they always are
    if tool.get("input_schema") is None:
        raise refuse(f"{path}.input_schema", "is missing")
    function: JsonObject = {"name": tool.get("name"), "parameters": tool["input_schema"], "strict": tool.get("strict")}
    description = _description(tool, path)
    return function if description is None else function | {"description": description}


def _check_kind(kind: object, path: str) -> None:
    if kind in (None, "custom"):
        return
    name = printable(a_text(kind, path), 40)
    dated = _DATED.fullmatch(name)
    if (dated[1] if dated else name) in _RUN_BY_SERVER:
        raise refuse(path, f"is {name}, a tool that a server runs: this one runs none; describe your own as custom")
    told = "is known to Anthropic's models alone: describe it as custom, with an input_schema"
    raise refuse(path, f"is {name}: a tool without a schema {told}")


def _description(tool: JsonObject, path: str) -> str | None:
    given = tool.get("description")
    words = None if given is None else a_text(given, f"{path}.description", least=0)
    if tool.get("input_examples") in (None, []):
        return words
    inner = f"{path}.input_examples"
    examples = a_list(tool["input_examples"], inner, most=MAX_EXAMPLES, what="examples")
    lines = [compact(an_object(example, f"{inner}[{i}]")) for i, example in enumerate(examples)]
    return "\n".join([*([words, ""] if words else []), "Examples of its input:", *lines])
