"""What a request to /v1/responses says of functions and of its answer's form, read into the values that chat has.

Called by responses.py. Shapes are flat here where chat's are nested; tools that a provider would run are refused by
their names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .errors import InvalidRequest
from .openai_output import ANY_OBJECT, OutputForm, named_schema
from .openai_tools import MAX_TOOLS, Mode, ToolUse, checked_tools
from .strict_json import printable
from .wire_checks import JsonObject, a_flag, a_list, a_text, an_object, is_default, one_of, refuse

_FUNCTION = ("name", "description", "parameters", "strict")
# Fields of a function that change nothing at these values.
_FIXED: dict[str, tuple[object, ...]] = {
    "allowed_callers": (None, ["direct"]),
    "async": (None, False),
    "defer_loading": (None, False),
    "output_schema": (None,),
}
_NAMED_SHAPE = '{"type": "function", "name": ...}'
_FORMATS = ("text", "json_object", "json_schema")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """`use` None: there are none. `told` and `choice` are what a response repeats of them."""

    use: ToolUse | None
    told: list[JsonObject]
    choice: object


def read_tools(tools: object, choice: object, parallel: object) -> Tools:
    """Of the fields tools, tool_choice, parallel_tool_calls. Raises InvalidRequest naming the path."""
    is_parallel = a_flag(parallel, "parallel_tool_calls") is not False
    entries = [] if tools is None else a_list(tools, "tools", most=MAX_TOOLS, what="tools", may_be_empty=True)
    paths = [f"tools[{i}]" for i in range(len(entries))]
    inner: list[tuple[str, object]] = [(p, _function(entry, p)) for p, entry in zip(paths, entries, strict=True)]
    if not entries:
        if choice not in (None, "none", "auto"):
            raise refuse("tool_choice", "chooses among tools, and the request has none")
        return Tools(use=None, told=[], choice=choice or "auto")
    found = checked_tools(inner)
    mode, names, is_named = _choice(choice, tuple(tool.name for tool in found))
    use = ToolUse(tools=found, mode=mode, names=names, parallel=is_parallel, is_named=is_named)
    told: list[JsonObject] = []
    for entry in entries:
        strict = entry.get("strict")
        told.append({**entry, "parameters": entry.get("parameters"), "strict": True if strict is None else strict})
    return Tools(use=use, told=told, choice=choice or "auto")


def _function(entry: object, path: str) -> object:
    if not isinstance(entry, dict):
        raise refuse(path, "must be an object")
    if (kind := entry.get("type")) != "function":
        shown = f" ({printable(kind, 40)})" if isinstance(kind, str) else ""
        told = f"must be function: tools that a server runs, and tools without a schema, do not exist here{shown}"
        words = "is missing" if kind is None else told
        raise refuse(f"{path}.type", words)
    if isinstance(entry.get("function"), dict):
        raise refuse(f"{path}.function", "is chat's shape: here name and parameters stand beside type")
    an_object(entry, path, {"type", *_FUNCTION, *_FIXED})
    for name, defaults in _FIXED.items():
        if not is_default(entry.get(name), defaults):
            raise refuse(f"{path}.{name}", "is not supported: leave it out")
    return {name: entry[name] for name in _FUNCTION if name in entry}


def _choice(value: object, every: tuple[str, ...]) -> tuple[Mode, tuple[str, ...], bool]:
    """The mode, the names that may be called, and whether one function was named."""
    if value is None or value == "auto":
        return "auto", every, False
    if value == "none":
        return "none", (), False
    if value == "required":
        return "required", every, False
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(value, dict) and kind == "function":
        return "required", (_known(value, "tool_choice", every),), True
    if isinstance(value, dict) and kind == "allowed_tools":
        an_object(value, "tool_choice", {"type", "mode", "tools"})
        modes: tuple[Mode, ...] = ("auto", "required")
        mode = one_of(value.get("mode"), "tool_choice.mode", modes)
        entries = a_list(value.get("tools"), "tool_choice.tools", most=MAX_TOOLS, what="tools")
        names = {_known(entry, f"tool_choice.tools[{i}]", every) for i, entry in enumerate(entries)}
        return mode, tuple(name for name in every if name in names), False
    if isinstance(kind, str):
        raise refuse("tool_choice.type", f"is {printable(kind, 40)}: this server runs no tools itself")
    raise refuse(
        "tool_choice", f'must be "none", "auto", "required", {_NAMED_SHAPE} or an object of type allowed_tools'
    )


def _known(value: object, path: str, every: Sequence[str]) -> str:
    if not isinstance(value, dict) or value.get("type") != "function":
        raise refuse(path, f"must have the shape {_NAMED_SHAPE}")
    name = a_text(an_object(value, path, {"type", "name"}).get("name"), f"{path}.name")
    if name not in every:
        told = ", ".join(every[:4]) + (", ..." if len(every) > 4 else "")
        raise refuse(f"{path}.name", f"is none of the request's functions: {told}")
    return name


def read_text(value: object) -> tuple[OutputForm | None, JsonObject]:
    """Of the field text: the form of the answer, and what a response repeats. Raises InvalidRequest."""
    given = {} if value is None else an_object(value, "text", {"format", "verbosity"})
    verbosity = given.get("verbosity")
    if verbosity is not None and one_of(verbosity, "text.verbosity", ("low", "medium", "high")) != "medium":
        raise InvalidRequest(
            "text.verbosity is not known to the models of this server: leave it out, and say in instructions how long "
            "the answer should be",
            "text.verbosity",
        )
    form, told = _format(given.get("format"))
    return form, {"format": told, "verbosity": "medium"}


def _format(value: object) -> tuple[OutputForm | None, JsonObject]:
    path = "text.format"
    if value is None:
        return None, {"type": "text"}
    asked = an_object(value, path)
    kind = one_of(asked.get("type"), f"{path}.type", _FORMATS)
    if kind == "json_schema":
        an_object(asked, path, {"type", "name", "description", "schema", "strict"})
        strict = asked.get("strict")
        return named_schema(asked, path), {**asked, "strict": True if strict is None else strict}
    an_object(asked, path, {"type"})
    if kind == "text":
        return None, {"type": "text"}
    return OutputForm(kind="json_object", value=ANY_OBJECT, path=path), {"type": "json_object"}
