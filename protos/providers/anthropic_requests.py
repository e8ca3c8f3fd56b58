"""A canonical request as a body for Anthropic's POST /v1/messages, with notes of all that became something else.

Called by anthropic.py. The conversation: anthropic_turns.py; reasoning and sampling: claude_settings.py.
Format: platform.claude.com/docs/en/api/messages and the types of anthropic 2.12, read 2026-11-23.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from diptych.protos.errors import InvalidRequest
from diptych.protos.openai import ChatRequest
from diptych.protos.openai_tools import Tool, ToolUse
from diptych.protos.strict_json import printable
from diptych.protos.wire_checks import compact

from .anthropic_turns import Turns, cache_control
from .claude_models import LATEST_VERSION, Claude, claude_of
from .claude_settings import Block, block_of, most_tokens, plan_thinking, sampling_of
from .codec import JsonObject, Note, Outgoing
from .conversation import begun, earlier_calls
from .quirks import Quirks
from .request_fields import NO_SCHEMA, Frame, finished, moved, put, unsaid, unsupported, user_of
from .schema_documents import Inexpressible
from .schemas import adapt_schema

VERSION = "2023-06-01"  # the later one takes less, and third parties do not know it
VERSION_HEADER, BETA_HEADER = "anthropic-version", "anthropic-beta"
BETA_OPTION = "anthropic_beta"
_FIXED = frozenset({"model", "messages", "stream", "system"})
_SAID = frozenset({"temperature", "top_p", "top_k", "stop", "user", "safety_identifier"})
_SAID_AS = {
    "stop_sequences": "stop",
    "metadata": "user",
    "thinking": "reasoning_effort",
    "output_config": "response_format",
    "output_config.format": "response_format",
    "output_config.effort": "reasoning_effort",
}
_TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")
_THOUGHTS = ("thinking", "redacted_thinking")
_COMBINED = ("anyOf", "oneOf", "allOf")  # refused at the top of a tool's schema


@dataclass(slots=True)
class Encoding:
    """One request on its way into a body."""

    request: ChatRequest
    model: str
    quirks: Quirks
    name: str
    notes: list[Note] = field(default_factory=list)

    @property
    def family(self) -> str:
        """By which name provider_data and provider_options are this provider's."""
        return self.quirks.family or self.name

    @property
    def dialect(self) -> str:
        """Of schemas."""
        return "anthropic" if self.quirks.schema_dialect == "openai_strict" else self.quirks.schema_dialect

    def outgoing(self, *, stream: bool) -> Outgoing:
        """The whole. Raises InvalidRequest."""
        request, claude = self.request, claude_of(self.model)
        body: JsonObject = {"model": self.model, "max_tokens": 0}
        goes_on = self._converse(body, claude)
        forced = self._offer(body, claude)
        blocked = _block(body["messages"], forced=forced, goes_on=goes_on)
        plan = plan_thinking(request, claude, self.quirks, blocked=blocked)
        self.notes += plan.notes
        if plan.thinking is not None:
            body["thinking"] = plan.thinking
        body["max_tokens"], notes = most_tokens(request, claude, plan, self.quirks)
        version = self.quirks.headers.get(VERSION_HEADER, VERSION)
        sampling, more = sampling_of(request, claude, plan, samples=version < LATEST_VERSION)
        body |= sampling
        self.notes += notes + more
        if plan.effort:
            put(body, plan.effort_path, plan.effort)
        if form := self._form(claude, goes_on=goes_on):
            put(body, "output_config.format", form)
        if stops := self._stops():
            body["stop_sequences"] = stops
        user, notes = user_of(request)
        self.notes += notes
        if user:
            body["metadata"] = {"user_id": user}
        self.notes += unsaid(request, _SAID, format_name=self.name)
        return self._sent(body, stream=stream, version=version)

    def _converse(self, body: JsonObject, claude: Claude | None) -> bool:
        """The messages. Whether the last one begins the answer."""
        can = self.quirks.prefill and (claude is None or claude.prefill)
        request, notes = begun(self.request, can=can, format_name=self.name)
        goes_on = can and request.template.continue_final
        is_claude = claude is not None
        turns = Turns(request, self.quirks, self.family, self.name, is_claude=is_claude, goes_on=goes_on)
        system, body["messages"] = turns.made()
        if system:
            body["system"] = system
        if self.quirks.flattens_content:
            flatten(body)
        self.notes += notes + turns.notes
        return goes_on

    def _offer(self, body: JsonObject, claude: Claude | None) -> bool:
        """The tools. Whether a call is demanded."""
        use = self.request.tool_use
        if use is None:
            if calls := earlier_calls(self.request.messages):
                schema = {"type": "object"}
                body["tools"] = [{"name": call.name, "input_schema": schema} for call in calls]
                body["tool_choice"] = {"type": "none"}
                self.notes.append(moved("tools", "those that were called before, none of which may be called now"))
            return False
        lacks_names = self.quirks.tool_choice == "no_named"
        offered = use.tools if use.mode == "none" or (use.is_named and not lacks_names) else use.allowed
        body["tools"] = [tool_of(tool, i, self) for i, tool in enumerate(offered)]
        choice = self._choice(use, claude)
        if choice != {"type": "auto"}:
            body["tool_choice"] = choice
        return choice["type"] in ("any", "tool")

    def _choice(self, use: ToolUse, claude: Claude | None) -> JsonObject:
        path = "function_call" if use.is_legacy else "tool_choice"
        if use.mode == "none":
            return {"type": "none"}
        choice: JsonObject = {"type": "auto"}
        if use.mode == "required":
            named = use.is_named and self.quirks.tool_choice != "no_named"
            choice = {"type": "tool", "name": use.names[0]} if named else {"type": "any"}
            if self.quirks.tool_choice in ("no_required", "auto_only") or (claude and not claude.forced_calls):
                self.notes.append(unsupported(path, "this model chooses itself whether it calls a tool"))
                choice = {"type": "auto"}
        if use.most_calls == 1:
            if self.quirks.parallel_tools:
                choice["disable_parallel_tool_use"] = True
            else:
                self.notes.append(unsupported("parallel_tool_calls", "the provider has no such parameter"))
        return choice

    def _form(self, claude: Claude | None, *, goes_on: bool) -> JsonObject:
        form = self.request.output_form
        if form is None or not form.is_json:
            return {}
        if form.kind == "json_object":
            told = f"{self.name} has no form for any JSON object: send a schema (json_schema)"
        elif self.dialect == "none" or (claude is not None and not claude.structured):
            told = NO_SCHEMA
        elif goes_on:
            told = "an answer that the last message begins has no form here"
        else:
            schema = form.schema
            assert schema is not None
            if form.description is not None:
                schema.setdefault("description", form.description)
            made = adapted(schema, self.dialect, form.path, self.notes)
            return {} if made is None else {"type": "json_schema", "schema": made}
        self.notes.append(unsupported(form.path, told))
        return {}

    def _stops(self) -> list[str]:
        found: list[str] = []
        for i, text in enumerate(self.request.stop):
            if not text.strip():
                self.notes.append(unsupported(f"stop[{i}]", "is whitespace alone, which the format refuses"))
            elif self.quirks.most_stops is not None and len(found) == self.quirks.most_stops:
                told = f"the provider takes {self.quirks.most_stops} strings at most"
                self.notes.append(unsupported(f"stop[{i}]", told))
            else:
                found.append(text)
        return found

    def _sent(self, body: JsonObject, *, stream: bool, version: str) -> Outgoing:
        if stream:
            body["stream"] = True
        betas, request = self._betas()
        frame = Frame(family=self.family, fixed=_FIXED, said_as=_SAID_AS)
        body, notes = finished(body, request, self.quirks, frame)
        headers = {name: value for name, value in self.quirks.headers.items() if name.lower() != BETA_HEADER}
        inner = str(body.get("anthropic_version", ""))
        if inner.startswith("vertex-"):
            # Google's address names the model, and its body the version.
            del body["model"]
            if betas:
                body[BETA_OPTION] = betas
            verb = "streamRawPredict" if stream else "rawPredict"
            path = f"/{quote(self.model, safe='@')}:{verb}"
        else:
            headers[VERSION_HEADER] = version
            if betas:
                headers[BETA_HEADER] = ",".join(betas)
            path = "/messages"
        return Outgoing(path=path, body=body, headers=headers, notes=tuple(self.notes + notes))

    def _betas(self) -> tuple[list[str], ChatRequest]:
        """Those of the provider and of the client, and the request without its own."""
        found = [beta.strip() for beta in self.quirks.headers.get(BETA_HEADER, "").split(",") if beta.strip()]
        options = self.request.provider_options
        given = options.get(self.family, {})
        if BETA_OPTION not in given:
            return found, self.request
        path = f"provider_options.{self.family}.{BETA_OPTION}"
        asked = given[BETA_OPTION]
        asked = [asked] if isinstance(asked, str) else asked
        if not isinstance(asked, list) or not all(_is_token(beta) for beta in asked):
            raise InvalidRequest(f"{path} must be a list of names of beta features", path)
        rest = {name: value for name, value in given.items() if name != BETA_OPTION}
        request = self.request.model_copy(update={"provider_options": {**options, self.family: rest}})
        return list(dict.fromkeys(found + asked)), request


