"""`llm.wrap`: a maker's client whose calls take response_model=. Everything else of it is as it was.

For programs that were written for Instructor, and for those that hold a client anyway. New ones need none: @llm.call.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterable, Iterator
from typing import Any, Generic, Self, TypeVar, overload

from pydantic import BaseModel
from typing_extensions import TypeForm

from ..errors import UsageError
from ..exchange import exchange
from ..machine import Machine, adrive, drive
from ..partial import Partial
from ..retries import Retries
from ..streams import Stream
from .asking import OWN, Asked, Settings, asked, items_of, kind_of, retries_of
from .listeners import EventName, Handler, WrapHooks
from .makers import Maker, maker_of

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)


class _Resource:
    """Where answers are made. Arguments are the maker's, and

    response_model   the type of the result; None: the maker's own answer, untouched
    max_retries      attempts beyond the first, or llm.Retries
    context          what validators get as info.context; `validation_context` is the same
    strict           false: "25" is taken for 25
    token_budget     the most tokens of all attempts; timeout: seconds of all attempts
    hooks            WrapHooks of this call, beside the client's
    """

    def __init__(self, maker: Maker, settings: Settings, native: Any) -> None:
        self._maker = maker
        self._settings = settings
        self._native = native

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)

    def _untouched(self, given: dict[str, Any]) -> Any:
        given.pop("response_model", None)
        for name in sorted(OWN & given.keys()):
            raise UsageError(f"{self._maker.resource}.create: {name}= is for calls with response_model=", name)
        if self._settings.model is not None:
            given.setdefault("model", self._settings.model)
        return self._native.create(**given)

    def _asked(self, given: dict[str, Any], kind: Callable[[Any, str], Any]) -> Asked:
        where = f"{self._maker.resource}.create"
        return asked(self._maker, self._settings, given, kind(given.get("response_model"), where))

    def _refuse_stream(self, given: dict[str, Any]) -> None:
        if given.get("stream") is True:
            raise UsageError(
                f"{self._maker.resource}.create: of a result that comes in pieces there are create_partial (of one "
                f"object) and create_iterable (of many); leave stream out",
                "stream",
            )


class Creating(_Resource):
    """Of a synchronous client."""

    @overload
    def create(self, *, response_model: TypeForm[T], **given: Any) -> T: ...
    @overload
    def create(self, *, response_model: None = None, **given: Any) -> Any: ...
    def create(self, *, response_model: Any = None, **given: Any) -> Any:
        """The result; without response_model the maker's own answer. Raises CallFailed, UsageError."""
        if response_model is None:
            return self._untouched(given)
        return self.create_with_completion(response_model=response_model, **given)[0]

    def create_with_completion(self, *, response_model: TypeForm[T], **given: Any) -> tuple[T, Any]:
        """The result, and the maker's own object that it stood in."""
        self._refuse_stream(given)
        one = self._asked({"response_model": response_model, **given}, kind_of)
        reply = drive(exchange(one.draft))
        return reply.value, one.upstream.native

    @overload
    def create_partial(self, *, response_model: type[M], **given: Any) -> Generator[Partial[M] | M, None, None]: ...
    @overload
    def create_partial(self, *, response_model: TypeForm[T], **given: Any) -> Generator[Any, None, None]: ...
    def create_partial(self, *, response_model: Any, **given: Any) -> Generator[Any, None, None]:
        """What is known of the result, again and again while it comes, as Stream.partials tells it; the last is the
        result itself, validated.
        """
        return self._flow({"response_model": response_model, **given}, kind_of, is_list=False)

    @overload
    def create_iterable(self, *, response_model: type[M], **given: Any) -> Generator[M, None, None]: ...
    @overload
    def create_iterable(self, *, response_model: TypeForm[list[T]], **given: Any) -> Generator[T, None, None]: ...
    @overload
    def create_iterable(self, *, response_model: TypeForm[Iterable[M]], **given: Any) -> Generator[M, None, None]: ...
    @overload
    def create_iterable(
        self, *, response_model: TypeForm[Iterable[Any]], **given: Any
    ) -> Generator[Any, None, None]: ...
    @overload
    def create_iterable(self, *, response_model: TypeForm[T], **given: Any) -> Generator[T, None, None]: ...
    def create_iterable(self, *, response_model: Any, **given: Any) -> Generator[Any, None, None]:
        """Each object of a list as it closes, validated. `response_model` is the type of one, or a list of it."""
        return self._flow({"response_model": response_model, **given}, items_of, is_list=True)

    def _flow(
        self, given: dict[str, Any], kind: Callable[[Any, str], Any], *, is_list: bool
    ) -> Generator[Any, None, None]:
        one = self._asked(given, kind)
        stream = _stream(one)

        def flow() -> Generator[Any, None, None]:
            try:
                yield from stream.items() if is_list else stream.partials()
                value = stream.reply().value
            finally:
                stream.close()
            if not is_list:
                yield value

        return flow()


