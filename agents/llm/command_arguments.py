"""Words of a command line, or members of a JSON object, as the arguments of a function, by its hints.

command.py and batch_items.py call it. It knows nothing of calls, agents and models.
"""

from __future__ import annotations

import collections.abc
import inspect
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from typing import Annotated, Any, cast, get_args, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from pydantic_core import ErrorDetails, from_json

from .errors import DefinitionError, UsageError
from .reports import pointer
from .tool_context import hint_of

Given = Sequence[tuple[str, str | None]]  # names and texts in their order; None: a name without a text
OWN_OPTIONS = frozenset({"arg", "model", "stream", "json", "help"})  # of the command itself
_LAZY = (collections.abc.Iterable, collections.abc.Iterator, collections.abc.Generator)  # pydantic reads these late
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_ONLY)
_MOST_TOLD = 5  # faults of one value


class WrongArguments(UsageError):
    """The command line cannot mean this function; `field` is the parameter, where it is one."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """`hint` is asked for only when a value is given: a hint that cannot be read hinders nobody who leaves it out."""

    name: str
    is_required: bool
    hint: Callable[[], Any]
    is_option: bool = True

    @property
    def label(self) -> str:
        """As a command line names it, or an object."""
        if not self.is_option:
            return self.name
        return f"--arg {self.name}=..." if self.name in OWN_OPTIONS else f"--{self.name.replace('_', '-')}"


def words_of(pairs: Iterable[str], rest: Sequence[str]) -> list[tuple[str, str | None]]:
    """Of NAME=VALUE in `pairs`, and of --NAME VALUE, --NAME=VALUE and --NAME in `rest`. Raises WrongArguments."""
    found: list[tuple[str, str | None]] = []
    for pair in pairs:
        name, sign, text = pair.partition("=")
        if not sign or not name:
            raise WrongArguments(f"--arg {pair}: write --arg NAME=VALUE")
        found.append((name, text))
    at = 0
    while at < len(rest):
        word = rest[at]
        at += 1
        if not word.startswith("--") or word.startswith(("--=", "---")) or word == "--":
            raise WrongArguments(f"{word!r} belongs to no parameter: write --NAME VALUE, texts with spaces in quotes")
        name, sign, text = word[2:].partition("=")
        if sign:
            found.append((name, text))
        elif at < len(rest) and not rest[at].startswith("--"):
            found.append((name, rest[at]))
            at += 1
        else:
            found.append((name, None))
    return found


def parameters_of(
    function: Callable[..., Any], without: str | None = None, *, are_options: bool = True
) -> dict[str, Parameter]:
    """Those that a command line, or an object, can give, by their names; `without` is one that somebody else gives."""
    found: dict[str, Parameter] = {}
    for one in inspect.signature(function).parameters.values():
        if one.kind in _NAMED and one.name != without:
            found[one.name] = Parameter(one.name, one.default is one.empty, _late_hint(function, one), are_options)
    return found


def rest_of(function: Callable[..., Any]) -> Parameter | None:
    """What `**NAME` of the function takes: arguments of any name."""
    for one in inspect.signature(function).parameters.values():
        if one.kind is one.VAR_KEYWORD:
            return Parameter(one.name, False, _late_hint(function, one))
    return None


def _late_hint(function: Callable[..., Any], one: inspect.Parameter) -> Callable[[], Any]:
    def hint() -> Any:
        return Any if one.annotation is one.empty else hint_of(function, one, _name(function))

    return hint


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)


def arguments(
    name: str, parameters: Mapping[str, Parameter], given: Given, *, others: Parameter | None = None
) -> dict[str, Any]:
    """The typed values of the parameters that are given. Raises WrongArguments that names the parameter: for one that
    is not there, one that is missing, and a value that its type does not take.
    """
    texts: dict[str, list[str | None]] = {}
    for said, text in given:
        key = said if said in parameters else said.replace("-", "_")
        off = parameters.get(key.removeprefix("no_")) if text is None and key not in parameters else None
        if off is not None and _is_flag(off.hint()):
            key, text = off.name, "false"
        if key not in parameters and others is None:
            raise WrongArguments(_unknown(name, said, parameters), said)
        texts.setdefault(key, []).append(text)
    _check_all_there(name, parameters, texts)
    values: dict[str, Any] = {}
    for key, several in texts.items():
        one = parameters.get(key) or Parameter(key, False, others.hint if others else lambda: Any)
        values[key] = _value(name, one, several)
    return values


def members(
    name: str, parameters: Mapping[str, Parameter], given: Mapping[str, Any], *, others: Parameter | None = None
) -> dict[str, Any]:
    """The same of values as JSON has them."""
    for said in given:
        if said not in parameters and others is None:
            raise WrongArguments(_unknown(name, said, parameters), said)
    _check_all_there(name, parameters, given)
    values: dict[str, Any] = {}
    for key, value in given.items():
        one = parameters.get(key) or others
        assert one is not None
        try:
            values[key] = _adapter(name, one).validate_python(value)
        except ValidationError as exc:
            raise WrongArguments(
                f"{name}: {key} {_short(repr(value))} is no {_kind(one.hint())}: {_faults(exc)}", key
            ) from exc
    return values


def bound(
    function: Callable[..., Any], values: Mapping[str, Any], without: str | None = None
) -> inspect.BoundArguments:
    """Values by their names as the function is called with them; `without` is one that somebody else gives."""
    signature, rest = inspect.signature(function), rest_of(function)
    takes = [one for one in signature.parameters.values() if one.name != without]
    named = {one.name: one.default for one in takes if one.kind is one.POSITIONAL_ONLY and one.default is not one.empty}
    own = {one.name for one in takes if one.kind in _NAMED}
    named |= {key: value for key, value in values.items() if key in own}
    if rest is not None:
        named[rest.name] = {key: value for key, value in values.items() if key not in own}
    return inspect.BoundArguments(signature.replace(parameters=takes), cast("Any", named))


def _check_all_there(name: str, parameters: Mapping[str, Parameter], given: Container[str]) -> None:
    missing = [one for one in parameters.values() if one.is_required and one.name not in given]
    if missing:
        told = ", ".join(f"{one.label} ({_told(one)})" for one in missing)
        raise WrongArguments(f"{name}: missing {told}", missing[0].name)


def _unknown(name: str, said: str, parameters: Mapping[str, Parameter]) -> str:
    there = ", ".join(one.label for one in parameters.values())
    close = get_close_matches(said.replace("-", "_"), parameters, n=1)
    hint = f": did you mean {parameters[close[0]].label}?" if close else ""
    return (
        f"{name} has no parameter {_short(repr(said))}{hint or ':'} {f'it takes {there}' if there else 'it takes none'}"
    )


def _told(one: Parameter) -> str:
    try:
        return _kind(one.hint())
    except DefinitionError:  # the hint cannot be read; whoever gives a value is told so
        return "?"


def _kind(hint: Any) -> str:
    while get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    return "text" if hint is Any or hint is str else inspect.formatannotation(hint)


def _value(name: str, one: Parameter, texts: Sequence[str | None]) -> Any:
    hint = one.hint()
    adapter = _adapter(name, one)
    if None in texts:
        if not _is_flag(hint):
            raise WrongArguments(f"{name}: {one.label} needs a value ({_told(one)})", one.name)
        texts = ["true" if text is None else text for text in texts]
    whole = [text for text in texts if text is not None]
    faults: list[ValidationError] = []
    for candidate in _candidates(whole):
        try:
            return adapter.validate_python(candidate)
        except ValidationError as exc:
            faults.append(exc)
    said = repr(_short(whole[0])) if len(whole) == 1 else f"is given {len(whole)} times, and all of them together"
    why = _no_json(whole[0]) or _faults(max(faults, key=_depth))
    raise WrongArguments(f"{name}: {one.label.removesuffix('=...')} {said} is no {_kind(hint)}: {why}", one.name)


def _is_flag(hint: Any) -> bool:
    return bool in (hint, *get_args(hint))


def _no_json(text: str) -> str:
    """What is wrong with a text that was meant to be an object or a list."""
    if text.lstrip()[:1] in ("{", "["):
        try:
            from_json(text)
        except ValueError as exc:
            return f"this is no JSON: {exc}"
    return ""


def _depth(fault: ValidationError) -> int:
    """Of what a value may mean, that was nearest which is wrong only far inside."""
    return max(len(error["loc"]) for error in fault.errors(include_url=False, include_input=False))


@lru_cache(maxsize=256)  # of a file with many lines, each asks for the same
def _adapter(name: str, one: Parameter) -> TypeAdapter[Any]:
    hint = one.hint()
    if get_origin(hint) in _LAZY:
        hint = list[get_args(hint)[0]]  # type: ignore[misc]  # pydantic reads it as any other
    try:
        return TypeAdapter(hint)
    except (PydanticUserError, DefinitionError) as exc:  # the latter of a Context inside it
        place = "text on a command line" if one.is_option else "JSON"
        raise WrongArguments(
            f"{name}: {one.label} is a {_kind(hint)}, which no {place} can be: "
            f"write a function around it that takes texts, numbers, lists or models",
            one.name,
        ) from exc


def _candidates(texts: Sequence[str]) -> Iterable[Any]:
    """What texts may mean, the nearest first: the text itself, the JSON in it, lists of either."""
    documents = []
    for text in texts:
        try:
            documents.append(from_json(text))
        except ValueError:
            break
    is_json = len(documents) == len(texts)
    if len(texts) == 1:
        yield texts[0]
        if is_json:
            yield documents[0]
    yield list(texts)
    if is_json:
        yield documents


def _faults(fault: ValidationError) -> str:
    errors = fault.errors(include_url=False, include_input=False)
    told = "; ".join(map(_fault, errors[:_MOST_TOLD]))
    return told if len(errors) <= _MOST_TOLD else f"{told}; and {len(errors) - _MOST_TOLD} more"


def _fault(error: ErrorDetails) -> str:
    where = pointer(error["loc"])
    return f"{where}: {error['msg']}" if where else error["msg"]


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
