"""What a call gives back: the value, everything that was said, and how to go on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, Unpack

from diptych.protos.messages import Message, ToolCall
from diptych.protos.replies import Finish, Usage
from diptych.protos.replies import Reply as Answer

from .attempts import Attempt
from .conversation import Prompt, messages_of
from .draft import Draft
from .errors import UsageError
from .machine import Machine, verb
from .params import Params
from .registry import current
from .travel import check_whole
from .usage import Spent, total

if TYPE_CHECKING:
    from .outcomes import Results, ToolOutcome
    from .tool_runs import RunLimits

T = TypeVar("T")


class Unset:
    """In place of a value that is not there (yet)."""

    def __repr__(self) -> str:
        return "Unset"

    def __bool__(self) -> bool:
        return False

    def __reduce__(self) -> str:
        return "UNSET"


UNSET = Unset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply(Generic[T]):
    """`answer` is the last attempt's, in the canonical form; `draft` what was asked."""

    draft: Draft[T]
    answer: Answer
    attempts: tuple[Attempt, ...]
    result: T | Unset = field(default=UNSET, repr=False)

    @property
    def value(self) -> T:
        """The result, of the type that the call asked for; without one, the text. Raises UsageError where the model
        asked for tools instead.
        """
        if isinstance(self.result, Unset):
            names = ", ".join(call.name for call in self.tool_calls)
            raise UsageError(
                f"{self.draft.name}: there is no value yet, the model calls {names}: "
                f"reply.resume(reply.run_tools()), or let an Agent do it"
            )
        return self.result

    @property
    def text(self) -> str:
        """What the model said, without its reasoning."""
        return self.answer.message.content

    @property
    def thoughts(self) -> str:
        """Its reasoning, where it is told."""
        return self.answer.message.reasoning_content or ""

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """What it wants called, in its order."""
        return self.answer.message.tool_calls

    @property
    def usage(self) -> Usage:
        """Of the last attempt; `spent` is that of all."""
        return self.answer.usage

    @property
    def spent(self) -> Spent:
        """Tokens and dollars of all attempts."""
        return total(attempt.spent for attempt in self.attempts)

    @property
    def cost(self) -> Decimal | None:
        """Dollars of all attempts; None where nobody knows a price, 0 where it was free or kept."""
        return self.spent.dollars

    @property
    def is_cached(self) -> bool:
        """Whether nobody was asked; then `saved` is what the answer cost when it was made."""
        return self.attempts[-1].why == "cached"

    @property
    def saved(self) -> Spent:
        """Tokens and dollars that a cache spared."""
        return total(attempt.saved for attempt in self.attempts)

    @property
    def finish(self) -> Finish:
        """Why it ended: stop, length, tool_calls or content_filter."""
        return self.answer.ended.finish

    @property
    def model(self) -> str:
        """The reference of the model that answered."""
        return self.attempts[-1].model

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation, this answer included."""
        return (*self.draft.messages, self.answer.message)

    @property
    def raw(self) -> Any:
        """The provider's own JSON: one body, or of a stream the list of its events."""
        raw = self.attempts[-1].raw
        return raw[0] if len(raw) == 1 else raw

    @verb
    def resume(self, /, content: Prompt | Results, **params: Unpack[Params]) -> Machine[Reply[T]]:
        """The next answer of the conversation, after `content`: what a prompt may be, or what run_tools gave."""
        from .exchange import exchange

        return (yield from exchange(self.followed(content, params)))

    @verb
    def run_tools(
        self,
        /,
        *,
        approved: Mapping[str, Any] | None = None,
        done: Sequence[ToolOutcome] = (),
        deps: Any = None,
        on_error: Literal["tell", "raise"] = "tell",
        on_outcome: Callable[[ToolOutcome], object] | None = None,
        **limits: Unpack[RunLimits],
    ) -> Machine[list[ToolOutcome]]:
        """Runs the tools that this answer calls, at once, and gives their outcomes in the order of the calls.

        approved    by call id: True, False, {"args": {...}} to run it with others, or an outcome such as llm.Failed
        done        outcomes that are there already: settled ones are kept, their tools are not run again
        deps        in place of the call's own
        on_error    tell: a tool that raises is Failed, and the model is told; raise: ToolFailed, when all have ended
        on_outcome  told of each as it ends, in this thread
        limits      timeout (seconds of tools without their own, 600), at_once (16), most_chars of a result (50,000)

        Raises UsageError.
        """
        from .tool_runs import run_calls

        return (
            yield from run_calls(
                self, approved or {}, done, deps=deps, on_error=on_error, on_outcome=on_outcome, limits=limits
            )
        )

    @verb
    def fork(
        self, /, n: int, content: Prompt | Results | None = None, **params: Unpack[Params]
    ) -> Machine[list[Reply[T]]]:
        """`n` replies at once that go on from here after `content`; without one, `n` other answers in place of this.
        They are of one session, and have seeds of their own where a seed is set.
        """
        from .forks import forked

        return (yield from forked(self, n, content, params))

    def followed(self, content: Any, params: Mapping[str, Any] | None = None) -> Draft[T]:
        """The draft of the next call; `using(model=...)` around it chooses another model."""
        from .draft import with_params
        from .outcomes import messages_of_outcomes

        check_whole(self.draft)
        override = current()
        more: Sequence[Message] = messages_of_outcomes(content, self.tool_calls) or messages_of(content, "resume(...)")
        draft = replace(
            self.draft,
            messages=(*self.messages, *more),
            model=override.model or self.model,
            registry=override.registry or self.draft.registry,
        )
        return with_params(draft, {**override.params, **(params or {})}, "resume(...)")

    def __str__(self) -> str:
        return self.text
