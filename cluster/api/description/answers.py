"""Answers of chat and completions: bodies, events of streams, token counts, logprobs; and errors in OpenAI's shape."""

from __future__ import annotations

from diptych.cluster.router.call import Explanation

from .shapes import (
    Field,
    JsonObject,
    Shape,
    any_object,
    either,
    many,
    mapping,
    nullable,
    number,
    of_dataclass,
    one_of,
    tells,
    text,
    told,
    whole,
)

COUNT = whole(0)
NULL: JsonObject = {"type": "null"}


def answer(name: str, words: str, *fields: Field) -> Shape:
    """The shape of an answer: later versions may tell more."""
    return Shape(name=name, words=words, fields=fields, is_open=True)


ERROR = answer(
    "Error",
    "What was wrong, and where.",
    told("message", text(1), "a sentence that names the remedy"),
    told("type", text(1), "the kind of error"),
    told("param", nullable(text()), "the field, parameter or header to blame"),
    told("code", text(1), "the error by name"),
)
ERROR_BODY = answer("ErrorBody", "Every error of these endpoints.", told("error", ERROR.ref))

EXPLANATION_SHAPES = of_dataclass(
    Explanation, "Explanation", "How a choice was answered. Times in seconds; engines by their ids."
)
EXPLANATION = EXPLANATION_SHAPES[-1]
_MS = number(0)
ROUTE_ATTEMPT = answer(
    "RouteAttempt",
    "One try at one target. Times in milliseconds since the request began.",
    told("target", text(1)),
    told("group", text(1), "the route that it belongs to"),
    told("cause", text(1), "first, or why there was another"),
    told("phase", one_of("A", "B", "C"), "what the client had seen when it ended"),
    told("outcome", one_of("running", "answered", "failed", "lost", "left")),
    told("began_ms", _MS),
    tells("first_ms", _MS, "the first content"),
    tells("ended_ms", _MS, "its end"),
    tells("failure", text(1), "what kind of failure ended it"),
    tells("message", text(), "the failure in words"),
    tells("status", whole(100, 999), "HTTP's, of the provider"),
    tells("usage", mapping(COUNT), "as far as it is known"),
    tells("notes", many(text(1)), "what the target could not be told, or was told otherwise"),
    tells("explanation", EXPLANATION.ref, "of an own pool"),
    tells("request_id", text(1), "the provider's"),
)
ROUTE_RECORD = answer(
    "RouteRecord",
    "How a choice of a route's answer came about.",
    told("model", text(1), "that was asked for"),
    told("route", text(1), "that answered"),
    told("rule", text(), "that decided; empty: none"),
    told("target", text(), "whose answer it is"),
    told("outcome", text(1), "answered, cancelled, cached, or an error's code"),
    told("attempts", many(ROUTE_ATTEMPT.ref)),
    told("skipped", mapping(text()), "targets that were not tried, with the reason"),
    told("words", many(text()), "decisions that are no attempt"),
)
EXPLANATIONS = answer(
    "Explanations",
    "Where the request asked for `explain`.",
    told("choices", many(either(EXPLANATION.ref, ROUTE_RECORD.ref)), "one for each choice that ended"),
)

CACHED = answer("PromptTokenDetails", "Of the prompt's tokens.", told("cached_tokens", COUNT, "found in a cache"))
REASONED = answer(
    "CompletionTokenDetails", "Of the answer's tokens.", told("reasoning_tokens", COUNT, "of its reasoning")
)
USAGE = answer(
    "Usage",
    "Token counts of all choices together; each prompt counts once.",
    told("prompt_tokens", COUNT),
    told("completion_tokens", COUNT),
    told("total_tokens", COUNT),
    told("prompt_tokens_details", CACHED.ref),
    tells("completion_tokens_details", REASONED.ref, "of chat answers"),
)
TOP_TOKEN = answer(
    "TokenLogprob",
    "A token and its logprob.",
    told("token", text(), "its text; a replacement where it is part of a character"),
    told("logprob", number(-9999, 0)),
    told("bytes", many(whole(0, 255)), "what it stands for"),
)
TOKEN_LOGPROB = answer(
    "GeneratedTokenLogprob",
    "A token of the answer.",
    *TOP_TOKEN.fields,
    told("top_logprobs", many(TOP_TOKEN.ref), "the likeliest alternatives"),
)
CHAT_LOGPROBS = answer(
    "ChatLogprobs",
    "Token by token.",
    told("content", many(TOKEN_LOGPROB.ref)),
    told("refusal", NULL),
)
TEXT_LOGPROBS = answer(
    "TextLogprobs",
    "In columns; the first token of an echoed prompt has no logprob.",
    told("tokens", many(text())),
    told("token_logprobs", many(nullable(number(-9999, 0)))),
    told("top_logprobs", many(nullable(mapping(number(-9999, 0))))),
    told("text_offset", many(COUNT), "characters before each token"),
)
PROMPT_TOKEN = answer(
    "PromptTokenLogprob",
    "A token at a place of the prompt.",
    told("logprob", number(-9999, 0)),
    told("rank", whole(1), "1: no token is likelier"),
    told("decoded_token", text()),
)
PROMPT_LOGPROBS = many(nullable(mapping(PROMPT_TOKEN.ref)))
_ASKED_PROMPT = "vLLM's, by token id; null for the first token"

