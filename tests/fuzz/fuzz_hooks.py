"""Loaded by schemathesis' command line: keeps valid requests from failing rules that no schema tells, and counts.

What is generated as invalid goes out as it is.
"""

from __future__ import annotations

import atexit
import collections
import json
import os
from typing import Any

import schemathesis

FORMS = ("response_format", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs")
COUNTS: collections.Counter[str] = collections.Counter()


LEAST_TIMEOUT_S = 5.0
NEEDS = {"stream_options": "stream", "top_logprobs": "logprobs", "tool_choice": "tools", "function_call": "functions"}
# They refer to what is not there, or are refused with some values that no schema tells.
DROPPED = ("structured", "continue_final_message", "chat_template_kwargs", "best_of", "previous_response_id")
# They exclude a form of the answer, or name tokens of the vocabulary.
TOKENS = ("logit_bias", "allowed_token_ids", "stop_token_ids", "min_tokens", "ignore_eos", "bad_words")


@schemathesis.hook
def before_call(ctx: Any, case: Any, kwargs: Any) -> None:
    """A valid body that breaks a rule about several fields loses one of them; no request asks for a moment only."""
    if not isinstance(case.body, dict):
        return
    for name in ("timeout_s", "first_token_timeout_s"):
        if isinstance(case.body.get(name), int | float) and 0 < case.body[name] < LEAST_TIMEOUT_S:
            case.body[name] = LEAST_TIMEOUT_S
    if case.meta is not None and case.meta.generation.mode.value == "positive":
        mend(case.body)


def mend(body: dict[str, Any]) -> None:
    forms = [name for name in FORMS if body.get(name) is not None]
    for name in forms[1:]:
        body[name] = None
    if body.get("functions") and body.get("tools"):
        body["functions"] = None
    for name in [*DROPPED, *(needs for needs, needed in NEEDS.items() if not body.get(needed))]:
        body.pop(name, None)
    if body.get("prompt_logprobs") is not None:
        body["stream"] = None
        body.pop("stream_options", None)
    for name in TOKENS:
        if forms or body.get(name) not in (None, [], {}, 0, False):
            body.pop(name, None)
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        if isinstance(body.get(name), int):
            body[name] = 1 + body[name] % 50
    if body.get("max_tokens") is not None:
        body.pop("max_completion_tokens", None)
    _mend_messages(body)
    _mend_thinking(body)


def _mend_messages(body: dict[str, Any]) -> None:
    for name in ("messages", "input"):
        entries = body.get(name)
        if isinstance(entries, list) and entries and isinstance(entries[0], dict):
            kept = [entry for entry in entries if _is_plain(entry)]
            body[name] = kept or [{"role": "user", "content": "hello"}]
    if "input" in body and body["input"] in (None, []):
        body["input"] = "hello"


def _is_plain(entry: Any) -> bool:
    """Whether it refers to nothing else in the conversation, and is text."""
    if not isinstance(entry, dict) or entry.get("role") not in ("user", "system", "developer"):
        return False
    content = entry.get("content")
    parts = content if isinstance(content, list) else []
    return all(isinstance(part, dict) and part.get("type") in ("text", "input_text") for part in parts)


def _mend_thinking(body: dict[str, Any]) -> None:
    thinking = body.get("thinking")
    if isinstance(thinking, dict) and isinstance(thinking.get("budget_tokens"), int):
        thinking["budget_tokens"] = 1
        if isinstance(body.get("max_tokens"), int):
            body["max_tokens"] = max(body["max_tokens"], 2)
    if "output_config" in body and "output_format" in body:
        del body["output_format"]


@schemathesis.hook
def after_call(ctx: Any, case: Any, response: Any) -> None:
    """One more answer of its operation, by its status."""
    COUNTS[f"{case.operation.label} {response.status_code}"] += 1


def _write() -> None:
    with open(os.environ["API_FUZZ_COUNTS"], "w") as file:
        json.dump(COUNTS, file)


if "API_FUZZ_COUNTS" in os.environ:
    atexit.register(_write)