def flatten(body: JsonObject) -> None:
    """Contents that are texts alone become one text each."""
    for holder, name in [(body, "system"), *((message, "content") for message in body["messages"])]:
        blocks = holder.get(name, [])
        if blocks and all(block.get("type") == "text" for block in blocks):
            joint = "" if holder.get("role") == "assistant" else "\n\n"
            holder[name] = joint.join(block["text"] for block in blocks)


def begins_with(message: JsonObject, *kinds: str) -> bool:
    """Whether a message's first block is of one of these kinds."""
    content = message["content"]
    return isinstance(content, list) and content[0].get("type") in kinds


def _is_token(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9._-]{1,128}", value) is not None


def _block(messages: list[JsonObject], *, forced: bool, goes_on: bool) -> Block | None:
    """Why thinking with a budget cannot be asked for; None: it can."""
    last = next((message for message in reversed(messages) if message["role"] == "assistant"), None)
    lacks = last is not None and begins_with(messages[-1], "tool_result") and not begins_with(last, *_THOUGHTS)
    return block_of(forced=forced, goes_on=goes_on, lacks=lacks)


def tool_of(tool: Tool, i: int, encoding: Encoding) -> JsonObject:
    """One tool. The model is asked to keep to its schema, not held to it: the format holds to few and simple ones."""
    check_tool_name(tool, i, _TOOL_NAME, encoding.name)
    description, schema = tool.description or "", tool.parameters
    if any(name in schema for name in _COMBINED):
        path = f"{tool.path or f'tools[{i}]'}.{tool.schema_field}"
        description, schema = told_apart(description, schema)
        encoding.notes.append(Note("adapted", path, "its alternatives stand in the tool's description"))
    made: JsonObject = {"name": tool.name, "input_schema": schema}
    return made | ({"description": description} if description else {}) | cache_control(tool.kept)


