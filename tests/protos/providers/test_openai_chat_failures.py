"""Error answers of providers that speak OpenAI's chat format, as kinds of failure with a message and a time to wait.

Guards against a prompt that is too long and is sent to the same target again, a breaker that opens over a client's own
mistake, a wait that is longer than the provider asked for, and a key that reaches a client in an error's words.
"""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.protos.failures import Failure, FailureKind
from diptych.protos.providers.openai_chat import ChatCodec

K = FailureKind
NOW = {"date": "Mon, 23 Nov 2026 09:00:00 GMT"}


def failure(status: int, body: Any = b"", headers: dict[str, str] | None = None) -> Failure:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return ChatCodec().failure(status, headers or {}, raw)


def error(message: str = "", **more: Any) -> dict[str, Any]:
    return {"error": {"message": message, **more}}


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, K.BAD_REQUEST),
        (401, K.AUTH),
        (402, K.QUOTA),
        (403, K.AUTH),
        (404, K.NOT_FOUND),
        (408, K.SERVER),
        (409, K.SERVER),
        (413, K.BAD_REQUEST),
        (418, K.BAD_REQUEST),
        (422, K.BAD_REQUEST),
        (429, K.RATE_LIMITED),
        (498, K.OVERLOADED),
        (500, K.SERVER),
        (501, K.UNSUPPORTED),
        (502, K.SERVER),
        (503, K.OVERLOADED),
        (504, K.SERVER),
        (520, K.SERVER),
        (529, K.OVERLOADED),
        (302, K.SERVER),
    ],
)
def test_a_status_without_a_word_says_what_it_can(status: int, kind: FailureKind) -> None:
    found = failure(status)
    assert (found.kind, found.message) == (kind, f"HTTP status {status}, without a word")


