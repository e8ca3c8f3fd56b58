"""`llm.call`: a function that returns a prompt becomes a call of a model.

One class, three verbs: `f(...)`, `await f.aio(...)`, `f.stream(...)`. Of an async function, `f(...)` is a coroutine.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import replace
from typing import Any, Concatenate, Generic, Literal, ParamSpec, Protocol, Self, TypeVar, Unpack, cast, overload

from typing_extensions import TypeForm

from .cache import Cache
from .conversation import Prompt, messages_of, told
from .draft import Draft
from .errors import DefinitionError, UsageError
from .exchange import exchange, prepared
from .hooks import Hooks
from .limiter import Limiter
from .machine import Awaited, Machine, adrive, drive, is_async, take
from .output import Output
from .params import Params, checked, layered, merged
from .registry import Registry, current, default_registry
from .reply import Reply
from .retries import Budget, Retries
from .streams import Stream
from .templated import templated
from .templates import Template
from .tool_context import Context, Injection
from .tools import Tools, arrived, as_tools
from .upstream import JsonObject
from .versions import remember, version_of

P = ParamSpec("P")
R = TypeVar("R")  # what f(...) is: a reply, or a coroutine of one
T = TypeVar("T")
Q = ParamSpec("Q")
S = TypeVar("S")
Asked = Prompt | Mapping[str, Any] | None  # what a call's function may return; the latter two beside a template


class Call(Generic[P, R, T]):
    """A function as a call. All of it is data: `with_` gives another one, nothing changes in place."""

    def __init__(self, function: Callable[P, Any], settings: Draft[T], model: str | None) -> None:
        self.__name__ = settings.name
        functools.update_wrapper(self, function, assigned=("__module__", "__qualname__", "__doc__"))
        self.function = function
        self.is_async = is_async(function)
        self.model = model
        self._settings = settings
        self._injection = Injection.of(function, settings.name)

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """The reply; of an async function, a coroutine of it."""
        machine = self.machine(*args, **kwargs)
        return cast("R", adrive(machine) if self.is_async else drive(machine))

    async def aio(self, /, *args: P.args, **kwargs: P.kwargs) -> Reply[T]:
        """The reply, on the running loop."""
        return await adrive(self.machine(*args, **kwargs))

    def stream(self, /, *args: P.args, **kwargs: P.kwargs) -> Stream[T]:
        """The answer as it comes, for `for` or `async for`."""
        held = self._held()  # what holds here, also where it is read behind the block of a `using`
        return Stream(lambda: self._filled(held, *args, **kwargs), self.__name__, self._settings.output)

    def machine(self, /, *args: P.args, **kwargs: P.kwargs) -> Machine[Reply[T]]:
        """For other machines."""
        return (yield from exchange((yield from self.draft(*args, **kwargs))))

    def draft(self, /, *args: P.args, **kwargs: P.kwargs) -> Machine[Draft[T]]:
        """The prompt, and everything else of the call, under the overrides that hold here."""
        return (yield from self._filled(self._held(), *args, **kwargs))

    def _filled(self, held: Mapping[str, Any], /, *args: P.args, **kwargs: P.kwargs) -> Machine[Draft[T]]:
        given, named, settings = args, kwargs, self._settings
        if self._injection is not None:
            context = Context(deps=settings.deps, session=held["params"].get("session") or "")
            given, named = self._injection.filled(args, kwargs, context)  # type: ignore[assignment]  # P has it
        prompt = self.function(*given, **named)
        if self.is_async:
            prompt = yield from take(Awaited(cast("Awaitable[Any]", prompt)))
        tools = yield from arrived(settings.tools)
        messages = messages_of(prompt, f"what {self.__name__}() returned")
        return replace(settings, **held, messages=messages, tools=tools)

    def blank(self) -> Draft[T]:
        """The draft without its prompt: what holds here, whatever the arguments are."""
        return replace(self._settings, **self._held())

    def _held(self) -> dict[str, Any]:
        """Of the draft: what only the call tells, by the registry and the blocks of `using` around it."""
        override, settings = current(), self._settings
        registry = override.registry or settings.registry
        return {
            "model": override.model or self.model or "",
            "registry": registry,
            "version": self.version,
            "params": merged(registry.params, settings.params, override.params),
        }

    @functools.cached_property
    def version(self) -> str:
        """12 letters that change with what is asked, but not with the model: see versions.py."""
        settings = self._settings
        return version_of(self.function, params=settings.params, output=settings.output, tools=settings.tools)

    def request(self, /, *args: P.args, **kwargs: P.kwargs) -> JsonObject:
        """The body exactly as it would be sent, without sending it."""

        def machine() -> Machine[JsonObject]:
            return (yield from prepared((yield from self.draft(*args, **kwargs)))).outgoing.body

        return drive(machine())

    def with_(
        self,
        model: str | None = None,
        *,
        registry: Registry | None = None,
        retries: Retries | None = None,
        budget: Budget | None = None,
        limiter: Limiter | None = None,
        hooks: Hooks | None = None,
        cache: Cache | Literal[False] | None = None,
        validation: Any = None,
        deps: Any = None,
        tools: Tools | None = None,
        strict: bool | None = None,
        **params: Unpack[Params],
    ) -> Call[P, R, T]:
        """The same call otherwise: what is given here holds over what was given before."""
        settings = self._settings
        output = settings.output
        _check_kinds(
            f"{self.__name__}.with_(...)",
            registry=registry,
            retries=retries,
            budget=budget,
            limiter=limiter,
            hooks=hooks,
            cache=cache,
        )
        changed = replace(
            settings,
            registry=registry or settings.registry,
            retries=retries or settings.retries,
            budget=budget or settings.budget,
            limiter=limiter or settings.limiter,
            hooks=settings.hooks if hooks is None else hooks,
            cache=settings.cache if cache is None else cache,
            validation=settings.validation if validation is None else validation,
            deps=settings.deps if deps is None else deps,
            tools=settings.tools if tools is None else as_tools(tools),
            output=output if strict is None or output is None else output.held(is_strict=strict),
            params=layered(settings.params, checked(params, f"{self.__name__}.with_(...)")),
        )
        return Call(self.function, changed, model or self.model)

    @overload
    def __get__(self, owner: None, kind: type) -> Self: ...
    @overload
    def __get__(self: Call[Concatenate[S, Q], R, T], owner: S, kind: type | None = None) -> Call[Q, R, T]: ...
    def __get__(self, owner: Any, kind: type | None = None) -> Any:
        if owner is None:
            return self
        return Call(functools.partial(self.function, owner), self._settings, self.model)


_KINDS: dict[str, tuple[type, str]] = {
    "registry": (Registry, "llm.Registry(...)"),
    "retries": (Retries, "llm.Retries(attempts=...)"),
    "budget": (Budget, "llm.Budget(tokens=..., dollars=..., seconds=...)"),
    "limiter": (Limiter, "llm.Limiter(...)"),
    "hooks": (Hooks, "llm.Hooks()"),
    "cache": (Cache, "llm.Cache(...), or False"),
}


def _check_kinds(where: str, **given: object) -> None:
    """Raises UsageError for a setting that is of another class than its own."""
    for name, value in given.items():
        kind, example = _KINDS[name]
        if value is None or isinstance(value, kind) or (name == "cache" and value is False):
            continue
        raise UsageError(f"{where}: {name} is {example}, not {told(value)}", name)


def _function_of(given: Callable[..., Any]) -> Callable[..., Any]:
    """A prompt's own function, so that a call of it is one of the function."""
    from .prompt import Prompt as WithoutModel

    return given.function if isinstance(given, WithoutModel) else given