def check_tool_name(tool: Tool, i: int, allowed: re.Pattern[str], format_name: str) -> None:
    """Raises InvalidRequest for a name that the format does not take."""
    if not allowed.fullmatch(tool.name):
        path = f"{tool.path or f'tools[{i}]'}.name"
        told = f"is {printable(tool.name, 64)}: {format_name} takes letters, digits, _ and - alone; rename the tool"
        raise InvalidRequest(f"{path} {told}", path)


def told_apart(description: str, schema: Mapping[str, Any]) -> tuple[str, JsonObject]:
    """A tool's description and schema without alternatives at its top, which formats refuse there."""
    kept = {name: value for name, value in schema.items() if name not in _COMBINED}
    left = {name: value for name, value in schema.items() if name in _COMBINED}
    words = f"Its input must also match the JSON schema {compact(left)}"
    return f"{description}\n\n{words}" if description else words, kept


def adapted(schema: JsonObject, dialect: str, path: str, notes: list[Note]) -> JsonObject | None:
    """`schema` in a dialect, with notes below `path`; None, with a note, where it cannot be said in it."""
    try:
        found, changes = adapt_schema(schema, dialect, field=path)
    except Inexpressible as exc:
        notes.append(unsupported(exc.path or path, exc.words))
        return None
    notes += changes
    return found
