"""What a run of an agent tells while it goes on, and what it gives in the end.

agent_loop.py makes them, `agent.stream(...)` hands them out. Each names the agent that it is of, because a conversation
may be handed on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from diptych.protos.messages import Message, ToolCall

from .agent_state import AgentState, Pending
from .errors import UsageError
from .outcomes import ToolOutcome
from .reply import UNSET, Reply, Unset
from .streams import Restarted
from .usage import Spent

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TurnBegan:
    """A model is asked, for the `turn`-th time in this run."""

    agent: str
    turn: int


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A piece of the text; of a structured result, of its JSON. All of it at once where a processor needs the whole."""

    agent: str
    text: str


@dataclass(frozen=True, slots=True)
class ThoughtDelta:
    """A piece of the reasoning."""

    agent: str
    text: str


@dataclass(frozen=True, slots=True)
class ToolBegan:
    """A call that the model asked for is taken up; ToolEnded tells where it waits for an approval instead. Arguments
    are as the tool gets them.
    """

    agent: str
    call: ToolCall


@dataclass(frozen=True, slots=True)
class ToolEnded:
    """It was made, or waits for somebody: `outcome.is_settled` tells."""

    agent: str
    outcome: ToolOutcome


@dataclass(frozen=True, slots=True)
class HandedOff:
    """The conversation goes from `source` to `target`."""

    source: str
    target: str


@dataclass(frozen=True, slots=True)
class Delegated:
    """Something happened inside the agent that was called as a tool, by the call `call_id` of `agent`."""

    agent: str
    call_id: str
    event: AgentEvent


@dataclass(frozen=True, slots=True)
class Paused:
    """The run waits for approvals or results: see Run.pending."""

    agent: str
    pending: tuple[Pending, ...]


@dataclass(frozen=True, slots=True)
class AgentStep:
    """One turn of a run: the answer, and what came of its calls."""

    agent: str
    reply: Reply[Any]
    outcomes: tuple[ToolOutcome, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Run(Generic[T]):
    """What a run gave. `steps` are those of this call of run(...); `state` is all of the conversation, and goes on in
    whatever process.
    """

    state: AgentState
    reply: Reply[T] | None = field(default=None, repr=False)
    steps: tuple[AgentStep, ...] = field(default=(), repr=False)
    result: T | Unset = field(default=UNSET, repr=False)

    @property
    def value(self) -> T:
        """The result, of the type that the agent answers with; without one, the text. Raises UsageError while the run
        waits for somebody.
        """
        if isinstance(self.result, Unset):
            waits = ", ".join(f"{one.tool} ({one.call_id}: {one.kind})" for one in self.pending)
            raise UsageError(
                f"{self.agent}: there is no value yet, the run waits for {waits}: "
                f"agent.run(state=run.state, approvals={{call_id: True}}, results={{call_id: value}})"
            )
        return self.result

    @property
    def text(self) -> str:
        """What the model said last, as processors let it through."""
        return "" if self.reply is None else self.reply.text

    @property
    def agent(self) -> str:
        """Who had the last word."""
        return self.state.agent

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation as models know it, instructions and all."""
        return self.state.messages

    @property
    def spent(self) -> Spent:
        """Tokens and dollars since the prompt, those of delegated agents included."""
        return self.state.spent

    @property
    def pending(self) -> tuple[Pending, ...]:
        """Calls that wait for an approval or a result."""
        return self.state.pending

    @property
    def is_done(self) -> bool:
        """Whether there is a value."""
        return self.state.is_done

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class RunEnded(Generic[T]):
    """The last event, also of a run that waits."""

    run: Run[T]


Happened = TurnBegan | TextDelta | ThoughtDelta | ToolBegan | ToolEnded | HandedOff | Delegated | Paused | Restarted
AgentEvent = Happened | RunEnded[Any]
