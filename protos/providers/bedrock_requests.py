"""A canonical request as a body for Amazon Bedrock's Converse and ConverseStream, with notes of all that became
something else.

Called by bedrock.py. The conversation: bedrock_turns.py; what the models take: bedrock_models.py, claude_settings.py.
Format: the service model of botocore 1.44 and docs.aws.amazon.com/bedrock/latest/APIReference, read 2026-11-23.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import quote

from diptych.protos.openai import ChatRequest
from diptych.protos.openai_tools import Tool, ToolUse
from diptych.protos.wire_checks import compact

from .anthropic_requests import adapted, check_tool_name, told_apart
from .bedrock_models import BedrockModel, model_of
from .bedrock_turns import Turns, cache_point
from .claude_settings import Block, Plan, block_of, plan_thinking, sampling_of, wish_of
from .codec import JsonObject, Note, Outgoing
from .conversation import begun, earlier_calls
from .quirks import Quirks
from .request_fields import NO_SCHEMA, Frame, finished, moved, put, unsaid, unsupported, user_of

_FIXED = frozenset({"modelId", "messages", "system"})
_SAID = frozenset({"temperature", "top_p", "top_k", "stop", "user", "safety_identifier"})
_SAID_AS = {
    "inferenceConfig.temperature": "temperature",
    "inferenceConfig.topP": "top_p",
    "inferenceConfig.maxTokens": "max_tokens",
    "inferenceConfig.stopSequences": "stop",
    "toolConfig": "tools",
    "toolConfig.toolChoice": "tool_choice",
    "outputConfig": "response_format",
}
_TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_METADATA = re.compile(r"[a-zA-Z0-9\s:_@$#=/+,.-]{1,256}")
_FORM_NAME = re.compile(r"[^A-Za-z0-9_-]+")
_COMBINED = ("anyOf", "oneOf", "allOf")
_REASONED_TO_THE_FULL = "cannot be set while this model reasons with high effort"


@dataclass(slots=True)
class Encoding:
    """One request on its way into a body."""

    request: ChatRequest
    model_id: str
    quirks: Quirks
    name: str
    notes: list[Note] = field(default_factory=list)
    extra: JsonObject = field(default_factory=dict)  # additionalModelRequestFields

    @property
    def family(self) -> str:
        """By which name provider_data and provider_options are this provider's."""
        return self.quirks.family or self.name

    @property
    def dialect(self) -> str:
        """Of schemas."""
        return "bedrock" if self.quirks.schema_dialect == "openai_strict" else self.quirks.schema_dialect

    def outgoing(self, *, stream: bool) -> Outgoing:
        """The whole. Raises InvalidRequest."""
        request, model = self.request, model_of(self.model_id)
        body: JsonObject = {}
        goes_on = self._converse(body, model)
        forced = self._offer(body, model)
        plan = self._reason(model, body, forced=forced)
        if settings := self._settings(model, plan):
            body["inferenceConfig"] = settings
        if form := self._form(model, goes_on=goes_on):
            body["outputConfig"] = {"textFormat": form}
        user, notes = user_of(request)
        self.notes += notes
        if user:
            if _METADATA.fullmatch(user):
                body["requestMetadata"] = {"user": user}
            else:
                told = f"{self.name} takes letters, digits, spaces and :_@$#=/+,-. alone, 256 at most"
                self.notes.append(unsupported("user", told))
        if request.stop and model.claude is not None:
            body["additionalModelResponseFieldPaths"] = ["/stop_sequence"]  # which of them it was
        if self.extra:
            body["additionalModelRequestFields"] = self.extra
        self.notes += unsaid(request, _SAID, format_name=self.name)
        frame = Frame(family=self.family, fixed=_FIXED, said_as=_SAID_AS)
        body, notes = finished(body, request, self.quirks, frame)
        verb = "converse-stream" if stream else "converse"
        path = f"/model/{quote(self.model_id, safe='')}/{verb}"
        return Outgoing(path=path, body=body, headers=dict(self.quirks.headers), notes=tuple(self.notes + notes))

    def _converse(self, body: JsonObject, model: BedrockModel) -> bool:
        """The messages. Whether the last one begins the answer."""
        can = self.quirks.prefill and model.prefill
        request, notes = begun(self.request, can=can, format_name=self.name)
        goes_on = can and request.template.continue_final
        turns = Turns(request, model, self.quirks, self.family, self.name, goes_on=goes_on)
        system, body["messages"] = turns.made()
        if system:
            body["system"] = system
        self.notes += notes + turns.notes
        return goes_on

    def _offer(self, body: JsonObject, model: BedrockModel) -> bool:
        """The tools. Whether a call is demanded. Blocks of calls are refused without a toolConfig."""
        use, calls = self.request.tool_use, earlier_calls(self.request.messages)
        if use is None:
            if calls:
                self._name_again([call.name for call in calls], body, model)
            return False
        if use.mode == "none":
            if not calls:
                return False  # to offer none says the same
            body["toolConfig"] = {"tools": self._tools(use.tools, model)}
            self._forbid_calls(model, "function_call" if use.is_legacy else "tool_choice")
            return False
        offered = use.tools if use.is_named else use.allowed
        config: JsonObject = {"tools": self._tools(offered, model)}
        body["toolConfig"] = config
        return self._choose(use, model, config)

    def _name_again(self, names: list[str], body: JsonObject, model: BedrockModel) -> None:
        schema = {"json": {"type": "object"}}
        body["toolConfig"] = {"tools": [{"toolSpec": {"name": name, "inputSchema": schema}} for name in names]}
        self.notes.append(moved("tools", "those that were called before, none of which is to be called now"))
        if model.claude is not None:
            self.extra["tool_choice"] = {"type": "none"}

    def _forbid_calls(self, model: BedrockModel, path: str) -> None:
        if model.claude is not None:
            self.extra["tool_choice"] = {"type": "none"}  # beside a toolChoice it would be refused
        else:
            self.notes.append(unsupported(path, "this model cannot be kept from calls after there were some"))

    def _choose(self, use: ToolUse, model: BedrockModel, config: JsonObject) -> bool:
        path = "function_call" if use.is_legacy else "tool_choice"
        forced = use.mode == "required"
        if forced and (not model.forced_calls or self.quirks.tool_choice in ("no_required", "auto_only")):
            self.notes.append(unsupported(path, "this model chooses itself whether it calls a tool"))
            forced = False
        named = forced and use.is_named and self.quirks.tool_choice != "no_named"
        if use.most_calls == 1 and model.claude is not None and self.quirks.parallel_tools:
            kind: JsonObject = (
                {"type": "tool", "name": use.names[0]} if named else {"type": "any" if forced else "auto"}
            )
            self.extra["tool_choice"] = {**kind, "disable_parallel_tool_use": True}
            return forced
        if use.most_calls == 1 and not use.parallel:
            self.notes.append(unsupported("parallel_tool_calls", "this model has no such parameter"))
        if forced:  # `auto` is what is meant where nothing is said, and some models refuse the word
            config["toolChoice"] = {"tool": {"name": use.names[0]}} if named else {"any": {}}
        return forced

    def _tools(self, tools: Sequence[Tool], model: BedrockModel) -> list[JsonObject]:
        return [made for i, tool in enumerate(tools) for made in (self._tool(tool, i), *cache_point(tool.kept, model))]

    def _tool(self, tool: Tool, i: int) -> JsonObject:
        check_tool_name(tool, i, _TOOL_NAME, self.name)
        description, schema = (tool.description or "").strip(), tool.parameters
        if any(name in schema for name in _COMBINED):
            path = f"{tool.path or f'tools[{i}]'}.{tool.schema_field}"
            description, schema = told_apart(description, schema)
            self.notes.append(Note("adapted", path, "its alternatives stand in the tool's description"))
        made: JsonObject = {"name": tool.name, "inputSchema": {"json": schema}}
        return {"toolSpec": made | ({"description": description} if description else {})}

    def _reason(self, model: BedrockModel, body: JsonObject, *, forced: bool) -> Plan:
        """What is said of reasoning; of a Claude it is the plan."""
        if model.claude is None:
            self._reason_elsewhere(model)
            return Plan()
        blocked = _block(body["messages"], forced=forced)
        plan = plan_thinking(self.request, model.claude, self.quirks, blocked=blocked)
        self.notes += plan.notes
        if plan.thinking is not None:
            self.extra["thinking"] = plan.thinking
        # Bedrock takes an effort beside adaptive thinking alone; beside a budget of tokens that says it already.
        if plan.effort and model.claude.adaptive_thinking:
            self.extra["output_config"] = {"effort": plan.effort}
        return plan

    def _reason_elsewhere(self, model: BedrockModel) -> None:
        wish = wish_of(self.request)
        if wish.budget is not None:
            self.notes.append(unsupported("reasoning_budget", "this model has no budget of reasoning"))
        effort = wish.effort or {None: "", True: "medium", False: "none"}[wish.is_on]
        if not effort:
            return
        efforts, path, word = model.efforts, self.quirks.effort_field, None
        if path != "reasoning_effort":
            word = self.quirks.effort_values.get(effort, effort) if path else None
        elif efforts is not None:
            path, word = efforts.path, self.quirks.effort_values.get(effort, efforts.words.get(effort))
        if word is None:
            if wish.effort not in (None, "none"):
                self.notes.append(unsupported(wish.path, "this model cannot be told how much to reason"))
            return
        put(self.extra, path, word)
        if model.is_nova_2 and path.startswith("reasoningConfig."):
            put(self.extra, "reasoningConfig.type", "enabled")
        if word != effort:
            self.notes.append(moved(wish.path, f"{path} {word}"))

    def _settings(self, model: BedrockModel, plan: Plan) -> JsonObject:
        request = self.request
        found: JsonObject = {}
        tokens = request.wanted_tokens[1] if request.wanted_tokens is not None else self.quirks.default_max_tokens
        if tokens is None and plan.budget:
            tokens = plan.budget + 4096
            self.notes.append(moved("max_tokens", f"{tokens}: thinking with a budget demands a number"))
        if tokens is not None:
            found["maxTokens"] = tokens
        sampling, notes = sampling_of(request, model.claude, plan, samples=model.samples)
        self.notes += notes
        names = {"temperature": "temperature", "top_p": "topP"}
        found |= {names[name]: value for name, value in sampling.items() if name in names}
        if "top_k" in sampling:
            if model.top_k_path:
                put(self.extra, model.top_k_path, sampling["top_k"])
            else:
                self.notes.append(unsupported("top_k", "this model has no such parameter"))
        if model.is_nova_2 and self.extra.get("reasoningConfig", {}).get("maxReasoningEffort") == "high":
            fields = {"maxTokens": "max_tokens", "temperature": "temperature", "topP": "top_p"}
            for name in [name for name in fields if name in found]:
                del found[name]
                self.notes.append(unsupported(fields[name], _REASONED_TO_THE_FULL))
        if request.stop:
            found["stopSequences"] = self._stops()
        return found

    def _stops(self) -> list[str]:
        most = self.quirks.most_stops
        found = list(self.request.stop) if most is None else list(self.request.stop[:most])
        for i in range(len(found), len(self.request.stop)):
            self.notes.append(unsupported(f"stop[{i}]", f"the model takes {most} strings at most"))
        return found

    def _form(self, model: BedrockModel, *, goes_on: bool) -> JsonObject:
        form = self.request.output_form
        if form is None or not form.is_json:
            return {}
        if form.kind == "json_object":
            told = f"{self.name} has no form for any JSON object: send a schema (json_schema)"
        elif self.dialect == "none" or not model.structured:
            told = NO_SCHEMA
        elif goes_on:
            told = "an answer that the last message begins has no form here"
        else:
            schema = adapted(form.schema or {}, self.dialect, form.path, self.notes)
            if schema is None:
                return {}
            named = {"name": _FORM_NAME.sub("_", form.name or "answer"), "schema": compact(schema)}
            said = named | ({"description": form.description} if form.description else {})
            return {"type": "json_schema", "structure": {"jsonSchema": said}}
        self.notes.append(unsupported(form.path, told))
        return {}


def _block(messages: list[JsonObject], *, forced: bool) -> Block | None:
    """Why thinking with a budget cannot be asked for; None: it can."""
    last = next((message for message in reversed(messages) if message["role"] == "assistant"), None)
    answers = "toolResult" in messages[-1]["content"][0]
    lacks = answers and last is not None and "reasoningContent" not in last["content"][0]
    return block_of(forced=forced, goes_on=messages[-1]["role"] == "assistant", lacks=lacks)
