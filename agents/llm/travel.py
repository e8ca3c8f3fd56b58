"""What of a reply goes through a pickle: what was asked and said, as data.

draft.py, tools.py and output.py ask here. Registries, functions and types are found again by their names; keys,
connections and what is the developer's own (deps, the context of validators, hooks) stay where they are, and going on
without them is refused.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import fields, is_dataclass
from operator import attrgetter
from types import FunctionType
from typing import TYPE_CHECKING, Any, get_args

from .errors import UsageError

if TYPE_CHECKING:
    from .draft import Draft
    from .tools import Tool

Place = tuple[str, str]  # module, name in it
_TOLD = "name model registry messages params output tools retries budget version begun reads_parts".split()


class Left:
    """In place of what did not travel."""

    def __repr__(self) -> str:
        return "LEFT"

    def __reduce__(self) -> str:
        return "LEFT"


LEFT: Any = Left()  # in fields of any type


def place_of(thing: Any) -> Place | None:
    """Where `thing`, or the tool that was made of it, is found again; None: it has no name in a module."""
    place = (getattr(thing, "__module__", None) or "", getattr(thing, "__qualname__", None) or "")
    if place[0] not in sys.modules:
        return None
    found = found_at(place)
    return place if found is thing or getattr(found, "function", None) is thing else None


def found_at(place: Place) -> Any:
    """What has this name there; None: nothing has."""
    module, name = place
    try:
        return attrgetter(name)(importlib.import_module(module))
    except (ImportError, AttributeError):
        return None


def has_name(kind: Any) -> bool:
    """Whether a type can be found again: it is a class of a module, or made of such; so is all that checks it."""
    if inner := get_args(kind):
        return all(has_name(one) for one in inner)
    if isinstance(kind, type | FunctionType):
        return kind.__module__ == "builtins" or place_of(kind) is not None
    if is_dataclass(kind):  # a validator of pydantic's in Annotated
        return all(has_name(getattr(kind, one.name)) for one in fields(kind))
    return True


def draft_told(draft: Draft[Any]) -> dict[str, Any]:
    """The fields of a draft that travel; `call`'s own hooks, cache, limiter and trace are left out."""
    told = {name: getattr(draft, name) for name in _TOLD}
    if draft.output not in (None, LEFT) and not has_name(draft.output.kind):
        told["output"] = LEFT
    for name in ("deps", "validation"):
        told[name] = None if getattr(draft, name) is None else LEFT
    return told | {"cache": False if draft.cache is False else None}


def draft_again(told: dict[str, Any]) -> Draft[Any]:
    """Of what draft_told gave."""
    from .draft import Draft

    return Draft(**told)


def check_whole(draft: Draft[Any]) -> None:
    """Raises UsageError where the next answer of `draft` would not be read as its last one was."""
    if draft.output is LEFT:
        raise UsageError(
            f"{draft.name}: its type did not travel with this reply: define it, and the functions that check it, at "
            f"the top of a module, or make the call anew",
            "output",
        )
    if draft.validation is LEFT:
        raise UsageError(
            f"{draft.name}: its validation did not travel with this reply: give it anew, "
            f"reply = dataclasses.replace(reply, draft=dataclasses.replace(reply.draft, validation=...))",
            "validation",
        )


def tool_told(tool: Tool) -> tuple[Place | None, dict[str, Any]]:
    """Where its function is, and its settings; without a place it can be told to a model, and not be run."""
    from .tools import Tool

    place, needs = place_of(getattr(tool, "function", None)), tool.needs_approval
    if callable(needs) and not has_name(needs):
        place, needs = None, True
    told = {one.name: getattr(tool, one.name) for one in fields(Tool) if one.name != "body"}
    return place, told | {"needs_approval": needs}


def tool_again(place: Place | None, told: dict[str, Any]) -> Tool:
    """Of what tool_told gave."""
    from .tools import Tool, of_function

    function = None if place is None else found_at(place)
    if function is None:
        return Tool(**told, body=LEFT)
    return of_function(getattr(function, "function", function), told)
