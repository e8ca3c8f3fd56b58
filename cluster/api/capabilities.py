"""What a served model can do, as /v1/models tells it: clients read facts here instead of guessing by a model's name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from diptych.cluster.constraints.keywords import Draft
from diptych.cluster.formats.format import JSON, ReasoningFormat, ToolFormat
from diptych.protos.openai import MAX_ANSWERS
from diptych.protos.openai_output import Kind
from diptych.protos.openai_replies import JsonObject
from diptych.protos.openai_sampling import MAX_CHOICES, MAX_LOGPROBS
from diptych.protos.openai_tools import MAX_SCHEMA_BYTES, MAX_TOOLS

from .served import ServedModel

_CHOICES = ["auto", "none", "required", "named", "allowed_tools"]
_MEDIA = ("image", "audio", "file")
_DIALECTS = [draft.value.split("/")[-1].removeprefix("draft-") for draft in Draft]


def capabilities_of(model: ServedModel, context_tokens: int) -> JsonObject:
    """`context_tokens`: prompt and answer together, as the engines' pools allow now."""
    has_template = model.renderer.has_template
    return {
        "context_tokens": context_tokens,
        "modalities": {"input": ["text"], "output": ["text"]},
        "endpoints": ["chat.completions", "responses", "messages", "completions"] if has_template else ["completions"],
        "constraints": list(get_args(Kind)),
        "schema": {"dialects": _DIALECTS, "strict": "always", "max_bytes": MAX_SCHEMA_BYTES},
        "tools": _tools(model) if has_template else None,
        "reasoning": _reasoning(model, model.format.reasoning) if has_template else None,
        "logprobs": {"top": MAX_LOGPROBS, "prompt": True},
        "limits": {"n": MAX_CHOICES, "answers": MAX_ANSWERS},
    }


def capabilities_of_route(targets: Sequence[str], own: Sequence[JsonObject]) -> JsonObject:
    """The sum of what its targets can do: `own` are those of own models. Which of them a request needs decides which
    targets it can go to. `context_tokens` null: only providers know.
    """
    has_providers = any(not name.startswith("pool/") for name in targets)
    tools = next((told["tools"] for told in own if told["tools"] is not None), None)
    if has_providers:
        tools = {**(tools or {}), "choices": _CHOICES, "parallel": True, "max": MAX_TOOLS}
    return {
        "context_tokens": None if has_providers else max((told["context_tokens"] for told in own), default=None),
        "modalities": {"input": ["text", *(_MEDIA if has_providers else ())], "output": ["text"]},
        "endpoints": ["chat.completions", "responses", "messages"],
        "constraints": list(get_args(Kind)) if own else ["json_schema", "json_object"],
        "schema": {"dialects": _DIALECTS, "strict": "always" if not has_providers else "by target"},
        "tools": tools,
        "reasoning": next((told["reasoning"] for told in own if told["reasoning"] is not None), None)
        or ({"field": "reasoning_content"} if has_providers else None),
        "logprobs": {"top": MAX_LOGPROBS, "prompt": True} if own else None,
        "limits": {"n": MAX_CHOICES, "answers": MAX_ANSWERS},
        "targets": list(targets),
    }


def _tools(model: ServedModel) -> JsonObject | None:
    knows = model.renderer.knows_tools
    format: ToolFormat | None = model.format.tools if knows else JSON
    if format is None:
        return None
    return {
        "format": format.name,
        "in_template": knows,  # false: a system message tells the model of tools
        "choices": _CHOICES,
        "parallel": True,
        "guided": True,  # names exist and arguments fit, whatever `strict` says
        "max": MAX_TOOLS,
    }


def _reasoning(model: ServedModel, format: ReasoningFormat | None) -> JsonObject | None:
    if format is None:
        return None
    return {
        "format": format.name,
        "field": "reasoning_content",
        "before_constraints": {format.start, format.end} <= model.markers.keys(),
    }
