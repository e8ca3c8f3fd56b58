"""The grammar of tool calls in a model's own format: text until a call begins, then a call of an offered tool.

`compose` calls it with the literal pieces of `formats.calls` and the schemas of the arguments, judged already.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from diptych.cluster.constraints import lark
from diptych.cluster.formats import calls
from diptych.cluster.formats.format import ToolFormat

MAX_CALLS: Final = 64  # in one answer; no loop of calls goes on to the token limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Offered:
    """A tool that may be called: its name and the reduced schema of its arguments."""

    name: str
    schema: object


@dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """What calls an answer may hold. `token_ids` are the format's markers that the vocabulary has as one token."""

    format: ToolFormat
    tools: Sequence[Offered]
    parallel: bool = True
    token_ids: Mapping[str, int] = field(default_factory=dict)

    def required(self) -> str:
        """One call or more, nothing else."""
        return "\n".join(["start: calls", *self._group("calls", in_text=False), *self._arguments()])

    def optional(self) -> str:
        """Text, and calls where the model begins one.

        With a trigger: text in which it does not occur, then calls, then text again; without `parallel` the answer
        ends with the call. Where a call may begin without one, an answer that begins with its first character is one.
        """
        marks = list(self.format.triggers)
        first = f"FIRST: {self._opening(marks)}" if self.format.bare else f"FIRST: {lark.without(marks, '+')}"
        branches = ["FIRST?"]
        rules = [first]
        if self.format.bare:
            branches.append("bare")
            rules += self._group("bare", in_text=False)
        if marks:
            more = f" more{{0,{MAX_CALLS - 1}}} TEXT?" if self.parallel else ""
            branches.append(f"head{more}")
            rules += [f"TEXT: {lark.without(marks, '+')}", *self._triggered(marks)]
        return "\n".join([f"start: {' | '.join(branches)}", *rules, *self._arguments()])

    def optional_or_json(self, schema: object) -> str:
        """Calls, or a JSON value by a schema in the reduced form."""
        if self.format.bare:
            rules = [f"answer: {lark.json_value(self._united(schema))}"]
            if not self.format.triggers:
                return "\n".join(["start: answer", *rules])
            tagged = self._group("calls", in_text=True)
            return "\n".join(["start: calls | answer", *rules, *tagged, *self._arguments()])
        group = self._group("calls", in_text=True)
        return "\n".join(["start: calls | answer", f"answer: {lark.json_value(schema)}", *group, *self._arguments()])

    def _triggered(self, marks: list[str]) -> list[str]:
        """`head`: text up to the trigger and the calls from there; `more`: the same, of any text."""
        trigger = marks[0]
        if trigger in self.token_ids:
            return ["head: FIRST? calls", "more: TEXT? calls", *self._group("calls", in_text=True)]
        # A lexer without a way back finds the trigger as the end of one lazy terminal, not as a terminal of its own.
        return [
            "head: first_begin calls",
            "more: begin calls",
            "first_begin[lazy]: FIRST_BEGIN",
            "begin[lazy]: BEGIN",
            f"FIRST_BEGIN: FIRST? {lark.quoted(trigger)}",
            f"BEGIN: TEXT? {lark.quoted(trigger)}",
            *self._group("calls", in_text=True, after=len(trigger)),
        ]

    def _opening(self, marks: list[str]) -> str:
        """Text that does not begin like a bare call."""
        first = "".join(f"\\x{ord(character):02x}" for character in self.format.bare)
        shape = f"/\\s*[^\\s{first}](?s:.*)/"
        return shape if not marks else f"{shape} & ({lark.without(marks)})"

    def _group(self, name: str, *, in_text: bool, after: int = 0) -> list[str]:
        """Calls one after another, with what stands before the first and after the last.

        `after`: so many characters of it, the trigger, have been said already.
        """
        lead = calls.lead(self.format, in_text=in_text)
        separator, end = calls.separator(self.format), calls.end(self.format)
        first = " | ".join(self._one(number, lead, after) for number in range(len(self.tools)))
        if self.parallel:
            following = [self._one(number, separator) for number in range(len(self.tools))]
            repeated = f" {name}_next{{0,{MAX_CALLS - 1}}}"
            rules = [f"{name}_next: {' | '.join(following)}"]
        else:
            repeated, rules = "", []
        return [f"{name}: ({first}){repeated} {self._literal(end)}", *rules]

    def _one(self, number: int, before: str, after: int = 0) -> str:
        text = (before + calls.prefix(self.format, self.tools[number].name))[after:]
        return f"{self._literal(text)} args_{number} {self._literal(calls.suffix(self.format))}".strip()

    def _literal(self, text: str) -> str:
        return lark.literal(text, self.token_ids)

    def _arguments(self) -> list[str]:
        return [f"args_{number}: {lark.json_value(tool.schema)}" for number, tool in enumerate(self.tools)]

    def _united(self, schema: object) -> dict[str, object]:
        """Calls of a bare format and another JSON value as one schema: both may begin with the same characters."""
        definitions: dict[str, object] = {}
        key = _arguments_key(self.format)
        objects: list[object] = []
        for number, tool in enumerate(self.tools):
            members = {"name": {"const": tool.name}, key: _moved(tool.schema, f"t{number}", definitions)}
            objects.append(
                {"type": "object", "properties": members, "required": list(members), "additionalProperties": False}
            )
        one: object = {"anyOf": objects}
        if calls.lead(self.format).endswith("["):
            most = MAX_CALLS if self.parallel else 1
            one = {"type": "array", "items": one, "minItems": 1, "maxItems": most}
        united: dict[str, object] = {"anyOf": [one, _moved(schema, "f", definitions)]}
        return united | ({"$defs": definitions} if definitions else {})


def _arguments_key(format: ToolFormat) -> str:
    found = re.search(r'"(\w+)": $', format.writing.after_name)
    assert found is not None, "bare formats write objects"
    return found[1]


def _moved(schema: object, prefix: str, definitions: dict[str, object]) -> object:
    """A schema whose definitions stand among others, under names of their own."""
    if not isinstance(schema, dict) or "$defs" not in schema:
        return schema
    own = schema["$defs"]
    for name, part in own.items() if isinstance(own, dict) else ():
        definitions[prefix + name] = _renamed(part, prefix)
    return _renamed({word: value for word, value in schema.items() if word != "$defs"}, prefix)


def _renamed(value: object, prefix: str) -> object:
    if isinstance(value, list):
        return [_renamed(inner, prefix) for inner in value]
    if not isinstance(value, dict):
        return value
    made: dict[str, object] = {}
    for word, inner in value.items():
        if word == "$ref" and isinstance(inner, str):
            made[word] = "#/$defs/" + prefix + inner.removeprefix("#/$defs/")
        elif word in ("const", "enum"):
            made[word] = inner
        elif word == "properties" and isinstance(inner, dict):
            # A member may be called const or $ref.
            made[word] = {name: _renamed(part, prefix) for name, part in inner.items()}
        else:
            made[word] = _renamed(inner, prefix)
    return made