class AsyncCreating(_Resource):
    """Of an asynchronous client."""

    @overload
    async def create(self, *, response_model: TypeForm[T], **given: Any) -> T: ...
    @overload
    async def create(self, *, response_model: None = None, **given: Any) -> Any: ...
    async def create(self, *, response_model: Any = None, **given: Any) -> Any:
        """The result; without response_model the maker's own answer. Raises CallFailed, UsageError."""
        if response_model is None:
            return await self._untouched(given)
        return (await self.create_with_completion(response_model=response_model, **given))[0]

    async def create_with_completion(self, *, response_model: TypeForm[T], **given: Any) -> tuple[T, Any]:
        """The result, and the maker's own object that it stood in."""
        self._refuse_stream(given)
        one = self._asked({"response_model": response_model, **given}, kind_of)
        reply = await adrive(exchange(one.draft))
        return reply.value, one.upstream.native

    @overload
    def create_partial(self, *, response_model: type[M], **given: Any) -> Pieces[Partial[M] | M]: ...
    @overload
    def create_partial(self, *, response_model: TypeForm[T], **given: Any) -> Pieces[Any]: ...
    def create_partial(self, *, response_model: Any, **given: Any) -> Pieces[Any]:
        """See Creating; for `async for`."""
        return self._flow({"response_model": response_model, **given}, kind_of, is_list=False)

    @overload
    def create_iterable(self, *, response_model: type[M], **given: Any) -> Pieces[M]: ...
    @overload
    def create_iterable(self, *, response_model: TypeForm[list[T]], **given: Any) -> Pieces[T]: ...
    @overload
    def create_iterable(self, *, response_model: TypeForm[Iterable[M]], **given: Any) -> Pieces[M]: ...
    @overload
    def create_iterable(self, *, response_model: TypeForm[Iterable[Any]], **given: Any) -> Pieces[Any]: ...
    @overload
    def create_iterable(self, *, response_model: TypeForm[T], **given: Any) -> Pieces[T]: ...
    def create_iterable(self, *, response_model: Any, **given: Any) -> Pieces[Any]:
        """See Creating; for `async for`."""
        return self._flow({"response_model": response_model, **given}, items_of, is_list=True)

    def _flow(self, given: dict[str, Any], kind: Callable[[Any, str], Any], *, is_list: bool) -> Pieces[Any]:
        one = self._asked(given, kind)
        stream = _stream(one)

        async def flow() -> AsyncGenerator[Any, None]:
            try:
                async for found in stream.items() if is_list else stream.partials():
                    yield found
                value = (await stream.reply.aio()).value
            finally:
                await stream.aclose()
            if not is_list:
                yield value

        return Pieces(flow())


class Pieces(Generic[T]):
    """For `async for`, once; awaiting it first changes nothing, since some of Instructor's methods ask for that."""

    def __init__(self, flow: AsyncGenerator[T, None]) -> None:
        self._flow = flow

    def __aiter__(self) -> AsyncIterator[T]:
        return self._flow

    def __await__(self) -> Generator[Any, None, Self]:
        yield from ()
        return self

    async def aclose(self) -> None:
        """Closes the connection."""
        await self._flow.aclose()


R = TypeVar("R", bound=_Resource)


class Chat(Generic[R]):
    """The `chat` of `client.chat.completions`."""

    def __init__(self, native: Any, completions: R) -> None:
        self.completions = completions
        self._native = native

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)


class _Client(Generic[R]):
    def __init__(self, client: Any, maker: Maker, settings: Settings, resource: R) -> None:
        self.client = client
        self.hooks = settings.hooks
        self._settings = settings
        self._maker = maker
        self._resource = resource
        self.chat = Chat(getattr(client, "chat", client), resource)
        self.messages = resource

    def on(self, name: EventName, handler: Handler) -> None:
        """See WrapHooks."""
        self.hooks.on(name, handler)

    def off(self, name: EventName, handler: Handler) -> None:
        """See WrapHooks."""
        self.hooks.off(name, handler)

    def clear(self, name: EventName | None = None) -> None:
        """See WrapHooks."""
        self.hooks.clear(name)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.client, name)

    def __repr__(self) -> str:
        return f"llm.wrap({type(self.client).__name__} at {self._maker.base_url})"


