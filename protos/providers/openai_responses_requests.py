"""A canonical request as a body of OpenAI's POST /v1/responses, in the variant that a provider's quirks ask for.

Called by openai_responses.py. Nothing is stored at the provider: the conversation is sent whole, and with it the
reasoning that came sealed. Fields that OpenAI does not have are sent where `quirks.rename` names them.
Format: the types of openai 3.54 and OpenAI's pages on reasoning and structured outputs, read 2026-11-23.
"""

from __future__ import annotations

import re
from typing import Final

from diptych.protos.openai import ChatRequest
from diptych.protos.openai_output import OutputForm
from diptych.protos.openai_tools import Tool, ToolUse

from .codec import JsonObject, Note, Outgoing
from .openai_responses_input import InputWriter
from .quirks import Quirks
from .reasoning_wish import Thinking, thinking
from .request_fields import Frame, finished, moved, put, unsaid, unsupported
from .schema_documents import Inexpressible
from .schemas import adapt_schema

PATH: Final = "/responses"
NAME: Final = "openai.responses"
SEALED: Final = "reasoning.encrypted_content"
# `background` answers before there is an answer, and the others name what the provider keeps, which is nothing.
_FIXED: Final = frozenset(
    {"model", "input", "instructions", "stream", "background", "conversation", "previous_response_id"}
)
_PLAIN = ("temperature", "top_p", "user", "safety_identifier", "prompt_cache_key")
# Of other servers that speak the format.
_EXTENSIONS = (
    "frequency_penalty",
    "ignore_eos",
    "include_stop_str_in_output",
    "min_p",
    "min_tokens",
    "presence_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "top_k",
)
_EFFORT = "reasoning.effort"
_DEFAULT = Quirks()
_NOT_IN_NAME = re.compile(r"[^A-Za-z0-9_-]")
_REASONS = re.compile(r"(?:^|/)(?:o[0-9]|gpt-(?:[5-9]|[1-9][0-9])|gpt-oss|codex)")
_ONLY_CHATS = re.compile(r"(?:^|/)(?:gpt-[34]|chatgpt)|gpt-[0-9.]+-chat")


def encode(request: ChatRequest, *, model: str, stream: bool, quirks: Quirks) -> Outgoing:
    """See Codec."""
    family = quirks.family or NAME
    writer = InputWriter(quirks, family)
    messages = request.messages
    notes: list[Note] = []
    if request.template.continue_final and not quirks.prefill:
        words = "this provider begins an answer anew: what the last message begins is not sent"
        notes.append(unsupported("continue_final_message", words))
        messages = messages[:-1]
    body: JsonObject = {"model": model, **writer.write(messages)}
    if "store" not in quirks.unsupported:
        body["store"] = False
    if stream:
        body["stream"] = True
    notes += writer.notes
    limit = _sampling(body, request, quirks)
    said = {*_PLAIN, *(name for name in _EXTENSIONS if name in quirks.rename)}
    notes += unsaid(request, said, format_name="this provider's format")
    if request.tool_use is not None:
        notes += _tools(body, request.tool_use, quirks)
    if request.output_form is not None and request.output_form.is_json:
        notes += _form(body, request.output_form, quirks)
    wish = thinking(request)
    notes += _reason(body, wish, request, model, quirks)
    form = request.output_form
    said_as = {
        "max_output_tokens": limit,
        "text": form.path if form is not None else "response_format",
        "reasoning": wish.path,
        _EFFORT: wish.path,
    }
    found, more = finished(body, request, quirks, Frame(family=family, fixed=_FIXED, said_as=said_as))
    notes += [note for note in more if not (note.kind == "renamed" and note.field == note.words)]
    return Outgoing(path=PATH, body=found, headers=dict(quirks.headers), notes=tuple(notes))


def _sampling(body: JsonObject, request: ChatRequest, quirks: Quirks) -> str:
    """What chooses tokens. The field that said how many."""
    for name in _PLAIN:
        if (value := getattr(request, name)) is not None:
            body[name] = value
    for name in _EXTENSIONS:
        value = getattr(request, name)
        if name in quirks.rename and value not in (None, ()):
            body[name] = list(value) if isinstance(value, tuple) else value
    if request.wanted_tokens is not None:
        body["max_output_tokens"] = request.wanted_tokens[1]
        return request.wanted_tokens[0]
    if quirks.default_max_tokens is not None:
        body["max_output_tokens"] = quirks.default_max_tokens
    return "max_completion_tokens"


def _tools(body: JsonObject, use: ToolUse, quirks: Quirks) -> list[Note]:
    path = "function_call" if use.is_legacy else "tool_choice"
    if use.mode == "none" and quirks.tool_choice == "auto_only":
        return [moved(path, "no tools are sent, so that none is called")]
    choice, offered, notes = _choice(use, quirks, path)
    body["tools"] = [_tool(tool, quirks) for tool in offered]
    if choice != "auto":
        body["tool_choice"] = choice
    if use.mode != "none" and (not use.parallel or use.is_legacy):
        if quirks.parallel_tools:
            body["parallel_tool_calls"] = False
        elif not use.parallel:
            words = "this provider's model chooses for itself how often it calls"
            notes.append(unsupported("parallel_tool_calls", words))
    return notes


