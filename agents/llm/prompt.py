"""`llm.prompt`: a prompt without a model, for any of them.

`p("x")` is the conversation, which a call may return; `p.call("PREFIX/MODEL")` is a call of it. `version` tells
changes of the prompt's content apart.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, Self, TypeVar, Unpack, cast, overload

from typing_extensions import TypeForm

from diptych.protos.messages import Message

from .call import Asked, Call, CallSettings, call
from .conversation import messages_of
from .errors import DefinitionError
from .machine import is_async
from .reply import Reply
from .templated import of_template, templated
from .templates import Template
from .versions import remember, version_of

P = ParamSpec("P")
Q = ParamSpec("Q")
S = TypeVar("S")
T = TypeVar("T")
Messages = tuple[Message, ...]
Later = Coroutine[Any, Any, Messages]
V = TypeVar("V")  # what p(...) is: messages, or a coroutine of them


class Prompt(Generic[P, V]):
    """A function, or a template, as a prompt."""

    def __init__(self, function: Callable[P, Any]) -> None:
        functools.update_wrapper(self, function, assigned=("__module__", "__qualname__", "__doc__"), updated=())
        self.__name__: str = getattr(function, "__name__", type(function).__name__)
        self.function = function
        self.is_async = is_async(function)
        remember(function)

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> V:
        """The messages; of an async function, a coroutine of them. Raises UsageError."""
        found = self.aio(*args, **kwargs) if self.is_async else self._read(self.function(*args, **kwargs))
        return cast("V", found)

    async def aio(self, /, *args: P.args, **kwargs: P.kwargs) -> Messages:
        """The messages, on the running loop."""
        found = self.function(*args, **kwargs)
        return self._read(await cast("Awaitable[Any]", found) if self.is_async else found)

    def _read(self, found: object) -> Messages:
        return messages_of(found, f"what {self.__name__}() returned")

    @functools.cached_property
    def version(self) -> str:
        """12 letters that change with the prompt: see versions.py."""
        return version_of(self.function)

    @property
    def template(self) -> Template | None:
        """What it fills, where it has one."""
        found = getattr(self.function, "__dict__", {}).get("template")
        return found if isinstance(found, Template) else None

    @overload
    def call(
        self: Prompt[P, Later], model: str | None = None, *, output: None = None, **settings: Unpack[CallSettings]
    ) -> Call[P, Coroutine[Any, Any, Reply[str]], str]: ...
    @overload
    def call(
        self: Prompt[P, Later], model: str | None = None, *, output: TypeForm[T], **settings: Unpack[CallSettings]
    ) -> Call[P, Coroutine[Any, Any, Reply[T]], T]: ...
    @overload
    def call(
        self: Prompt[P, Messages], model: str | None = None, *, output: None = None, **settings: Unpack[CallSettings]
    ) -> Call[P, Reply[str], str]: ...
    @overload
    def call(
        self: Prompt[P, Messages], model: str | None = None, *, output: TypeForm[T], **settings: Unpack[CallSettings]
    ) -> Call[P, Reply[T], T]: ...
    def call(
        self, model: str | None = None, *, output: Any = None, **settings: Unpack[CallSettings]
    ) -> Call[P, Any, Any]:
        """A call of this prompt by `model`; takes what `llm.call` takes. Raises DefinitionError, UsageError."""
        return cast("Call[P, Any, Any]", call(model, output=output, **settings)(self.function))

    @overload
    def __get__(self, owner: None, kind: type) -> Self: ...
    @overload
    def __get__(self: Prompt[Concatenate[S, Q], V], owner: S, kind: type | None = None) -> Prompt[Q, V]: ...
    def __get__(self, owner: Any, kind: type | None = None) -> Any:
        if owner is None:
            return self
        return Prompt(functools.partial(self.function, owner))


class Decorator(Protocol):
    """Makes a function a prompt."""

    @overload
    def __call__(self, function: Callable[P, Asked]) -> Prompt[P, Messages]: ...
    @overload
    def __call__(self, function: Callable[P, Coroutine[Any, Any, Asked]]) -> Prompt[P, Later]: ...


@overload
def prompt(given: Template, /, *, name: str = "prompt") -> Prompt[..., Messages]: ...
@overload
def prompt(given: Callable[P, Asked], /) -> Prompt[P, Messages]: ...
@overload
def prompt(given: Callable[P, Coroutine[Any, Any, Asked]], /) -> Prompt[P, Later]: ...
@overload
def prompt(*, template: Template | None = None) -> Decorator: ...
def prompt(given: Any = None, /, *, template: Template | None = None, name: str = "") -> Any:
    """Makes a function that returns what a prompt may be, or a template, a prompt for any model.

    template    its slots are filled by the function's arguments, and by a dict that it returns
    name        of a prompt that is a template alone, for errors

    Raises DefinitionError.
    """
    if isinstance(given, Template):
        if template is not None:
            raise DefinitionError("llm.prompt(...) takes one template: give it first, or as template= of a function")
        return Prompt(of_template(given, name or given.name or "prompt"))
    if name:
        raise DefinitionError("llm.prompt(name=...) names a template; a function has its own name")

    def decorate(function: Callable[..., Any]) -> Prompt[..., Any]:
        if not callable(function):
            raise DefinitionError(
                f"llm.prompt decorates functions; {function!r} is none: write @llm.prompt above a def"
            )
        return Prompt(function if template is None else templated(function, template))

    return decorate if given is None else decorate(given)
