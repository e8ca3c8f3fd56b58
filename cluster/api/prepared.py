"""A checked request made ready to be answered: its prompts in token ids, what the answer must match, how it is read.

Called by the two endpoints. Grammars are composed in cluster/constraints and followed in the engines; formats of
reasoning and calls are cluster/formats'.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from diptych.cluster.constraints.compose import Composed, any_text, compose
from diptych.cluster.constraints.validate import validator
from diptych.cluster.formats.format import JSON, Format, ToolFormat
from diptych.protos.constraint import Constraint, Reasoning
from diptych.protos.errors import InvalidRequest
from diptych.protos.messages import Message
from diptych.protos.openai import ChatRequest, CompletionRequest, GenerationRequest
from diptych.protos.openai_output import OutputForm
from diptych.protos.openai_replies import JsonObject
from diptych.protos.openai_tools import ToolUse
from diptych.protos.strict_json import printable

from .reading import AnswerReader, Reading
from .render import ends_inside
from .served import ServedModel

MAX_TOLD_CHARS = 2048  # of keywords in a header, escapes included

Header = tuple[bytes, bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checks:
    """What complete answers are held against. `prefix`: the beginning of the content, which the request brought."""

    content: JsonObject | None = None  # a schema, and those of arguments, by function
    calls: Mapping[str, JsonObject] = field(default_factory=dict)
    prefix: str = ""

    def faults(self, content: str, calls: Sequence[tuple[str, str]]) -> list[str]:
        """Sentences with the places in the answer."""
        found: list[str] = []
        if self.content is not None and not calls:
            found += validator(self.content).errors(self.prefix + content)
        for number, (name, arguments) in enumerate(calls):
            if (schema := self.calls.get(name)) is not None:
                errors = validator(schema).errors(arguments)
                found += [f"tool_calls[{number}].function.arguments: {error}" for error in errors]
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """`reading` None: the text is the answer as it is."""

    prompts: list[tuple[int, ...]]
    constraint: Constraint | None = None
    reading: Reading | None = None
    checks: Checks | None = None
    headers: list[Header] = field(default_factory=list)
    asked: str = ""  # the field that put the constraint
    unenforced: str = ""  # keywords of its schema that the engines' grammar does not hold answers to, with their places

    def blamed(self, error: InvalidRequest) -> InvalidRequest:
        """An engine's error, of the constraint's field where it names none: engines do not know which field it was."""
        if error.param is not None or self.constraint is None:
            return error
        return InvalidRequest(f"{self.asked}: {error.message}", self.asked, error.detail)

    async def faults(self, reader: AnswerReader | None, text: str) -> list[str]:
        """How a complete answer fails its form; `text` where nobody reads it."""
        if self.checks is None:
            return []
        calls = [] if reader is None else [(call.name, call.arguments) for call in reader.calls]
        return await asyncio.to_thread(self.checks.faults, text if reader is None else reader.content, calls)


async def prepare_chat(request: ChatRequest, model: ServedModel, room: int) -> Prepared:
    """Raises InvalidRequest naming the field, ContextTooLong."""
    check_readable(request.messages, model)
    renderer, marks, form = model.renderer, model.format.reasoning, request.output_form
    tools = request.tool_use
    if tools is not None and (tools.mode == "none" or (form is not None and form.is_guided)):
        tools = None  # no call may be made: a form asked for in vLLM's way is the whole answer's
    told = _instruction(form) if form is not None and request.schema_in_prompt is not False else None
    text = renderer.chat_text(request.messages, tools=request.tool_use, options=request.template, instruction=told)
    prompt = await renderer.encode(text, add_special=False, max_tokens=room, param="messages")
    prefix = request.messages[-1].content if request.template.continue_final else ""
    lead = ""
    if marks is not None and not prefix:
        lead = renderer.answer_lead(text, request.messages, request.template)
    is_inside = marks is not None and ends_inside(lead, marks.start, marks.end)
    tool_format = _tool_format(model) if tools is not None else None
    reading = None
    if marks is not None or tools is not None or request.structured:
        reading = Reading(
            format=Format(tool_format, marks),
            in_reasoning=is_inside,
            tool_names=tools.names if tools is not None else (),
            is_named=tools is not None and tools.is_named,
            is_legacy=tools is not None and tools.is_legacy,
            shows_reasoning=request.include_reasoning is not False,
            tells_parts=request.structured is True,
            prefix=prefix,
        )
    composed = await _composed(request, form, tools, tool_format, model)
    reasoning = None
    if marks is not None and not prefix and (is_inside or marks.end not in lead):
        reasoning = _reasoning(model, is_open=is_inside, budget=request.reasoning_budget)
    if composed is None:
        is_watched = reasoning is not None and reasoning.budget is not None
        constraint = replace(any_text(), reasoning=reasoning) if is_watched else None
        return Prepared(prompts=[prompt], constraint=constraint, reading=reading, asked="reasoning_budget")
    schemas = {tool.name: tool.parameters for tool in tools.allowed} if tools is not None else {}
    return Prepared(
        prompts=[prompt],
        constraint=replace(composed.constraint, prefix=prefix, reasoning=reasoning),
        reading=reading,
        checks=Checks(content=form.schema if form is not None else None, calls=schemas, prefix=prefix),
        headers=_headers(composed) if schemas or (form is not None and form.is_json) else [],
        asked=_asked(form),
        unenforced=_unenforced(composed),
    )


def check_chat(request: ChatRequest, model: ServedModel) -> None:
    """What can be said before tokens are counted and grammars made. Raises InvalidRequest naming the field."""
    check_readable(request.messages, model)
    if request.tool_use is not None and request.tool_use.mode != "none":
        _tool_format(model)
    if request.reasoning_budget is not None:
        _reasoning(model, is_open=False, budget=request.reasoning_budget)
    model.renderer.chat_text(request.messages, tools=request.tool_use, options=request.template)


def check_readable(messages: Sequence[Message], model: ServedModel) -> None:
    """Raises InvalidRequest for a part that the model cannot read."""
    for message in messages:
        for part in message.media:
            what = "an image" if part.kind == "image" else "a sound" if part.kind == "audio" else "a file"
            told = f"is {what}, and the model {printable(model.name)} reads text only"
            raise InvalidRequest(f"{part.path} {told}", part.path)


async def prepare_completion(
    request: CompletionRequest, model: ServedModel, prompts: list[tuple[int, ...]]
) -> Prepared:
    """Raises InvalidRequest naming the field."""
    form = request.output_form
    composed = await _composed(request, form, None, None, model)
    if form is None or composed is None:
        return Prepared(prompts=prompts)
    return Prepared(
        prompts=prompts,
        constraint=composed.constraint,
        checks=Checks(content=form.schema),
        headers=_headers(composed) if form.is_json else [],
        asked=_asked(form),
    )


async def _composed(
    request: GenerationRequest,
    form: OutputForm | None,
    tools: ToolUse | None,
    tool_format: ToolFormat | None,
    model: ServedModel,
) -> Composed | None:
    if form is None and tools is None:
        return None
    for name, is_given in (("ignore_eos", request.ignore_eos), ("min_tokens", request.min_tokens)):
        if is_given:
            raise InvalidRequest(f"{name} goes beyond the end that {_asked(form)} gives the answer: leave it out", name)
    return await asyncio.to_thread(compose, form, tools, tool_format, token_ids=model.markers)


def _asked(form: OutputForm | None) -> str:
    return form.path if form is not None else "tools"


def _tool_format(model: ServedModel) -> ToolFormat:
    if not model.renderer.knows_tools:
        return JSON
    if model.format.tools is None:
        raise InvalidRequest(
            f"the model {printable(model.name)} writes calls in a format that this server cannot read; "
            "`tool_format` in its configuration names one",
            "tools",
        )
    return model.format.tools


def _reasoning(model: ServedModel, *, is_open: bool, budget: int | None) -> Reasoning | None:
    """The model's, where each of its markers is one token: only so an engine sees where it ends. Raises InvalidRequest
    for a budget where an engine cannot see that.
    """
    marks = model.format.reasoning
    if marks is None or not {marks.start, marks.end} <= model.markers.keys():
        if budget is not None and marks is not None:
            told = f"cannot be kept: the model {printable(model.name)} marks its reasoning with words, not with tokens"
            raise InvalidRequest(f"reasoning_budget {told}; leave the budget out", "reasoning_budget")
        return None
    return Reasoning(model.markers[marks.start], model.markers[marks.end], is_open, budget)


def _instruction(form: OutputForm) -> str | None:
    """The form in words: a model that is held to a form that it does not know writes worse."""
    if form.kind == "json_object":
        return "Answer with one JSON object and nothing else."
    if form.kind != "json_schema":
        return None
    named = f' named "{form.name}"' if form.name else ""
    told = f" ({form.description})" if form.description else ""
    return (
        f"Answer with JSON{named}{told} that matches this JSON schema, with its properties in the schema's order, "
        f"and with nothing else:\n{form.value}"
    )


def _headers(composed: Composed) -> list[Header]:
    headers = [(b"x-schema-coverage", composed.coverage.encode())]
    if told := _unenforced(composed):
        clean = told.encode("ascii", "backslashreplace")[:MAX_TOLD_CHARS]
        headers.append((b"x-schema-unsupported", clean))
    return headers


def _unenforced(composed: Composed) -> str:
    told = ", ".join(f"{note.keyword or 'the schema'} at {note.path}" for note in composed.notes)
    return printable(told, MAX_TOLD_CHARS)
