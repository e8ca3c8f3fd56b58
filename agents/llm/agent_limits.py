"""How far an agent's run may go, and what is left of it.

agent_loop.py asks before each answer and before tools are run. It does not know what the run is about.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from .errors import BudgetExceeded, UsageError
from .retries import Budget

if TYPE_CHECKING:
    from .agent_state import AgentState


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The most of one run, over all its continuations; None: no limit.

    turns        answers of models, those of agents that the conversation was handed to included
    tool_calls   calls of tools, hand-offs and delegations included; an answer that asks for more runs none of its own
    requests     to models, attempts and those of delegated agents included: agents that ask one another end by it
    tokens       in and out, delegated ones included
    dollars      as far as prices are known
    seconds      while it runs; time in which it waits for approvals does not count

    An answer that came counts, also where it went over.
    """

    turns: int | None = 10
    tool_calls: int | None = 50
    requests: int | None = 100
    tokens: int | None = None
    dollars: float | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for one in fields(self):
            most = getattr(self, one.name)
            is_number = isinstance(most, int | float) and not isinstance(most, bool)
            if most is not None and (not is_number or not most >= 0):
                raise UsageError(f"Limits({one.name}=...) is a number from 0 up, or None for no limit; not {most!r}")

    def check_turn(self, state: AgentState) -> None:
        """Whether the model may be asked once more. Raises BudgetExceeded."""
        self._check("turns", state.turns, self.turns, state)
        self.check_spent(state)

    def check_tools(self, state: AgentState, num_calls: int) -> None:
        """Whether `num_calls` more tools may be called. Raises BudgetExceeded."""
        if self.tool_calls is not None and state.tool_calls + num_calls > self.tool_calls:
            words = f"{state.tool_calls} calls of tools were made, the model asks for {num_calls} more"
            raise exceeded("tool_calls", self.tool_calls, words, state)
        self.check_spent(state)

    def check_spent(self, state: AgentState) -> None:
        """Requests, tokens, dollars and seconds. Raises BudgetExceeded."""
        self._check("requests", state.spent.requests, self.requests, state)
        self._check("tokens", state.spent.tokens, self.tokens, state)
        self._check("dollars", float(state.spent.dollars or 0), self.dollars, state)
        self._check("seconds", state.seconds, self.seconds, state)

    def left(self, state: AgentState) -> Budget | None:
        """For the next call and its attempts."""
        if self.tokens is None and self.dollars is None and self.seconds is None:
            return None
        return Budget(
            tokens=None if self.tokens is None else max(0, self.tokens - state.spent.tokens),
            dollars=None if self.dollars is None else max(0.0, self.dollars - float(state.spent.dollars or 0)),
            seconds=self.seconds_left(state),
        )

    def seconds_left(self, state: AgentState) -> float | None:
        """None: as many as it takes."""
        return None if self.seconds is None else max(0.001, self.seconds - state.seconds)

    def _check(self, limit: str, used: float, most: float | None, state: AgentState) -> None:
        if most is not None and used >= most:
            raise exceeded(limit, most, f"{used:.6g} used", state)


def exceeded(limit: str, most: float, words: str, state: AgentState) -> BudgetExceeded:
    """The error, with the state to go on from."""
    error = BudgetExceeded(
        f"{state.agent}: the run's limit of {most:g} {limit} is reached ({words}); go on with "
        f"agent.run(state=error.state, limits=Limits({limit}=...))",
        limit,
    )
    error.state = state
    return error
