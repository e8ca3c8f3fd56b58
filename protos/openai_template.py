"""What a chat request may tell the model's chat template: variables, and how the rendered text ends. Templates
themselves come with the model.

`read_template` is called by openai.py; cluster/api/render.py knows which variables a template reads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from .wire_checks import JsonObject, a_flag, a_name, an_object, one_of, refuse

TEMPLATE_FIELDS = frozenset(
    {"reasoning_effort", "chat_template_kwargs", "add_generation_prompt", "continue_final_message"}
)
MAX_VARIABLES = 16
MAX_VALUE_CHARS = 1024
FLAGS = frozenset({"enable_thinking", "thinking"})  # the common names of the switch for reasoning
_NAME = re.compile(r"[a-z_]{1,32}")
_NAMES = "chat_template_kwargs"
# What the server gives a template, what the language has, and the names by which other servers take what is refused.
_RESERVED = frozenset(
    "messages tools documents add_generation_prompt continue_final_message chat_template tokenize conversation "
    "raise_exception strftime_now namespace range dict loop self super caller varargs kwargs true false none".split()
)
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
EFFORTS: tuple[Effort, ...] = get_args(Effort)
_MOST = ("xhigh", "max")
Scalar = str | int | float | bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateOptions:
    """`variables`: of chat_template_kwargs and reasoning_effort. `implied`: others that nobody wrote, by which an own
    model's template does what the request's format means by its silence; providers are not told of them.
    `effort`: the level that the request's own field asked for, which providers are told; among `variables` stands the
    word that templates have for it. `continue_final`: the answer goes on with the last message's text, after which the
    rendering ends; else it ends as the template begins an answer, or, with `generation_prompt` false, behind the last
    message.
    """

    variables: Mapping[str, Scalar] = field(default_factory=dict)
    implied: Mapping[str, Scalar] = field(default_factory=dict)
    effort: Effort | None = None
    generation_prompt: bool = True
    continue_final: bool = False

    @property
    def asked_effort(self) -> str | None:
        """How much a request wants the model to reason, in its own word; None: it says nothing of it."""
        told = self.variables.get("reasoning_effort") if self.effort is None else self.effort
        return None if told is None else str(told)


def in_templates(effort: Effort) -> Effort:
    """The word that chat templates have for an effort: they know no more than high."""
    return "high" if effort in _MOST else effort


def read_template(fields: Mapping[str, object]) -> TemplateOptions:
    """The options in a body's TEMPLATE_FIELDS. Raises InvalidRequest naming the path."""
    variables = _variables(fields.get(_NAMES))
    effort: Effort | None = None
    if fields.get("reasoning_effort") is not None:
        effort = one_of(fields["reasoning_effort"], "reasoning_effort", EFFORTS)
        shown = in_templates(effort)
        if variables.setdefault("reasoning_effort", shown) not in (shown, effort):
            raise refuse("reasoning_effort", f"and {_NAMES}.reasoning_effort differ: send one of them")
    continues = a_flag(fields.get("continue_final_message"), "continue_final_message") is True
    prompt = a_flag(fields.get("add_generation_prompt"), "add_generation_prompt")
    if continues and prompt:
        told = "and add_generation_prompt exclude each other: an answer goes on with the last message or begins anew"
        raise refuse("continue_final_message", told)
    return TemplateOptions(
        variables=variables,
        effort=effort,
        generation_prompt=prompt is not False and not continues,
        continue_final=continues,
    )


def _variables(value: object) -> dict[str, Scalar]:
    if value is None:
        return {}
    given: JsonObject = an_object(value, _NAMES)
    if len(given) > MAX_VARIABLES:
        raise refuse(_NAMES, f"has {len(given)} variables; the limit is {MAX_VARIABLES}")
    found: dict[str, Scalar] = {}
    for name, setting in given.items():
        if name == "chat_template":
            raise refuse(
                f"{_NAMES}.chat_template", "is refused: a template is a program, and programs come with the model"
            )
        if name in _RESERVED or name.startswith("_") or name.endswith("_token"):
            raise refuse(_NAMES, f"may not set {name[:32]}, which the server gives every template")
        a_name(name, _NAMES, _NAME, "an object whose names have 1 to 32 of the characters a-z and _")
        path = f"{_NAMES}.{name}"
        if setting is not None and not isinstance(setting, str | int | float | bool):
            raise refuse(path, "must be a string, a number, true, false or null")
        if isinstance(setting, str) and len(setting) > MAX_VALUE_CHARS:
            raise refuse(path, f"has {len(setting)} characters; the limit is {MAX_VALUE_CHARS}")
        if name in FLAGS:
            a_flag(setting, path)
        found[name] = setting
    return found
