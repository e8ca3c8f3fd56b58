"""What goes wrong in typed calls: one tree below DiptychError, each class with what a program wants to decide by.

Error
|-- DefinitionError      a function, tool, template or schema that cannot work; raised where it is defined
|-- UsageError           an argument or a setting that cannot be; raised before anything is sent
|-- Unsupported          the target has no words for what the request asks
|-- ToolFailed           a tool cannot be run at all; what it answers itself is an Outcome (outcomes.py)
`-- CallFailed           a call was made, and there is no value; `attempts` tells of each try
    |-- ProviderError    the target, or the way to it
    |-- InvalidOutput    an answer came and is not what the result's type takes
    |-- Truncated        it ended at its limit of tokens
    |-- Refused          the model or its provider declined
    |-- EmptyAnswer      there was nothing in it
    |-- Blocked          a processor of an agent lets it not pass
    `-- BudgetExceeded   tokens, money, time, turns, requests or calls of tools are used up
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from diptych.protos.errors import DiptychError
from diptych.protos.failures import Failure

if TYPE_CHECKING:
    from .agent_state import AgentState
    from .attempts import Attempt
    from .reports import Report


MOST_CHARS = 4_000


class Error(DiptychError):
    """Root of this package's errors. `message` is whole, `str` and `repr` are bounded. `state`: of the agent's run that
    it ended, to go on from; None: there was none, or nothing of it yet.
    """

    state: AgentState | None = None

    def __str__(self) -> str:
        return bounded(self.message)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"


def bounded(text: str) -> str:
    """For a line of a log: an answer may be a megabyte. The whole of it stays an attribute."""
    return text if len(text) <= MOST_CHARS else f"{text[: MOST_CHARS - 3]}..."


class DefinitionError(Error, TypeError):
    """Says which function, which parameter and the remedy."""

    code = "llm_definition"


class UsageError(Error, ValueError):
    """`field`: the argument, in dotted form, where there is one."""

    code = "llm_usage"

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.args = (message, field)
        self.field = field


class Unsupported(UsageError):
    """`field` is the first that the target cannot be told of; see `on_unsupported`."""

    code = "llm_unsupported"


class ToolFailed(Error):
    """No such tool, or a tool whose arguments or result cannot be read; `tool` is its name."""

    code = "llm_tool"

    def __init__(self, message: str, tool: str = "") -> None:
        super().__init__(message)
        self.args = (message, tool)
        self.tool = tool


class CallFailed(Error):
    """`attempts`: every try of the call, the last one included; numbers count from 1. `message` is what became of the
    last one; the error's text goes on with a line for each try, where there were several. `left_out` tells of
    fallbacks that could not be asked such a thing.
    """

    code = "llm_call"
    left_out: tuple[str, ...] = ()
    reasked: ClassVar[bool] = False  # whether telling the model of it may help

    def __init__(self, message: str, attempts: tuple[Attempt, ...] = ()) -> None:
        super().__init__(message)
        self.args = (message, attempts)
        self.attempts = attempts

    def __str__(self) -> str:
        if len(self.attempts) < 2 and not self.left_out:
            return super().__str__()
        from .attempts import history

        return f"{super().__str__()}\n{history(self.attempts, self.left_out)}"

    @property
    def last(self) -> Attempt | None:
        """The last try."""
        return self.attempts[-1] if self.attempts else None

    @property
    def text(self) -> str:
        """The last answer's text, as far as there was one: the last invalid object stands there."""
        return next((one.text for one in reversed(self.attempts) if one.text), "")


class ProviderError(CallFailed):
    """`failure` has the kind, the status and after how many seconds the target may be asked again."""

    code = "llm_provider"

    def __init__(self, failure: Failure, target: str, attempts: tuple[Attempt, ...] = ()) -> None:
        super().__init__(f"{target}: {failure.message}", attempts)
        self.args = (failure, target, attempts)
        self.failure = failure
        self.target = target


class InvalidOutput(CallFailed):
    """`report`: the fields that are wrong, each with its path, the text that is there and a hint."""

    code = "llm_invalid_output"
    reasked = True

    def __init__(self, message: str, report: Report, attempts: tuple[Attempt, ...] = ()) -> None:
        super().__init__(message, attempts)
        self.args = (message, report, attempts)
        self.report = report


class Truncated(CallFailed):
    """`text` holds what came, `partial` what is known of a JSON answer by it: members and items that are complete, in
    plain JSON values; None where there are none.
    """

    code = "llm_truncated"

    def __init__(self, message: str, said: str = "", partial: Any = None, attempts: tuple[Attempt, ...] = ()) -> None:
        super().__init__(message, attempts)
        self.args = (message, said, partial, attempts)
        self.said = said
        self.partial = partial

    @property
    def text(self) -> str:
        """The answer as far as it came."""
        return self.said or super().text


class Refused(CallFailed):
    """`words`: the refusal, where there are any."""

    code = "llm_refused"

    def __init__(self, message: str, words: str = "", attempts: tuple[Attempt, ...] = ()) -> None:
        super().__init__(message, attempts)
        self.args = (message, words, attempts)
        self.words = words


class EmptyAnswer(CallFailed):
    """No text, no call."""

    code = "llm_empty"


class Blocked(CallFailed):
    """`processor` is the name of the one that stopped it, `reason` what it says, `side` whether it was what the model
    would have been told (before) or what it said (after).
    """

    code = "llm_blocked"

    def __init__(self, processor: str, reason: str, side: str = "before", attempts: tuple[Attempt, ...] = ()) -> None:
        where = "what the model would be told" if side == "before" else "the model's answer"
        super().__init__(f"{processor} blocks {where}: {reason}", attempts)
        self.args = (processor, reason, side, attempts)
        self.processor = processor
        self.reason = reason
        self.side = side


class BudgetExceeded(CallFailed):
    """`limit` is its name: tokens, dollars, seconds, turns, tool_calls or requests."""

    code = "llm_budget"

    def __init__(self, message: str, limit: str, attempts: tuple[Attempt, ...] = ()) -> None:
        super().__init__(message, attempts)
        self.args = (message, limit, attempts)
        self.limit = limit