class Wrapped(_Client[Creating]):
    """A synchronous client. `create` and its sisters stand on it, on `chat.completions` and on `messages`."""

    @overload
    def create(self, *, response_model: TypeForm[T], **given: Any) -> T: ...
    @overload
    def create(self, *, response_model: None = None, **given: Any) -> Any: ...
    def create(self, **given: Any) -> Any:
        """See Creating."""
        return self._resource.create(**given)

    def create_with_completion(self, *, response_model: TypeForm[T], **given: Any) -> tuple[T, Any]:
        """See Creating."""
        return self._resource.create_with_completion(response_model=response_model, **given)

    @overload
    def create_partial(self, *, response_model: type[M], **given: Any) -> Iterator[Partial[M] | M]: ...
    @overload
    def create_partial(self, *, response_model: TypeForm[T], **given: Any) -> Iterator[Any]: ...
    def create_partial(self, *, response_model: Any, **given: Any) -> Iterator[Any]:
        """See Creating."""
        return self._resource.create_partial(response_model=response_model, **given)

    @overload
    def create_iterable(self, *, response_model: type[M], **given: Any) -> Iterator[M]: ...
    @overload
    def create_iterable(self, *, response_model: TypeForm[list[T]], **given: Any) -> Iterator[T]: ...
    @overload
    def create_iterable(self, *, response_model: TypeForm[Iterable[M]], **given: Any) -> Iterator[M]: ...
    @overload
    def create_iterable(self, *, response_model: TypeForm[Iterable[Any]], **given: Any) -> Iterator[Any]: ...
    @overload
    def create_iterable(self, *, response_model: TypeForm[T], **given: Any) -> Iterator[T]: ...
    def create_iterable(self, *, response_model: Any, **given: Any) -> Iterator[Any]:
        """See Creating."""
        return self._resource.create_iterable(response_model=response_model, **given)


class AsyncWrapped(_Client[AsyncCreating]):
    """An asynchronous one; see Wrapped."""

    @overload
    async def create(self, *, response_model: TypeForm[T], **given: Any) -> T: ...
    @overload
    async def create(self, *, response_model: None = None, **given: Any) -> Any: ...
    async def create(self, **given: Any) -> Any:
        """See Creating."""
        return await self._resource.create(**given)

    async def create_with_completion(self, *, response_model: TypeForm[T], **given: Any) -> tuple[T, Any]:
        """See Creating."""
        return await self._resource.create_with_completion(response_model=response_model, **given)

    @overload
    def create_partial(self, *, response_model: type[M], **given: Any) -> Pieces[Partial[M] | M]: ...
    @overload
    def create_partial(self, *, response_model: TypeForm[T], **given: Any) -> Pieces[Any]: ...
    def create_partial(self, *, response_model: Any, **given: Any) -> Pieces[Any]:
        """See Creating; for `async for`."""
        return self._resource.create_partial(response_model=response_model, **given)

    @overload
    def create_iterable(self, *, response_model: type[M], **given: Any) -> Pieces[M]: ...
    @overload
    def create_iterable(self, *, response_model: TypeForm[list[T]], **given: Any) -> Pieces[T]: ...
    @overload
    def create_iterable(self, *, response_model: TypeForm[Iterable[M]], **given: Any) -> Pieces[M]: ...
    @overload
    def create_iterable(self, *, response_model: TypeForm[Iterable[Any]], **given: Any) -> Pieces[Any]: ...
    @overload
    def create_iterable(self, *, response_model: TypeForm[T], **given: Any) -> Pieces[T]: ...
    def create_iterable(self, *, response_model: Any, **given: Any) -> Pieces[Any]:
        """See Creating; for `async for`."""
        return self._resource.create_iterable(response_model=response_model, **given)


def wrapped(
    client: object, *, model: str | None, max_retries: int | Retries, schemas: bool | None, hooks: WrapHooks | None
) -> Wrapped | AsyncWrapped:
    """See wrap. Raises UsageError."""
    if isinstance(client, _Client):
        raise UsageError("this client is wrapped already; a second wrapping would try every attempt again")
    maker = maker_of(client)
    retries_of(max_retries, "llm.wrap")
    if hooks is not None and not isinstance(hooks, WrapHooks):
        raise UsageError(f"llm.wrap: hooks is llm.WrapHooks() with handlers, not {hooks!r:.80}", "hooks")
    if model is not None and not isinstance(model, str):
        raise UsageError(f"llm.wrap: model is the maker's name of one, not {model!r:.80}", "model")
    # One that is empty is false, and may get its handlers later.
    settings = Settings(model, max_retries, schemas, WrapHooks() if hooks is None else hooks)
    single: Any = client
    native = single.chat.completions if maker.package == "openai" else single.messages
    if maker.is_async:
        return AsyncWrapped(client, maker, settings, AsyncCreating(maker, settings, native))
    return Wrapped(client, maker, settings, Creating(maker, settings, native))


def _stream(one: Asked) -> Stream[Any]:
    def begin() -> Machine[Any]:
        yield from ()
        return one.draft

    return Stream(begin, one.draft.name, one.draft.output)
