"""The operations of /v1/responses: bodies, events, pages of items."""

from __future__ import annotations

from typing import get_args

from diptych.cluster.api.responses_pages import LISTED, MAX_LISTED, MAX_SEQUENCE_DIGITS
from diptych.protos.openai_template import Effort
from diptych.protos.responses_items import INPUT_ROLES

from .answers import COUNT, EXPLANATIONS, SCHEMA_ERRORS, TOKEN_LOGPROB, answer
from .generation import ERRORS, FORMED, HEADERS, REQUEST_ID
from .pages import in_path, ok
from .response_requests import INCLUDES, INPUT_TOKENS, RESPONSE
from .shapes import (
    Field,
    JsonObject,
    Operation,
    Reply,
    any_object,
    either,
    flag,
    many,
    mapping,
    nullable,
    number,
    one_of,
    tells,
    text,
    told,
    whole,
)

_STATUS = told("status", one_of("in_progress", "completed", "incomplete"))
SAID_PART = answer(
    "OutputText",
    "Words of the model.",
    told("type", one_of("output_text")),
    told("text", text()),
    told("annotations", many({})),
    told("logprobs", many(TOKEN_LOGPROB.ref), "where `include` asks for them"),
)
THOUGHT_PART = answer("ReasoningText", "Reasoning.", told("type", one_of("reasoning_text")), told("text", text()))
SUMMED_PART = answer("SummaryText", "A summary.", told("type", one_of("summary_text")), told("text", text()))
_ID = told("id", text(1))
OUTPUT_MESSAGE = answer(
    "OutputMessage",
    "What the model says.",
    _ID,
    told("type", one_of("message")),
    _STATUS,
    told("role", one_of("assistant")),
    told("content", many(SAID_PART.ref)),
)
OUTPUT_CALL = answer(
    "OutputCall",
    "A call that the model makes.",
    _ID,
    told("type", one_of("function_call")),
    _STATUS,
    told("call_id", text(1)),
    told("name", text(1)),
    told("arguments", text(), "JSON of an object"),
)
OUTPUT_REASONING = answer(
    "OutputReasoning",
    "What it thought.",
    _ID,
    told("type", one_of("reasoning")),
    _STATUS,
    told("summary", many(SUMMED_PART.ref)),
    tells("content", many(THOUGHT_PART.ref)),
    tells("encrypted_content", text(1), "where `include` asks for it"),
)
OUTPUT_ITEM = either(OUTPUT_MESSAGE.ref, OUTPUT_CALL.ref, OUTPUT_REASONING.ref)
KEPT_MESSAGE = answer(
    "KeptMessage",
    "A message of the input.",
    _ID,
    told("type", one_of("message")),
    _STATUS,
    told("role", one_of(*INPUT_ROLES)),
    told("content", many(any_object()), "its parts as they were sent"),
    tells("phase", text(1)),
)
KEPT_RESULT = answer(
    "KeptResult",
    "A result of a call in the input.",
    _ID,
    told("type", one_of("function_call_output")),
    _STATUS,
    told("call_id", text(1)),
    told("output", either(text(), many(any_object()))),
)
ITEM_LIST = answer(
    "ItemList",
    "A page of a response's own input.",
    told("object", one_of("list")),
    told("data", many(either(KEPT_MESSAGE.ref, KEPT_RESULT.ref, OUTPUT_CALL.ref, OUTPUT_REASONING.ref))),
    told("first_id", nullable(text(1))),
    told("last_id", nullable(text(1))),
    told("has_more", flag()),
)
RESPONSE_USAGE = answer(
    "ResponseUsage",
    "Token counts.",
    told("input_tokens", COUNT),
    told(
        "input_tokens_details",
        answer("", "", told("cached_tokens", COUNT), told("cache_write_tokens", COUNT)).schema(),
    ),
    told("output_tokens", COUNT),
    told("output_tokens_details", answer("", "", told("reasoning_tokens", COUNT)).schema()),
    told("total_tokens", COUNT),
)
RESPONSE_ERROR = answer(
    "ResponseError",
    "Why a response failed.",
    told("code", one_of("server_error", "rate_limit_exceeded", "invalid_prompt"), "OpenAI's"),
    told("message", text(1)),
    told("param", nullable(text())),
    told("type", text(1), "the error by its name here"),
)
INCOMPLETE = answer("IncompleteDetails", "Why it ended early.", told("reason", one_of("max_output_tokens")))
_STATES = ("queued", "in_progress", "completed", "incomplete", "failed", "cancelled")
ANSWER = answer(
    "Response",
    "A response. It repeats what its request said.",
    told("id", text(1, pattern="^resp_[0-9a-f]{24}$"), "also its x-request-id"),
    told("object", one_of("response")),
    told("created_at", COUNT, "Unix seconds"),
    told("completed_at", nullable(COUNT)),
    told("status", one_of(*_STATES)),
    told("output", many(OUTPUT_ITEM)),
    told("error", nullable(RESPONSE_ERROR.ref)),
    told("incomplete_details", nullable(INCOMPLETE.ref)),
    told("usage", nullable(RESPONSE_USAGE.ref)),
    told("model", text(1)),
    told("background", flag()),
    told("instructions", nullable(text())),
    told("max_output_tokens", nullable(whole(1))),
    told("max_tool_calls", nullable(whole(1))),
    told("metadata", mapping(text())),
    told("parallel_tool_calls", flag()),
    told("previous_response_id", nullable(text())),
    told("prompt_cache_key", nullable(text())),
    told(
        "reasoning",
        answer(
            "",
            "",
            told("effort", nullable(one_of(*get_args(Effort)))),
            told("summary", nullable(one_of("auto"))),
        ).schema(),
    ),
    told("safety_identifier", nullable(text())),
    told("service_tier", one_of("default")),
    told("store", flag()),
    told("temperature", nullable(number()), "null: the provider's own"),
    told("text", any_object()),
    told("tool_choice", either(text(1), any_object())),
    told("tools", many(any_object())),
    told("top_logprobs", COUNT),
    told("top_p", nullable(number()), "the same"),
    told("truncation", one_of("auto", "disabled")),
    told("user", nullable(text())),
    SCHEMA_ERRORS,
    tells("diptych", EXPLANATIONS.ref, "how the request was answered"),
)
DELETED = answer(
    "DeletedResponse",
    "It is gone.",
    told("id", text(1)),
    told("object", one_of("response")),
    told("deleted", one_of(True)),
)
COUNTED = answer(
    "InputTokens", "The prompt's tokens.", told("object", one_of("response.input_tokens")), told("input_tokens", COUNT)
)

