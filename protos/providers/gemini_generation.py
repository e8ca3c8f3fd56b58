"""What a request wants of its answer, as Gemini's generationConfig, tools and toolConfig.

Called by gemini.py, which applies what quirks take out of the finished body.
"""

from __future__ import annotations

import re
from typing import Final

from diptych.protos.errors import InvalidRequest
from diptych.protos.openai import ChatRequest
from diptych.protos.openai_tools import Tool, ToolUse
from diptych.protos.wire_checks import compact

from .codec import JsonObject, Note
from .gemini_models import Generation
from .quirks import Quirks
from .reasoning_wish import Thinking, thinking
from .request_fields import moved, unsaid, unsupported
from .schema_documents import Inexpressible
from .schemas import adapt_schema

MOST_STOPS: Final = 5
_DEFAULT: Final = Quirks()
FIELDS: Final = {
    "temperature": "temperature",
    "top_p": "topP",
    "top_k": "topK",
    "seed": "seed",
    "presence_penalty": "presencePenalty",
    "frequency_penalty": "frequencyPenalty",
}
_SAID = frozenset({*FIELDS, "stop", "reasoning_budget"})
_EFFORTS = ("none", "minimal", "low", "medium", "high")
_MORE = ("xhigh", "max")
# Google's own translation of efforts, from its documentation of the OpenAI endpoint. The least level that all models
# of the third generation and later take is LOW.
_BUDGETS = {"minimal": 1024, "low": 1024, "medium": 8192, "high": 24_576}
_LEVELS = {"none": "LOW", "minimal": "LOW", "low": "LOW", "medium": "MEDIUM", "high": "HIGH"}
_LEAST_BUDGET = 128
_FIRST_LETTER = re.compile(r"[A-Za-z_]")
_INTEGER = re.compile(r"-?[0-9]{1,9}")


def write_generation(request: ChatRequest, rules: Generation, quirks: Quirks) -> tuple[JsonObject, list[Note]]:
    """The generationConfig."""
    config, notes = _sampling(request, quirks)
    for more, found in (_reasoning(request, rules, quirks), _form(request, rules, quirks), _resolution(request)):
        config |= more
        notes += found
    return config, notes


def _sampling(request: ChatRequest, quirks: Quirks) -> tuple[JsonObject, list[Note]]:
    notes = unsaid(request, _SAID, format_name="Gemini")
    config: JsonObject = {}
    for name, theirs in FIELDS.items():
        value = getattr(request, name)
        if name == "seed" and value is not None and not -(2**31) <= value < 2**31:
            value &= 2**31 - 1
            notes.append(moved("seed", f"{value}, which has the 32 bits that a seed has here"))
        if name == "top_k" and value == 0:
            notes.append(unsupported("top_k", "Gemini never chooses among all tokens"))
        elif value is not None:
            config[theirs] = value
    if request.stop:
        most = MOST_STOPS if quirks.most_stops is None else quirks.most_stops
        if len(request.stop) > most:
            notes.append(unsupported("stop", f"at most {most} strings are taken"))
        config["stopSequences"] = list(request.stop[:most])
    if (wanted := request.wanted_tokens) is not None:
        config["maxOutputTokens"] = wanted[1]
    elif quirks.default_max_tokens is not None:
        config["maxOutputTokens"] = quirks.default_max_tokens
    return config, notes


def _reasoning(request: ChatRequest, rules: Generation, quirks: Quirks) -> tuple[JsonObject, list[Note]]:
    asked = thinking(request)
    notes: list[Note] = []
    config: JsonObject = {}
    if rules.thinks == "no" or not quirks.effort_field:
        words = "this model cannot be told how much to think"
        if asked.effort not in (None, "none"):
            notes.append(unsupported(asked.path, words))
        if asked.budget is not None:
            notes.append(unsupported("reasoning_budget", words))
    else:
        config, notes = _amount(asked, rules, quirks)
    if asked.is_shown and rules.thinks != "no":
        config["includeThoughts"] = True
    return ({"thinkingConfig": config} if config else {}), notes


def _amount(asked: Thinking, rules: Generation, quirks: Quirks) -> tuple[JsonObject, list[Note]]:
    """One of thinkingBudget and thinkingLevel, which exclude each other."""
    effort = asked.effort
    if asked.budget is not None:
        words = f"thinkingBudget {asked.budget} says how much, of reasoning_budget"
        return {"thinkingBudget": asked.budget}, ([] if effort is None else [moved(asked.path, words)])
    if effort is None:
        return {}, []
    name = "thinkingBudget" if rules.thinks == "budget" else "thinkingLevel"
    if quirks.effort_field != _DEFAULT.effort_field:
        name = quirks.effort_field.rpartition(".")[2]
    theirs = quirks.effort_values.get(effort)
    notes: list[Note] = []
    if theirs is None and effort in _MORE:
        effort, notes = "high", [moved(asked.path, "high, the most that Gemini knows")]
        theirs = quirks.effort_values.get(effort)
    if theirs is None and effort not in _EFFORTS:
        return {}, [unsupported(asked.path, f"is none of {', '.join(_EFFORTS)}")]
    if name == "thinkingBudget":
        budget = _number(theirs) if theirs is not None else _budget(effort, rules)
        return {name: budget}, [moved(asked.path, f"{name} {budget}")]
    level = _LEVELS[effort] if theirs is None else theirs
    is_least = theirs is None and level.lower() != effort
    if is_least:
        notes.append(moved(asked.path, f"{name} {level}, the least that all models have"))
    return {name: level}, notes


