"""Passing a conversation on: what a model sees as the tool `transfer_to_NAME`.

agent_tools.py does it; agent.py makes one of each agent in `handoffs`.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from diptych.protos.messages import Message, ToolCall

from .errors import DefinitionError
from .tools import Tool, tool

if TYPE_CHECKING:
    from .agent import Agent

Filter = Callable[[Sequence[Message]], "Sequence[Message] | Awaitable[Sequence[Message]]"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Handoff:
    """To `agent`, whose instructions take the place of those before; what was said stays.

    name         of the tool; empty: transfer_to_ and the agent's name
    description  when the model is to hand on; empty: a sentence with the agent's own description
    filter       what the other agent is told of the conversation, without any instructions: see without_tool_turns
    """

    agent: Agent[Any, Any]
    name: str = ""
    description: str = ""
    filter: Filter | None = None

    @property
    def tool_name(self) -> str:
        """As the model knows it."""
        return self.name or f"transfer_to_{re.sub(r'[^A-Za-z0-9_-]+', '_', self.agent.name)}"[:64]

    def tool(self) -> Tool:
        """What the model may call. Raises DefinitionError."""
        name = self.agent.name
        told = f" {self.agent.description}" if self.agent.description else ""

        def transfer(reason: str = "") -> str:
            return f"{name} has the conversation now."

        description = self.description or f"Hands the conversation to {name}, who goes on with it.{told}"
        return tool(name=self.tool_name, description=description)(transfer)


def as_handoff(given: Agent[Any, Any] | Handoff, where: str) -> Handoff:
    """Agents become hand-offs. Raises DefinitionError."""
    from .agent import Agent

    if isinstance(given, Agent):
        return Handoff(agent=given)
    if not isinstance(given, Handoff):
        raise DefinitionError(f"{where}: handoffs holds agents and llm.Handoff(agent=...), not {given!r}")
    return given


def without_tool_turns(messages: Sequence[Message]) -> list[Message]:
    """A filter: what was said, without calls of tools and their results. For targets that refuse calls of tools which
    the other agent does not have, and to make the history shorter.
    """
    found = []
    for message in messages:
        parts = tuple(part for part in message.parts if not isinstance(part, ToolCall))
        if message.role != "tool" and parts:
            found.append(message if parts == message.parts else replace(message, parts=parts))
    return found