class Decorator(Protocol[T]):
    """Of a function whose call gives a T."""

    @overload
    def __call__(self, function: Callable[P, Asked]) -> Call[P, Reply[T], T]: ...
    @overload
    def __call__(
        self, function: Callable[P, Coroutine[Any, Any, Asked]]
    ) -> Call[P, Coroutine[Any, Any, Reply[T]], T]: ...


class CallSettings(Params, total=False):
    """What `llm.call` takes beside the model, the result's type and the template; a prompt's `call` takes the same."""

    tools: Tools
    registry: Registry | None
    retries: Retries | None
    budget: Budget | None
    limiter: Limiter | None
    hooks: Hooks | None
    cache: Cache | Literal[False] | None
    validation: Any
    deps: Any
    strict: bool


@overload
def call(
    model: str | None = None,
    *,
    output: None = None,
    template: Template | None = None,
    **settings: Unpack[CallSettings],
) -> Decorator[str]: ...
@overload
def call(
    model: str | None = None,
    *,
    output: TypeForm[T],
    template: Template | None = None,
    **settings: Unpack[CallSettings],
) -> Decorator[T]: ...
def call(
    model: str | None = None,
    *,
    output: Any = None,
    template: Template | None = None,
    tools: Tools = (),
    registry: Registry | None = None,
    retries: Retries | None = None,
    budget: Budget | None = None,
    limiter: Limiter | None = None,
    hooks: Hooks | None = None,
    cache: Cache | Literal[False] | None = None,
    validation: Any = None,
    deps: Any = None,
    strict: bool = True,
    **params: Unpack[Params],
) -> Decorator[Any]:
    """Makes a function that returns a prompt a call.

    model       PREFIX/MODEL; None: it is told at the call, by `using` or `with_`
    output      the result's type, whatever pydantic takes; None: the text
    template    its slots are filled by the function's arguments, and by a dict that the function returns
    tools       functions that the model may call
    registry    where models are found; None: the process's own
    retries, budget   how often, and how far
    limiter     how many of its requests are on their way at once
    hooks       who hears what happens in it, besides the registry's hooks
    cache       where its answers are kept; None: where the registry says, False: nowhere
    validation  what validators get as info.context
    deps        what tools get as their Context's deps
    strict      false: "25" is taken for the number 25
    params      temperature, max_tokens, options of one provider, ...: see Params

    Raises DefinitionError, UsageError.
    """

    def decorate(function: Callable[..., Any]) -> Call[..., Any, Any]:
        name = getattr(function, "__name__", type(function).__name__)
        if not callable(function):
            raise DefinitionError(
                f"llm.call decorates functions; {function!r} is none: write @llm.call(...) above a def"
            )
        function = _function_of(function)
        if template is not None:
            function = templated(function, template)
        remember(function)
        _check_kinds(
            f"{name}: llm.call(...)",
            registry=registry,
            retries=retries,
            budget=budget,
            limiter=limiter,
            hooks=hooks,
            cache=cache,
        )
        settings: Draft[Any] = Draft(
            name=name,
            model="",
            registry=registry or default_registry(),
            messages=(),
            params=checked(params, f"{name}: llm.call(...)"),
            output=None if output is None or output is str else Output(output, name=name, is_strict=strict),
            tools=as_tools(tools),
            retries=retries or Retries(),
            budget=budget,
            limiter=limiter,
            hooks=hooks,
            cache=cache,
            validation=validation,
            deps=deps,
        )
        return Call(function, settings, model)

    if callable(model):
        raise DefinitionError("write @llm.call('PREFIX/MODEL') with parentheses: the model is its first argument")
    return cast("Decorator[Any]", decorate)
