"""A developer's judgement of what goes in and comes out: a list of words, a classifier, a model of a provider."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Sequence
from typing import Literal, TypeVar

from diptych.protos.messages import Message

from ..errors import UsageError
from .processor import Processor, ProcessorContext

T = TypeVar("T")
Verdict = bool | str | None
Hook = Callable[[str], Verdict | Awaitable[Verdict]]


class Moderation(Processor):
    """`hook(text)` says why the text must not pass: a reason, or True; None, False and "" let it pass. It may be a
    coroutine function, and may call models. It is asked for each turn that has words, or on one side alone.
    """

    def __init__(
        self, hook: Hook, *, on: Literal["input", "output", "both"] = "both", name: str = "Moderation"
    ) -> None:
        self.hook = hook
        self.on = on
        self._name = name

    @property
    def name(self) -> str:
        """As it was given."""
        return self._name

    async def _judged(self, verdict: Awaitable[Verdict], rest: Sequence[str], ctx: ProcessorContext) -> None:
        self._decide(await verdict, ctx)
        for text in rest:
            found = self.hook(text)
            self._decide(await found if inspect.isawaitable(found) else found, ctx)

    def before(
        self, messages: Sequence[Message], ctx: ProcessorContext
    ) -> Sequence[Message] | Awaitable[Sequence[Message]]:
        """All of them, or none."""
        waiting = self._asked([message.content for message in messages], ctx) if self.on != "output" else None
        return messages if waiting is None else _then(waiting, messages)

    def after(self, message: Message, ctx: ProcessorContext) -> Message | Awaitable[Message]:
        """The answer, or nothing."""
        waiting = self._asked([message.content], ctx) if self.on != "input" else None
        return message if waiting is None else _then(waiting, message)

    def _asked(self, texts: Sequence[str], ctx: ProcessorContext) -> Awaitable[None] | None:
        """None where the hook gives its verdicts at once."""
        said = [text for text in texts if text.strip()]
        for at, text in enumerate(said):
            verdict = self.hook(text)
            if inspect.isawaitable(verdict):
                return self._judged(verdict, said[at + 1 :], ctx)
            self._decide(verdict, ctx)
        return None

    def _decide(self, verdict: Verdict, ctx: ProcessorContext) -> None:
        if verdict is not None and not isinstance(verdict, bool | str):
            raise UsageError(
                f"{self.name}: the hook gave a {type(verdict).__name__}; it gives a reason, True, or None to let pass"
            )
        if verdict:
            ctx.block(verdict if isinstance(verdict, str) else "the hook says so")


async def _then(waiting: Awaitable[None], found: T) -> T:
    await waiting
    return found
