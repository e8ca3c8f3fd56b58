"""A function's signature as a schema for models, and the arguments of a model's call as typed values for the function.

tools.py makes one of each function. Types are pydantic's; values are taken from JSON in its lax mode, so that "25" is
taken for 25: an argument put right costs nothing, asking the model again a whole turn.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, NotRequired

from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import PydanticUndefined, to_jsonable_python
from typing_extensions import TypedDict

from .closed_schema import fault_of
from .docstrings import described
from .errors import DefinitionError
from .strict_json import validated
from .tool_context import WITHIN, Context, context_among, hint_of, stands_within

JsonObject = dict[str, Any]
_PROPERTY = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class _Schemas(GenerateJsonSchema):
    """Without the titles that pydantic makes of names: they say nothing and cost tokens."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        """Never."""
        return False


@dataclass(frozen=True, slots=True, eq=False)
class Signature:
    """`parameters` is the JSON schema; `context` the parameter that is given the Context, where there is one."""

    description: str
    parameters: JsonObject
    context: str | None
    _adapter: TypeAdapter[dict[str, Any]] = field(repr=False)
    _by_place: tuple[inspect.Parameter, ...] = field(repr=False)
    _defaults: Mapping[str, Any] = field(repr=False)

    @classmethod
    def of(cls, function: Callable[..., Any], where: str, *, skips_first: bool = False) -> Signature:
        """Raises DefinitionError that names the parameter and the remedy."""
        parameters = _parameters(function, where, 1 if skips_first else 0)
        hints = {one.name: hint_of(function, one, where) for one in parameters}
        context = context_among(hints, where)
        description, told = described(_docstring(function))
        fields: dict[str, Any] = {}
        for one in parameters:
            if one.name != context:
                fields[one.name] = _field(one, hints[one.name], told.get(one.name, ""), where)
        adapter, schema = _adapter_of(fields, where)
        return cls(
            description,
            schema,
            context,
            adapter,
            tuple(one for one in parameters if one.kind is one.POSITIONAL_ONLY),
            {one.name: one.default for one in parameters if one.default is not one.empty},
        )

    def read(self, document: str) -> dict[str, Any]:
        """The typed values in a JSON object; what it leaves out is left out here, too. Raises pydantic's
        ValidationError.
        """
        found: dict[str, Any] = validated(self._adapter, document)
        return found

    def with_defaults(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Those, and the defaults of what is left out."""
        defaults = {name: value for name, value in self._defaults.items() if name != self.context}
        return {**defaults, **values}

    def arranged(self, values: Mapping[str, Any], context: Context[Any]) -> tuple[list[Any], dict[str, Any]]:
        """As the function takes them."""
        named = dict(values) | ({} if self.context is None else {self.context: context})
        by_place = []
        last = max((at for at, one in enumerate(self._by_place) if one.name in named), default=-1)
        for one in self._by_place[: last + 1]:
            by_place.append(named.pop(one.name) if one.name in named else one.default)
        return by_place, named


def _docstring(function: Any) -> str | None:
    plain = function
    while hasattr(plain, "func") and hasattr(plain, "keywords"):  # a partial's own docstring tells of partials
        plain = plain.func
    if inspect.isroutine(plain) or inspect.isclass(plain) or hasattr(plain, "__wrapped__"):
        found: str | None = plain.__doc__
    else:
        found = type(plain).__call__.__doc__ or type(plain).__doc__
    return found


def _parameters(function: Callable[..., Any], where: str, begin: int) -> list[inspect.Parameter]:
    try:
        found = list(inspect.signature(function).parameters.values())[begin:]
    except (TypeError, ValueError) as exc:
        raise DefinitionError(f"{where}: its signature cannot be read: write a def around it") from exc
    for one in found:
        if one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD):
            stars = "*" if one.kind is one.VAR_POSITIONAL else "**"
            raise DefinitionError(
                f"{where}: a model cannot be told of {stars}{one.name}: name each parameter, or take one list or dict"
            )
        if one.annotation is one.empty:
            own = "; a method is marked inside its class, and given from an instance" if one.name == "self" else ""
            raise DefinitionError(
                f"{where}: parameter {one.name!r} has no type hint, so that no schema can be told to a model: write "
                f"{one.name}: str, or whatever it is{own}"
            )
        if isinstance(one.default, FieldInfo):
            raise DefinitionError(
                f"{where}: the default of parameter {one.name!r} is a Field: write "
                f"{one.name}: Annotated[..., Field(...)], and the default behind it"
            )
    return found


def _field(one: inspect.Parameter, hint: Any, told: str, where: str) -> Any:
    if isinstance(hint, TypeVarLike):
        raise DefinitionError(f"{where}: the type of parameter {one.name!r} is the variable {hint}: write a real type")
    own = [info for info in typing.get_args(hint)[1:] if isinstance(info, FieldInfo)] if _is_annotated(hint) else []
    if any(info.default is not PydanticUndefined or info.default_factory is not None for info in own):
        raise DefinitionError(
            f"{where}: the default of parameter {one.name!r} stands in its Field, where a call of the function does "
            f"not find it: write it in the signature, {one.name}: ... = default"
        )
    shown = next((info.alias for info in own if info.alias), one.name)
    if not _PROPERTY.fullmatch(shown):
        raise DefinitionError(
            f"{where}: parameter {one.name!r} cannot be told to every provider as {shown!r}: use 1 to 64 of the "
            f"characters a-z, A-Z, 0-9, _, . and -, or give it Field(alias=...)"
        )
    extra: dict[str, Any] = {}
    if told and not any(info.description for info in own):
        extra["description"] = told
    if one.default is one.empty:
        return Annotated[hint, Field(**extra)] if extra else hint
    try:
        extra["json_schema_extra"] = {"default": to_jsonable_python(one.default, by_alias=True)}
    except Exception:  # a default without JSON stays the function's own business
        pass
    return NotRequired[Annotated[hint, Field(**extra)] if extra else hint]


TypeVarLike = (typing.TypeVar, typing.ParamSpec)


def _is_annotated(hint: Any) -> bool:
    return typing.get_origin(hint) is Annotated


def _adapter_of(fields: Mapping[str, Any], where: str) -> tuple[TypeAdapter[dict[str, Any]], JsonObject]:
    try:
        return _made(fields)
    except Exception as exc:
        for name, hint in fields.items():
            try:
                _made({name: hint})
            except Exception as inner:
                if stands_within(hint):
                    raise DefinitionError(f"{where}: parameter {name!r}: {WITHIN}") from inner
                raise DefinitionError(
                    f"{where}: the type of parameter {name!r} has no JSON schema ({fault_of(inner)}): use types that "
                    f"JSON can say (str, int, list, dict, a pydantic model, a dataclass, ...), or llm.Context for "
                    f"what models must not see"
                ) from inner
        raise DefinitionError(f"{where}: no schema can be made of its parameters: {exc}") from exc


def _made(fields: Mapping[str, Any]) -> tuple[TypeAdapter[dict[str, Any]], JsonObject]:
    typed: Any = TypedDict
    kind = typed("Arguments", dict(fields))
    kind.__pydantic_config__ = ConfigDict(extra="forbid")
    adapter: TypeAdapter[dict[str, Any]] = TypeAdapter(kind)
    schema = adapter.json_schema(schema_generator=_Schemas)
    schema = {name: value for name, value in schema.items() if name not in ("title", "description")}
    schema.setdefault("properties", {})
    return adapter, schema
