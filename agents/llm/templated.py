"""Functions whose prompt is a template: their arguments fill its slots, and a dict that they return adds to them.

call.py and prompt.py put functions through `templated`. What can be compared is compared where the function is defined.
"""

from __future__ import annotations

import ast
import contextlib
import dis
import functools
import inspect
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from types import CodeType
from typing import Any, cast

from .conversation import told
from .errors import DefinitionError, UsageError
from .machine import is_async
from .templates import Filled, Template
from .tool_context import hint_of, is_context
from .versions import definition_of

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
# Of a body that is `...`, `pass` or a docstring, in all versions of Python that are served.
_IDLE = frozenset(
    "RESUME NOP POP_TOP LOAD_CONST RETURN_VALUE RETURN_CONST RETURN_GENERATOR COPY_FREE_VARS CALL_INTRINSIC_1 "
    "RERAISE".split()
)
_MEDIA = ("image", "images", "audio", "document", "messages")


def templated(function: Callable[..., Any], template: Template) -> Callable[..., Any]:
    """A function of the same arguments that gives the filled template. Raises DefinitionError where the slots and the
    parameters do not fit.
    """
    name = getattr(function, "__name__", type(function).__name__)
    if not isinstance(template, Template):
        raise DefinitionError(f"{name}: template= takes llm.Template(...), not {told(template)}")
    signature = inspect.signature(function)
    _compare(function, name, signature, template)

    def fill(found: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Filled:
        return template.fill(_values(name, signature, template, found, args, kwargs), f"{name}(...)")

    if is_async(function):

        @functools.wraps(function)
        async def filled(*args: Any, **kwargs: Any) -> Filled:
            return fill(await cast("Awaitable[Any]", function(*args, **kwargs)), args, kwargs)
    else:

        @functools.wraps(function)
        def filled(*args: Any, **kwargs: Any) -> Filled:
            return fill(function(*args, **kwargs), args, kwargs)

    filled.__dict__["template"] = template
    return filled


def of_template(template: Template, name: str) -> Callable[..., Filled]:
    """A function whose keyword arguments are the template's slots."""

    def filled(**values: Any) -> Filled:
        return template.fill(values, f"{name}(...)")

    filled.__name__ = filled.__qualname__ = name
    filled.__doc__ = None
    filled.__dict__["template"] = template
    return filled


def _values(
    name: str,
    signature: inspect.Signature,
    template: Template,
    found: object,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> dict[str, Any]:
    if found is not None and found is not ... and not isinstance(found, Mapping):
        raise UsageError(
            f"{name}() returned {told(found)}: with template= a function returns a dict of slots, or nothing"
        )
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    values: dict[str, Any] = {}
    for parameter, value in bound.arguments.items():
        if signature.parameters[parameter].kind is inspect.Parameter.VAR_KEYWORD:
            values |= value
        elif parameter in template.slots:
            values[parameter] = value
    return values | cast("dict[str, Any]", found) if isinstance(found, Mapping) else values


def _compare(function: Callable[..., Any], name: str, signature: inspect.Signature, template: Template) -> None:
    parameters = dict(signature.parameters)
    first = next(iter(parameters), "")
    if first in ("self", "cls") and first not in template.slots:
        del parameters[first]
    for parameter in parameters.values():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            raise DefinitionError(f"{name}: *{parameter.name} has no name for a slot: name each parameter")
    takes_any = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    hints = _hints(function, name, parameters.values())
    named = [
        one.name for one in parameters.values() if one.kind not in _VARIADIC and not is_context(hints.get(one.name))
    ]
    computed = _computed(function)
    slots = ", ".join(template.slots) or "none"
    if computed == frozenset():
        for one in named:
            if one not in template.slots:
                raise DefinitionError(
                    f"{name}: parameter {one!r} fills no slot of the template (slots: {slots}): write {{{one}}} into "
                    f"the template, or take the parameter out"
                )
    for one in sorted(computed or ()):
        if one not in template.slots:
            raise DefinitionError(f"{name}: the returned {one!r} fills no slot of the template (slots: {slots})")
    if computed is not None and not takes_any:
        for slot in template.slots:
            if slot not in named and slot not in computed:
                raise DefinitionError(
                    f"{name}: slot {{{slot}}} of the template, line {template.line_of(slot)}, has no parameter "
                    f"(parameters: {', '.join(named) or 'none'}): add the parameter {slot}, or return "
                    f"{{{slot!r}: ...}} from the function"
                )
    _compare_types(name, hints, named, template)


def _hints(function: Callable[..., Any], name: str, parameters: Iterable[inspect.Parameter]) -> dict[str, Any]:
    """Those that can be read; to tell of others is not this file's: here they only help."""
    found: dict[str, Any] = {}
    for parameter in parameters:
        with contextlib.suppress(DefinitionError):
            found[parameter.name] = hint_of(function, parameter, name)
    return found


def _compare_types(name: str, hints: Mapping[str, Any], named: list[str], template: Template) -> None:
    for one in named:
        kind = template.slots.get(one)
        if kind in _MEDIA and hints.get(one) in (str, int, float, bool, bytes):
            wanted = "messages" if kind == "messages" else "what llm.image, llm.audio and llm.document give"
            raise DefinitionError(
                f"{name}: parameter {one!r} is a {hints[one].__name__}, and the template's slot {{{one}:{kind}}} of "
                f"line {template.line_of(one)} takes {wanted}"
            )


def _computed(function: Callable[..., Any]) -> frozenset[str] | None:
    """The slots that the function returns; None where that shows only when it runs."""
    code = getattr(function, "__code__", None)
    if isinstance(code, CodeType) and _is_idle(code, function.__doc__):
        return frozenset()
    definition = definition_of(function)
    if definition is None:
        return None
    found: set[str] = set()
    for returned in _returned(definition):
        if not isinstance(returned, ast.Dict):
            return None
        for key in returned.keys:
            if not isinstance(key, ast.Constant) or not isinstance(key.value, str):
                return None
            found.add(key.value)
    return frozenset(found) or None


def _is_idle(code: CodeType, doc: str | None) -> bool:
    if any(one is not None and one is not ... and one != doc for one in code.co_consts):
        return False
    return all(instruction.opname in _IDLE for instruction in dis.get_instructions(code))


def _returned(node: ast.AST) -> Iterator[ast.expr | None]:
    """What the function itself returns, not those inside of it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Return):
            yield child.value
        elif not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            yield from _returned(child)
