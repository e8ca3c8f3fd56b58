"""Whether what goes in, or comes out, is of a type: the check of structured results as a processor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from diptych.protos.messages import Message

from ..errors import InvalidOutput
from ..output import Output
from .processor import Processor, ProcessorContext


class CheckSchema(Processor):
    """Blocks a final answer (on="output") or a user's turn (on="input") whose text holds no JSON of `kind`, which is
    whatever pydantic's TypeAdapter takes. Nothing is asked again: an agent's own `output=` does that. Raises
    DefinitionError.
    """

    def __init__(
        self, kind: Any, *, on: Literal["input", "output"] = "output", is_strict: bool = True, context: Any = None
    ) -> None:
        self.output: Output[Any] = Output(kind, name="CheckSchema", is_strict=is_strict)
        self.on = on
        self.context = context

    @property
    def name(self) -> str:
        """With its type."""
        return f"CheckSchema[{self.output.name}]"

    def before(self, messages: Sequence[Message], ctx: ProcessorContext) -> Sequence[Message]:
        """The last user's turn among them is checked."""
        asked = [message for message in messages if message.role == "user"]
        if self.on == "input" and asked:
            self._check(asked[-1].content, ctx)
        return messages

    def after(self, message: Message, ctx: ProcessorContext) -> Message:
        """A final answer is checked."""
        if self.on == "output" and ctx.is_final:
            self._check(message.content, ctx)
        return message

    def _check(self, text: str, ctx: ProcessorContext) -> None:
        try:
            self.output.parse(text, self.context)
        except InvalidOutput as exc:
            ctx.block(f"it is no {self.output.name}:\n{exc.report}")
