"""A canonical request as a body of OpenAI's chat format, in the variant that a provider's quirks ask for.

Called by openai_chat.py. Fields that the format's maker does not have (top_k, min_p, guided_regex, ...) are sent where
`quirks.rename` names them, if only to themselves; all others that cannot be said become notes.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any

from diptych.protos.openai import ChatRequest
from diptych.protos.openai_output import OutputForm
from diptych.protos.openai_tools import Tool, ToolUse

from .codec import JsonObject, Note, Outgoing
from .openai_chat_messages import MessageWriter
from .quirks import Quirks
from .reasoning_wish import thinking
from .request_fields import Frame, finished, moved, unsupported
from .schema_documents import Inexpressible
from .schemas import adapt_schema

PATH = "/chat/completions"
_MOST_KEPT = 16384  # characters of a schema that is adapted once for many requests
FIXED = frozenset({"model", "messages", "stream"})
_PLAIN = ("temperature", "top_p", "seed", "presence_penalty", "frequency_penalty", "user", "safety_identifier")
# Of other servers that speak the format, with the values that ask for nothing.
EXTENSIONS: dict[str, tuple[object, ...]] = {
    "top_k": (None, 0, -1),
    "min_p": (None, 0),
    "repetition_penalty": (None, 1),
    "bad_words": ((),),
    "allowed_token_ids": (None,),
    "stop_token_ids": ((),),
    "include_stop_str_in_output": (None, False),
    "min_tokens": (None, 0),
    "ignore_eos": (None, False),
    "prompt_cache_key": (None,),  # the maker's own, and refused by many that speak its format
}
# Answers of providers are read without them.
_UNREAD: dict[str, tuple[object, ...]] = {"logprobs": (None, False), "prompt_logprobs": (None,)}
_SWITCHES = frozenset({"reasoning_effort", "enable_thinking", "thinking"})
_NOT_IN_NAME = re.compile(r"[^A-Za-z0-9_-]")
_NO_FIELD = "this provider's format has no such field"


def encode(request: ChatRequest, *, model: str, stream: bool, quirks: Quirks) -> Outgoing:
    """`request` for `model`, one choice. Raises InvalidRequest for a part of a message that cannot be said."""
    family = quirks.family or "openai.chat"
    writer = MessageWriter(request, quirks, family)
    body: JsonObject = {"model": model, "messages": writer.written()}
    notes = writer.notes
    if stream:
        body["stream"] = True
        if quirks.stream_usage:
            body["stream_options"] = {"include_usage": True}
    limit = _limits(body, request, quirks)
    notes += _sampling(body, request, quirks)
    notes += _template(body, request, quirks)
    if request.tool_use is not None:
        notes += _tools(body, request.tool_use, quirks)
    if request.output_form is not None:
        notes += _form(body, request.output_form, quirks)
    said_as = {"max_completion_tokens": limit, "response_format": _form_path(request), "tools": _tools_path(request)}
    found, more = finished(body, request, quirks, Frame(family=family, fixed=FIXED, said_as=said_as))
    notes += [note for note in more if note.kind != "renamed" or note.words != note.field]
    if limit == "max_tokens" and "max_completion_tokens" in found:
        notes.append(Note("renamed", limit, "max_completion_tokens"))
    notes += _nested(found, request, quirks)
    return Outgoing(path=PATH, body=found, headers=dict(quirks.headers), notes=tuple(notes))


def _limits(body: JsonObject, request: ChatRequest, quirks: Quirks) -> str:
    """The most tokens. The field that asked for it."""
    if request.wanted_tokens is not None:
        body["max_completion_tokens"] = request.wanted_tokens[1]
        return request.wanted_tokens[0]
    if quirks.default_max_tokens is not None:
        body["max_completion_tokens"] = quirks.default_max_tokens
    return "max_completion_tokens"


def _sampling(body: JsonObject, request: ChatRequest, quirks: Quirks) -> list[Note]:
    notes: list[Note] = []
    for name in _PLAIN:
        if (value := getattr(request, name)) is not None:
            body[name] = value
    if request.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in request.logit_bias}
    if request.stop:
        body["stop"] = list(request.stop)
        most = 4 if quirks.most_stops is None else quirks.most_stops
        if len(request.stop) > most:
            body["stop"] = body["stop"][:most]
            notes.append(unsupported("stop", f"this provider takes {most} at most, and there are {len(request.stop)}"))
        if not body["stop"]:
            del body["stop"]
    for name, neutral in EXTENSIONS.items():
        value = getattr(request, name)
        if value in neutral:
            continue
        if name in quirks.rename:
            body[name] = list(value) if isinstance(value, tuple) else value
        else:
            notes.append(unsupported(name, _NO_FIELD))
    for name, neutral in _UNREAD.items():
        if getattr(request, name) not in neutral:
            notes.append(unsupported(name, "answers of providers come without them"))
    return notes


def _template(body: JsonObject, request: ChatRequest, quirks: Quirks) -> list[Note]:
    """What providers that have chat templates of their own may be told."""
    notes: list[Note] = []
    template = request.template
    if template.continue_final and "continue_final_message" in quirks.rename:
        body |= {"continue_final_message": True, "add_generation_prompt": False}
    elif not template.generation_prompt and not template.continue_final:
        notes.append(unsupported("add_generation_prompt", "a provider always begins an answer"))
    others = {name: value for name, value in template.variables.items() if name not in _SWITCHES}
    if others and "chat_template_kwargs" in quirks.rename:
        body["chat_template_kwargs"] = others
    else:
        notes += [unsupported(f"chat_template_kwargs.{name}", _NO_FIELD) for name in others]
    return notes


def _nested(body: JsonObject, request: ChatRequest, quirks: Quirks) -> list[Note]:
    """What is asked of reasoning, in fields that may lie within others."""
    notes: list[Note] = []
    wish = thinking(request)
    if wish.effort is not None:
        effort = quirks.effort_values.get(wish.effort, wish.effort)
        if not quirks.effort_field or not effort or "reasoning_effort" in quirks.unsupported:
            notes.append(unsupported(wish.path, f"this provider cannot be asked for the effort {wish.effort}"))
        else:
            _put(body, quirks.effort_field, effort)
            if wish.path != "reasoning_effort":
                notes.append(moved(wish.path, f"said as {quirks.effort_field}: {effort}"))
            elif quirks.effort_field != "reasoning_effort" or effort != wish.effort:
                notes.append(Note("renamed", wish.path, f"{quirks.effort_field}: {effort}"))
    if wish.budget is not None:
        if "reasoning_budget" in quirks.rename:
            _put(body, quirks.rename["reasoning_budget"], wish.budget)
            notes.append(Note("renamed", "reasoning_budget", quirks.rename["reasoning_budget"]))
        else:
            notes.append(unsupported("reasoning_budget", _NO_FIELD))
    return notes


def _put(body: JsonObject, path: str, value: object) -> None:
    """What stands there already came from the client's provider_options, and stays."""
    *outer, name = path.split(".")
    for step in outer:
        inner = body.get(step)
        body[step] = dict(inner) if isinstance(inner, dict) else {}
        body = body[step]
    body.setdefault(name, value)


