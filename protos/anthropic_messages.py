"""Anthropic's request bodies for /v1/messages and /v1/messages/count_tokens, as pure functions from bytes.

They become what OpenAI's become, a ChatRequest, so that all behind it is one road. A field is honoured or refused with
an error that names it; the tables below list what is not taken. Blocks: anthropic_blocks.py, tools: anthropic_tools.py.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, PlainValidator

from .anthropic_blocks import BETWEEN, Announced, read_assistant, read_cache, read_texts, read_user, with_mark
from .anthropic_tools import read_tools
from .errors import InvalidRequest
from .messages import Message, Part
from .openai import ChatRequest
from .openai_messages import MAX_MESSAGES
from .openai_output import OutputForm, named_schema
from .openai_sampling import validated
from .openai_template import Effort, Scalar, TemplateOptions, in_templates
from .openai_tools import ToolUse
from .strict_json import parse_object, printable
from .wire_checks import JsonObject, a_list, a_text, an_object, one_of, refuse

# What both endpoints read; then what generating needs besides; then fields of this server's own.
_CONVERSATION = frozenset(
    {"messages", "model", "cache_control", "output_config", "output_format", "speed", "system", "thinking"}
    | {"tool_choice", "tools"}
)
_GENERATION = frozenset(
    {"max_tokens", "metadata", "service_tier", "stop_sequences", "stream", "temperature", "top_k", "top_p"}
)
OWN = frozenset({"first_token_timeout_s", "min_p", "priority", "seed", "timeout_s"})
# Nothing is taken out of the conversation. The last two are how coding agents say that all thinking stays.
_NO_EDITS: tuple[object, ...] = (
    None,
    {},
    {"edits": []},
    *({"edits": [{"type": "clear_thinking_20251015", "keep": keep}]} for keep in ("all", {"type": "all"})),
)
# Known fields that mean nothing here at these values; any other value is refused, with the reason.
REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "billing_policy": ((None,), "is Anthropic's own: leave it out"),
    "compaction": ((None,), "is not supported: shorten the conversation before it is sent"),
    "container": ((None,), "is for code that a server runs: this one runs none"),
    "context_management": (_NO_EDITS, "is not supported: shorten the conversation before it is sent"),
    "diagnostics": ((None, {}, {"previous_message_id": None}), "are not told: usage says how much a cache had"),
    "fallback_credit_token": ((None,), "is Anthropic's own: leave it out"),
    "fallbacks": ((None, []), "are not supported: name one model"),
    "inference_geo": ((None,), "chooses among Anthropic's regions: leave it out"),
    "mcp_servers": ((None, []), "are not called from here: call them, and send what they have as tools"),
    "user_profile_id": ((None,), "is Anthropic's own: leave it out"),
}
_THINKING = ("enabled", "disabled", "adaptive")
EFFORT_NAMES: tuple[Effort, ...] = ("low", "medium", "high", "xhigh", "max")
# What is behind the reader speaks of fields by OpenAI's names.
_NAMES = (
    (re.compile(r"\bstop\b(?=[ :.]|$)"), "stop_sequences"),
    (re.compile(r"^user\b"), "metadata.user_id"),
    (re.compile(r"\btool_calls\[([0-9]+)\]\.function\.arguments"), r"the input of tool_use \1"),
    (re.compile(r"\bcontinue_final_message\b"), "messages"),
    (re.compile(r"\breasoning_budget\b"), "thinking.budget_tokens"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Thinking:
    """What a request says of thinking, if anything `is_told`. `budget`: the most tokens of it; None: any number. Where
    the text `is_omitted` its blocks say that there was some.
    """

    is_told: bool = False
    is_on: bool = False
    budget: int | None = None
    is_omitted: bool = False


class UnsupportedThread(InvalidRequest):
    """The conversation should be kept here. Anthropic's client knows the code, and sends it whole instead."""

    code = "thread_unsupported_request"


def _as_read(value: object) -> object:
    return value


class MessagesRequest(ChatRequest):
    """Body of POST /v1/messages, and of /v1/messages/count_tokens with a max_tokens of 0."""

    messages: Annotated[tuple[Message, ...], PlainValidator(_as_read)]
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)]  # 0: the prompt's KV is kept, and nothing said
    thinking: Annotated[Thinking, PlainValidator(_as_read)]


def parse_messages(body: bytes) -> MessagesRequest:
    """The request in `body`. Raises InvalidRequest naming the field."""
    return _request(parse_object(body), _CONVERSATION | _GENERATION | OWN)


