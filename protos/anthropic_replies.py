"""Anthropic's answer bodies as pure functions: messages, usage, models, errors. Events: cluster/api/messages.py.

A thinking block's signature proves nothing, and nothing relies on it: conversations may bring any reasoning. Where the
block's text is left out, the signature carries it, so that it comes back with the block.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from .errors import CapacityError, DiptychError, RequestError
from .replies import Usage

JsonObject = dict[str, Any]

_DIGEST, _CARRIER = "d1.", "t1."  # what stands behind is a text's digest, or the text
OVERLOADED_STATUS = 529
_TYPES = {  # by status; 400 to 499 else invalid_request_error, other ones api_error
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    499: "api_error",
    504: "timeout_error",
    OVERLOADED_STATUS: "overloaded_error",
}
_NO = {"supported": False}
_YES = {"supported": True}


def signature_of(text: str, *, carries: bool) -> str:
    """A thinking block's signature; one that `carries` the text stands in for it."""
    if carries:
        return _CARRIER + base64.urlsafe_b64encode(text.encode()).decode()
    return _DIGEST + base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode()


def thought_in(signature: str) -> str | None:
    """The text that a signature carries; None where it carries none, as those of other servers."""
    if not signature.startswith(_CARRIER):
        return None
    try:
        return base64.b64decode(signature.removeprefix(_CARRIER), b"-_", validate=True).decode()
    except (binascii.Error, UnicodeError, ValueError):
        return None


def usage(used: Usage) -> JsonObject:
    """Token counts; null what nobody told. `input_tokens` are those that a cache neither had nor took."""
    fresh = used.input_tokens
    if fresh is not None:
        fresh = max(fresh - (used.cache_read_tokens or 0) - (used.cache_write_tokens or 0), 0)
    return {
        "input_tokens": fresh,
        "cache_creation_input_tokens": used.cache_write_tokens,
        "cache_read_input_tokens": used.cache_read_tokens,
        "output_tokens": used.output_tokens,
        "output_tokens_details": {"thinking_tokens": used.reasoning_tokens},
    }


def message(*, id: str, model: str, content: Sequence[JsonObject], end: JsonObject, use: JsonObject) -> JsonObject:
    """A whole answer, or with no content and no end the beginning of a streamed one."""
    return {
        "id": id,
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": list(content),
        "stop_reason": None,
        "stop_sequence": None,
        **end,
        "usage": {**use, "service_tier": "standard"},
    }


def content_of(events: Sequence[JsonObject]) -> list[JsonObject]:
    """The content blocks that events begin, fill and end; other events are none of theirs.

    The input of a call that was cut off amid its JSON is empty: `stop_reason` tells that it was cut.
    """
    content: list[JsonObject] = []
    inputs: dict[int, list[str]] = {}
    for event in events:
        match event:
            case {"type": "content_block_start", "content_block": block}:
                content.append(dict(block))
            case {"type": "content_block_delta", "index": index, "delta": {"type": "input_json_delta"} as delta}:
                inputs.setdefault(index, []).append(delta["partial_json"])
            case {"type": "content_block_delta", "index": index, "delta": delta}:
                (field,) = delta.keys() - {"type"}
                content[index][field] += delta[field]
    for index, pieces in inputs.items():
        content[index]["input"] = _input("".join(pieces))
    return content


def _input(text: str) -> JsonObject:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def error_status(error: DiptychError) -> int:
    """The HTTP status: Anthropic has one of its own for a server that has no room."""
    if isinstance(error, CapacityError) and error.http_status == 503:
        return OVERLOADED_STATUS
    return error.http_status


def error_body(error: DiptychError, request_id: str | None) -> JsonObject:
    """What a client is told about an error; `detail` stays in the log."""
    status = error_status(error)
    kind = _TYPES.get(status, "invalid_request_error" if 400 <= status < 500 else "api_error")
    details = {"error_code": error.code, "param": error.param if isinstance(error, RequestError) else None}
    told = {"type": kind, "message": str(error), "details": details}
    return {"type": "error", "error": told, "request_id": request_id}


def model_card(
    name: str, created: int, max_context_tokens: int | None, *, is_reasoning: bool, has_template: bool
) -> JsonObject:
    """One entry of /v1/models; `created` in Unix seconds."""
    thinks = {"supported": is_reasoning}
    return {
        "type": "model",
        "id": name,
        "display_name": name,
        "created_at": datetime.fromtimestamp(created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "lifecycle": "active",
        "max_input_tokens": max_context_tokens,
        "max_tokens": max_context_tokens,
        "capabilities": {
            "batch": _NO,
            "citations": _NO,
            "code_execution": _NO,
            "context_management": _NO,
            "effort": {**thinks, **dict.fromkeys(("low", "medium", "high", "xhigh", "max"), thinks)},
            "image_input": _NO,
            "pdf_input": _NO,
            "server_tools": {**_NO, "code_execution": _NO, "web_search": _NO},
            "structured_outputs": {"supported": has_template},
            "thinking": {
                **thinks,
                "types": {"adaptive": thinks, "between_tools": _NO, "disabled": _YES, "enabled": thinks},
            },
        },
    }


def model_list(cards: Sequence[JsonObject], *, has_more: bool) -> JsonObject:
    """A page of /v1/models."""
    first, last = (cards[0]["id"], cards[-1]["id"]) if cards else (None, None)
    return {"data": list(cards), "has_more": has_more, "first_id": first, "last_id": last}