FUNCTION_CALL = answer(
    "FunctionCall", "What is called.", told("name", text(1)), told("arguments", text(), "JSON of an object")
)
TOOL_CALL = answer(
    "ToolCall",
    "A call that the model makes.",
    told("id", text(1), "by which the result is to name it"),
    told("type", one_of("function")),
    told("function", FUNCTION_CALL.ref),
)
MESSAGE = answer(
    "AnswerMessage",
    "What the model says.",
    told("role", one_of("assistant")),
    told("content", nullable(text()), "null where it only calls functions"),
    told("refusal", NULL),
    tells("reasoning_content", text(1), "what it thought before"),
    tells("tool_calls", many(TOOL_CALL.ref, 1)),
    tells("function_call", FUNCTION_CALL.ref, "where the request has `functions`"),
)
_CHAT_ENDS = one_of("stop", "length", "tool_calls", "function_call")
_TEXT_ENDS = one_of("stop", "length")
SCHEMA_ERRORS = tells("schema_errors", many(text(1), 1), "how a complete answer fails its form")
CHAT_CHOICE = answer(
    "ChatChoice",
    "One answer.",
    told("index", COUNT),
    told("message", MESSAGE.ref),
    told("logprobs", nullable(CHAT_LOGPROBS.ref)),
    told("finish_reason", _CHAT_ENDS),
    SCHEMA_ERRORS,
)
TEXT_CHOICE = answer(
    "TextChoice",
    "One answer.",
    told("index", COUNT),
    told("text", text()),
    told("logprobs", nullable(TEXT_LOGPROBS.ref)),
    told("finish_reason", _TEXT_ENDS),
    tells("prompt_logprobs", PROMPT_LOGPROBS, _ASKED_PROMPT),
    SCHEMA_ERRORS,
)


def _head(prefix: str, kind: str) -> tuple[Field, ...]:
    return (
        told("id", text(1, pattern=f"^{prefix}-[0-9a-f]{{24}}$"), "also the answer's x-request-id"),
        told("object", one_of(kind)),
        told("created", COUNT, "Unix seconds"),
        told("model", text(1)),
        told(
            "system_fingerprint",
            nullable(text(1)),
            "the same where the same model is served in the same way; null: a provider did not tell one",
        ),
    )


_EXPLAINED = tells("diptych", EXPLANATIONS.ref, "how the request was answered")
CHAT_ANSWER = answer(
    "ChatCompletion",
    "A whole chat answer.",
    *_head("chatcmpl", "chat.completion"),
    told("choices", many(CHAT_CHOICE.ref, 1)),
    told("usage", USAGE.ref),
    tells("prompt_logprobs", PROMPT_LOGPROBS, _ASKED_PROMPT),
    _EXPLAINED,
)
TEXT_ANSWER = answer(
    "Completion",
    "A whole completion.",
    *_head("cmpl", "text_completion"),
    told("choices", many(TEXT_CHOICE.ref, 1)),
    told("usage", USAGE.ref),
    _EXPLAINED,
)

PART_EVENT = answer(
    "StructuredPart",
    "A part of an answer in JSON that is complete: a scalar with its value, or an object or list that was closed.",
    told("path", text(), "JSON pointer"),
    tells("value", {}, "of a scalar, an empty object or list"),
    tells("closed", one_of("object", "array")),
)
CALL_DELTA = answer(
    "ToolCallDelta",
    "A piece of a call; the first has its id, type and name.",
    told("index", COUNT),
    tells("id", text(1)),
    tells("type", one_of("function")),
    told(
        "function",
        answer("FunctionCallDelta", "", tells("name", text(1)), told("arguments", text())).schema(),
    ),
)
DELTA = answer(
    "ChatDelta",
    "What a chunk adds to the message.",
    tells("role", one_of("assistant")),
    tells("content", text()),
    tells("reasoning_content", text()),
    tells("tool_calls", many(CALL_DELTA.ref, 1)),
    tells("function_call", any_object(), "where the request has `functions`"),
    tells("structured", many(PART_EVENT.ref, 1), "where the request says `structured: true`"),
)
CHUNK_CHOICE = answer(
    "ChatChunkChoice",
    "A piece of one answer.",
    told("index", COUNT),
    told("delta", DELTA.ref),
    told("logprobs", nullable(CHAT_LOGPROBS.ref)),
    told("finish_reason", nullable(_CHAT_ENDS)),
    SCHEMA_ERRORS,
)
TEXT_CHUNK_CHOICE = answer(
    "TextChunkChoice",
    "A piece of one answer.",
    told("index", COUNT),
    told("text", text()),
    told("logprobs", nullable(TEXT_LOGPROBS.ref)),
    told("finish_reason", nullable(_TEXT_ENDS)),
    SCHEMA_ERRORS,
)
_LAST = "of the chunk before the end, which has no choices; null in the others, where stream_options ask for it"
CHUNK = answer(
    "ChatCompletionChunk",
    "One event of a stream.",
    *_head("chatcmpl", "chat.completion.chunk"),
    told("choices", many(CHUNK_CHOICE.ref)),
    tells("usage", nullable(USAGE.ref), _LAST),
    _EXPLAINED,
)
TEXT_CHUNK = answer(
    "CompletionChunk",
    "One event of a stream.",
    *_head("cmpl", "text_completion"),
    told("choices", many(TEXT_CHUNK_CHOICE.ref)),
    tells("usage", nullable(USAGE.ref), _LAST),
    _EXPLAINED,
)
CHAT_EVENT = either(CHUNK.ref, ERROR_BODY.ref)
TEXT_EVENT = either(TEXT_CHUNK.ref, ERROR_BODY.ref)

TOKENS = answer(
    "Tokens",
    "The tokens of a text or of a conversation.",
    told("count", COUNT),
    told("max_model_len", whole(1), "tokens that prompt and answer may have together"),
    told("tokens", many(COUNT)),
    told("token_strs", nullable(many(text())), "the vocabulary's own names of them, where asked for"),
)
DETOKENIZED = answer("TokensText", "The text of tokens, special ones written out.", told("prompt", text()))
