"""OpenAI's answer bodies as pure functions: completions, usage, model list, errors. Chunks: cluster/api/sse.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import DiptychError, RequestError

JsonObject = dict[str, Any]


def usage(
    prompt_tokens: int, completion_tokens: int, cached_tokens: int, reasoning_tokens: int | None = None
) -> JsonObject:
    """Token counts of one request. `cached_tokens` of the prompt were found in a prefix cache; `reasoning_tokens` of a
    chat answer came before what it says.
    """
    counts: JsonObject = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
    if reasoning_tokens is not None:
        counts["completion_tokens_details"] = {"reasoning_tokens": reasoning_tokens}
    return counts


def chat_message(text: str) -> JsonObject:
    """An assistant's message that is nothing but text."""
    return {"role": "assistant", "content": text, "refusal": None}


def chat_choice(index: int, message: JsonObject, finish_reason: str, logprobs: JsonObject | None) -> JsonObject:
    """One choice of a whole chat answer."""
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish_reason}


def text_choice(index: int, text: str, finish_reason: str, logprobs: JsonObject | None) -> JsonObject:
    """One choice of a whole text completion."""
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def completion(
    kind: str, *, id: str, created: int, model: str, fingerprint: str, choices: list[JsonObject], use: JsonObject
) -> JsonObject:
    """A whole answer; `kind` is chat.completion or text_completion, `created` in Unix seconds."""
    head: JsonObject = {"id": id, "object": kind, "created": created, "model": model}
    return head | {"system_fingerprint": fingerprint, "choices": choices, "usage": use}


def model_card(
    name: str, created: int, max_context_tokens: int, defaults: Mapping[str, float], capabilities: JsonObject
) -> JsonObject:
    """One entry of /v1/models; `defaults` hold for sampling fields that a request does not give. `capabilities`: so
    that no client needs a list of models' names.
    """
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "diptych",
        "max_model_len": max_context_tokens,
        "sampling_defaults": dict(defaults),
        "capabilities": capabilities,
    }


def error_body(error: DiptychError) -> JsonObject:
    """What a client is told about an error; `detail` stays in the log."""
    param = error.param if isinstance(error, RequestError) else None
    return {"error": {"message": str(error), "type": error.kind, "param": param, "code": error.code}}
