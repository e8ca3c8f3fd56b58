"""Token counts in answers of OpenAI's chat format, by all the names under which providers tell them.

Called where answers are read and where they are relayed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diptych.protos.replies import Usage

from .loose_values import count_in

# Of each count, the paths where it may stand; the first that is there counts.
_PATHS: dict[str, tuple[tuple[str, ...], ...]] = {
    "input_tokens": (("prompt_tokens",), ("input_tokens",)),
    "output_tokens": (("completion_tokens",), ("output_tokens",)),
    "cache_read_tokens": (
        ("prompt_tokens_details", "cached_tokens"),
        ("input_tokens_details", "cached_tokens"),
        ("prompt_cache_hit_tokens",),  # DeepSeek
        ("cached_tokens",),  # Moonshot, Together
        ("num_cached_tokens",),  # Mistral
        ("cache_read_input_tokens",),
    ),
    "cache_write_tokens": (
        ("prompt_tokens_details", "cache_write_tokens"),  # OpenRouter
        ("prompt_tokens_details", "cache_creation_tokens"),
        ("cache_creation_input_tokens",),
    ),
    "reasoning_tokens": (("completion_tokens_details", "reasoning_tokens"), ("reasoning_tokens",)),
    "input_audio_tokens": (("prompt_tokens_details", "audio_tokens"),),
    "output_audio_tokens": (("completion_tokens_details", "audio_tokens"),),
    "cache_write_1h_tokens": (  # of resellers of Claudes
        ("prompt_tokens_details", "cache_creation_token_details", "ephemeral_1h_input_tokens"),
        ("cache_creation", "ephemeral_1h_input_tokens"),
    ),
    "web_searches": (("server_tool_use", "web_search_requests"),),
}
_COUNTS = [(name, frozenset(path[0] for path in paths), paths) for name, paths in _PATHS.items()]


def read_usage(chunk: Mapping[str, Any], choice: Mapping[str, Any]) -> Usage | None:
    """What a chunk or a whole answer tells, in `usage`, in its choice (Moonshot) or in `x_groq`; None: nothing."""
    aside = chunk.get("x_groq")
    for told in (chunk.get("usage"), aside.get("usage") if isinstance(aside, dict) else None, choice.get("usage")):
        if isinstance(told, dict) and told:
            return _usage(told)
    return None


def _usage(told: Mapping[str, Any]) -> Usage:
    counts = {name: _first(told, paths) for name, keys, paths in _COUNTS if not keys.isdisjoint(told)}
    given, said, thought = (counts.get(name) for name in ("input_tokens", "output_tokens", "reasoning_tokens"))
    total = _count(told.get("total_tokens"))
    if given is not None and said is not None and thought and total == given + said + thought:
        counts["output_tokens"] = said + thought  # xAI counts the reasoning apart
    return Usage(**counts)


def _first(told: Mapping[str, Any], paths: tuple[tuple[str, ...], ...]) -> int | None:
    for path in paths:
        at: Any = told
        for step in path:
            at = at.get(step) if isinstance(at, dict) else None
        if (count := _count(at)) is not None:
            return count
    return None


def _count(value: object) -> int | None:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return count_in(value)
