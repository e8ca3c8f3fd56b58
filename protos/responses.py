"""OpenAI's request bodies for /v1/responses, as pure functions from bytes.

A field is honoured or refused with an error that names it: FIXED lists known fields of which only the default is
accepted. What chat knows too is read by chat's constructors, so that behind this reader there is one road. The items
of `input` are read later, behind those of the responses before it: responses_items.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import Field, PlainValidator

from .errors import InvalidRequest
from .messages import Message
from .openai import ChatRequest, Count, Label, check_labels, no_obfuscation
from .openai_sampling import MAX_LOGPROBS, Alternatives, SamplingFields, Wire, validated
from .openai_template import EFFORTS, Effort, read_template
from .responses_items import MAX_ITEMS
from .responses_tools import Tools, read_text, read_tools
from .strict_json import parse_object, printable
from .wire_checks import JsonObject, a_list, an_object, is_default, one_of, refuse

Include = Literal[
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
]
LOGPROBS: Final[Include] = "message.output_text.logprobs"
SEALED: Final[Include] = "reasoning.encrypted_content"

# Known fields that change nothing at their default; any other value is refused, with the reason.
FIXED: dict[str, tuple[object, ...]] = {
    "access_programs": (None,),
    "background_options": (None, {}, {"completion_window": "soonest"}),
    "context_management": (None, []),
    "conversation": (None,),
    "image": (None,),
    "moderation": (None,),
    "prompt": (None,),
    "prompt_cache_options": (None, {}, {"mode": "implicit"}),
    "prompt_cache_retention": (None, "in_memory"),
    "service_tier": (None, "auto", "default"),
}
_REFUSED = {
    "background_options": "is not supported: background responses begin as soon as there is room",
    "context_management": "is not supported: this server does not compact conversations; truncation: auto drops turns",
    "conversation": "is not supported: go on with previous_response_id",
    "moderation": "is not supported: no model of this server moderates",
    "prompt": "is not supported: prompts are not stored here; send instructions and input",
    "prompt_cache_options": "is not supported: prefixes are cached by themselves, and for no promised time",
    "prompt_cache_retention": "must be in_memory: prefixes are cached for no promised time",
    "service_tier": "must be auto or default: there is one tier here",
}
# Of chat's fields those that mean the same here; OpenAI's own API has the first two alone.
CHAT_FIELDS: Final = (frozenset(SamplingFields.model_fields) - {"n", "prompt_logprobs"}) | {
    "explain",
    "first_token_timeout_s",
    "include_reasoning",
    "priority",
    "safety_identifier",
    "schema_in_prompt",
    "timeout_s",
    "user",
}
_READ = frozenset({"input", "tools", "tool_choice", "text", "reasoning", "chat_template_kwargs"})
_REASONING: dict[str, tuple[object, ...]] = {
    "context": (None, "auto"),
    "generate_summary": (None, "auto"),
    "mode": (None, "standard"),
    "summary": (None, "auto"),
}
_REASONING_WORDS = {
    "context": "must be auto: the model's chat template decides which reasoning it is shown again",
    "mode": "must be standard: there is one mode here",
}
_SUMMARY = "must be auto: no summaries are written here; the reasoning itself is in the item's content"


class ResponsesStreamOptions(Wire):
    """Nothing that can be turned on."""

    include_obfuscation: Annotated[None, PlainValidator(no_obfuscation)] = None


def _includes(value: object) -> frozenset[str]:
    return frozenset() if value is None else read_includes(value, "include")


def read_includes(value: object, path: str) -> frozenset[str]:
    """Names of what a response is to tell besides; of things that are not made here there is nothing to tell. Raises
    InvalidRequest.
    """
    known: tuple[str, ...] = get_args(Include)
    entries = a_list(value, path, most=64, what="names", may_be_empty=True)
    return frozenset(one_of(entry, f"{path}[{i}]", known) for i, entry in enumerate(entries))


def _metadata(value: object) -> dict[str, str]:
    check_labels(value)
    return dict(value) if isinstance(value, dict) else {}


class ResponsesFields(Wire):
    """The fields that chat does not have, or has in another form."""

    background: bool | None = None
    include: Annotated[frozenset[str], PlainValidator(_includes)] = frozenset()
    instructions: str | None = None
    max_output_tokens: Count | None = None
    max_tool_calls: Count | None = None  # of tools that a server runs, which are none here: never reached
    metadata: Annotated[dict[str, str], PlainValidator(_metadata)] = Field(default_factory=dict)
    model: Annotated[str, Field(min_length=1, max_length=256)]
    parallel_tool_calls: bool | None = None
    previous_response_id: str | None = None
    prompt_cache_key: Label | None = None  # requests of one key go to where their prefixes are
    store: bool | None = None
    stream: bool | None = None
    stream_options: ResponsesStreamOptions | None = None
    top_logprobs: Alternatives | None = None
    truncation: Literal["auto", "disabled"] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponsesRequest:
    """A checked body. `chat` is what it means, without its messages; `items` are the input, unread."""

    fields: ResponsesFields
    chat: ChatRequest
    items: Sequence[object]
    tools: Tools
    text: JsonObject  # as a response repeats it
    reasoning: JsonObject = field(default_factory=dict)

    @property
    def stores(self) -> bool:
        """Whether the response is kept."""
        return self.fields.store is not False

    @property
    def streams(self) -> bool:
        """Whether the client wants events."""
        return self.fields.stream is True

    @property
    def is_background(self) -> bool:
        """Whether it is answered before it is done."""
        return self.fields.background is True

    @property
    def seals(self) -> bool:
        """Whether reasoning is told in a form that only this server can read, too."""
        return SEALED in self.fields.include

    def as_chat(self, messages: tuple[Message, ...]) -> ChatRequest:
        """The whole request in chat's terms."""
        return self.chat.model_copy(update={"messages": messages})

    def told(self) -> JsonObject:
        """What a response repeats of its request."""
        fields = self.fields
        return {
            "background": self.is_background,
            "instructions": fields.instructions,
            "max_output_tokens": fields.max_output_tokens,
            "max_tool_calls": fields.max_tool_calls,
            "metadata": fields.metadata,
            "model": fields.model,
            "parallel_tool_calls": fields.parallel_tool_calls is not False,
            "previous_response_id": fields.previous_response_id,
            "prompt_cache_key": fields.prompt_cache_key,
            "reasoning": self.reasoning,
            "safety_identifier": self.chat.safety_identifier,
            "service_tier": "default",
            "store": self.stores,
            "text": self.text,
            "tool_choice": self.tools.choice,
            "tools": self.tools.told,
            "top_logprobs": fields.top_logprobs or 0,
            "truncation": fields.truncation or "disabled",
            "user": self.chat.user,
        }


