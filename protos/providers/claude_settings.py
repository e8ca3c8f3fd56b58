"""How a request's wishes about reasoning and sampling are said to a Claude model: which of them it can be told at all.

Both codecs that reach Claude ask here; where the fields stand in their bodies they know themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diptych.protos.openai import ChatRequest

from .claude_models import LEAST_BUDGET, Claude
from .codec import JsonObject, Note
from .quirks import Quirks
from .request_fields import moved, unsupported

# Tokens of thinking for an effort, where the model knows budgets alone; the format's least for the least.
BUDGETS = {"minimal": LEAST_BUDGET, "low": 2048, "medium": 8192, "high": 16_384, "xhigh": 32_768, "max": 32_768}
ROOM = 4096  # tokens of an answer beside its thinking, where the request wants no number
LONG_ROOM = 16_384  # the same for models that take more than their context has room for
LEAST_TOP_P = 0.95  # with thinking
_OWN_EFFORT = Quirks().effort_field  # not set: the maker's own
_SWITCHES = ("enable_thinking", "thinking")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What the request says of reasoning; None: nothing. `path` is the field that says it, for notes."""

    is_on: bool | None = None
    effort: str | None = None
    budget: int | None = None
    path: str = ""


@dataclass(frozen=True, slots=True)
class Block:
    """Why a model cannot think with a budget now. `is_passing`: a later request of the conversation will have it."""

    words: str
    is_passing: bool = False


def block_of(*, forced: bool, goes_on: bool, lacks: bool) -> Block | None:
    """Of a request that demands a call; that goes on with an answer; whose last message has results of calls that were
    made without thinking, as those of clients always are that speak another format, which has no proofs of it.
    """
    if forced:
        return Block("a model that must call a tool does not think before: leave out one of them")
    if goes_on:
        return Block("a model that goes on with an answer does not think before it")
    if lacks:
        return Block("not amid a turn whose calls came without it: it begins with the next user's message", True)
    return None


@dataclass(slots=True, kw_only=True)
class Plan:
    """`thinking`: the field's value; None: left out. `effort` stands at `effort_path`; empty: left out."""

    thinking: JsonObject | None = None
    effort: str = ""
    effort_path: str = "output_config.effort"
    notes: list[Note] = field(default_factory=list)

    @property
    def budget(self) -> int:
        """Tokens of manual thinking; 0: there is none."""
        found = (self.thinking or {}).get("budget_tokens", 0)
        return found if isinstance(found, int) else 0

    @property
    def is_on(self) -> bool:
        """Whether the request asks for thinking."""
        return self.thinking is not None and self.thinking.get("type") in ("enabled", "adaptive")


def wish_of(request: ChatRequest) -> Wish:
    """What `request` says of reasoning. An effort of `none` says that there is to be none."""
    variables, effort = request.template.variables, request.template.asked_effort
    switch = next((variables[name] for name in _SWITCHES if isinstance(variables.get(name), bool)), None)
    if request.reasoning_budget is not None:
        path = "reasoning_budget"
    elif effort is not None:
        path = "reasoning_effort"
    else:
        path = next((f"chat_template_kwargs.{name}" for name in _SWITCHES if name in variables), "")
    if effort == "none":
        return Wish(is_on=False, effort="none", path=path)
    if effort is not None and switch is False and request.include_reasoning is False:
        switch = None  # reasoning that is not to be told, with an effort of which it is a part
    return Wish(
        is_on=switch if isinstance(switch, bool) else None,
        effort=effort,
        budget=request.reasoning_budget,
        path=path,
    )


def plan_thinking(request: ChatRequest, claude: Claude | None, quirks: Quirks, *, blocked: Block | None) -> Plan:
    """What is said of thinking. `blocked`: why a budget of tokens cannot be given for this request; None: it can."""
    wish, plan = wish_of(request), Plan()
    if wish.is_on is False:
        _forbid(plan, wish, claude)
    elif wish.is_on or wish.effort is not None or wish.budget is not None:
        _demand(plan, wish, claude, request, quirks, blocked)
    elif request.include_reasoning and claude is not None and claude.thinks_by_default:
        plan.thinking = {"type": "adaptive"}
    if wish.effort not in (None, "none"):
        _say_effort(plan, wish.effort or "", claude, quirks)
    if claude is not None and claude.hides_thinking and plan.is_on and plan.thinking is not None:
        hides = request.include_reasoning is False or wish.is_on is False
        plan.thinking["display"] = "omitted" if hides else "summarized"
    return plan


def _forbid(plan: Plan, wish: Wish, claude: Claude | None) -> None:
    how = "disabled" if claude is None else claude.no_thinking
    if how in ("disabled", "between_tools"):
        plan.thinking = {"type": how}
    elif how == "never":
        plan.thinking = {"type": "adaptive"}
        plan.effort = "low" if wish.effort == "none" else ""
        plan.notes.append(moved(wish.path, "this model always thinks; what it thinks is left out of the answer"))


