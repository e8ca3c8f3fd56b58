"""What of a type matters while its JSON is still coming: where objects have fields, and where text may be shown as it
grows. assembling.py builds what is known by it.

Types come from their annotations. What nobody can tell from them is free: plain objects, lists, any text.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import types
from collections.abc import Mapping, Sequence
from typing import (
    Annotated,
    Any,
    NewType,
    NotRequired,
    Required,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import typing_extensions
from pydantic import AliasChoices, AliasPath, BaseModel, RootModel
from pydantic.fields import FieldInfo
from typing_extensions import ReadOnly, TypeAliasType

from .partial import Partial, Path, partial_class

_LISTS = (list, set, frozenset, tuple, collections.abc.Sequence, collections.abc.Set, collections.abc.Iterable)
_OBJECTS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)


class Shape:
    """`grows`: a text here may be shown before its end. This one is of what nobody knows more of."""

    grows = True

    def below(self, key: str | int) -> Shape:
        """Of the member `key`."""
        return FREE

    def opened(self, kind: str) -> Shape:
        """What it is, now that an object, "{", or a list, "[", stands here."""
        return self

    def partial(self) -> type[Partial[Any]] | None:
        """The class of the object here, where it has fields."""
        return None


class _Closed(Shape):
    """Numbers, words of a fixed list, dates: half of one is another one."""

    grows = False


FREE = Shape()
CLOSED = _Closed()


class _List(Shape):
    grows = False

    def __init__(self, items: Sequence[Any], rest: Any) -> None:
        self._items = [_Late(item) for item in items]
        self._rest = _Late(rest)

    def below(self, key: str | int) -> Shape:
        """See Shape."""
        is_own = isinstance(key, int) and key < len(self._items)
        return self._items[key].shape if isinstance(key, int) and is_own else self._rest.shape

    def opened(self, kind: str) -> Shape:
        """See Shape."""
        return self if kind == "[" else FREE


class _Object(Shape):
    grows = False

    def __init__(self, fields: Mapping[str, Any], rest: Any = Any) -> None:
        self._fields = {name: _Late(kind) for name, kind in fields.items()}
        self._rest = _Late(rest)

    def below(self, key: str | int) -> Shape:
        """See Shape."""
        return self._fields.get(str(key), self._rest).shape

    def opened(self, kind: str) -> Shape:
        """See Shape."""
        return self if kind == "{" else FREE


class _Fields(_Object):
    """An object with attributes: a model, a dataclass, or any of several."""

    def __init__(self, kinds: tuple[type, ...]) -> None:
        names: dict[str, list[Path]] = {}
        fields: dict[str, list[Any]] = {}
        for kind in kinds:
            for name, annotation, paths in _fields_of(kind):
                names.setdefault(name, []).extend(path for path in paths if path not in names.get(name, []))
                for path in paths:
                    if len(path) == 1:
                        fields.setdefault(str(path[0]), []).append(annotation)
        super().__init__({key: _one_of(found) for key, found in fields.items()})
        self._partial = partial_class(kinds, {name: tuple(paths) for name, paths in names.items()})

    def partial(self) -> type[Partial[Any]] | None:
        """See Shape."""
        return self._partial


class _Union(Shape):
    def __init__(self, members: Sequence[Shape]) -> None:
        self._members = members
        self.grows = any(member.grows for member in members)

    def opened(self, kind: str) -> Shape:
        """See Shape."""
        fitting = [found for member in self._members if (found := member.opened(kind)) not in (FREE, CLOSED)]
        return fitting[0] if fitting else FREE


class _Late:
    """The shape of a type when it is asked for: types hold themselves."""

    __slots__ = ("_kind", "_shape")

    def __init__(self, kind: Any) -> None:
        self._kind = kind
        self._shape: Shape | None = None

    @property
    def shape(self) -> Shape:
        if self._shape is None:
            self._shape = shape_of(self._kind)
        return self._shape


_of_class: dict[tuple[type, ...], _Fields] = {}


def shape_of(kind: Any) -> Shape:
    """Of an annotation; never raises for one that pydantic takes."""
    kind = _plain(kind)
    origin = get_origin(kind) or kind
    arguments = get_args(kind)
    if origin is Union or origin is types.UnionType:
        return _of_union(arguments)
    if kind is str or kind is Any or kind is object:
        return FREE
    if isinstance(kind, type) and issubclass(kind, RootModel):
        return shape_of(kind.model_fields["root"].annotation)
    if isinstance(kind, type) and (issubclass(kind, BaseModel) or dataclasses.is_dataclass(kind)):
        return _of_fields((kind,))
    if dataclasses.is_dataclass(origin) and isinstance(origin, type):
        return _of_fields((origin,))
    if typing_extensions.is_typeddict(origin):  # typing's own does not know those of typing_extensions
        return _Object(_hints(origin))
    if isinstance(origin, type) and issubclass(origin, tuple) and hasattr(origin, "_fields"):
        hints = _hints(origin)
        return _List([hints.get(name, Any) for name in origin._fields], Any)
    if origin is tuple and arguments and arguments[-1:] != (...,):
        return _List(arguments, Any)
    if origin in _LISTS:
        return _List((), arguments[0] if arguments else Any)
    if origin in _OBJECTS:
        return _Object({}, arguments[1] if len(arguments) == 2 else Any)
    return CLOSED


def item_of(kind: Any) -> Any:
    """The type of a list's items; None of what is no list, or one whose items have a type each."""
    kind = _plain(kind)
    if isinstance(kind, type) and issubclass(kind, RootModel):
        return item_of(kind.model_fields["root"].annotation)
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    if origin is tuple and arguments[1:] != (...,):
        return None
    if origin not in _LISTS:
        return None
    return arguments[0] if arguments else Any


