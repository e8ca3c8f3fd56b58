"""The operations that generate in OpenAI's shapes of chat and completions, and what all generating operations share."""

from __future__ import annotations

from collections.abc import Mapping

from diptych.cluster.api.idempotency import HEADER, KEPT_S, MAX_KEY_CHARS
from diptych.cluster.config import MAX_LABEL_CHARS

from .answers import CHAT_ANSWER, CHAT_EVENT, TEXT_ANSWER, TEXT_EVENT
from .chat import CHAT, COMPLETION
from .shapes import Field, JsonObject, Operation, Reply, Shape, text

ERRORS = frozenset({400, 404, 408, 409, 413, 422, 429, 499, 502, 504})
_LABEL = text(1, MAX_LABEL_CHARS, pattern="^[!-~]([ -~]*[!-~])?$")
SESSION = Field(
    name="x-session-id", schema=_LABEL, words="requests of one session go to the same engines where the policy says so"
)
TRACEPARENT = Field(name="traceparent", schema=text(), words="the W3C trace that the request belongs to")
IDEMPOTENCY_KEY = Field(
    name=HEADER,
    schema=text(1, MAX_KEY_CHARS, pattern="^[!-~]([ -~]*[!-~])?$"),
    words=f"a request sent again with its key is worked on once within {KEPT_S // 3600} hours, and answered each time",
)
HEADERS = (SESSION, TRACEPARENT, IDEMPOTENCY_KEY)
LIMITS_TOLD = {
    "x-ratelimit-limit-requests": "per minute, where the key or the tenant has a limit",
    "x-ratelimit-remaining-requests": "likewise",
    "x-ratelimit-reset-requests": "likewise",
}
REQUEST_ID = {
    "x-request-id": "the answer's id",
    "idempotent-replayed": "true where an answer is told again",
    **LIMITS_TOLD,
}
FORMED = {
    "x-schema-coverage": "of answers held to a schema: `full`, or `partial` where no grammar holds all of it",
    "x-schema-unsupported": "those parts, by keyword and place",
}


def generated(whole: Shape, *, told: Mapping[str, str] = FORMED, words: str = "the answer") -> Reply:
    """A whole answer, or its events as a stream where the request asks for one."""
    media: dict[str, JsonObject] = {"application/json": whole.ref, "text/event-stream": text()}
    return Reply(status=200, words=words, media=media, headers={**REQUEST_ID, **told})


OPERATIONS = (
    Operation(
        id="createChatCompletion",
        method="POST",
        path="/v1/chat/completions",
        tag="Generation",
        words="go on with a conversation; OpenAI's shape, with vLLM's extensions",
        scope="inference",
        body=CHAT,
        headers=HEADERS,
        replies=(generated(CHAT_ANSWER),),
        errors=ERRORS,
        events=CHAT_EVENT,
        last_event="[DONE]",
    ),
    Operation(
        id="createCompletion",
        method="POST",
        path="/v1/completions",
        tag="Generation",
        words="go on with a text; OpenAI's shape, with vLLM's extensions",
        scope="inference",
        body=COMPLETION,
        headers=HEADERS,
        replies=(generated(TEXT_ANSWER),),
        errors=ERRORS,
        events=TEXT_EVENT,
        last_event="[DONE]",
    ),
)
