"""What a call may ask for beside its messages: portable parameters, and typed ones of each kind of target.

draft.py writes them into a request. Portable ones are translated, and refused where the target has no words for
them; those under `options` go out verbatim, and only to the family that they are for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict, cast, get_args, get_type_hints

from .errors import UsageError

MOST_LABEL = 128  # characters of the name of a session or tenant, as clusters take them
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class PoolOptions(TypedDict, total=False):
    """Of a Diptych cluster: what its API takes beyond OpenAI's fields (docs/api-fields.md)."""

    min_p: float
    repetition_penalty: float
    min_tokens: int
    ignore_eos: bool
    bad_words: list[str]
    stop_token_ids: list[int]
    allowed_token_ids: list[int]
    include_stop_str_in_output: bool
    logprobs: bool
    top_logprobs: int
    prompt_logprobs: int
    guided_regex: str
    guided_choice: list[str]
    guided_grammar: str
    guided_json: dict[str, Any] | str
    schema_in_prompt: bool
    include_reasoning: bool
    chat_template_kwargs: dict[str, Any]
    priority: int
    timeout_s: float
    first_token_timeout_s: float
    explain: bool
    prompt_cache_key: str
    safety_identifier: str
    metadata: dict[str, str]
    provider_options: dict[str, dict[str, Any]]


class OpenAIOptions(TypedDict, total=False):
    """Of Chat Completions (https://platform.openai.com/docs/api-reference/chat/create)."""

    logprobs: bool
    top_logprobs: int
    metadata: dict[str, str]
    modalities: list[Literal["text", "audio"]]
    audio: dict[str, Any]
    prediction: dict[str, Any]
    prompt_cache_key: str
    prompt_cache_retention: Literal["in_memory", "24h"]
    safety_identifier: str
    service_tier: Literal["auto", "default", "flex", "priority"]
    store: bool
    verbosity: Literal["low", "medium", "high"]
    web_search_options: dict[str, Any]


class OpenAIResponsesOptions(TypedDict, total=False):
    """Of the Responses API (https://platform.openai.com/docs/api-reference/responses/create)."""

    include: list[str]
    metadata: dict[str, str]
    prompt_cache_key: str
    reasoning: dict[str, Any]
    safety_identifier: str
    service_tier: Literal["auto", "default", "flex", "priority"]
    store: bool
    text: dict[str, Any]
    truncation: Literal["auto", "disabled"]


class AnthropicOptions(TypedDict, total=False):
    """Of Messages (https://docs.claude.com/en/api/messages)."""

    cache_control: dict[str, Any]
    container: str
    context_management: dict[str, Any]
    mcp_servers: list[dict[str, Any]]
    metadata: dict[str, str]
    output_config: dict[str, Any]
    service_tier: Literal["auto", "standard_only"]
    thinking: dict[str, Any]
    top_k: int


class GeminiOptions(TypedDict, total=False):
    """Of generateContent (https://ai.google.dev/api/generate-content)."""

    cachedContent: str
    generationConfig: dict[str, Any]
    labels: dict[str, str]
    safetySettings: list[dict[str, Any]]


class BedrockOptions(TypedDict, total=False):
    """Of Converse (https://docs.aws.amazon.com/bedrock/latest/APIReference/API_runtime_Converse.html)."""

    additionalModelRequestFields: dict[str, Any]
    additionalModelResponseFieldPaths: list[str]
    guardrailConfig: dict[str, Any]
    performanceConfig: dict[str, str]
    promptVariables: dict[str, Any]
    requestMetadata: dict[str, str]


class OpenRouterOptions(TypedDict, total=False):
    """Of OpenRouter (https://openrouter.ai/docs/api-reference/chat-completion)."""

    models: list[str]
    plugins: list[dict[str, Any]]
    provider: dict[str, Any]
    reasoning: dict[str, Any]
    route: Literal["fallback"]
    transforms: list[str]
    usage: dict[str, Any]


class MistralOptions(TypedDict, total=False):
    """Of Mistral (https://docs.mistral.ai/api/)."""

    prompt_mode: Literal["reasoning"]
    safe_prompt: bool


class Options(TypedDict, total=False):
    """By the family of the target; others of the registry take any mapping, as `extra` does."""

    pool: PoolOptions
    openai: OpenAIOptions
    openai_responses: OpenAIResponsesOptions
    anthropic: AnthropicOptions
    gemini: GeminiOptions
    bedrock: BedrockOptions
    openrouter: OpenRouterOptions
    mistral: MistralOptions