@pytest.mark.parametrize(
    "message",
    [
        "This model's maximum context length is 8192 tokens. However, your messages resulted in 9000 tokens.",
        "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. Given: 5000 `inputs` tokens",
        "Prompt contains 65673 tokens and 0 draft tokens, too large for model with 32768 maximum context length",
        "Please reduce the length of the messages or completion.",
        "This model's maximum prompt length is 131072 but the request contains 200000 tokens.",
        "Invalid request: Your request exceeded model token limit: 8192",
        "the request exceeds the available context size, try increasing it",
        "prompt is too long: 210000 tokens > 200000 maximum",
        "The input token count (1200000) exceeds the maximum number of tokens allowed (1048576).",
        "too many tokens: total number of tokens in the prompt cannot exceed 4081",
        "Range of input length should be [1, 30720]",
        "The input (9000 tokens) is longer than the model's context length (8192 tokens).",
    ],
)
def test_a_prompt_that_is_too_long_is_known_by_its_words(message: str) -> None:
    for body in (error(message), {"object": "error", "message": message}, {"detail": message}, message.encode()):
        assert failure(400, body).kind is K.CONTEXT_LENGTH


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (400, error("x", code="context_length_exceeded"), K.CONTEXT_LENGTH),
        (
            413,
            error(
                "Request too large for model `l` on tokens per minute (TPM): Limit 6000",
                code="rate_limit_exceeded",
                type="tokens",
            ),
            K.RATE_LIMITED,
        ),
        (
            429,
            error(
                "You exceeded your current quota, please check your plan.",
                type="insufficient_quota",
                code="insufficient_quota",
            ),
            K.QUOTA,
        ),
        (429, [error("You exceeded your current quota.", code=429, status="RESOURCE_EXHAUSTED")], K.RATE_LIMITED),
        (
            429,
            error("The engine is currently overloaded, please try again later", type="engine_overloaded_error"),
            K.OVERLOADED,
        ),
        (402, error("Insufficient Balance", code="invalid_request_error"), K.QUOTA),
        (403, error("Your credit balance is too low"), K.QUOTA),
        (
            400,
            error("The prompt triggered Azure OpenAI's content management policy.", code="content_filter"),
            K.CONTENT_POLICY,
        ),
        (400, error("x", innererror={"code": "ResponsibleAIPolicyViolation"}), K.CONTENT_POLICY),
        (400, error("Content Exists Risk"), K.CONTENT_POLICY),
        (403, error('x requires moderation. Your input was flagged for "violence"', code=403), K.CONTENT_POLICY),
        (
            404,
            error("The model `gpt-9` does not exist or you do not have access to it.", code="model_not_found"),
            K.NOT_FOUND,
        ),
        (400, error("Model Not Exist"), K.NOT_FOUND),
        (400, error("m is not a valid model ID", code=400), K.NOT_FOUND),
        (404, error("The API deployment for this resource does not exist.", code="DeploymentNotFound"), K.NOT_FOUND),
        (400, error("API key not valid. Please pass a valid API key."), K.AUTH),
        (401, error("Invalid Authentication", type="invalid_authentication_error"), K.AUTH),
        (
            400,
            error(
                "Unsupported parameter: 'temperature' is not supported with this model.", code="unsupported_parameter"
            ),
            K.UNSUPPORTED,
        ),
        (
            422,
            {"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]},
            K.UNSUPPORTED,
        ),
        (422, {"detail": [{"type": "missing", "loc": ["body", "messages"], "msg": "Field required"}]}, K.BAD_REQUEST),
        (
            400,
            error("Invalid type for 'messages[0].content'", code="invalid_type", param="messages[0].content"),
            K.BAD_REQUEST,
        ),
        (503, error("Service unavailable", code="service_unavailable"), K.OVERLOADED),
        (500, error("The server had an error while processing your request.", type="server_error"), K.SERVER),
        (500, error("The model is overloaded"), K.OVERLOADED),
    ],
    ids=str,
)
def test_words_say_more_than_a_status(status: int, body: Any, kind: FailureKind) -> None:
    assert failure(status, body).kind is kind


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (error("A sentence here."), "A sentence here."),
        ({"error": "A sentence here."}, "A sentence here."),
        ({"message": "A sentence here.", "code": 5}, "A sentence here."),
        ({"detail": "A sentence here."}, "A sentence here."),
        ({"detail": [{"loc": ["body", "x"], "msg": "Field required"}]}, "body.x: Field required"),
        ({"object": "error", "message": {"detail": [{"loc": ["body", "x"], "msg": "no"}]}}, "body.x: no"),
        ({"errors": [{"message": "A sentence here."}]}, "A sentence here."),
        (
            error("Provider returned error", metadata={"raw": '{"error": {"message": "A sentence here."}}'}),
            "A sentence here.",
        ),
        ([error("A sentence here.")], "A sentence here."),
        ("A sentence here.", "A sentence here."),
        (b"A  sentence\n here.", "A sentence here."),
        (b"<html><head><title>502 Bad Gateway</title></head><body><h1>Bad</h1></body></html>", "502 Bad Gateway"),
        (b"<p>A <b>sentence</b> here.</p>", "A sentence here."),
        (b"{not json", "{not json"),
        (gzip.compress(b"x" * 100, mtime=0), "an answer of 24 bytes that are no text"),
        (b"", "HTTP status 502, without a word"),
        (b"{}", "HTTP status 502, without a word"),
        (b"null", "null"),
    ],
    ids=str,
)
def test_the_message_is_found_wherever_it_stands(body: Any, message: str) -> None:
    assert failure(502, body).message == message


@pytest.mark.parametrize(
    "key",
    [
        "sk-proj-AbCdEf0123456789AbCdEf0123456789",
        "sk-ant-api03-abcdefghijkl-mnop",
        "gsk_abcdefghijklmnopqrstuvwx0123",
        "AIzaSyA0123456789abcdefghijklmnopqrstuv",
        "Bearer tiny-secret",
        "0123456789abcdef0123456789abcdef",
        "123e4567-e89b-12d3-a456-426614174000",
        "sk-ab***********wxyz",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abc-def_ghi",
        "AKIAIOSFODNN7EXAMPLE",
    ],
)
def test_what_looks_like_a_key_is_not_repeated(key: str) -> None:
    for words in (f"Incorrect API key provided: {key}.", f'header "{key}" refused', f"api_key={key}, model=x"):
        found = failure(401, error(words, param=key, code=key))
        told = f"{found.message} {found.param} {found.code}"
        assert "[key]" in told
        assert not any(part in told for part in (key, key[-8:], key.removeprefix("Bearer ")))


