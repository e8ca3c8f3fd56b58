"""Which format a model writes: from its chat template and its tokens, or by the names in the configuration.

Called once per model. A template is searched for strings; it is never run.
"""

from __future__ import annotations

from collections.abc import Callable, Container

from diptych.cluster.formats.format import (
    CALL_BEGIN,
    DEEPSEEK,
    DEEPSEEK_V3,
    HERMES,
    JSON,
    LLAMA3,
    MISTRAL,
    MISTRAL_LIST,
    REASONING_FORMATS,
    TOOL_FORMATS,
    Format,
    ReasoningFormat,
    ToolFormat,
)

# What templates of formats contain that are not known here. Some share a marker with Hermes and have XML inside it.
FOREIGN = (
    "<function=",  # Qwen3-Coder, Nemotron 3, functionary
    "<arg_key>",  # GLM
    "\uff5cDSML\uff5c",  # DeepSeek from V3.2 on
    "<|tool_calls_section_begin|>",  # Kimi K2
    "<|START_ACTION|>",  # Command
    "<|channel|>",  # gpt-oss
    "<|tool_call|>",  # Granite 3, Phi 4 mini
    "<|tool_call>",  # Gemma 4
    "functools[",
    "<invoke",  # MiniMax
    "<seed:tool_call>",
    "<|tool_list_start|>",  # LFM2
)


def detect(chat_template: str | None, vocabulary: Container[str]) -> Format:
    """The format that template and tokens speak of.

    Tools: what the template contains decides, then which markers are tokens; `json` where nothing speaks of a format,
    None where the template speaks of one that is not known. Reasoning: a marker in the template, or both as tokens.
    """
    template = chat_template or ""
    return Format(_tools(template, vocabulary), _reasoning(template, vocabulary))


def named(tools: str | None, reasoning: str | None) -> Format:
    """The format by its names. ValueError names what exists."""
    for name, known, what in ((tools, TOOL_FORMATS, "tool"), (reasoning, REASONING_FORMATS, "reasoning")):
        if name is not None and name not in known:
            raise ValueError(f"there is no {what} format {name!r}: choose one of {', '.join(sorted(known))}")
    return Format(
        TOOL_FORMATS[tools] if tools is not None else None,
        REASONING_FORMATS[reasoning] if reasoning is not None else None,
    )


def _tools(template: str, vocabulary: Container[str]) -> ToolFormat | None:
    if any(mark in template for mark in FOREIGN):
        return None
    found = _tools_by(lambda mark: mark in template, template)
    if found is None:
        found = _tools_by(lambda mark: mark in vocabulary, template)
    return found or JSON


def _tools_by(has: Callable[[str], bool], template: str) -> ToolFormat | None:
    if has(CALL_BEGIN):
        return DEEPSEEK_V3 if "```json" in template else DEEPSEEK
    if has(MISTRAL.triggers[0]):
        return MISTRAL if has("[ARGS]") else MISTRAL_LIST
    if has(HERMES.triggers[0]):
        return HERMES
    return LLAMA3 if has(LLAMA3.triggers[0]) else None


def _reasoning(template: str, vocabulary: Container[str]) -> ReasoningFormat | None:
    for form in REASONING_FORMATS.values():
        if form.start in template or form.end in template:
            return form
    for form in REASONING_FORMATS.values():
        if form.start in vocabulary and form.end in vocabulary:
            return form
    return None