def _budget(effort: str, rules: Generation) -> int:
    if effort == "none":
        return 0 if rules.may_stop else _LEAST_BUDGET
    return _BUDGETS[effort]


def _number(value: str) -> int | str:
    return int(value) if _INTEGER.fullmatch(value) else value


def _form(request: ChatRequest, rules: Generation, quirks: Quirks) -> tuple[JsonObject, list[Note]]:
    form = request.output_form
    if form is None or not form.is_json:
        return {}, []
    is_json: JsonObject = {"responseMimeType": "application/json"}
    if form.kind == "json_object":
        return is_json, []
    dialect = dialect_of(rules, quirks)
    schema = form.schema or {}
    if form.description is not None:
        schema.setdefault("description", form.description)
    try:
        adapted, notes = adapt_schema(schema, dialect, field=form.path)
    except Inexpressible as exc:
        return is_json, [unsupported(exc.path or form.path, exc.words)]
    return is_json | {"responseSchema" if dialect == "gemini" else "responseJsonSchema": adapted}, list(notes)


def _resolution(request: ChatRequest) -> tuple[JsonObject, list[Note]]:
    """Of images, which is one for a whole request."""
    images = [media for message in request.messages for media in message.media if media.kind == "image"]
    wished = [media for media in images if media.detail not in ("", "auto")]
    if not wished:
        return {}, []
    is_low = all(media.detail == "low" for media in wished)
    if is_low and len(wished) < len(images):
        return {}, [unsupported(f"{wished[0].path}.detail", "Gemini has one resolution for all images of a request")]
    resolution = "MEDIA_RESOLUTION_LOW" if is_low else "MEDIA_RESOLUTION_HIGH"
    notes = [moved(f"{media.path}.detail", f"{resolution}, for all images") for media in wished]
    return {"mediaResolution": resolution}, notes


def write_tools(request: ChatRequest, rules: Generation, quirks: Quirks) -> tuple[JsonObject, list[Note]]:
    """The fields tools and toolConfig. Raises InvalidRequest for a function's name that Gemini cannot say."""
    use = request.tool_use
    if use is None:
        return {}, []
    path = "function_call" if use.is_legacy else "tool_choice"
    notes: list[Note] = []
    if not use.parallel and use.mode != "none":
        notes.append(unsupported("parallel_tool_calls", "Gemini makes as many calls at a time as it likes"))
    if use.mode == "auto" and len(use.names) < len(use.tools):
        notes.append(moved(path, "the other functions are not told of at all"))
    declared = []
    for at, tool in enumerate(use.tools):
        if use.mode != "auto" or tool.name in use.names:
            function, found = _declared(tool, at, dialect_of(rules, quirks))
            declared.append(function)
            notes += found
    body: JsonObject = {"tools": [{"functionDeclarations": declared}]}
    config, found = _mode(use, quirks, path)
    if config:
        body["toolConfig"] = {"functionCallingConfig": config}
    return body, notes + found


def _mode(use: ToolUse, quirks: Quirks, path: str) -> tuple[JsonObject, list[Note]]:
    if use.mode == "none":
        return {"mode": "NONE"}, []
    if use.mode == "auto":
        return {}, []
    is_some = use.is_named or len(use.names) < len(use.tools)
    if quirks.tool_choice in ("no_required", "auto_only") or (is_some and quirks.tool_choice == "no_named"):
        return {}, [unsupported(path, "this target cannot be made to call")]
    return {"mode": "ANY"} | ({"allowedFunctionNames": list(use.names)} if is_some else {}), []


def _declared(tool: Tool, at: int, dialect: str) -> tuple[JsonObject, list[Note]]:
    path = tool.path or f"tools[{at}].function"
    if not _FIRST_LETTER.match(tool.name):
        told = f"{path}.name must begin with a letter or _ for Gemini ({tool.name}): rename the function"
        raise InvalidRequest(told, f"{path}.name")
    function: JsonObject = {"name": tool.name, "description": tool.description or ""}
    properties, is_open = tool.parameters.get("properties"), tool.parameters.get("additionalProperties")
    if not properties and (dialect == "gemini" or (properties is not None and not is_open)):
        return function, []  # an object without properties is refused
    place = f"{path}.{tool.schema_field}"
    name = "parameters" if dialect == "gemini" else "parametersJsonSchema"
    try:
        schema, notes = adapt_schema(tool.parameters, dialect, field=place)
    except Inexpressible as exc:
        words = f"Its arguments must match the JSON schema {compact(tool.parameters)}"
        function["description"] = f"{tool.description}\n\n{words}" if tool.description else words
        return function, [unsupported(exc.path or place, f"{exc.words}; it stands in the description")]
    return function | {name: schema}, list(notes)


def dialect_of(rules: Generation, quirks: Quirks) -> str:
    """Of schemas: JSON Schema's own words for models that have thought from the beginning, OpenAPI's for older ones."""
    if quirks.schema_dialect != _DEFAULT.schema_dialect:
        return quirks.schema_dialect
    return "gemini_json" if rules.thinks in ("budget", "level") else "gemini"