class Params(TypedDict, total=False):
    """Portable parameters, each with the meaning that it has everywhere. None: not sent, whatever lies below says.

    thinking           how hard to reason; `thinking_tokens`: the most tokens of it
    tool_choice        auto, none, required, or a tool's name
    parallel_tools     false: at most one call in an answer
    session            requests of one session go where their prefix is kept; a target that has no sessions is not told
    timeout            seconds for one attempt; `first_token_timeout`: to the first piece of a stream
    options            of each family of targets, verbatim: {"pool": {"min_p": 0.05}}
    extra              fields of the body, verbatim, for whatever target
    on_unsupported     error (default), warn, or drop: what becomes of parameters that a target has no words for
    """

    temperature: float | None
    top_p: float | None
    top_k: int | None
    max_tokens: int | None
    stop: str | Sequence[str] | None
    seed: int | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    thinking: Effort | None
    thinking_tokens: int | None
    tool_choice: str | None
    parallel_tools: bool | None
    user: str | None
    session: str | None
    timeout: float | None
    first_token_timeout: float | None
    options: Options | None
    extra: Mapping[str, Any] | None
    on_unsupported: Literal["error", "warn", "drop"] | None


FAMILIES: Mapping[str, frozenset[str]] = {
    family: frozenset(get_type_hints(fields)) for family, fields in get_type_hints(Options).items()
}
NAMES = frozenset(get_type_hints(Params))
# Portable parameters to the canonical request's fields.
_FIELDS = {
    "thinking": "reasoning_effort",
    "thinking_tokens": "reasoning_budget",
    "parallel_tools": "parallel_tool_calls",
}
_OWN = {field: name for name, field in _FIELDS.items()} | {"max_completion_tokens": "max_tokens"}
_SCHEMA = "response_format.json_schema.schema"
_HERE = frozenset({"session", "timeout", "first_token_timeout", "options", "extra", "on_unsupported", "tool_choice"})


def checked(params: Mapping[str, Any], where: str) -> Params:
    """`params`, each known. Raises UsageError that names the unknown one and what is close to it."""
    from difflib import get_close_matches

    for name in params:
        if name not in NAMES:
            close = get_close_matches(name, NAMES, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise UsageError(
                f"{where}: there is no parameter {name!r}: {hint}what one provider alone knows goes under options "
                f"(typed) or extra (verbatim)",
                name,
            )
    if (way := params.get("on_unsupported")) not in (None, "error", "warn", "drop"):
        raise UsageError(f"{where}: on_unsupported is error, warn or drop, not {way!r}", "on_unsupported")
    for name in ("timeout", "first_token_timeout"):
        limit = params.get(name)
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit > 0):
            raise UsageError(f"{where}: {name} is a number of seconds above 0, not {limit!r}", name)
    session = params.get("session")
    if session is not None and not is_label(session):
        raise UsageError(f"{where}: session is a text of 1 to {MOST_LABEL} printable ASCII characters", "session")
    for name, told in (
        ("options", "families to their fields"),
        ("extra", "fields to values"),
        ("logit_bias", "tokens"),
    ):
        if params.get(name) is not None and not isinstance(params[name], Mapping):
            raise UsageError(f"{where}: {name} is a mapping of {told}, not a {type(params[name]).__name__}", name)
    stop = params.get("stop")
    if stop is not None and (isinstance(stop, bytes) or not isinstance(stop, Sequence)):
        raise UsageError(f"{where}: stop is a text or a list of texts, not a {type(stop).__name__}", "stop")
    _check_options(params.get("options") or {}, where)
    for name in ("options", "extra"):
        if params.get(name):
            _check_json(params[name], f"{where}: {name}", name)
    return cast("Params", {name: _detached(value) for name, value in params.items()})


def _check_json(value: Mapping[Any, Any], where: str, field: str) -> None:
    """Each of the fields; what goes out verbatim is JSON already."""
    import json

    for name, inner in value.items():
        if not isinstance(name, str):
            raise UsageError(f"{where}: fields have names, and {name!r} is none: write it in quotes", field)
        try:
            json.dumps(_detached(inner), allow_nan=False)
        except (TypeError, ValueError, RecursionError) as exc:
            raise UsageError(f"{where}.{name} holds what JSON has not: {exc}", f"{field}.{name}") from exc


