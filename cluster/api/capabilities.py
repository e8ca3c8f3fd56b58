"""What a served model can do, as /v1/models tells it: clients read facts here instead of guessing by a model's name."""

from __future__ import annotations

from typing import get_args

from diptych.cluster.constraints.keywords import Draft
from diptych.cluster.formats.format import JSON, ReasoningFormat, ToolFormat
from diptych.protos.openai import MAX_ANSWERS
from diptych.protos.openai_output import Kind
from diptych.protos.openai_replies import JsonObject
from diptych.protos.openai_sampling import MAX_CHOICES, MAX_LOGPROBS
from diptych.protos.openai_tools import MAX_SCHEMA_BYTES, MAX_TOOLS

from .served import ServedModel

_DIALECTS = [draft.value.split("/")[-1].removeprefix("draft-") for draft in Draft]


def capabilities_of(model: ServedModel, context_tokens: int) -> JsonObject:
    """`context_tokens`: prompt and answer together, as the engines' pools allow now."""
    has_template = model.renderer.has_template
    return {
        "context_tokens": context_tokens,
        "modalities": {"input": ["text"], "output": ["text"]},
        "endpoints": ["chat.completions", "completions"] if has_template else ["completions"],
        "constraints": list(get_args(Kind)),
        "schema": {"dialects": _DIALECTS, "strict": "always", "max_bytes": MAX_SCHEMA_BYTES},
        "tools": _tools(model) if has_template else None,
        "reasoning": _reasoning(model, model.format.reasoning) if has_template else None,
        "logprobs": {"top": MAX_LOGPROBS, "prompt": True},
        "limits": {"n": MAX_CHOICES, "answers": MAX_ANSWERS},
    }


def _tools(model: ServedModel) -> JsonObject | None:
    knows = model.renderer.knows_tools
    format: ToolFormat | None = model.format.tools if knows else JSON
    if format is None:
        return None
    return {
        "format": format.name,
        "in_template": knows,  # false: a system message tells the model of tools
        "choices": ["auto", "none", "required", "named", "allowed_tools"],
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