def parse_count(body: bytes) -> MessagesRequest:
    """The conversation in `body` whose tokens are to be counted. Raises InvalidRequest naming the field."""
    fields = parse_object(body)
    for name in _GENERATION & fields.keys():
        raise refuse(name, "changes no number of tokens in a prompt: leave it out")
    return _request({**fields, "max_tokens": 0}, _CONVERSATION | {"max_tokens"})


def in_our_words(error: InvalidRequest) -> InvalidRequest:
    """The same error with the names that this wire format has for its fields."""
    return InvalidRequest(renamed(error.message), renamed(error.param) if error.param else None, error.detail)


def renamed(text: str) -> str:
    """`text` with OpenAI's names of fields replaced by Anthropic's."""
    for pattern, name in _NAMES:
        text = pattern.sub(name, text)
    return text


def _request(fields: JsonObject, known: frozenset[str]) -> MessagesRequest:
    _check_known(fields, known)
    _check_tiers(fields)
    tools = read_tools(fields.get("tools"), fields.get("tool_choice"))
    thinking = _thinking(fields.get("thinking"), fields.get("max_tokens"), is_count="stream" not in known)
    messages, is_begun = _messages(fields)
    if kept := read_cache(fields, "the request"):  # up to the last block
        last = messages[-1]
        messages = (*messages[:-1], dataclasses.replace(last, parts=tuple(with_mark(last.parts, kept))))
    form, effort = _output(fields)
    if is_begun:
        _check_begun(tools, thinking, messages[-1])
    made: dict[str, Any] = {
        "messages": messages,
        "tool_use": tools,
        "thinking": thinking,
        "template": TemplateOptions(
            variables=_variables(thinking, effort),
            implied={} if thinking.is_told else _switch(is_on=False),
            effort=effort,
            generation_prompt=not is_begun,
            continue_final=is_begun,
        ),
        "output_form": form,
        "include_reasoning": thinking.is_on,
        "reasoning_budget": thinking.budget,
        "cuts_to_fit": True,
        "stop": _stops(fields.get("stop_sequences")),
        "user": _user(fields.get("metadata")),
    }
    plain = {"model", "max_tokens", "stream", "temperature", "top_k", "top_p"} | OWN
    try:
        return validated(MessagesRequest, {name: fields[name] for name in plain & fields.keys()} | made, "")
    except InvalidRequest as exc:
        raise in_our_words(exc) from None


def _check_known(fields: Mapping[str, object], known: frozenset[str]) -> None:
    for name, value in fields.items():
        if name == "thread":
            if value is not None:
                raise UnsupportedThread("thread: no conversation is kept here: send all of it", "thread")
        elif name in REFUSED:
            defaults, words = REFUSED[name]
            if value not in defaults:
                raise refuse(name, words)
        elif name not in known:
            told = printable(name)
            raise InvalidRequest(f"unknown field {told}", told)
    for name in ("model", "max_tokens", "messages"):
        if fields.get(name) is None:
            raise refuse(name, "is missing")


def _check_tiers(fields: Mapping[str, object]) -> None:
    """Classes of service: there is one here."""
    if fields.get("service_tier") is not None:
        one_of(fields["service_tier"], "service_tier", ("auto", "standard_only"))
    if fields.get("speed") not in (None, "standard"):
        raise refuse("speed", "must be standard: every answer comes as fast as it can")


def _thinking(value: object, max_tokens: object, *, is_count: bool) -> Thinking:
    if value is None:
        return Thinking()
    given = an_object(value, "thinking")
    if given.get("type") == "between_tools":
        raise refuse("thinking.type", "must be enabled, disabled or adaptive: where a model thinks is its own choice")
    kind = one_of(given.get("type"), "thinking.type", _THINKING)
    if kind == "disabled":
        an_object(given, "thinking", {"type"})
        return Thinking(is_told=True)
    an_object(given, "thinking", {"type", "display"} | ({"budget_tokens"} if kind == "enabled" else set()))
    shown = given.get("display")
    if shown is not None:
        one_of(shown, "thinking.display", ("summarized", "omitted"))
    budget = None
    if kind == "enabled":
        budget = given.get("budget_tokens")
        if type(budget) is not int or not 1 <= budget < 2**31:
            words = "is missing" if budget is None else "must be a whole number from 1"
            raise refuse("thinking.budget_tokens", words)
        if type(max_tokens) is int and not is_count and budget >= max_tokens:
            raise refuse("thinking.budget_tokens", f"must be less than max_tokens, {max_tokens}, of which it is a part")
    return Thinking(is_told=True, is_on=True, budget=budget, is_omitted=shown == "omitted")