def _tools(body: JsonObject, use: ToolUse, quirks: Quirks) -> list[Note]:
    path = "function_call" if use.is_legacy else "tool_choice"
    if use.mode == "none":
        if quirks.tool_choice == "auto_only":
            return [moved(path, "no tools are sent, so that none is called")]
        body |= {"tools": [_tool(tool, quirks) for tool in use.tools], "tool_choice": "none"}
        return []
    choice, notes = _choice(use, quirks, path)
    offered = use.allowed
    if isinstance(choice, dict):
        offered = use.tools
    elif len(offered) < len(use.tools) and not use.is_named:
        notes.append(moved(path, "the tools that are not allowed are not sent"))
    body["tools"] = [_tool(tool, quirks) for tool in offered]
    if choice != "auto":
        body["tool_choice"] = choice
    if quirks.parallel_tools and use.most_calls == 1 and not use.is_named:
        body["parallel_tool_calls"] = False
    elif not quirks.parallel_tools and not use.parallel:
        words = "this provider's model chooses for itself how often it calls"
        notes.append(unsupported("parallel_tool_calls", words))
    return notes


def _choice(use: ToolUse, quirks: Quirks, path: str) -> tuple[str | JsonObject, list[Note]]:
    """tool_choice, of tools that may be called."""
    named: JsonObject = {"type": "function", "function": {"name": use.names[0]}}
    if use.mode == "auto":
        return "auto", []
    match quirks.tool_choice:
        case "auto_only":
            return "auto", [unsupported(path, "this provider's model chooses for itself whether it calls")]
        case "no_required" if not use.is_named and len(use.names) > 1:
            return "auto", [unsupported(path, "this provider has no way to require a call of any function")]
        case "no_required":
            return named, []
        case "no_named" if use.is_named:
            return "required", [moved(path, "only the named function is sent, and a call is required")]
    return (named if use.is_named else "required"), []


