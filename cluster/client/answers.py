"""What a client gets: answers, streamed deltas, model cards, each made of the server's JSON by one pure function."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

JsonObject = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call that the model wants made. `arguments` is JSON text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceAnswer:
    """One of the `n` choices of an answer. `text` is what it says, without reasoning and calls."""

    index: int
    text: str
    finish_reason: str  # stop, length or tool_calls
    logprobs: JsonObject | None = None  # in OpenAI's shape for the endpoint, where asked for
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    schema_errors: tuple[str, ...] = ()  # how it fails its schema, where the grammar could not express all of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A whole answer. `raw` is the server's JSON."""

    model: str
    choices: tuple[ChoiceAnswer, ...]
    prompt_tokens: int
    completion_tokens: int  # over all choices
    explanation: JsonObject | None  # how it was answered, where asked for by explain=True
    raw: JsonObject

    @property
    def text(self) -> str:
        """Of the first choice."""
        return self.choices[0].text

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """A streamed piece of one choice. The last piece of a choice has its `finish_reason`.

    The stream ends with one delta of empty text that carries `usage`, and `explanation` where asked for.
    """

    index: int = 0
    text: str = ""
    finish_reason: str | None = None
    logprobs: JsonObject | None = None
    reasoning: str = ""
    tool_calls: tuple[JsonObject, ...] = ()  # pieces of calls, in OpenAI's shape
    structured: tuple[JsonObject, ...] = ()  # parts of a JSON answer that are complete: path and value
    schema_errors: tuple[str, ...] = ()
    usage: Mapping[str, Any] | None = None  # prompt_tokens, completion_tokens, total_tokens, ...
    explanation: JsonObject | None = None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """A served model."""

    name: str
    max_context_tokens: int | None  # None: the server does not tell
    sampling_defaults: Mapping[str, float]  # what holds for sampling fields that a request does not give
    capabilities: JsonObject | None = None  # constraints, tools, reasoning, limits


def answer_of(body: JsonObject) -> Answer:
    """From the body of a whole answer of either endpoint."""
    choices = [
        ChoiceAnswer(
            index=choice["index"],
            text=(choice["message"]["content"] or "") if "message" in choice else choice["text"],
            finish_reason=choice["finish_reason"],
            logprobs=choice.get("logprobs"),
            schema_errors=tuple(choice.get("schema_errors") or ()),
            **_said(choice.get("message") or {}),
        )
        for choice in body["choices"]
    ]
    use = body.get("usage") or {}
    return Answer(
        model=body["model"],
        choices=tuple(sorted(choices, key=lambda choice: choice.index)),
        prompt_tokens=use.get("prompt_tokens", 0),
        completion_tokens=use.get("completion_tokens", 0),
        explanation=body.get("diptych"),
        raw=body,
    )


def _said(message: JsonObject) -> dict[str, Any]:
    calls = message.get("tool_calls") or ()
    return {
        "reasoning": message.get("reasoning_content") or "",
        "tool_calls": tuple(
            ToolCall(id=call["id"], name=call["function"]["name"], arguments=call["function"]["arguments"])
            for call in calls
        ),
    }


def deltas_of(event: JsonObject) -> list[Delta]:
    """From one event of a stream; empty for one that says nothing, such as the first of a chat answer."""
    found = []
    for choice in event["choices"]:
        said = choice.get("delta") or {}
        delta = Delta(
            index=choice.get("index", 0),
            text=(said.get("content") or "") if "delta" in choice else choice["text"],
            finish_reason=choice.get("finish_reason"),
            logprobs=choice.get("logprobs"),
            reasoning=said.get("reasoning_content") or "",
            tool_calls=tuple(said.get("tool_calls") or ()),
            structured=tuple(said.get("structured") or ()),
            schema_errors=tuple(choice.get("schema_errors") or ()),
        )
        if delta != Delta(index=delta.index):
            found.append(delta)
    if not event["choices"]:
        found.append(Delta(usage=event.get("usage"), explanation=event.get("diptych")))
    return found


def cards_of(body: JsonObject) -> list[ModelCard]:
    """From the body of /v1/models."""
    return [
        ModelCard(
            name=card["id"],
            max_context_tokens=card.get("max_model_len"),
            sampling_defaults=card.get("sampling_defaults") or {},
            capabilities=card.get("capabilities"),
        )
        for card in body["data"]
    ]
