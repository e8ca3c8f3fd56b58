"""An agent as a tool of another: `agent.as_tool(...)`.

Inside an agent's run agent_tools.py makes the other's run a part of its own: its state, its tokens and its approvals
are there. Elsewhere, as a tool of a plain call, it is run here like any tool.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from contextvars import copy_context
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diptych.protos.messages import Message

from .agent_limits import Limits
from .background import background
from .conversation import messages_of
from .errors import BudgetExceeded, CallFailed, UsageError
from .machine import Machine, adrive
from .outcomes import Failed
from .output import WRAPPED, Output
from .strict_json import validated
from .tool_context import Context

if TYPE_CHECKING:
    from .agent import Agent

JsonObject = dict[str, Any]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Delegation:
    """The body of such a tool. `input` None: one text, `request`; else the parameters are the fields of its type."""

    agent: Agent[Any, Any]
    input: Output[Any] | None
    prompt: Callable[[Any], Any] | None
    limits: Limits | None
    deps: Callable[[Any], Any] | None
    depth: int
    is_async: bool = True

    @property
    def parameters(self) -> JsonObject:
        """JSON schema of the arguments."""
        if self.input is not None:
            return self.input.schema
        request = {"type": "string", "description": "What is asked for, with everything that must be known for it."}
        return {"type": "object", "properties": {"request": request}, "required": ["request"]}

    def read(self, document: str) -> JsonObject:
        """The input as the one value of a mapping. Raises pydantic's ValidationError, ValueError."""
        if self.input is not None:
            if self.input.is_wrapped:
                document = json.dumps(json.loads(document)[WRAPPED])
            return {WRAPPED: validated(self.input.adapter, document)}
        found = json.loads(document)
        request = found.get("request") if isinstance(found, dict) else None
        if not isinstance(request, str) or not request.strip():
            raise ValueError('give {"request": "..."}: one text that says what is asked for')
        return {WRAPPED: request}

    def with_defaults(self, values: Mapping[str, Any]) -> JsonObject:
        """What an approval is asked for."""
        value = values[WRAPPED]
        if self.input is None:
            return {"request": value}
        found = self.input.adapter.dump_python(value, mode="json")
        return found if isinstance(found, dict) else {WRAPPED: found}

    def prompted(self, values: Mapping[str, Any]) -> tuple[Message, ...]:
        """What the agent is asked. Raises UsageError."""
        value = values[WRAPPED]
        if self.prompt is not None:
            asked = self.prompt(value)
        else:
            asked = value if self.input is None else self.input.adapter.dump_json(value).decode()
        return messages_of(asked, f"the prompt of {self.agent.name} as a tool")

    def deps_of(self, deps: Any) -> Any:
        """Those of the agent, of those above it."""
        return deps if self.deps is None else self.deps(deps)

    async def start(self, values: Mapping[str, Any], context: Context[Any]) -> Any:
        """The agent's value, where no agent is above: what the developer's functions do between waits is done in a
        thread when this is the loop of synchronous calls, so that they may make such calls.
        """
        from .agent_tools import DEPTH

        if DEPTH.get() >= self.depth:
            return Failed(f"agents call one another more than {self.depth} deep here: answer without {self.agent.name}")
        agent = self.agent
        token = DEPTH.set(DEPTH.get() + 1)
        try:
            machine = agent.run_of(
                self.prompted(values),
                agent.fresh(context.session),
                deps=self.deps_of(context.deps),
                limits=self.limits,
                depth=DEPTH.get(),
            )
            run = await (_threaded(machine) if background.is_here else adrive(machine))
        except CallFailed as exc:
            return no_answer(agent.name, exc)
        finally:
            DEPTH.reset(token)
        if not run.is_done:
            waits = ", ".join(one.tool for one in run.pending)
            raise UsageError(
                f"the agent {agent.name} waits for {waits}, and a plain call cannot: give {agent.name}.as_tool() to an "
                f"Agent, or run it with {agent.name}.run(...)"
            )
        return run.value


def no_answer(name: str, error: CallFailed) -> Failed:
    """What a model is told of an agent's run that ended so."""
    why = f"its limit of {error.limit} is reached" if isinstance(error, BudgetExceeded) else error.message
    return Failed(f"the agent {name} gave no answer: {why}")


async def _threaded(machine: Machine[Any]) -> Any:
    """Drives it with its steps on this loop, and what is between them in threads, one after another."""
    loop, context = asyncio.get_running_loop(), copy_context()

    def moved(error: Exception | None, found: Any) -> tuple[bool, Any]:
        try:
            return False, machine.throw(error) if error is not None else machine.send(found)
        except StopIteration as end:
            return True, end.value

    error: Exception | None = None
    found: Any = None
    try:
        while True:
            is_over, step = await loop.run_in_executor(None, context.run, moved, error, found)
            if is_over:
                return step
            error = None
            try:
                found = await loop.create_task(_performed(step), context=context)
            except Exception as exc:
                error = exc
    finally:
        machine.close()


async def _performed(step: Any) -> Any:
    return await step.perform()
