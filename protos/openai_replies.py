"""OpenAI's answer bodies as pure functions: completions, usage, model list, errors. Chunks: cluster/api/sse.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import DiptychError, RequestError
from .replies import Usage

JsonObject = dict[str, Any]


def usage(used: Usage) -> JsonObject | None:
    """Token counts of one request; what nobody told is left out, and without both totals there is none."""
    prompt, completion = used.input_tokens, used.output_tokens
    if prompt is None or completion is None:
        return None
    counts: JsonObject = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
    if of_prompt := _told(cached_tokens=used.cache_read_tokens, audio_tokens=used.input_audio_tokens):
        counts["prompt_tokens_details"] = of_prompt
    if of_answer := _told(reasoning_tokens=used.reasoning_tokens, audio_tokens=used.output_audio_tokens):
        counts["completion_tokens_details"] = of_answer
    return counts


def _told(**counts: int | None) -> JsonObject:
    return {name: count for name, count in counts.items() if count is not None}


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
    kind: str,
    *,
    id: str,
    created: int,
    model: str,
    fingerprint: str | None,
    choices: list[JsonObject],
    use: JsonObject | None,
) -> JsonObject:
    """A whole answer; `kind` is chat.completion or text_completion, `created` in Unix seconds."""
    head: JsonObject = {"id": id, "object": kind, "created": created, "model": model}
    return head | {"system_fingerprint": fingerprint, "choices": choices, "usage": use}


def model_card(
    name: str, created: int, max_context_tokens: int | None, defaults: Mapping[str, float], capabilities: JsonObject
) -> JsonObject:
    """One entry of /v1/models; `defaults` hold for sampling fields that a request does not give. `capabilities`: so
    that no client needs a list of models' names. `max_context_tokens` None: only providers know.
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
