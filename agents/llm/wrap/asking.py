"""The arguments of a wrapped client's call, in the maker's words and Instructor's, as one of our drafts.

client.py asks for it. The caller's own lists and dicts are copied, never changed.
"""

from __future__ import annotations

import collections.abc
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, get_args, get_origin

from diptych.protos.errors import DiptychError, InvalidRequest
from diptych.protos.messages import Message
from diptych.protos.openai_messages import read_messages

from ..draft import Draft
from ..errors import UsageError
from ..output import Output
from ..params import Params
from ..registry import Registry, default_registry
from ..retries import Budget, Retries
from .listeners import WrapHooks, heard
from .makers import Maker
from .upstreams import SdkUpstream

JsonObject = dict[str, Any]
logger = logging.getLogger(__name__)
# Ours and Instructor's; everything else is the maker's.
OWN = frozenset(
    "response_model max_retries context validation_context strict token_budget hooks".split(),
)
_REFUSED = {
    "tools": "tools and a result's type together are for @llm.call(output=..., tools=[...])",
    "tool_choice": "tools and a result's type together are for @llm.call(output=..., tools=[...])",
    "functions": "tools and a result's type together are for @llm.call(output=..., tools=[...])",
    "function_call": "tools and a result's type together are for @llm.call(output=..., tools=[...])",
    "response_format": "response_model says what the answer's form is",
    "stream_options": "usage is always asked for",
    "mode": "there are no modes: the answer is held to the schema, or told of it (llm.wrap(client, schemas=False))",
}
_SLOT = re.compile(r"\{\{\s*([A-Za-z_][A-Za-z0-9_]*)\s*\}\}")


@dataclass(frozen=True, slots=True)
class Settings:
    """Of a wrapped client, for all its calls."""

    model: str | None
    max_retries: int | Retries
    schemas: bool | None
    hooks: WrapHooks


@dataclass(frozen=True, slots=True)
class Asked:
    """One call."""

    draft: Draft[Any]
    upstream: SdkUpstream


def asked(maker: Maker, settings: Settings, given: Mapping[str, Any], kind: Any) -> Asked:
    """A call for a result of the type `kind`. Raises UsageError, DefinitionError."""
    where = f"{maker.resource}.create"
    arguments = {name: value for name, value in given.items() if not _is_unset(value)}
    arguments.pop("response_model", None)
    retries = retries_of(arguments.pop("max_retries", settings.max_retries), where)
    _check_kinds(arguments, where)
    hooks = settings.hooks + hooks if (hooks := arguments.pop("hooks", None)) is not None else settings.hooks
    is_strict = arguments.pop("strict", True)
    seconds = arguments.pop("timeout") if isinstance(arguments.get("timeout"), (int, float)) else None
    tokens = arguments.pop("token_budget", None)
    context = _context(arguments, where)
    model = arguments.pop("model", None) or settings.model
    if not isinstance(model, str) or not model:
        raise UsageError(f"{where}: which model? Give model=..., here or to llm.wrap(client, model=...)", "model")
    messages = _messages(maker, arguments, where)
    _warn_of_slots(messages, context)
    limit_name, limit = _limit(maker, arguments)
    _refuse(arguments, where)
    _check_known(arguments, maker, where)
    output = _output_of(kind, where, is_strict)
    has_schemas = settings.schemas if maker.knows_schemas(model) else False
    upstream = SdkUpstream(maker, given=arguments, has_schemas=has_schemas, limit_name=limit_name)
    registry = Registry(hooks=default_registry().hooks)
    registry.add(upstream.name, upstream)
    params = Params() if limit is None else Params(max_tokens=limit)
    if not upstream.profile.has_schemas and maker.package == "anthropic":
        params["on_unsupported"] = "drop"  # that the answer be JSON, which the words say already
    draft: Draft[Any] = Draft(
        name=f"{where}(response_model={output.name})",
        model=f"{upstream.name}/{model}",
        registry=registry,
        messages=messages,
        params=params,
        output=output,
        retries=retries,
        budget=Budget(tokens=tokens, seconds=seconds) if tokens is not None or seconds is not None else None,
        validation=context,
        hooks=heard(hooks, upstream, retries.attempts),
    )
    return Asked(draft, upstream)


def _check_kinds(arguments: JsonObject, where: str) -> None:
    """Of ours; what is the maker's, its client looks at."""
    hooks = arguments.get("hooks")
    if hooks is not None and not isinstance(hooks, WrapHooks):
        raise UsageError(f"{where}: hooks is llm.WrapHooks() with handlers, not {hooks!r:.80}", "hooks")
    if not isinstance(arguments.get("strict", True), bool):
        raise UsageError(f"{where}: strict is true or false, not {arguments['strict']!r:.80}", "strict")


def _output_of(kind: Any, where: str, is_strict: bool) -> Output[Any]:
    try:
        hash(kind)
    except TypeError:
        return Output(kind, name=where, is_strict=is_strict)
    return _kept_output(kind, where, is_strict)


@lru_cache(maxsize=256)  # making a schema takes as long as all the rest of a call
def _kept_output(kind: Any, where: str, is_strict: bool) -> Output[Any]:
    return Output(kind, name=where, is_strict=is_strict)


