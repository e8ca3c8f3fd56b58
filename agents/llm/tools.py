"""Functions that a model may call: `@llm.tool`, and Tool, which is whatever can be offered to a model.

call.py offers them, tool_runs.py runs them, toolkits.py and mcp.py make more of them. What a signature becomes is known
to tool_schema.py, what comes of a call to outcomes.py.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, Self, TypeVar, cast, overload, runtime_checkable

from .errors import DefinitionError
from .machine import Machine, Step, is_async, take
from .tool_context import Context
from .tool_schema import JsonObject, Signature
from .travel import tool_again, tool_told

P = ParamSpec("P")
Q = ParamSpec("Q")
R = TypeVar("R")
S = TypeVar("S")
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_RESERVED = frozenset({"auto", "none", "required"})  # of tool_choice

Approves = bool | Callable[[dict[str, Any]], "bool | Awaitable[bool]"]


class Body(Protocol):
    """What runs when a tool is called."""

    @property
    def is_async(self) -> bool:
        """Whether `start` gives an awaitable; else it runs in a thread."""

    def read(self, document: str) -> dict[str, Any]:
        """Typed values of a JSON object. Raises pydantic's ValidationError, or ValueError."""

    def with_defaults(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Those, and the defaults of what is left out."""

    def start(self, values: Mapping[str, Any], context: Context[Any]) -> Any:
        """What the tool returns; an awaitable is awaited."""


@dataclass(frozen=True, slots=True, eq=False)
class FunctionBody:
    """A function with its signature."""

    function: Callable[..., Any]
    signature: Signature
    is_async: bool

    def read(self, document: str) -> dict[str, Any]:
        """See Body."""
        return self.signature.read(document)

    def with_defaults(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """See Body."""
        return self.signature.with_defaults(values)

    def start(self, values: Mapping[str, Any], context: Context[Any]) -> Any:
        """See Body."""
        by_place, named = self.signature.arranged(values, context)
        return self.function(*by_place, **named)


@dataclass(frozen=True, eq=False, kw_only=True)
class Tool:
    """Something that a model may call. Data: `dataclasses.replace` gives another one.

    name            as the model knows it; of a-z, A-Z, 0-9, _ and -
    parameters      JSON schema of an object
    timeout         seconds of one run; None: as run_tools says
    needs_approval  a person must say yes before it runs: always, or where a function of the arguments says so
    parallel        false: its runs, and those of other such tools, follow one another in the order of the calls
    retries         after so many failures in a row the model is told to give up; None: it may go on
    """

    name: str
    description: str = ""
    parameters: JsonObject = field(repr=False)
    timeout: float | None = None
    needs_approval: Approves = False
    parallel: bool = True
    retries: int | None = None
    body: Body = field(repr=False)

    def __post_init__(self) -> None:
        checked_name(self.name, f"tool {self.name!r}")
        if self.timeout is not None and not (_is_number(self.timeout, int | float) and self.timeout > 0):
            raise DefinitionError(f"tool {self.name}: timeout is a number of seconds above 0, not {self.timeout!r}")
        if self.retries is not None and not (_is_number(self.retries, int) and self.retries >= 0):
            raise DefinitionError(f"tool {self.name}: retries is a whole number from 0 up, not {self.retries!r}")
        if not isinstance(self.parallel, bool):
            raise DefinitionError(f"tool {self.name}: parallel is true or false, not {self.parallel!r}")
        if not isinstance(self.description, str):
            raise DefinitionError(f"tool {self.name}: description is a text, not {self.description!r}")
        if not callable(self.needs_approval) and not isinstance(self.needs_approval, bool):
            raise DefinitionError(
                f"tool {self.name}: needs_approval is true, false or a function of the arguments, "
                f"not {self.needs_approval!r}"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return tool_again, tool_told(self)

    def __deepcopy__(self, _: object) -> Self:
        return self

    def told(self) -> JsonObject:
        """As OpenAI's entry of `tools`."""
        function: JsonObject = {"name": self.name}
        if self.description:
            function["description"] = self.description
        return {"type": "function", "function": function | {"parameters": self.parameters}}


def _is_number(value: object, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def checked_name(name: str, where: str) -> str:
    """Raises DefinitionError for one that a provider would refuse."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise DefinitionError(
            f"{where}: {name!r} is no name of a tool: 1 to 64 of the characters a-z, A-Z, 0-9, _ and -; say "
            f"llm.tool(name=...)"
        )
    if name in _RESERVED:
        raise DefinitionError(f"{where}: {name!r} means something else in tool_choice: say llm.tool(name=...)")
    return name


@dataclass(frozen=True, eq=False, kw_only=True)
class FunctionTool(Tool, Generic[P, R]):
    """A function as a tool; called, it is the function itself. In a class it is a tool of each instance."""

    function: Callable[P, R] = field(repr=False)
    is_method: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, other in (
            ("__module__", ""),
            ("__qualname__", self.name),
            ("__name__", self.name),
            ("__doc__", None),
        ):
            object.__setattr__(self, name, getattr(self.function, name, other))
        object.__setattr__(self, "__wrapped__", self.function)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The function, without any of a tool's ways."""
        return self.function(*args, **kwargs)

    @overload
    def __get__(self, owner: None, kind: type) -> Self: ...
    @overload
    def __get__(self: FunctionTool[Concatenate[S, Q], R], owner: S, kind: type | None = None) -> FunctionTool[Q, R]: ...
    def __get__(self, owner: Any, kind: type | None = None) -> Any:
        if owner is None or not self.is_method:
            return self
        return self.bound(owner)

    def bound(self, owner: Any) -> Self:
        """The tool of an instance."""
        body = cast("FunctionBody", self.body)
        function = functools.partial(cast("Callable[..., Any]", self.function), owner)
        functools.update_wrapper(function, self.function)
        del function.__wrapped__  # type: ignore[attr-defined]  # its signature has one parameter more
        return replace(
            self, function=cast("Callable[P, R]", function), body=replace(body, function=function), is_method=False
        )


class Decorator(Protocol):
    """Of a function that is to be a tool."""

    def __call__(self, function: Callable[P, R]) -> FunctionTool[P, R]:
        """The tool."""


@overload
def tool(function: Callable[P, R], /) -> FunctionTool[P, R]: ...
@overload
def tool(
    *,
    name: str | None = None,
    description: str | None = None,
    timeout: float | None = None,
    needs_approval: Approves = False,
    parallel: bool = True,
    retries: int | None = None,
) -> Decorator: ...
def tool(
    function: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    description: str | None = None,
    timeout: float | None = None,
    needs_approval: Approves = False,
    parallel: bool = True,
    retries: int | None = None,
) -> Any:
    """Makes a function, sync or async, or a method, a tool. Its name, docstring and type hints tell the model of it.

    name, description   in place of the function's own
    timeout             seconds of one run; a thread that does not end is left behind
    needs_approval      true, or a function of the arguments (a dict, defaults included) that says whether
    parallel            false: such tools run one after another
    retries             after so many failures in a row the model is told to give up

    Raises DefinitionError that names the function, the parameter and the remedy.
    """

    def decorate(given: Callable[..., Any]) -> FunctionTool[..., Any]:
        made = _made(given, name)
        return replace(
            made,
            description=made.description if description is None else description,
            timeout=timeout,
            needs_approval=needs_approval,
            parallel=parallel,
            retries=retries,
        )

    if function is None:
        return decorate
    return decorate(function)


def _made(given: Any, name: str | None) -> FunctionTool[..., Any]:
    function = given.__func__ if isinstance(given, staticmethod) else given
    if isinstance(function, classmethod):
        raise DefinitionError("llm.tool: write @classmethod above @llm.tool, not below it")
    if isinstance(function, Tool):
        raise DefinitionError(f"tool {function.name}: it is a tool already: decorate it once")
    if not callable(function):
        raise DefinitionError(f"llm.tool decorates functions; {function!r} is none: write it above a def")
    own = getattr(function, "__name__", None) or getattr(getattr(function, "func", None), "__name__", None)
    own = own or type(function).__name__
    where = f"tool {name or own} ({getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', own)})"
    checked_name(name or own, where)
    called = function if inspect.isroutine(function) else type(function).__call__
    if inspect.isgeneratorfunction(inspect.unwrap(called)) or inspect.isasyncgenfunction(inspect.unwrap(called)):
        raise DefinitionError(f"{where}: a generator gives many values, and a tool one: return a list of them")
    is_method = isinstance(given, type(_made)) and _is_method(given)
    signature = Signature.of(function, where, skips_first=is_method)
    return FunctionTool(
        name=name or own,
        description=signature.description,
        parameters=signature.parameters,
        body=FunctionBody(function, signature, is_async(function)),
        function=function,
        is_method=is_method,
    )


def of_function(function: Callable[..., Any], told: Mapping[str, Any]) -> Tool:
    """The tool of a function with the settings of another: see travel.py."""
    return replace(_made(function, told["name"]), **told)


def _is_method(function: Any) -> bool:
    """Whether it is being defined in a class, with self or cls in front."""
    in_class = "." in function.__qualname__ and not function.__qualname__.rpartition(".")[0].endswith("<locals>")
    first = next(iter(inspect.signature(function).parameters.values()), None)
    return in_class and first is not None and first.annotation is first.empty


@runtime_checkable
class Kit(Protocol):
    """Tools that come together: see toolkits.py."""

    @property
    def is_late(self) -> bool:
        """Whether it tells its tools when a call begins."""

    def now(self) -> Sequence[Tool]:
        """Its tools, of a kit that is not late."""

    async def tools(self) -> Sequence[Tool]:
        """Its tools."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Late(Tool):
    """Stands for the tools of a late kit until a call begins; `arrived` replaces it."""

    kit: Kit
    body: Any = None
    parameters: JsonObject = field(default_factory=dict, repr=False)


Tools = Sequence[Tool | Kit | Callable[..., Any]] | Kit


def as_tools(given: Tools) -> tuple[Tool, ...]:
    """Functions and kits become tools. Raises DefinitionError, also where two have one name."""
    if isinstance(given, Kit):
        given = [given]
    if isinstance(given, str | Mapping | Tool) or not isinstance(given, Sequence):
        raise DefinitionError(f"tools is a list of functions and toolkits, not {given!r}: write tools=[...]")
    found: list[Tool] = []
    for one in given:
        if isinstance(one, FunctionTool) and one.is_method:
            raise DefinitionError(
                f"tool {one.name}: {getattr(one, '__qualname__', one.name)} is a method: take it from an instance, "
                f"tools=[thing.{one.name}], or all of them, tools=[llm.Toolkit(thing)]"
            )
        if isinstance(one, Tool):
            found.append(one)
        elif isinstance(one, Kit):
            late = Late(name=f"late_{len(found)}", kit=one) if one.is_late else None
            found += one.now() if late is None else [late]
        elif isinstance(under := getattr(one, "__func__", None), FunctionTool):  # of a classmethod
            found.append(under.bound(getattr(one, "__self__", None)))
        elif callable(one):
            found.append(_made(one, None))
        else:
            raise DefinitionError(
                f"tools[{len(found)}] is {one!r}, which is neither a function nor a toolkit: write a def, or "
                f"llm.Toolkit(...) around an instance"
            )
    return distinct(found)


def distinct(tools: Sequence[Tool]) -> tuple[Tool, ...]:
    """Raises DefinitionError where two have one name."""
    seen: dict[str, Tool] = {}
    for one in tools:
        other = seen.setdefault(one.name, one)
        if other is not one and not isinstance(one, Late):
            raise DefinitionError(
                f"two tools are named {one.name!r} ({_origin(other)} and {_origin(one)}): a call could mean either; "
                f"say llm.tool(name=...), or Toolkit(...).prefixed(...)"
            )
    return tuple(seen.values())


def _origin(one: Tool) -> str:
    if isinstance(one, FunctionTool):
        return f"{getattr(one, '__module__', '?')}.{getattr(one, '__qualname__', one.name)}"
    return type(one.body).__name__


@dataclass(slots=True)
class _Arrival(Step[Sequence[Tool]]):
    """A step: a late kit's tools."""

    kit: Kit

    async def perform(self) -> Sequence[Tool]:
        """Ask for them."""
        return await self.kit.tools()


def arrived(tools: Sequence[Tool]) -> Machine[tuple[Tool, ...]]:
    """`tools` with those of late kits in their places. Raises DefinitionError, and what a kit raises."""
    if not any(isinstance(one, Late) for one in tools):
        return tuple(tools)
    found: list[Tool] = []
    for one in tools:
        if isinstance(one, Late):
            found += yield from take(_Arrival(one.kit))
        else:
            found.append(one)
    return distinct(found)
