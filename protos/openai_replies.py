"""OpenAI's answer bodies as pure functions: completions, usage, model list, errors. Chunks: cluster/api/sse.py."""

from __future__ import annotations

from typing import Any

from .errors import DiptychError, RequestError

JsonObject = dict[str, Any]


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> JsonObject:
    """Token counts of one request; `cached_tokens` of the prompt were found in a prefix cache."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def chat_completion(*, id: str, created: int, model: str, text: str, finish_reason: str, use: JsonObject) -> JsonObject:
    """The whole answer of /v1/chat/completions. `created` in Unix seconds."""
    message = {"role": "assistant", "content": text, "refusal": None}
    return {
        "id": id,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}],
        "usage": use,
    }


def text_completion(*, id: str, created: int, model: str, text: str, finish_reason: str, use: JsonObject) -> JsonObject:
    """The whole answer of /v1/completions. `created` in Unix seconds."""
    return {
        "id": id,
        "object": "text_completion",
        "created": created,
        "model": model,
        "choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}],
        "usage": use,
    }


def model_card(name: str, created: int, max_context_tokens: int) -> JsonObject:
    """One entry of /v1/models."""
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "diptych",
        "max_model_len": max_context_tokens,
    }


def error_body(error: DiptychError) -> JsonObject:
    """What a client is told about an error; `detail` stays in the log."""
    param = error.param if isinstance(error, RequestError) else None
    return {"error": {"message": str(error), "type": error.kind, "param": param, "code": error.code}}
