"""Where a run of an agent stands, as data: enough to go on from in another process.

agent_loop.py makes a new one after every step. It is plain JSON: no types of the developer's are in it, no pickle, and
nothing is imported to read it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal, InvalidOperation
from typing import Any, Literal, get_args

from diptych.protos.messages import Message, ToolCall

from .errors import UsageError
from .message_json import message_from_json, messages_from_json, messages_to_json
from .usage import Spent

VERSION = 1
Phase = Literal["model", "tools", "paused", "done"]
PendingKind = Literal["approval", "result"]
JsonObject = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """A call that waits for somebody. `kind`: approval (True, False or {"args": {...}}) or result (its value).
    `call_id` is what `approvals` and `results` name it by; of a call inside a delegated agent it is
    OUTER/INNER. `agent` wants it called; `token` is what the tool gave to find it by.
    """

    call_id: str
    tool: str
    arguments: Mapping[str, Any]
    kind: PendingKind
    agent: str
    reason: str = ""
    token: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentState:
    """A run after one of its steps.

    agent       who has the conversation, which changes with a hand-off
    session     requests of the run go where their prefix is kept
    model       the reference that answered last; empty: the agent's own
    messages    what models were told and said, in the canonical form; the first `head` of them are the instructions
    phase       model: an answer is next; tools: calls of the last answer are; paused: `pending` must be told first;
                done
    answered    tool turns of the last answer's calls that were run already, by call id; they are not run again
    children    of calls that are delegated agents which wait: their states
    turns, tool_calls, seconds, spent    what Limits counts, delegated tokens and dollars included
    notes       what processors keep, by their names
    """

    agent: str
    session: str
    messages: tuple[Message, ...] = ()
    head: int = 0
    phase: Phase = "model"
    model: str = ""
    answered: Mapping[str, Message] = field(default_factory=dict)
    pending: tuple[Pending, ...] = ()
    children: Mapping[str, AgentState] = field(default_factory=dict)
    turns: int = 0
    tool_calls: int = 0
    seconds: float = 0.0
    spent: Spent = field(default_factory=Spent)
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_done(self) -> bool:
        """Whether there is an answer that asks for nothing more."""
        return self.phase == "done"

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        """Those of the last answer, while they are being run."""
        return self.messages[-1].tool_calls if self.phase in ("tools", "paused") else ()

    def to_json(self) -> str:
        """One line. Raises UsageError where a processor keeps what JSON has not."""
        try:
            return json.dumps(self.to_dict(), separators=(",", ":"))
        except (TypeError, ValueError) as exc:
            raise UsageError(f"the state of {self.agent} cannot be written: {exc}", "notes") from exc

    def to_dict(self) -> JsonObject:
        """What to_json writes."""
        spent = {name: getattr(self.spent, name) for name in _COUNTS}
        spent["dollars"] = None if self.spent.dollars is None else str(self.spent.dollars)
        return {
            "version": VERSION,
            "agent": self.agent,
            "session": self.session,
            "model": self.model,
            "phase": self.phase,
            "head": self.head,
            "messages": messages_to_json(self.messages),
            "answered": {name: messages_to_json([one])[0] for name, one in self.answered.items()},
            "pending": [_pending_told(one) for one in self.pending],
            "children": {name: one.to_dict() for name, one in self.children.items()},
            "turns": self.turns,
            "tool_calls": self.tool_calls,
            "seconds": self.seconds,
            "spent": spent,
            "notes": dict(self.notes),
        }

    @classmethod
    def from_json(cls, text: str | bytes) -> AgentState:
        """What to_json wrote. Raises UsageError that names the place where it is something else."""
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as exc:
            raise UsageError(f"the state is no JSON: {exc}", "state") from exc
        return cls.from_dict(found)

    @classmethod
    def from_dict(cls, found: object, where: str = "state") -> AgentState:
        """What to_dict made."""
        told = _object(found, where)
        version = told.get("version")
        if version != VERSION:
            raise UsageError(f"{where}.version is {version!r}; this program reads {VERSION}", f"{where}.version")
        phase: Any = told.get("phase")
        if phase not in get_args(Phase):
            raise UsageError(f"{where}.phase is {phase!r}; it may be {', '.join(get_args(Phase))}", f"{where}.phase")
        messages = messages_from_json(told.get("messages"), f"{where}.messages")
        state = cls(
            agent=_typed(told, "agent", str, where),
            session=_typed(told, "session", str, where),
            model=_typed(told, "model", str, where),
            phase=phase,
            head=_count(told, "head", where),
            messages=messages,
            answered={
                name: message_from_json(one, f"{where}.answered.{name}")
                for name, one in _object(told.get("answered"), f"{where}.answered").items()
            },
            pending=tuple(_pending(one, f"{where}.pending") for one in _typed(told, "pending", list, where)),
            children={
                name: cls.from_dict(one, f"{where}.children.{name}")
                for name, one in _object(told.get("children"), f"{where}.children").items()
            },
            turns=_count(told, "turns", where),
            tool_calls=_count(told, "tool_calls", where),
            seconds=float(_typed(told, "seconds", (int, float), where)),
            spent=_spent(told.get("spent"), f"{where}.spent"),
            notes=_object(told.get("notes"), f"{where}.notes"),
        )
        if state.head > len(messages) or not messages:
            raise UsageError(f"{where}.head is {state.head}, and there are {len(messages)} messages", f"{where}.head")
        if phase in ("tools", "paused") and not messages[-1].tool_calls:
            raise UsageError(f"{where}.phase is {phase}, and the last message calls no tool", f"{where}.phase")
        for name, turn in state.answered.items():
            if turn.result is None or turn.result.call_id != name:
                raise UsageError(f"{where}.answered.{name} is not the answer to that call", f"{where}.answered.{name}")
        return state

    def with_answer(self, messages: tuple[Message, ...], model: str) -> AgentState:
        """After an answer: `messages` are all, it included."""
        phase: Phase = "tools" if messages[-1].tool_calls else "done"
        return replace(
            self,
            messages=messages,
            model=model,
            phase=phase,
            turns=self.turns + 1,
            answered={},
            pending=(),
            children={},
        )


_COUNTS = ("requests", "input_tokens", "output_tokens", "cache_read_tokens", "reasoning_tokens")


def _pending_told(one: Pending) -> JsonObject:
    return {
        "call_id": one.call_id,
        "tool": one.tool,
        "arguments": dict(one.arguments),
        "kind": one.kind,
        "agent": one.agent,
        "reason": one.reason,
        "token": one.token,
    }


def _pending(found: object, where: str) -> Pending:
    told = _object(found, where)
    kind: Any = told.get("kind")
    if kind not in get_args(PendingKind):
        raise UsageError(f"{where}.kind is {kind!r}; it may be {', '.join(get_args(PendingKind))}", f"{where}.kind")
    texts = {name: _typed(told, name, str, where) for name in ("call_id", "tool", "agent", "reason", "token")}
    return Pending(arguments=_object(told.get("arguments"), f"{where}.arguments"), kind=kind, **texts)


def _spent(found: object, where: str) -> Spent:
    told = _object(found, where)
    try:
        dollars = None if told.get("dollars") is None else Decimal(_typed(told, "dollars", str, where))
    except InvalidOperation as exc:
        raise UsageError(f"{where}.dollars is no number: {told['dollars']!r}", f"{where}.dollars") from exc
    return Spent(**{name: _count(told, name, where) for name in _COUNTS}, dollars=dollars)


def _object(found: object, where: str) -> JsonObject:
    if not isinstance(found, dict):
        raise UsageError(f"{where} is {type(found).__name__}; it may be an object", where)
    return found


def _count(told: Mapping[str, Any], name: str, where: str) -> int:
    found: int = _typed(told, name, int, where)
    if found < 0:
        raise UsageError(f"{where}.{name} is {found}; it counts from 0", f"{where}.{name}")
    return found


def _typed(told: Mapping[str, Any], name: str, kind: type[Any] | tuple[type[Any], ...], where: str) -> Any:
    found = told.get(name)
    if not isinstance(found, kind) or isinstance(found, bool):
        wanted = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
        raise UsageError(f"{where}.{name} is {type(found).__name__}; it may be {wanted}", f"{where}.{name}")
    return found