def kind_of(response_model: Any, where: str) -> Any:
    """`response_model` as a type of ours. Raises UsageError."""
    if response_model is None:
        raise UsageError(f"{where} needs response_model=, the type of the result", "response_model")
    if get_origin(response_model) in (collections.abc.Iterable, collections.abc.Sequence):
        (inner,) = get_args(response_model)
        return list[inner]  # type: ignore[valid-type]  # a type that is known when it runs
    return response_model


def items_of(response_model: Any, where: str) -> Any:
    """The type of a list of them: of `T` as of `Iterable[T]` and `list[T]`."""
    kind = kind_of(response_model, where)
    return kind if get_origin(kind) is list else list[kind]  # type: ignore[valid-type]  # the same


def retries_of(given: object, where: str) -> Retries:
    """max_retries=n allows n attempts beyond the first. Raises UsageError."""
    if isinstance(given, Retries):
        if given.fallback:
            raise UsageError(
                f"{where}: a wrapped client has one place to ask; fallbacks are for @llm.call", "max_retries"
            )
        return given
    if isinstance(given, bool) or not isinstance(given, int) or given < 0:
        raise UsageError(
            f"{where}: max_retries is the number of attempts beyond the first, or llm.Retries(attempts=...), not "
            f"a {type(given).__name__} ({given!r:.80})",
            "max_retries",
        )
    return Retries(attempts=given + 1)


def plain(value: Any) -> Any:
    """A copy as JSON has it; objects of the makers (blocks of an earlier answer) become what they stand for."""
    if isinstance(value, Mapping):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, str) or not isinstance(value, collections.abc.Iterable) or hasattr(value, "to_dict"):
        return value.to_dict(mode="json") if hasattr(value, "to_dict") else value
    return [plain(inner) for inner in value]


def _context(arguments: JsonObject, where: str) -> Any:
    found = arguments.pop("context", None)
    other = arguments.pop("validation_context", None)
    if found is not None and other is not None:
        raise UsageError(f"{where}: context and validation_context are one thing; give one of them", "context")
    return other if found is None else found


def _messages(maker: Maker, arguments: JsonObject, where: str) -> tuple[Message, ...]:
    given = arguments.pop("messages", None)
    if isinstance(given, (str, Mapping)) or not isinstance(given, Sequence):
        raise UsageError(f"{where}: messages is a list of messages, as the maker's client takes it", "messages")
    said = plain(given)
    try:
        if maker.package == "openai":
            return read_messages(said)
        from diptych.protos.anthropic_messages import parse_messages

        system = arguments.pop("system", None)
        leading = 0
        while leading < len(said) and isinstance(said[leading], dict) and said[leading].get("role") == "system":
            leading += 1
        blocks = [*_blocks(plain(system)), *(block for one in said[:leading] for block in _blocks(one.get("content")))]
        body = {"model": "m", "max_tokens": 1, "messages": said[leading:], **({"system": blocks} if blocks else {})}
        return parse_messages(json.dumps(body).encode()).messages
    except InvalidRequest as exc:
        raise UsageError(f"{where}: {exc}", exc.param or "messages") from exc
    except (DiptychError, TypeError, RecursionError) as exc:
        raise UsageError(f"{where}: messages hold what JSON has not: {exc}", "messages") from exc


def _blocks(content: Any) -> list[Any]:
    if not content:
        return []
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _limit(maker: Maker, arguments: JsonObject) -> tuple[str, int | None]:
    """The most tokens, and by which of two names the caller speaks of them."""
    for name in ("max_completion_tokens", "max_tokens") if maker.package == "openai" else ("max_tokens",):
        if name in arguments:
            limit: int | None = arguments.pop(name)
            return name, limit
    return "", None


def _refuse(arguments: JsonObject, where: str) -> None:
    for name, why in _REFUSED.items():
        if arguments.get(name) is not None:
            raise UsageError(f"{where}: no {name}= beside response_model=: {why}", name)
    if arguments.get("n") not in (None, 1):
        raise UsageError(f"{where}: one answer gives one result: no n= beside response_model=", "n")
    arguments.pop("stream", None)


def _check_known(arguments: JsonObject, maker: Maker, where: str) -> None:
    for name in arguments.keys() - maker.known:
        close = get_close_matches(name, maker.known | OWN, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UsageError(
            f"{where}: {maker.package}'s client has no argument {name!r}: {hint}Other fields of the body go by "
            f"extra_body",
            name,
        )


def _warn_of_slots(messages: Sequence[Message], context: Any) -> None:
    """Who comes from Instructor may expect that the context fills templates, too; here a message is data."""
    if not isinstance(context, Mapping):
        return
    for message in messages:
        for found in _SLOT.finditer(message.content):
            if found[1] in context:
                logger.warning(
                    "a message holds %s, and context has that name: messages are no templates here; write the value "
                    "into the message, or use llm.Template",
                    found[0],
                )
                return


def _is_unset(value: object) -> bool:
    """The makers' own ways to say nothing."""
    return type(value).__name__ in ("NotGiven", "Omit") and type(value).__module__.startswith(("openai", "anthropic"))
