"""How a provider differs from the wire format that it says it speaks; data of the providers' registry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Quirks:
    """None of these set: the format's maker's own. Field names are those of the provider's wire format."""

    # By which name provider_data and provider_options are this provider's; those of one family take each other's.
    family: str = ""
    # Fields of the body that have another name here. Those that the maker's format lacks (top_k, guided_regex) are sent
    # where they stand here, if only under their own name.
    rename: Mapping[str, str] = field(default_factory=dict)
    unsupported: frozenset[str] = frozenset()  # fields that the provider refuses or ignores
    system_role: Literal["system", "developer", "first_user"] = "system"  # `developer`: both are known
    flattens_content: bool = False  # contents are strings, never lists of parts
    stream_usage: bool = True  # stream_options.include_usage is known
    tool_choice: Literal["all", "no_required", "no_named", "auto_only"] = "all"
    parallel_tools: bool = True
    schema_dialect: str = "openai_strict"  # of response_format and of tools; `none`: no schema can be sent
    reasoning_field: str = "reasoning_content"  # of messages and deltas
    effort_field: str = "reasoning_effort"  # a dotted path; empty: no effort can be asked for
    effort_values: Mapping[str, str] = field(
        default_factory=dict
    )  # ours to theirs; a missing one goes as it is, an empty one cannot
    replay_reasoning: Literal["required", "optional", "strip"] = "strip"  # in messages that are sent back
    most_stops: int | None = None
    prefill: bool = False  # a last assistant message is gone on from
    prefill_field: str = ""  # a field of that message which must be true for it
    default_max_tokens: int | None = None  # where the format or the provider demands a number
    error_in_200: bool = False
    media: frozenset[str] = frozenset({"image"})  # kinds of Media that the format can carry here
    tells_parts: bool = False  # deltas tell which parts of a JSON answer are complete, as `structured`, on request
    extra_body: Mapping[str, Any] = field(default_factory=dict)  # always sent
    headers: Mapping[str, str] = field(default_factory=dict)  # always sent