def test_a_key_of_any_form_is_not_repeated_where_it_is_called_one() -> None:
    assert (
        failure(401, error("Incorrect API key provided: hunter2. See x.")).message
        == "Incorrect API key provided: [key]. See x."
    )
    assert failure(401, error('{"api_key": "hunter22"} is wrong')).message == '{"api_key": [key]"} is wrong'


@pytest.mark.parametrize(
    "words",
    [
        "The model meta-llama/Llama-3.3-70B-Instruct-Turbo is busy",
        "claude-3-5-sonnet-20241022 has no tokens left: 5000000 of 10000000 used",
        "tool_choice: Input should be 'none' or 'auto' at messages[0].content[1].text",
    ],
)
def test_names_of_models_and_fields_are_no_keys(words: str) -> None:
    assert failure(400, error(words)).message == words


def test_a_message_is_one_bounded_line() -> None:
    found = failure(500, error("a\r\nb\x00\u2028" + "c " * 5000))
    assert len(found.message) <= 403
    assert found.message.startswith("a b? c c")
    assert found.message.isprintable()


@pytest.mark.parametrize(
    ("headers", "body", "wait"),
    [
        ({"retry-after": "7"}, b"", 7),
        ({"retry-after": "0.5"}, b"", 0.5),
        ({"retry-after": "7", "retry-after-ms": "250"}, b"", 0.25),
        ({"retry-after": "Mon, 23 Nov 2026 09:00:30 GMT", **NOW}, b"", 30),
        ({"retry-after": "Mon, 23 Nov 2026 08:00:00 GMT", **NOW}, b"", 0),
        ({"retry-after": "Mon, 23 Nov 2026 09:00:30 GMT"}, b"", None),
        ({"retry-after": "soon"}, b"", None),
        ({"retry-after": "99999999"}, b"", 86_400),
        ({"x-ratelimit-reset-requests": "1s", "x-ratelimit-reset-tokens": "6m0s"}, b"", 1),
        (
            {
                "x-ratelimit-reset-requests": "1s",
                "x-ratelimit-reset-tokens": "6m0s",
                "x-ratelimit-remaining-tokens": "0",
            },
            b"",
            360,
        ),
        ({"x-ratelimit-reset-requests": "120ms"}, b"", 0.12),
        ({"x-ratelimit-reset": "1795424415000", "x-ratelimit-remaining": "0", **NOW}, b"", 15),
        ({}, error("Rate limit reached. Please try again in 7m12.5s. Visit x"), 432.5),
        ({}, error("Please retry in 39.5s."), 39.5),
        ({}, [error("x", details=[{"@type": "google.rpc.RetryInfo", "retryDelay": "39s"}])], 39),
        ({}, b"", None),
    ],
    ids=str,
)
def test_the_time_to_wait_is_what_the_provider_says(headers: dict[str, str], body: Any, wait: float | None) -> None:
    found = failure(429, body, headers)
    assert found.kind is K.RATE_LIMITED
    assert found.retry_after_s == (None if wait is None else pytest.approx(wait))


def test_who_asked_wrongly_is_not_told_to_wait() -> None:
    assert failure(400, error("no"), {"retry-after": "7"}).retry_after_s is None
    assert failure(503, b"", {"retry-after": "7"}).retry_after_s == 7


def test_the_field_and_the_word_that_the_provider_names_are_kept() -> None:
    found = failure(400, error("no", param="messages[0]", code="invalid_type"))
    assert (found.status, found.param, found.code) == (400, "messages[0]", "invalid_type")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                "error message detail metadata raw code type status errors details innererror param".split()
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(100, 599),
    JSON.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=40),
    st.dictionaries(
        st.sampled_from(["retry-after", "retry-after-ms", "x-ratelimit-reset", "x-ratelimit-remaining", "date"]),
        st.text(max_size=8) | st.sampled_from(["1e999", "nan", "-5", "Mon, 23 Nov 2026 09:00:00 GMT", "9" * 400]),
    ),
)
def test_no_answer_breaks_the_reader(status: int, body: bytes, headers: dict[str, str]) -> None:
    found = failure(status, body, headers)
    assert found.message
    assert found.message.isprintable()
    assert found.retry_after_s is None or 0 <= found.retry_after_s <= 86_400
