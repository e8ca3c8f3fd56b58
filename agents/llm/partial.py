"""What is known of a result while it comes: objects with the attributes of the result's own, some of them UNSET.

assembling.py fills them; shapes.py makes a class of them for each class of results. A Partial is a view: it shows what
is known now, and later more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NoReturn, TypeVar

from .errors import UsageError
from .reply import UNSET

if TYPE_CHECKING:
    from .assembling import Tree

T = TypeVar("T")
Path = tuple[str | int, ...]


class Partial(Generic[T]):
    """An object that is being told. Each field of T is an attribute: its value so far, or UNSET while nothing of it is
    known; never a default. Objects inside are Partials, lists grow, values are those of the JSON (a date is a text).

    A field that has the name of a method here hides it: `llm.Partial.to_dict(partial)` reaches it.
    """

    __slots__ = ("_partial_tree", "_partial_values")
    __hash__ = None  # type: ignore[assignment]  # it changes
    _partial_fields: ClassVar[Mapping[str, tuple[Path, ...]]] = {}
    _partial_kinds: ClassVar[tuple[type, ...]] = ()

    def __init__(self, tree: Tree) -> None:
        self._partial_tree = tree
        self._partial_values: dict[str, Any] = {}

    def to_dict(self) -> dict[str, Any]:
        """What is known now, as plain objects and lists that change no more; the names are those of the JSON."""
        return {name: plain(value) for name, value in self._partial_values.items()}

    def is_final(self, path: str = "") -> bool:
        """Whether what stands at `path`, a JSON pointer from here ("/items/0/name"), will not change: it is complete.
        Without a path: whether this object is. False for what is not there yet.
        """
        return self._partial_tree.is_final(self, steps_of(path))

    def validated(self) -> T:
        """This object as the type's own, with its validators run. Raises UsageError while it is not complete,
        InvalidOutput where it is not what the type takes.
        """
        if not Partial.is_final(self):
            raise UsageError(f"{type(self).__name__}: it is not complete, ask is_final() before: {self!r}")
        found: T = self._partial_tree.validated(self, self._partial_kinds)
        return found

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and name in self._partial_values:  # a field that the type does not name
            return self._partial_values[name]
        there = ", ".join(self._partial_fields)
        raise AttributeError(f"{type(self).__name__} has no {name!r}: its fields are {there}", name=name, obj=self)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Partial):
            return NotImplemented
        return self._partial_kinds == other._partial_kinds and self._partial_values == other._partial_values

    def __repr__(self) -> str:
        fields = {name: _at(self._partial_values, paths) for name, paths in self._partial_fields.items()}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in fields.items())})"

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *self._partial_values})

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{type(self).__name__} is a view of an answer that comes: keep its to_dict()")


def partial_class(kinds: tuple[type, ...], fields: Mapping[str, tuple[Path, ...]]) -> type[Partial[Any]]:
    """For objects of one of `kinds`; `fields` are the places where a value may stand, by attribute."""
    attributes: dict[str, Any] = {
        "__slots__": (),
        "__doc__": f"What is known of a {' or a '.join(kind.__name__ for kind in kinds)}.",
        "__module__": kinds[0].__module__,
        "_partial_fields": fields,
        "_partial_kinds": kinds,
    }
    own = {name: property(_reader(paths)) for name, paths in fields.items() if not name.startswith("_")}
    return type(f"Partial[{' | '.join(kind.__name__ for kind in kinds)}]", (Partial,), {**own, **attributes})


def _reader(paths: tuple[Path, ...]) -> Callable[[Partial[Any]], Any]:
    if len(paths) == 1 and len(paths[0]) == 1:
        key = str(paths[0][0])
        return lambda partial: partial._partial_values.get(key, UNSET)
    return lambda partial: _at(partial._partial_values, paths)


def _at(values: Mapping[str, Any], paths: Sequence[Path]) -> Any:
    for path in paths:
        found: Any = values
        for step in path:
            found = member(found, step)
        if found is not UNSET:
            return found
    return UNSET


def member(value: Any, step: str | int) -> Any:
    """What stands in `value` at `step`; UNSET where nothing does."""
    if isinstance(value, Partial):
        value = value._partial_values
    if isinstance(value, dict):
        return value.get(str(step), UNSET)
    if isinstance(value, list):
        try:
            return value[int(step)] if int(step) < len(value) else UNSET
        except (ValueError, IndexError):
            return UNSET
    return UNSET


def plain(value: Any) -> Any:
    """A copy without Partials."""
    if isinstance(value, Partial):
        return Partial.to_dict(value)
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, list):
        return [plain(one) for one in value]
    return value


def steps_of(pointer: str) -> list[str]:
    """Of a JSON pointer (RFC 6901). Raises UsageError."""
    if pointer and not pointer.startswith("/"):
        raise UsageError(f'{pointer!r} is no JSON pointer: it begins with "/", for example "/{pointer}"')
    return [step.replace("~1", "/").replace("~0", "~") for step in pointer.split("/")[1:]]