def _plain(kind: Any) -> Any:
    """Without what says nothing of the value's form."""
    while True:
        origin = get_origin(kind)
        if origin in (Annotated, Required, NotRequired, ReadOnly):
            kind = get_args(kind)[0]
        elif isinstance(kind, TypeAliasType) or (origin is None and hasattr(kind, "__value__")):
            kind = kind.__value__
        elif isinstance(kind, NewType):
            kind = kind.__supertype__
        elif isinstance(kind, TypeVar):
            kind = kind.__bound__ or (Union[kind.__constraints__] if kind.__constraints__ else Any)  # noqa: UP007
        else:
            return kind


def _of_union(arguments: Sequence[Any]) -> Shape:
    members = [_plain(one) for one in arguments]
    classes = tuple(
        one
        for one in members
        if isinstance(one, type)
        and not issubclass(one, RootModel)
        and (issubclass(one, BaseModel) or dataclasses.is_dataclass(one))
    )
    others = [shape_of(one) for one in members if one not in classes and one is not type(None)]
    return _Union([*([_of_fields(classes)] if classes else []), *others])


def _of_fields(kinds: tuple[type, ...]) -> Shape:
    if kinds not in _of_class:
        if len(_of_class) > 10_000:  # programs that make their types anew for each call
            _of_class.clear()
        _of_class[kinds] = _Fields(kinds)
    return _of_class[kinds]


def _one_of(kinds: list[Any]) -> Any:
    return kinds[0] if len(kinds) == 1 else Union[tuple(kinds)]  # noqa: UP007


def _fields_of(kind: type) -> list[tuple[str, Any, tuple[Path, ...]]]:
    """(attribute, annotation, where its value may stand in the JSON)."""
    told: Mapping[str, FieldInfo] | None = getattr(kind, "model_fields", None) or getattr(
        kind, "__pydantic_fields__", None
    )
    if told is None:
        hints = _hints(kind)
        return [(one.name, hints.get(one.name, Any), ((one.name,),)) for one in dataclasses.fields(kind) if one.init]
    return [(name, field.annotation, _paths(name, field, kind)) for name, field in told.items()]


def _paths(name: str, field: FieldInfo, kind: type) -> tuple[Path, ...]:
    alias = field.validation_alias
    found: list[Path] = []
    for one in alias.choices if isinstance(alias, AliasChoices) else [alias]:
        if isinstance(one, AliasPath):
            found.append(tuple(one.path))
        elif one is not None:
            found.append((one,))
    config: Mapping[str, Any] = getattr(kind, "model_config", None) or getattr(kind, "__pydantic_config__", None) or {}
    if not found or config.get("populate_by_name") or config.get("validate_by_name"):
        found.append((name,))
    return tuple(found)


def _hints(kind: Any) -> dict[str, Any]:
    try:
        return get_type_hints(kind, include_extras=True)
    except Exception:  # names that only pydantic, which was told of another namespace, could find
        return {}
