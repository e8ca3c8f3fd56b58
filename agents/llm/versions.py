"""Versions of calls and prompts: 12 letters that change when what is sent would change.

Of the function's definition (as a tree: without comments, layout and decorators), the texts, templates and prompts that
it names, its template, the result's schema, the tools, and the parameters. Not of the model, nor of functions that the
function calls. A function without source, such as a lambda, counts by its code object, which is one Python version's.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from types import CodeType
from typing import TYPE_CHECKING, Any

from .templates import Template

if TYPE_CHECKING:
    from .output import Output
    from .tools import Tool

Definition = ast.FunctionDef | ast.AsyncFunctionDef
Plain = Any  # what JSON can say
# Who asks, and how long they wait, is no part of what is asked.
_APART = frozenset({"user", "session", "timeout", "first_token_timeout", "on_unsupported"})
_NO_CONTENT = frozenset({"decorator_list", "type_comment", "ctx", "kind"})
_definitions: weakref.WeakKeyDictionary[Callable[..., Any], Plain] = weakref.WeakKeyDictionary()


def version_of(
    function: Callable[..., Any],
    *,
    params: Mapping[str, Any] | None = None,
    output: Output[Any] | None = None,
    tools: Sequence[Tool] = (),
) -> str:
    """The first 12 hexadecimal digits of a SHA-256; the same in every process, wherever the file is."""
    asked = {name: value for name, value in (params or {}).items() if name not in _APART}
    told = {
        "function": [[_definition(one), _named(one), _template_of(one)] for one in layers(function)],
        "params": plain(asked),
        "output": None if output is None else output.schema,
        "tools": [tool.told() for tool in tools],
    }
    # The order of a schema's properties is content: answers come in it.
    written = json.dumps(told, separators=(",", ":"), default=plain)
    return hashlib.sha256(written.encode()).hexdigest()[:12]


def remember(function: Callable[..., Any]) -> None:
    """Reads the source now, where it is defined: later the file may be another."""
    for one in layers(function):
        _definition(one)


def layers(function: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """`function`, and those below it that functools.wraps and partial tell of."""
    seen = set()
    while id(function) not in seen:
        seen.add(id(function))
        if isinstance(function, functools.partial):
            function = function.func
            continue
        function = getattr(function, "__func__", function)
        yield function
        function = getattr(function, "__wrapped__", function)


def definition_of(function: Callable[..., Any]) -> Definition | None:
    """Its source as a tree; None where there is none that is certain to be its own."""
    code = getattr(function, "__code__", None)
    if not isinstance(code, CodeType) or code.co_name == "<lambda>":
        return None
    try:
        source = inspect.getsource(code)
        # A block around it takes any indentation, and leaves texts over several lines as they are.
        tree = ast.parse(f"if 1:\n{source}" if source[:1].isspace() else source)
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    body = tree.body[0].body if isinstance(tree.body[0], ast.If) else tree.body
    found = body[0]
    is_it = isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef) and found.name == code.co_name
    return found if is_it else None  # type: ignore[return-value]  # the line above looked


def plain(value: Any) -> Plain:
    """`value` as JSON has it, in one order, the same in each process."""
    if isinstance(value, Mapping):
        return {str(name): plain(inner) for name, inner in sorted(value.items(), key=lambda item: str(item[0]))}
    if isinstance(value, Set):
        return sorted((plain(one) for one in value), key=json.dumps)
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [plain(one) for one in value]
    if isinstance(value, CodeType):
        return _code(value)
    kind = type(value)
    is_plain = isinstance(value, bytes | bytearray | complex) or value is ...
    return [f"{kind.__module__}.{kind.__qualname__}", repr(value) if is_plain else None]


def _definition(function: Callable[..., Any]) -> Plain:
    try:
        known = _definitions.get(function)
    except TypeError:  # an object that cannot be referred to weakly
        return _read(function)
    if known is None:
        known = _definitions[function] = _read(function)
    return known


def _read(function: Callable[..., Any]) -> Plain:
    if _template_of(function) is not None:
        return None  # templated.py's own function around the developer's
    found = definition_of(function)
    if found is not None:
        return _tree(found)
    code = getattr(function, "__code__", None)
    if not isinstance(code, CodeType):
        code = getattr(type(function).__call__, "__code__", None)
    return _code(code) if isinstance(code, CodeType) else f"{type(function).__module__}.{type(function).__qualname__}"


def _tree(node: Any) -> Plain:
    if isinstance(node, ast.AST):
        fields = ((name, value) for name, value in ast.iter_fields(node) if name not in _NO_CONTENT)
        # Fields that later versions of Python add are empty in what earlier ones could say.
        return [type(node).__name__, {name: _tree(value) for name, value in fields if value not in (None, [])}]
    if isinstance(node, list):
        return [_tree(one) for one in node]
    return plain(node)


def _code(code: CodeType) -> Plain:
    """Its name, constants, names and instructions; no line and no file."""
    constants = [plain(one) for one in code.co_consts]
    return [code.co_name, constants, list(code.co_names), list(code.co_varnames), code.co_code.hex()]


def _template_of(function: Callable[..., Any]) -> str | None:
    template = getattr(function, "__dict__", {}).get("template")
    return template.text if isinstance(template, Template) else None


def _named(function: Callable[..., Any]) -> dict[str, Plain]:
    """The texts, templates and prompts outside of the function that it names."""
    code = getattr(function, "__code__", None)
    if not isinstance(code, CodeType) or _template_of(function) is not None:
        return {}
    outer: dict[str, Any] = dict(getattr(function, "__globals__", {}))
    for name, cell in zip(code.co_freevars, getattr(function, "__closure__", None) or (), strict=False):
        try:
            outer[name] = cell.cell_contents
        except ValueError:  # not set yet
            outer.pop(name, None)
    names = _outer_names(code)
    found = {}
    for name in sorted(names & outer.keys()):
        if not name.startswith("__") and (told := _content(outer[name], function)) is not None:
            found[name] = told
    return found


def _outer_names(code: CodeType) -> set[str]:
    """What it, and functions and comprehensions inside of it, take from outside."""
    names = {*code.co_names, *code.co_freevars}
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            names |= _outer_names(inner)
    return names - {*code.co_varnames, *code.co_cellvars}


def _content(value: Any, asking: Callable[..., Any]) -> Plain:
    from .call import Call
    from .prompt import Prompt

    if isinstance(value, str):
        return value
    if isinstance(value, Template):
        return value.text
    if isinstance(value, Call | Prompt):
        below = [one for one in layers(value.function) if one is not asking]
        return [[_definition(one), _template_of(one)] for one in below]
    return None
