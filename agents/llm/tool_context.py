"""`llm.Context[Deps]`: a parameter annotated so is given to a tool, or to a call's function, and told to no model.

tool_schema.py and call.py look for it. A parameter may have any name and stand anywhere.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import sys
import typing
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import FrameType, SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar

from pydantic_core.core_schema import is_instance_schema

from diptych.protos.messages import ToolCall

from .errors import DefinitionError

if TYPE_CHECKING:
    from .reply import Reply

D = TypeVar("D")


@dataclass(frozen=True, slots=True, kw_only=True)
class Context(Generic[D]):
    """What a tool may know of its call: the `deps` of the call or agent, the reply that calls it, its own call, the
    session, and whether a person approved. In a call's function there is no reply yet.
    """

    deps: D = field(repr=False)  # may hold passwords
    reply: Reply[Any] | None = field(default=None, repr=False)
    call: ToolCall | None = None
    session: str = ""
    is_approved: bool = False

    @classmethod
    def __get_pydantic_core_schema__(cls, source: object, handler: object) -> Any:
        return is_instance_schema(cls)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: object, handler: object) -> Any:
        raise DefinitionError(WITHIN)


WITHIN = (
    "Context in the wrong place: it stands in a type that models are told of; make it a parameter of a tool, or of a "
    "call's function: ctx: llm.Context[Deps]"
)
INJECTED: Any = None  # a default for Context parameters, so that type checkers do not ask callers for them


def hint_of(function: Callable[..., Any], parameter: inspect.Parameter, where: str) -> Any:
    """A parameter's annotation, resolved; names of functions around the definition count. Raises DefinitionError."""
    plain = _plain(function)
    globalns = getattr(plain, "__globals__", None) or vars(sys.modules.get(getattr(plain, "__module__", ""), typing))
    one = SimpleNamespace(__annotations__={"it": parameter.annotation})
    try:
        try:
            return typing.get_type_hints(one, globalns, include_extras=True)["it"]
        except NameError:
            return typing.get_type_hints(one, globalns, _names_around(globalns), include_extras=True)["it"]
    except NameError as exc:
        raise DefinitionError(
            f"{where}: the type of parameter {parameter.name!r} names {exc.name!r}, which is not defined here: define "
            f"or import it at the top of the module, outside `if TYPE_CHECKING`"
        ) from exc
    except Exception as exc:  # whatever evaluating the developer's own text raises
        raise DefinitionError(
            f"{where}: the type of parameter {parameter.name!r}, {parameter.annotation!r}, cannot be read: {exc}"
        ) from exc


def _names_around(globalns: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals is globalns:
            found = {**frame.f_locals, **found}
        frame = frame.f_back
    return found


def _plain(function: Any) -> Any:
    """The function below partials, wrappers, methods and objects that can be called."""
    while True:
        if hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        elif hasattr(function, "func") and hasattr(function, "keywords"):
            function = function.func
        elif hasattr(function, "__func__"):
            function = function.__func__
        elif not hasattr(function, "__globals__") and not isinstance(function, type) and callable(function):
            called = type(function).__call__
            if not hasattr(called, "__globals__"):
                return function
            function = called
        else:
            return function


def is_context(hint: Any) -> bool:
    """Whether a parameter of this type is given a Context."""
    while typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    return hint is Context or typing.get_origin(hint) is Context


def context_among(hints: Mapping[str, Any], where: str) -> str | None:
    """The name of the Context parameter. Raises DefinitionError where it stands in the wrong place."""
    found = [name for name, hint in hints.items() if is_context(hint)]
    if len(found) > 1:
        raise DefinitionError(
            f"{where}: Context in the wrong place: parameters {' and '.join(map(repr, found))} both are one: leave one"
        )
    for name, hint in hints.items():
        if name not in found and _holds_context(hint):
            raise DefinitionError(
                f"{where}: Context in the wrong place: it stands inside the type of parameter {name!r}: write "
                f"{name}: llm.Context[Deps], and nothing around it"
            )
    return found[0] if found else None


def _holds_context(hint: Any) -> bool:
    if hint is Context or typing.get_origin(hint) is Context:
        return True
    inner = hint if isinstance(hint, list) else typing.get_args(hint)
    return any(_holds_context(one) for one in inner)


def stands_within(kind: Any) -> bool:
    """Whether a Context is somewhere in a type, in the fields of its classes, too."""
    seen: set[int] = set()
    left = [kind]
    while left:
        one = left.pop()
        if is_context(one):
            return True
        if id(one) in seen:
            continue
        seen.add(id(one))
        if typing.get_origin(one) is not None:
            left += [typing.get_origin(one), *typing.get_args(one)]
        elif isinstance(one, type):
            for base in one.__mro__:
                for told in vars(base).get("__annotations__", {}).values():
                    left += _written(told, base)
    return False


def _written(told: Any, owner: type) -> list[Any]:
    """What an annotation names, where it is a text."""
    told = told.__forward_arg__ if isinstance(told, typing.ForwardRef) else told
    if not isinstance(told, str):
        return [told]
    found = []
    for dotted in re.findall(r"[A-Za-z_][\w.]*", told):
        first, *rest = dotted.split(".")
        one = vars(sys.modules.get(owner.__module__, typing)).get(first)
        for name in rest:
            one = getattr(one, name, None)
        found.append(one)
    return found


@dataclass(frozen=True, slots=True)
class Injection:
    """Where a call's function takes its Context; `at` counts parameters that can be given by place."""

    name: str
    at: int | None

    @classmethod
    def of(cls, function: Callable[..., Any], where: str) -> Injection | None:
        """None where it takes none. Raises DefinitionError."""
        with contextlib.suppress(KeyError, TypeError):  # TypeError: what is no key of a dictionary
            return _known[function]
        found = cls._found(function, where)
        with contextlib.suppress(TypeError):
            _known[function] = found
        return found

    @classmethod
    def _found(cls, function: Callable[..., Any], where: str) -> Injection | None:
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):
            return None
        hints = {}
        for one in parameters:
            try:
                hints[one.name] = hint_of(function, one, where)
            except DefinitionError:  # a call's function may have whatever annotations it likes
                if "Context" in str(one.annotation):
                    raise
        if (name := context_among(hints, where)) is None:
            return None
        places = [one.name for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
        return cls(name, places.index(name) if name in places else None)

    def filled(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], context: Context[Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with `context`, unless the caller gave one."""
        if isinstance(kwargs.get(self.name), Context) or any(isinstance(one, Context) for one in args):
            return args, kwargs
        if self.at is not None and self.at <= len(args):
            return (*args[: self.at], context, *args[self.at :]), kwargs
        return args, {**kwargs, self.name: context}


_known: weakref.WeakKeyDictionary[Callable[..., Any], Injection | None] = weakref.WeakKeyDictionary()