_EVENTS: list[object] = []
_PLACE = (told("output_index", COUNT),)
_OF_ITEM = (told("output_index", COUNT), told("item_id", text(1)))
_OF_PART = (*_OF_ITEM, told("content_index", one_of(0)))


def _event(name: str, kinds: tuple[str, ...], *fields: Field) -> JsonObject:
    kind = told("type", one_of(*(f"response.{each}" for each in kinds)))
    shape = answer(name, "An event of a stream.", kind, told("sequence_number", COUNT), *fields)
    _EVENTS.append(shape)
    return shape.ref


EVENT = either(
    _event("ResponseStateEvent", ("created", *_STATES), told("response", ANSWER.ref)),
    _event("ResponseItemEvent", ("output_item.added", "output_item.done"), *_PLACE, told("item", OUTPUT_ITEM)),
    _event(
        "ResponsePartEvent",
        ("content_part.added", "content_part.done"),
        *_OF_PART,
        told("part", either(SAID_PART.ref, THOUGHT_PART.ref)),
    ),
    _event(
        "ResponseTextDelta",
        ("output_text.delta",),
        *_OF_PART,
        told("delta", text()),
        told("logprobs", many(TOKEN_LOGPROB.ref)),
    ),
    _event(
        "ResponseTextDone",
        ("output_text.done",),
        *_OF_PART,
        told("text", text()),
        told("logprobs", many(TOKEN_LOGPROB.ref)),
    ),
    _event("ResponseReasoningDelta", ("reasoning_text.delta",), *_OF_PART, told("delta", text())),
    _event("ResponseReasoningDone", ("reasoning_text.done",), *_OF_PART, told("text", text())),
    _event("ResponseArgumentsDelta", ("function_call_arguments.delta",), *_OF_ITEM, told("delta", text())),
    _event(
        "ResponseArgumentsDone",
        ("function_call_arguments.done",),
        *_OF_ITEM,
        told("name", text(1)),
        told("arguments", text()),
    ),
    answer(
        "ResponseErrorEvent",
        "What ends a stream whose response could not be kept.",
        told("type", one_of("error")),
        told("code", text(1)),
        told("message", text(1)),
        told("param", nullable(text())),
        told("sequence_number", COUNT),
    ).schema(),
)
EVENTS = tuple(_EVENTS)
_TAG = "Responses"
_RESPONSE_ID = in_path("id", "of a response")
_FOUND = frozenset({400, 404})
_INCLUDE = Field(name="include", schema=many(INCLUDES, 0, 64), words="what is told besides")
_OF_IT = {"id": "$response.body#/id"}
_LINKS = {
    name: {"operationId": name, "parameters": _OF_IT}
    for name in ("getResponse", "deleteResponse", "cancelResponse", "listInputItems")
}
_EITHER: dict[str, JsonObject] = {"application/json": ANSWER.ref, "text/event-stream": text()}
OPERATIONS = (
    Operation(
        id="createResponse",
        method="POST",
        path="/v1/responses",
        tag=_TAG,
        words="go on with a conversation, and keep it; OpenAI's shape",
        scope="inference",
        body=RESPONSE,
        headers=HEADERS,
        replies=(
            Reply(status=200, words="the response", media=_EITHER, headers={**REQUEST_ID, **FORMED}, links=_LINKS),
        ),
        errors=ERRORS | {403, 429},
        events=EVENT,
    ),
    Operation(
        id="countInputTokens",
        method="POST",
        path="/v1/responses/input_tokens",
        tag=_TAG,
        words="the tokens that /v1/responses would compute for a conversation",
        scope="inference",
        body=INPUT_TOKENS,
        replies=(ok(COUNTED, "the number"),),
        errors=frozenset({400, 404, 408, 413}),
    ),
    Operation(
        id="getResponse",
        method="GET",
        path="/v1/responses/{id}",
        tag=_TAG,
        words="a stored response as it is now, or its events",
        scope="inference",
        path_fields=(_RESPONSE_ID,),
        query=(
            Field(name="stream", schema=flag(), words="its events; of background responses", default="false"),
            Field(
                name="starting_after",
                schema=whole(0, 10**MAX_SEQUENCE_DIGITS - 1),
                words="with stream: behind this event",
            ),
            _INCLUDE,
            Field(name="include_obfuscation", schema=one_of(False), words="padding is not offered", default="false"),
        ),
        replies=(Reply(status=200, words="the response", media=_EITHER),),
        errors=_FOUND,
        events=EVENT,
    ),
    Operation(
        id="deleteResponse",
        method="DELETE",
        path="/v1/responses/{id}",
        tag=_TAG,
        words="end a stored response",
        scope="inference",
        path_fields=(_RESPONSE_ID,),
        replies=(ok(DELETED, "it is gone"),),
        errors=_FOUND,
    ),
    Operation(
        id="cancelResponse",
        method="POST",
        path="/v1/responses/{id}/cancel",
        tag=_TAG,
        words="end a background response; one that is over is told as it is",
        scope="inference",
        path_fields=(_RESPONSE_ID,),
        replies=(ok(ANSWER, "the response"),),
        errors=_FOUND,
    ),
    Operation(
        id="listInputItems",
        method="GET",
        path="/v1/responses/{id}/input_items",
        tag=_TAG,
        words="a response's own input",
        scope="inference",
        path_fields=(_RESPONSE_ID,),
        query=(
            Field(name="after", schema=text(), words="the item that the page begins after"),
            Field(name="limit", schema=whole(1, MAX_LISTED), words="items of a page", default=str(LISTED)),
            Field(name="order", schema=one_of("asc", "desc"), words="by place", default="desc"),
            _INCLUDE,
        ),
        replies=(ok(ITEM_LIST, "a page"),),
        errors=_FOUND,
    ),
)