def _choice(use: ToolUse, quirks: Quirks, path: str) -> tuple[str | JsonObject, tuple[Tool, ...], list[Note]]:
    """The field tool_choice, the tools that are sent, and what became of the wish."""
    names: list[JsonObject] = [{"type": "function", "name": name} for name in use.names]
    is_some = not use.is_named and use.mode != "none" and len(use.names) < len(use.tools)
    if is_some and quirks.tool_choice == "all" and "tool_choice.allowed_tools" not in quirks.unsupported:
        return {"type": "allowed_tools", "mode": use.mode, "tools": names}, use.tools, []
    notes = [moved(path, "the tools that are not allowed are not sent")] if is_some else []
    offered = use.allowed if is_some else use.tools
    if use.mode != "required":
        return use.mode, offered, notes
    if quirks.tool_choice == "auto_only":
        notes.append(unsupported(path, "this provider's model chooses for itself whether it calls"))
        return "auto", use.allowed, notes
    if use.is_named and quirks.tool_choice == "no_named":
        notes.append(moved(path, "only the named function is sent, and a call is required"))
        return "required", use.allowed, notes
    if use.is_named or (quirks.tool_choice == "no_required" and len(names) == 1):
        return names[0], offered, notes
    if quirks.tool_choice == "no_required":
        notes.append(unsupported(path, "this provider has no way to require a call of any function"))
        return "auto", offered, notes
    return "required", offered, notes


def _tool(tool: Tool, quirks: Quirks) -> JsonObject:
    """Held to its schema where that is the provider's dialect as it is; where it had to be changed, arguments would
    come with nulls that the client's function does not know.
    """
    found: JsonObject = {"type": "function", "name": tool.name}
    if tool.description is not None:
        found["description"] = tool.description
    is_strict = False
    if quirks.schema_dialect not in ("openai", "none"):
        try:
            adapted, notes = adapt_schema(tool.parameters, quirks.schema_dialect)
            is_strict = not notes and adapted == tool.parameters
        except Inexpressible:
            is_strict = False
    return found | {"parameters": tool.parameters, "strict": is_strict}


def _form(body: JsonObject, form: OutputForm, quirks: Quirks) -> list[Note]:
    if form.kind == "json_object":
        body["text"] = {"format": {"type": "json_object"}}
        return []
    schema = form.schema
    assert schema is not None
    told: JsonObject = {"type": "json_schema", "name": _NOT_IN_NAME.sub("_", form.name or "answer")}
    if form.description is not None:
        told["description"] = form.description
    notes: list[Note] = []
    try:
        adapted, changes = adapt_schema(schema, quirks.schema_dialect, field=form.path)
        told |= {"schema": adapted, "strict": quirks.schema_dialect != "openai"}
        notes += changes
    except Inexpressible as exc:
        notes.append(unsupported(form.path, f"{exc.path.removeprefix(form.path).lstrip('.')} {exc.words}".strip()))
        told |= {"schema": schema, "strict": False}  # the best that can be done, where the caller sends it even so
        if quirks.schema_dialect == "none":
            told = {"type": "json_object"}
    body["text"] = {"format": told}
    return notes


def _reason(body: JsonObject, wish: Thinking, request: ChatRequest, model: str, quirks: Quirks) -> list[Note]:
    """What is asked of reasoning, and that it comes sealed, so that it can go back."""
    notes: list[Note] = []
    if wish.budget is not None:
        notes.append(unsupported("reasoning_budget", "this provider's format has no such field"))
    only_chats = _ONLY_CHATS.search(model) is not None
    reasons = not only_chats and (_REASONS.search(model) or quirks.replay_reasoning != "strip")
    if reasons and "include" not in quirks.unsupported:  # refused by models that do not reason
        body["include"] = [SEALED]
    summarises = quirks.effort_field and not {"reasoning", "reasoning.summary"} & quirks.unsupported
    if request.include_reasoning and not only_chats and summarises:
        body["reasoning"] = {"summary": "auto"}
    effort = wish.effort
    if effort is None or (effort == "none" and only_chats):
        return notes
    theirs = quirks.effort_values.get(effort, effort)
    field = _EFFORT if quirks.effort_field == _DEFAULT.effort_field else quirks.effort_field
    if not field or not theirs:
        return [*notes, unsupported(wish.path, f"this provider cannot be asked for the effort {effort}")]
    put(body, field, theirs)
    if wish.path != "reasoning_effort":
        notes.append(moved(wish.path, f"said as {field}: {theirs}"))
    elif field != _EFFORT or theirs != effort:
        notes.append(Note("renamed", wish.path, f"{field}: {theirs}"))
    return notes