def is_label(text: object) -> bool:
    """Whether it may stand in a header."""
    return (
        isinstance(text, str)
        and 0 < len(text) <= MOST_LABEL
        and text.isascii()
        and text.isprintable()
        and text == text.strip()
    )


def _check_options(options: Mapping[str, Any], where: str) -> None:
    from difflib import get_close_matches

    for family, fields in options.items():
        if fields is not None and not isinstance(fields, Mapping):
            raise UsageError(f"{where}: options.{family} is a mapping of fields", f"options.{family}")
        known = FAMILIES.get(family)
        for name in fields or ():
            if known is not None and name not in known:
                close = get_close_matches(name, known, n=1)
                hint = f": did you mean {close[0]}?" if close else "; extra takes any field"
                raise UsageError(f"{where}: {family} has no option {name!r}{hint}", f"options.{family}.{name}")


def _detached(value: Any) -> Any:
    """What the caller does to it later changes no call."""
    if isinstance(value, Mapping):
        return {name: _detached(inner) for name, inner in value.items()}
    return [_detached(inner) for inner in value] if isinstance(value, list) else value


class _Anew(dict[str, Any]):
    """What lies below this was taken away, and nothing of it comes back."""


def _laid(below: Any, over: Any) -> Any:
    if over is None or below is None or isinstance(over, _Anew):
        return _Anew(over) if below is None and over is not None else over
    together = {**below, **over}
    return _Anew(together) if isinstance(below, _Anew) else together


def _families(below: Any, over: Any) -> Any:
    if over is None or below is None or isinstance(over, _Anew):
        return _Anew(over) if below is None and over is not None else over
    together = {**below, **over}
    together |= {family: _laid(below[family], over[family]) for family in below if family in over}
    return _Anew(together) if isinstance(below, _Anew) else together


def layered(*layers: Mapping[str, Any]) -> Params:
    """Later layers win; `options` and `extra` are merged name by name. A None stays, so that it holds over layers that
    this one will be laid upon.
    """
    found: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            if name in found and name == "extra":
                found[name] = _laid(found[name], value)
            elif name in found and name == "options":
                found[name] = _families(found[name], value)
            else:
                found[name] = value
    return cast("Params", found)


def merged(*layers: Mapping[str, Any]) -> Params:
    """The same for a request: a parameter, a family and an option that are None are not there. What is None in `extra`
    is sent: it goes out as it is.
    """
    found = {name: value for name, value in layered(*layers).items() if value is not None}
    options: Any = found.get("options")
    if options is not None:
        found["options"] = {
            family: {name: value for name, value in fields.items() if value is not None}
            for family, fields in options.items()
            if fields is not None
        }
    return cast("Params", found)


def own_name(field: str) -> str:
    """Of a field of the canonical request, as calls have it."""
    if field.startswith(_SCHEMA):
        return f"output{field[len(_SCHEMA) :]}"
    return _OWN.get(field, field)


def in_own_words(words: str, field: str) -> str:
    """Words about a field of the canonical request that begin with its name."""
    return own_name(field) + words[len(field) :] if field and words.startswith(field) else words


def canonical(params: Mapping[str, Any], tool_names: Sequence[str]) -> dict[str, Any]:
    """As fields of a chat request. Raises UsageError."""
    fields: dict[str, Any] = {_FIELDS.get(name, name): value for name, value in params.items() if name not in _HERE}
    if "max_tokens" in fields:
        fields["max_completion_tokens"] = fields.pop("max_tokens")
    if "logit_bias" in fields:
        fields["logit_bias"] = {str(token): bias for token, bias in fields["logit_bias"].items()}
    if "stop" in fields and not isinstance(fields["stop"], str):
        fields["stop"] = list(fields["stop"])
    choice = params.get("tool_choice")
    if choice == "required" and not tool_names:
        raise UsageError("tool_choice='required' needs tools, and there are none: give tools=[...]", "tool_choice")
    if choice in ("auto", "none", "required"):
        if tool_names:
            fields["tool_choice"] = choice
    elif choice is not None:
        if choice not in tool_names:
            there = ", ".join(tool_names) or "none"
            words = f"tool_choice is auto, none, required or a tool's name; {choice!r} is none of: {there}"
            raise UsageError(words, "tool_choice")
        fields["tool_choice"] = {"type": "function", "function": {"name": choice}}
    if not tool_names:
        fields.pop("parallel_tool_calls", None)
    return fields


EFFORTS: tuple[Effort, ...] = get_args(Effort)