def _demand(
    plan: Plan, wish: Wish, claude: Claude | None, request: ChatRequest, quirks: Quirks, blocked: Block | None
) -> None:
    manual = claude is None or claude.manual_thinking
    adaptive = claude is not None and claude.adaptive_thinking
    if not manual and not adaptive:
        plan.notes.append(unsupported(wish.path, "this model does not reason"))
        return
    if wish.budget is not None and not manual:
        told = "this model has no budget of reasoning: reasoning_effort says how much it thinks"
        plan.notes.append(unsupported("reasoning_budget", told))
    if adaptive and (wish.budget is None or not manual):
        plan.thinking = {"type": "adaptive"}
        return
    if claude is None and wish.budget is None and quirks.effort_field != _OWN_EFFORT and wish.effort is not None:
        return  # the provider's own field says it, or nothing does
    if blocked is not None:
        plan.notes.append((moved if blocked.is_passing else unsupported)(wish.path, blocked.words))
        return
    budget = wish.budget or BUDGETS.get(wish.effort or "medium", 0)
    if wish.budget is None and budget:
        plan.notes.append(moved(wish.path, f"thinking.budget_tokens {budget}"))
    _spend(plan, budget, wish, request)


def _spend(plan: Plan, budget: int, wish: Wish, request: ChatRequest) -> None:
    """A budget is less than the answer's tokens, of which it is a part, and has a least value."""
    wanted = request.wanted_tokens
    if wanted is not None and budget >= wanted[1]:
        budget = wanted[1] - 1
        plan.notes.append(moved(wish.path, f"thinking.budget_tokens {budget}, less than {wanted[0]}"))
    if budget < LEAST_BUDGET:
        plan.notes.append(unsupported(wish.path, f"thinking takes {LEAST_BUDGET} tokens or more, less than max_tokens"))
        return
    plan.thinking = {"type": "enabled", "budget_tokens": budget}


def _say_effort(plan: Plan, effort: str, claude: Claude | None, quirks: Quirks) -> None:
    path, said = "reasoning_effort", quirks.effort_values.get(effort, effort)
    if claude is None and quirks.effort_field not in ("", _OWN_EFFORT):
        plan.effort, plan.effort_path = said, quirks.effort_field
        return
    known = claude.efforts if claude is not None else ()
    if not known:
        if not plan.budget and not any(note.field == path and note.kind == "unsupported" for note in plan.notes):
            plan.notes.append(unsupported(path, "this model has no such setting"))
        return
    if said not in known:
        if said not in BUDGETS:
            plan.notes.append(unsupported(path, f"is none of {', '.join(known)}"))
            return
        said = {"minimal": known[0], "max": known[-1]}.get(said, "high")  # never more than was asked for
        plan.notes.append(moved(path, f"{said}, the nearest that this model knows"))
    plan.effort = said


def sampling_of(
    request: ChatRequest, claude: Claude | None, plan: Plan, *, samples: bool
) -> tuple[JsonObject, list[Note]]:
    """temperature, top_p and top_k, as far as they can be sent. `samples`: the API's version has them at all. Values
    that are the defaults are left out where they would be refused.
    """
    found: dict[str, Any] = {}
    for name, neutral in (("temperature", 1), ("top_p", 1), ("top_k", 0)):
        value = getattr(request, name)
        if value is not None and (value != neutral or name == "temperature"):
            found[name] = value
    notes: list[Note] = []
    if not samples or (claude is not None and not claude.samples):
        _refuse(found, notes, dict.fromkeys(found, "this model takes no sampling parameters"))
        return {}, notes
    why: dict[str, str] = {}
    if found.get("temperature", 0) > 1:
        why["temperature"] = "is at most 1 here"
    if plan.is_on:
        why |= {"temperature": "is 1 while the model thinks", "top_k": "cannot be set while the model thinks"}
        if found.get("top_p", 1) < LEAST_TOP_P:
            why["top_p"] = f"is {LEAST_TOP_P} or more while the model thinks"
    if claude is not None and claude.one_sampler and found.get("temperature", 1) != 1:
        why["top_p"] = "cannot be set beside temperature"
    _refuse(found, notes, why)
    if "top_p" in found and claude is not None and claude.one_sampler:
        found.pop("temperature", None)  # which is 1, or refused
    return found, notes


def _refuse(found: JsonObject, notes: list[Note], why: Mapping[str, str]) -> None:
    for name, words in why.items():
        value = found.pop(name, None)
        if value is not None and not (name == "temperature" and value == 1):
            notes.append(unsupported(name, words))


def most_tokens(request: ChatRequest, claude: Claude | None, plan: Plan, quirks: Quirks) -> tuple[int, list[Note]]:
    """max_tokens, which the format demands: what is wanted, or a number of ours and a note of it."""
    limit = None if claude is None else claude.most_tokens
    if (wanted := request.wanted_tokens) is not None:
        name, number = wanted
        if request.cuts_to_fit and limit is not None and number > limit:
            return limit, [moved(name, f"{limit}, the most that this model gives")]
        return number, []
    own = LONG_ROOM if claude is not None and claude.cuts_at_context else ROOM
    number = plan.budget + (quirks.default_max_tokens or own)
    if limit is not None:
        number = max(min(number, limit), plan.budget + 1)
    return number, [moved("max_tokens", f"{number}: the format demands a number, and the request has none")]