def _variables(thinking: Thinking, effort: Effort | None) -> dict[str, Scalar]:
    """The switch, where the request has one, and the effort."""
    found = _switch(is_on=thinking.is_on) if thinking.is_told else {}
    return found if effort is None else found | {"reasoning_effort": in_templates(effort)}


def _switch(*, is_on: bool) -> dict[str, Scalar]:
    """Under the two names that templates have for it."""
    return {"enable_thinking": is_on, "thinking": is_on}


def _output(fields: Mapping[str, object]) -> tuple[OutputForm | None, Effort | None]:
    """The form of the answer, and the effort."""
    given: JsonObject = {}
    if fields.get("output_config") is not None:
        given = an_object(fields["output_config"], "output_config", {"effort", "format"})
    effort: Effort | None = None
    if given.get("effort") is not None:
        effort = one_of(given["effort"], "output_config.effort", EFFORT_NAMES)
    form, older = given.get("format"), fields.get("output_format")
    if form is not None and older is not None:
        raise refuse("output_format", "is the old name of output_config.format: send one of them")
    if form is None and older is None:
        return None, effort
    path = "output_config.format" if older is None else "output_format"
    asked = an_object(older if form is None else form, path, {"type", "schema"})
    one_of(asked.get("type"), f"{path}.type", ("json_schema",))
    if asked.get("schema") is None:
        raise refuse(f"{path}.schema", "is missing")
    named = named_schema({"name": "answer", "schema": asked["schema"]}, path)
    return dataclasses.replace(named, name=None), effort


def _messages(fields: Mapping[str, object]) -> tuple[tuple[Message, ...], bool]:
    """The conversation, and whether it ends with the beginning of the answer."""
    entries = a_list(fields["messages"], "messages", most=MAX_MESSAGES, what="messages")
    announced = Announced()
    found: list[Message] = []
    if fields.get("system") is not None and fields["system"] != []:
        found.append(Message(role="system", parts=read_texts(fields["system"], "system")))
    has_system = bool(found)
    for i, value in enumerate(entries):
        path = f"messages[{i}]"
        entry = an_object(value, path, {"role", "content"})
        match one_of(entry.get("role"), f"{path}.role", ("user", "assistant", "system")):
            case "user":
                read = read_user(entry.get("content"), f"{path}.content", announced)
            case "assistant":
                read = [read_assistant(entry.get("content"), f"{path}.content", announced)]
            case _:
                read = [Message(role="system", parts=read_texts(entry.get("content"), f"{path}.content"))]
        found += read
    found = _merged(found)
    if found[-1].role == "assistant" and not found[-1].content and not found[-1].tool_calls:
        found.pop()  # an answer that is begun with nothing
    if len(found) == has_system:
        raise refuse("messages", "must hold something that is said")
    return tuple(found), found[-1].role == "assistant"


def _merged(messages: Sequence[Message]) -> list[Message]:
    """Neighbouring messages of the user are one turn, and so are those of the assistant."""
    found: list[Message] = []
    for role, group in itertools.groupby(messages, key=lambda message: message.role):
        run = list(group)
        if len(run) == 1 or role not in ("user", "assistant"):
            found += run
            continue
        parts: list[Part] = []
        has_said = False
        for message in run:
            says = bool(message.content)
            parts += [BETWEEN] if says and has_said else []
            parts += message.parts
            has_said = has_said or says
        found.append(Message(role=role, parts=tuple(parts)))
    return found


def _check_begun(tools: ToolUse | None, thinking: Thinking, last: Message) -> None:
    if last.tool_calls:
        raise refuse("messages", "end with calls: send their results, as tool_result blocks of a user's message")
    if tools is not None and tools.mode == "required":
        told = "the last message begins the answer with a text, and tool_choice makes the answer a call"
        raise InvalidRequest(f"tool_choice: {told}: send one of them", "tool_choice")
    if thinking.is_on:
        told = "an answer that the last message begins cannot think before it: leave out one of them"
        raise InvalidRequest(f"thinking: {told}", "thinking")


def _stops(value: object) -> list[str] | None:
    if value is None:
        return None
    for i, text in enumerate(a_list(value, "stop_sequences", most=2**31, what="strings", may_be_empty=True)):
        a_text(text, f"stop_sequences[{i}]")
    return list(value) if isinstance(value, list) else None


def _user(value: object) -> str | None:
    if value is None:
        return None
    given = an_object(value, "metadata", {"user_id"})
    return None if given.get("user_id") is None else a_text(given["user_id"], "metadata.user_id", most=512, least=0)
