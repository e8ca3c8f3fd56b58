"""The ends of every encoding: what a request asks that a format has no field for, and what a provider's quirks and the
client's provider_options do to a finished body.

For codecs whose format is not OpenAI's own. They know which fields they have said.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from diptych.protos.errors import InvalidRequest
from diptych.protos.openai import ChatRequest
from diptych.protos.strict_json import printable

from .codec import JsonObject, Note
from .quirks import Quirks

# Parameters of a request, with the values that ask for nothing. What is said of reasoning is each codec's own.
_PARAMETERS: dict[str, tuple[object, ...]] = {
    "temperature": (None,),
    "top_p": (None,),
    "top_k": (None, 0),
    "min_p": (None, 0),
    "seed": (None,),
    "repetition_penalty": (None, 1),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": ((),),
    "bad_words": ((),),
    "allowed_token_ids": (None,),
    "stop": ((),),
    "stop_token_ids": ((),),
    "include_stop_str_in_output": (None, False),
    "min_tokens": (None, 0),
    "ignore_eos": (None, False),
    "prompt_logprobs": (None,),
    "logprobs": (None, False),
    "user": (None,),
    "safety_identifier": (None,),
    "prompt_cache_key": (None,),
}
_NO_INSTRUCTIONS = frozenset({"user", "safety_identifier", "prompt_cache_key"})
# What chat templates are told that is no template's alone.
_REASONING = frozenset({"reasoning_effort", "enable_thinking", "thinking"})


NO_SCHEMA = "this model cannot be held to a schema"  # to no schema at all; who asks may tell it in words


def unsupported(path: str, words: str) -> Note:
    """The note of something that is not sent. What says for whom the request is made, or what is kept of its prompt,
    changes no answer: that alone is no reason to refuse it.
    """
    return Note("omitted" if path in _NO_INSTRUCTIONS else "unsupported", path, words)


def moved(path: str, words: str) -> Note:
    """The note of something that is said in another place or way."""
    return Note("moved", path, words)


def unsaid(request: ChatRequest, said: Collection[str], *, format_name: str) -> list[Note]:
    """A note for each parameter that asks for something and is none of `said`: those that choose tokens, and what only
    a server with a template and a grammar can do.
    """
    why = f"{format_name} has no such parameter"
    notes = [
        unsupported(name, why)
        for name, neutral in _PARAMETERS.items()
        if name not in said and getattr(request, name) not in neutral
    ]
    for name in request.template.variables:
        if name not in _REASONING:
            notes.append(unsupported(f"chat_template_kwargs.{name}", f"{format_name} has no template"))
    if not request.template.generation_prompt and not request.template.continue_final:
        notes.append(unsupported("add_generation_prompt", f"{format_name} always begins an answer"))
    form = request.output_form
    if form is not None and not form.is_json:
        notes.append(unsupported(form.path, f"{format_name} can be held to a JSON schema alone"))
    named = next((i for i, message in enumerate(request.messages) if message.name is not None), None)
    if named is not None:
        notes.append(unsupported(f"messages[{named}].name", f"{format_name} has no names of participants"))
    return notes


def user_of(request: ChatRequest) -> tuple[str, list[Note]]:
    """For whom the request is made, for formats with one field for it; empty: nobody is named."""
    user, other = request.safety_identifier or request.user or "", request.user
    if other is None or other == user:
        return user, []
    return user, [Note("omitted", "user", "safety_identifier says it, and there is one field for both")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """What a codec says of its bodies: `family` of provider_options; fields that options may not overwrite; by which
    path of the request a field of the body came, where it has another name.
    """

    family: str
    fixed: frozenset[str]
    said_as: Mapping[str, str] = field(default_factory=dict)


def finished(body: JsonObject, request: ChatRequest, quirks: Quirks, frame: Frame) -> tuple[JsonObject, list[Note]]:
    """`body` with what the provider's quirks take out, rename and add, and the client's options, which come last and
    win; object by object. Raises InvalidRequest for an option that may not be set.
    """
    notes: list[Note] = []
    found = dict(body)
    for name in sorted(quirks.unsupported):
        if _taken(found, name):
            notes.append(unsupported(frame.said_as.get(name, name), "the provider does not take it"))
    for name, other in quirks.rename.items():
        if name in found:
            found[other] = found.pop(name)
            notes.append(Note("renamed", frame.said_as.get(name, name), other))
    found, more = with_options(found, request.provider_options, quirks, frame)
    return found, notes + more


def with_options(
    body: JsonObject, all_options: Mapping[str, Mapping[str, Any]], quirks: Quirks, frame: Frame
) -> tuple[JsonObject, list[Note]]:
    """`body` with what is always sent, and the client's options for this family. Raises InvalidRequest for one that may
    not be set.
    """
    found = _merged(body, quirks.extra_body, "", [])
    place = f"provider_options.{frame.family}"
    options = all_options.get(frame.family, {})
    for name in options:
        if name in frame.fixed:
            path = f"{place}.{printable(name)}"
            told = "cannot be set: the request itself says it; leave it out of provider_options"
            raise InvalidRequest(f"{path} {told}", path)
    overwritten: list[str] = []
    found = _merged(found, options, "", overwritten)
    told = "stands in place of what the request's own fields say"
    return found, [moved(f"{place}.{printable(path)}", told) for path in overwritten]


def _taken(body: JsonObject, path: str) -> bool:
    """Whether the field at a dotted `path` was there; it leaves `body`, whose objects are not changed."""
    name, _, rest = path.partition(".")
    if name not in body:
        return False
    if not rest:
        del body[name]
        return True
    if not isinstance(body[name], dict):
        return False
    inner = dict(body[name])
    was_there = _taken(inner, rest)
    body[name] = inner
    return was_there


def _merged(body: JsonObject, more: Mapping[str, Any], path: str, overwritten: list[str]) -> JsonObject:
    """Neither is changed. Collects the paths of the fields that had another value."""
    found = dict(body)
    for name, value in more.items():
        inner, known = (f"{path}.{name}" if path else name), body.get(name)
        is_object = isinstance(value, Mapping)
        if is_object and isinstance(known, dict):
            found[name] = _merged(known, value, inner, overwritten)
            continue
        found[name] = _merged({}, value, inner, overwritten) if is_object else value
        if name in body and known != value:
            overwritten.append(inner)
    return found


def put(body: JsonObject, path: str, value: object) -> None:
    """Sets the field at a dotted path; `body` and its objects are the caller's own."""
    *folders, name = path.split(".")
    for folder in folders:
        body = body.setdefault(folder, {})
    body[name] = value