def parse_responses(body: bytes) -> ResponsesRequest:
    """The request in `body`. Raises InvalidRequest naming the field."""
    return _read(parse_object(body))


# Of a request's fields those that count for its number of tokens.
COUNTED: Final = frozenset(
    {
        "conversation",
        "input",
        "instructions",
        "model",
        "parallel_tool_calls",
        "previous_response_id",
        "reasoning",
        "text",
        "tool_choice",
        "tools",
        "truncation",
    }
)


def parse_input_tokens(body: bytes) -> ResponsesRequest:
    """The request to /v1/responses/input_tokens in `body`. Raises InvalidRequest naming the field."""
    fields = parse_object(body)
    for name in fields:
        if name not in COUNTED:
            shown = printable(name)
            told = f"unknown field {shown}; here may stand: {', '.join(sorted(COUNTED))}"
            raise InvalidRequest(told, shown)
    return _read(fields)


def _read(fields: JsonObject) -> ResponsesRequest:
    for name, value in fields.items():
        if name in FIXED:
            if not is_default(value, FIXED[name]):
                raise InvalidRequest(f"{name} {_REFUSED.get(name, 'is not supported: leave it out')}", name)
        elif name not in _READ | CHAT_FIELDS and name not in ResponsesFields.model_fields:
            raise InvalidRequest(f"unknown field {printable(name)}", printable(name))
    own = validated(ResponsesFields, {k: v for k, v in fields.items() if k in ResponsesFields.model_fields}, "")
    _check(own)
    tools = read_tools(fields.get("tools"), fields.get("tool_choice"), fields.get("parallel_tool_calls"))
    form, text = read_text(fields.get("text"))
    effort, reasoning = _reasoning(fields.get("reasoning"))
    options: dict[str, object] = {"chat_template_kwargs": fields.get("chat_template_kwargs")}
    if effort is not None:
        options["reasoning_effort"] = effort
    given: dict[str, Any] = {name: value for name, value in fields.items() if name in CHAT_FIELDS}
    given |= {"model": own.model, "stream": own.stream, "messages": (), "output_form": form}
    given |= {"prompt_cache_key": own.prompt_cache_key, "max_completion_tokens": own.max_output_tokens}
    given |= {"tool_use": tools.use, "template": read_template(options)}
    if LOGPROBS in own.include:
        given |= {"logprobs": True, "top_logprobs": own.top_logprobs}
    items = _items(fields.get("input"), own)
    chat = validated(ChatRequest, given, "")
    return ResponsesRequest(fields=own, chat=chat, items=items, tools=tools, text=text, reasoning=reasoning)


def _check(own: ResponsesFields) -> None:
    if own.stream_options is not None and not own.stream:
        raise InvalidRequest("stream_options is for requests with stream: true", "stream_options")
    if own.background and own.store is False:
        raise InvalidRequest("background is for responses that are stored: leave out store: false", "background")
    if own.top_logprobs and LOGPROBS not in own.include:
        raise InvalidRequest(
            f'top_logprobs (0 to {MAX_LOGPROBS}) is for requests with include: ["{LOGPROBS}"]', "top_logprobs"
        )


def _items(value: object, own: ResponsesFields) -> Sequence[object]:
    if isinstance(value, str):
        return [{"type": "message", "role": "user", "content": value}]
    if value is None or value == []:
        if own.previous_response_id is None:
            raise refuse("input", "is missing: a string or a list of items, or a previous_response_id to go on from")
        return ()
    if not isinstance(value, list):
        raise refuse("input", "must be a string or a list of items")
    return a_list(value, "input", most=MAX_ITEMS, what="items")


def _reasoning(value: object) -> tuple[Effort | None, JsonObject]:
    """The effort, and what a response repeats."""
    given = {} if value is None else an_object(value, "reasoning", {"effort", *_REASONING})
    for name, defaults in _REASONING.items():
        if not is_default(given.get(name), defaults):
            raise refuse(f"reasoning.{name}", _REASONING_WORDS.get(name, _SUMMARY))
    effort = given.get("effort")
    if effort is not None:
        effort = one_of(effort, "reasoning.effort", EFFORTS)
    return effort, {"effort": effort, "summary": given.get("summary") or given.get("generate_summary")}
