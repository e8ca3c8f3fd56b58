"""The operations in Anthropic's wire format: answers, events, errors, its list of models."""

from __future__ import annotations

from diptych.protos.anthropic_replies import _TYPES as TYPES
from diptych.protos.anthropic_replies import OVERLOADED_STATUS

from .answers import COUNT as NUMBER
from .answers import SCHEMA_ERRORS, answer
from .anthropic_requests import COUNT, MESSAGES
from .generation import ERRORS, FORMED, HEADERS, generated
from .shapes import (
    Field,
    JsonObject,
    Operation,
    Reply,
    any_object,
    either,
    flag,
    many,
    nullable,
    one_of,
    text,
    told,
    whole,
)

_ERROR_TYPES = sorted({*TYPES.values(), "invalid_request_error"})
DETAILS = answer(
    "AnthropicErrorDetails",
    "The same in the words of this server.",
    told("error_code", text(1), "the error by name"),
    told("param", nullable(text()), "the field to blame"),
)
ERROR = answer(
    "AnthropicError",
    "What was wrong.",
    told("type", one_of(*_ERROR_TYPES)),
    told("message", text(1), "a sentence that names the remedy"),
    told("details", DETAILS.ref),
)
ERROR_BODY = answer(
    "AnthropicErrorBody",
    "Every error of these endpoints, and the last event of a stream that broke.",
    told("type", one_of("error")),
    told("error", ERROR.ref),
    told("request_id", nullable(text(1))),
)
OUTPUT_DETAILS = answer("OutputTokenDetails", "Of the answer's tokens.", told("thinking_tokens", NUMBER))
USAGE = answer(
    "AnthropicUsage",
    "Token counts.",
    told("input_tokens", NUMBER, "of the prompt, that no cache had"),
    told("cache_creation_input_tokens", NUMBER),
    told("cache_read_input_tokens", NUMBER),
    told("output_tokens", NUMBER),
    told("output_tokens_details", OUTPUT_DETAILS.ref),
)
MESSAGE_USAGE = answer("MessageUsage", "Token counts.", *USAGE.fields, told("service_tier", one_of("standard")))
SAID = answer("SaidBlock", "Words.", told("type", one_of("text")), told("text", text()))
THOUGHT = answer(
    "ThoughtBlock",
    "What the model thought.",
    told("type", one_of("thinking")),
    told("thinking", text()),
    told("signature", text(), "to be sent back with the block"),
)
CALLED = answer(
    "CallBlock",
    "A call that the model makes.",
    told("type", one_of("tool_use")),
    told("id", text(1)),
    told("name", text(1)),
    told("input", any_object()),
)
BLOCK = either(SAID.ref, THOUGHT.ref, CALLED.ref)
REASONS = one_of("end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded")
_END: tuple[Field, ...] = (
    told("stop_reason", nullable(REASONS), "null in the first event of a stream"),
    told("stop_sequence", nullable(text(1)), "the one that ended the answer"),
    SCHEMA_ERRORS,
)
MESSAGE = answer(
    "Message",
    "A whole answer.",
    told("id", text(1, pattern="^msg_[0-9a-f]{24}$"), "also its x-request-id"),
    told("type", one_of("message")),
    told("role", one_of("assistant")),
    told("model", text(1)),
    told("content", many(BLOCK)),
    *_END,
    told("usage", MESSAGE_USAGE.ref),
)
TOKEN_COUNT = answer("TokenCount", "The prompt's tokens.", told("input_tokens", NUMBER))


def _event(name: str, kind: str, *fields: Field) -> JsonObject:
    shape = answer(name, f"The event {kind}.", told("type", one_of(kind)), *fields)
    _EVENTS.append(shape)
    return shape.ref


def _piece(name: str, kind: str, field: str) -> JsonObject:
    return _event(name, kind, told(field, text()))


_EVENTS: list[object] = []
_INDEX = told("index", NUMBER, "of the block")
_PIECE = either(
    _piece("TextDelta", "text_delta", "text"),
    _piece("ThinkingDelta", "thinking_delta", "thinking"),
    _piece("SignatureDelta", "signature_delta", "signature"),
    _piece("InputJsonDelta", "input_json_delta", "partial_json"),
)
MESSAGE_END = answer("MessageEnd", "Why the answer ended.", *_END)
EVENT = either(
    _event("MessageStartEvent", "message_start", told("message", MESSAGE.ref)),
    _event("PingEvent", "ping"),
    _event("BlockStartEvent", "content_block_start", _INDEX, told("content_block", BLOCK)),
    _event("BlockDeltaEvent", "content_block_delta", _INDEX, told("delta", _PIECE)),
    _event("BlockStopEvent", "content_block_stop", _INDEX),
    _event("MessageDeltaEvent", "message_delta", told("delta", MESSAGE_END.ref), told("usage", USAGE.ref)),
    _event("MessageStopEvent", "message_stop"),
    ERROR_BODY.ref,
)
EVENTS = tuple(_EVENTS)

MODEL = answer(
    "AnthropicModel",
    "A served model.",
    told("type", one_of("model")),
    told("id", text(1)),
    told("display_name", text(1)),
    told("created_at", text(1), "a date and time"),
    told("lifecycle", one_of("active")),
    told("max_input_tokens", whole(0)),
    told("max_tokens", whole(0)),
    told("capabilities", any_object()),
)
MODELS = answer(
    "AnthropicModelList",
    "A page of the served models, for requests with the header anthropic-version.",
    told("data", many(MODEL.ref)),
    told("has_more", flag()),
    told("first_id", nullable(text(1))),
    told("last_id", nullable(text(1))),
)
VERSION = Field(
    name="anthropic-version",
    schema=text(pattern="^([0-9]{4}-[0-9]{2}-[0-9]{2})?$", example="2023-06-01"),
    words="any date: all versions there were are one here",
)
ANY_VERSION = Field(
    name="anthropic-version",
    schema=text(),
    words="where it stands, the answer has Anthropic's shape",
    default="OpenAI's",
)
OVERLOADED = frozenset({OVERLOADED_STATUS})
_TAG = "Messages"
OPERATIONS = (
    Operation(
        id="createMessage",
        method="POST",
        path="/v1/messages",
        tag=_TAG,
        words="go on with a conversation; Anthropic's shape",
        scope="inference",
        body=MESSAGES,
        headers=(VERSION, *HEADERS),
        replies=(generated(MESSAGE, told={"request-id": "the same under Anthropic's name", **FORMED}),),
        errors=ERRORS | OVERLOADED,
        error_schema=ERROR_BODY.ref,
        events=EVENT,
    ),
    Operation(
        id="countMessageTokens",
        method="POST",
        path="/v1/messages/count_tokens",
        tag=_TAG,
        words="the tokens that /v1/messages would compute for a conversation",
        scope="inference",
        body=COUNT,
        headers=(VERSION,),
        replies=(Reply(status=200, words="the number", media={"application/json": TOKEN_COUNT.ref}),),
        errors=frozenset({400, 404, 408, 413}) | OVERLOADED,
        error_schema=ERROR_BODY.ref,
    ),
)
