"""What a canonical request says of reasoning, for encodings that say it with a word or a number of tokens.

Knows no provider's format.
"""

from __future__ import annotations

from dataclasses import dataclass

from diptych.protos.openai import ChatRequest

_SWITCHES = ("enable_thinking", "thinking")


@dataclass(frozen=True, slots=True, kw_only=True)
class Thinking:
    """`effort` and `path`: a word, and the field that had it. `budget`: the most tokens. `is_shown`: the answer is to
    tell its reasoning.
    """

    effort: str | None = None
    path: str = "reasoning_effort"
    budget: int | None = None
    is_shown: bool = False


def thinking(request: ChatRequest) -> Thinking:
    """A switch that is off is an effort of `none`, unless the answer is not to tell its reasoning anyway: then nobody
    could see a difference, and many models cannot be switched off. Reasoning that is asked for in any way is shown,
    unless the request says otherwise.
    """
    variables = request.template.variables
    effort, path = request.template.asked_effort, "reasoning_effort"
    for name in _SWITCHES:
        if effort is None and variables.get(name) is False and request.include_reasoning is not False:
            effort, path = "none", f"chat_template_kwargs.{name}"
    shown = request.include_reasoning
    if shown is None:
        is_on = bool(variables) and any(variables.get(name) is True for name in _SWITCHES)
        shown = is_on or request.reasoning_budget is not None or effort not in (None, "none")
    return Thinking(effort=effort, path=path, budget=request.reasoning_budget, is_shown=shown)
