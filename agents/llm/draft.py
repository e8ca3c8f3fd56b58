"""Everything of one call before it is sent, and the request that it becomes for a target.

call.py makes drafts, exchange.py sends them; a reply keeps its own, so that it can be gone on from.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, Literal, Self, TypeVar

from diptych.protos.errors import DiptychError
from diptych.protos.messages import Message, said
from diptych.protos.openai import ChatRequest, read_chat
from diptych.protos.providers.codec import Note, Outgoing
from diptych.protos.providers.request_fields import NO_SCHEMA

from .conversation import placed
from .errors import Unsupported, UsageError
from .params import Params, canonical, checked, in_own_words, own_name
from .registry import Registry
from .retries import Budget, Retries
from .travel import draft_again, draft_told
from .upstream import Upstream, with_extra

if TYPE_CHECKING:
    from .cache import Cache
    from .hooks import Hooks
    from .limiter import Limiter
    from .output import Output
    from .tools import Tool

T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft(Generic[T]):
    """One call. `name` is the function's; `validation` what validators get as `info.context`; `deps` what tools get.
    `cache`: None is the registry's, False none. `trace`: an OpenTelemetry context that the call's spans go below.
    `begun`: the beginning of the answer, an assistant's turn that a target goes on from within its form.
    `reads_parts`: who reads the stream wants its finished parts told, where the target can.
    """

    name: str
    model: str
    registry: Registry
    messages: tuple[Message, ...]
    params: Params = field(default_factory=lambda: Params())
    output: Output[T] | None = None
    tools: tuple[Tool, ...] = ()
    retries: Retries = field(default_factory=Retries)
    budget: Budget | None = None
    validation: Any = field(default=None, repr=False)  # what is in them, nobody knows: keys, connections, people's data
    deps: Any = field(default=None, repr=False)
    version: str = ""
    hooks: Hooks | None = None
    cache: Cache | Literal[False] | None = None
    trace: Any = None
    limiter: Limiter | None = None
    begun: Message | None = None
    reads_parts: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        return draft_again, (draft_told(self),)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, _: object) -> Self:
        return self

    def target(self) -> tuple[Upstream, str]:
        """Who is asked, and for which model. Raises UsageError."""
        return self.registry.resolve(self.model)

    @property
    def tool_names(self) -> tuple[str, ...]:
        """In their order."""
        return tuple(tool.name for tool in self.tools)


@dataclass(frozen=True, slots=True)
class Encoded:
    """A draft for its target. `request` is the canonical one."""

    upstream: Upstream
    model: str
    request: ChatRequest
    outgoing: Outgoing


def canonical_of(draft: Draft[Any], upstream: Upstream, model: str) -> ChatRequest:
    """The canonical request. Raises UsageError that names the parameter."""
    messages, fields = placed(draft.messages), canonical(draft.params, draft.tool_names)
    checked_media(messages, upstream, draft.model)
    if draft.tools:
        fields["tools"] = [tool.told() for tool in draft.tools]
    has_form = draft.output is None or _has_own_form(draft.params, upstream)
    if draft.output is not None and not has_form and not upstream.profile.has_schemas:
        fields["response_format"], has_form = {"type": "json_object"}, True
        messages = _told_the_schema(messages, draft.output.schema)
    if draft.begun is not None:
        messages, fields["continue_final_message"] = (*messages, draft.begun), True
    try:
        if draft.output is not None and not has_form:
            fields["response_format"] = draft.output.form
        return read_chat({"model": model, "messages": messages, **fields})
    except DiptychError as exc:
        field = getattr(exc, "param", None) or ""
        raise UsageError(f"{draft.name}: {in_own_words(str(exc), field)}", own_name(field)) from exc
    except (TypeError, RecursionError) as exc:
        raise UsageError(f"{draft.name}: the request holds what JSON has not: {exc}") from exc


def encoded(draft: Draft[Any], upstream: Upstream, model: str, request: ChatRequest, *, stream: bool) -> Encoded:
    """As it goes out. Raises Unsupported, UsageError."""
    try:
        outgoing = upstream.codec.encode(request, model=model, stream=stream, quirks=upstream.quirks)
        if draft.output is not None and _is_told_in_words(draft, outgoing):
            told = _told_the_schema(request.messages, draft.output.schema)  # of what it is not held to, it is told
            request = request.model_copy(update={"messages": told})
            outgoing = upstream.codec.encode(request, model=model, stream=stream, quirks=upstream.quirks)
    except DiptychError as exc:
        raise Unsupported(f"{draft.model}: {exc}", getattr(exc, "param", None) or "") from exc
    _permit(draft, outgoing)
    draft.registry.check_options(draft.params.get("options") or {})
    extra = {**_options(draft.params, upstream), **(draft.params.get("extra") or {})}
    is_json = request.output_form is not None and request.output_form.is_json
    if stream and draft.reads_parts and upstream.profile.tells_parts and is_json:
        extra["structured"] = True
    headers = {}
    if (session := draft.params.get("session")) and upstream.profile.has_sessions:
        headers["x-session-id"] = session
    return Encoded(upstream, model, request, with_extra(outgoing, extra, headers))


def _is_told_in_words(draft: Draft[Any], outgoing: Outgoing) -> bool:
    """Of models that take no schema at all, as of providers of that kind; of others that lack this one, on request."""
    lacking = [note for note in outgoing.unsupported if own_name(note.field).startswith("output")]
    is_permitted = draft.params.get("on_unsupported") in ("warn", "drop")
    return bool(lacking) and (is_permitted or all(note.words == NO_SCHEMA for note in lacking))


def _options(params: Params, upstream: Upstream) -> Mapping[str, Any]:
    options: Mapping[str, Any] = params.get("options") or {}
    return {**options.get(upstream.family, {}), **options.get(upstream.name, {})} if options else {}


def _has_own_form(params: Params, upstream: Upstream) -> bool:
    """Whether the developer holds the answer to a form of another kind, which gives what the type takes."""
    return any(name.startswith("guided_") for name in _options(params, upstream))


def _permit(draft: Draft[Any], outgoing: Outgoing) -> None:
    way = draft.params.get("on_unsupported", "error")
    lacking = tuple(note for note in outgoing.unsupported if draft.output is None or note.words != NO_SCHEMA)
    if not lacking or way == "drop":
        return
    words = f"{draft.model} has no words for {_listed(lacking)}"
    if way == "warn":
        logger.warning("%s: %s: not sent", draft.name, words)
        return
    raise Unsupported(
        f"{draft.name}: {words}: {_remedy(lacking)}, or say on_unsupported='warn'",
        own_name(lacking[0].field),
    )


def _remedy(notes: tuple[Note, ...]) -> str:
    if all(own_name(note.field).startswith("output") for note in notes):
        return "change the result's type"
    return f"leave {'it' if len(notes) == 1 else 'them'} out"


def _listed(notes: tuple[Note, ...]) -> str:
    return ", ".join(f"{own_name(note.field)}{f' ({note.words})' if note.words else ''}" for note in notes)


def checked_media(messages: tuple[Message, ...], upstream: Upstream, model: str) -> None:
    """Raises Unsupported for a part that the target cannot be sent."""
    for message in messages:
        for media in message.media:
            if media.kind not in upstream.profile.media:
                can = ", ".join(sorted(upstream.profile.media)) or "text alone"
                where = "" if message.result is None else f"the tool {message.result.name} gave one: "
                raise Unsupported(
                    f"{media.path}: {where}{model} takes no {media.kind} (it takes {can}): leave the part out, or ask "
                    f"another model",
                    media.path,
                )


def _told_the_schema(messages: tuple[Message, ...], schema: Mapping[str, Any]) -> tuple[Message, ...]:
    """For a target that cannot be held to a schema: told in words, in front of everything else."""
    words = "Answer with one JSON object that matches this JSON Schema, and nothing else:\n"
    told = words + json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
    first = messages[0]
    if first.role == "system":
        return (replace(first, parts=(*first.parts, *said("system", f"\n\n{told}").parts)), *messages[1:])
    return (said("system", told), *messages)


def with_params(draft: Draft[T], params: Mapping[str, Any], where: str) -> Draft[T]:
    """`draft` with other parameters over its own."""
    from .params import merged

    return replace(draft, params=merged(draft.params, checked(params, where)))