def _tool(tool: Tool, quirks: Quirks) -> JsonObject:
    """Held to its schema where that is the provider's dialect as it is; where it had to be changed, arguments would
    come with nulls that the client's function does not know.
    """
    function: JsonObject = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    function["parameters"] = tool.parameters
    if quirks.schema_dialect not in ("openai", "none"):
        try:
            adapted, notes = adapt_schema(tool.parameters, quirks.schema_dialect)
        except Inexpressible:
            notes, adapted = (), {}
        if not notes and adapted == tool.parameters:
            function["strict"] = True
    return {"type": "function", "function": function}


def _form(body: JsonObject, form: OutputForm, quirks: Quirks) -> list[Note]:
    if not form.is_json:
        name = f"guided_{form.kind}"
        if name not in quirks.rename:
            return [unsupported(form.path, "this provider can be held to a JSON schema alone")]
        body[name] = list(form.value) if isinstance(form.value, tuple) else form.value
        return []
    if form.kind == "json_object":
        body["response_format"] = {"type": "json_object"}
        return []
    assert isinstance(form.value, str)
    notes: list[Note] = []
    named: dict[str, Any] = {"name": _NOT_IN_NAME.sub("_", form.name or "answer")}
    if form.description is not None:
        named["description"] = form.description
    try:
        adapt = _kept if len(form.value) <= _MOST_KEPT else _adapted
        text, changes = adapt(form.value, quirks.schema_dialect, form.path)
    except Inexpressible as exc:
        notes.append(unsupported(form.path, f"{exc.path.removeprefix(form.path).lstrip('.')} {exc.words}".strip()))
        if quirks.schema_dialect == "none":
            body["response_format"] = {"type": "json_object"}
            return notes
        named |= {"schema": json.loads(form.value)}  # the best that can be done, where the caller sends it even so
    else:
        notes += changes
        named |= {"schema": json.loads(text)} | ({"strict": True} if quirks.schema_dialect != "openai" else {})
    body["response_format"] = {"type": "json_schema", "json_schema": named}
    return notes


def _adapted(schema: str, dialect: str, path: str) -> tuple[str, tuple[Note, ...]]:
    """The text of `schema` in a dialect, and what was changed. Raises Inexpressible."""
    if dialect == "openai":
        return schema, ()
    adapted, changes = adapt_schema(json.loads(schema), dialect, field=path)
    return json.dumps(adapted), changes


_kept = lru_cache(maxsize=128)(_adapted)  # as texts, so that each body has its own


def _form_path(request: ChatRequest) -> str:
    return request.output_form.path if request.output_form is not None else "response_format"


def _tools_path(request: ChatRequest) -> str:
    return "functions" if request.tool_use is not None and request.tool_use.is_legacy else "tools"
