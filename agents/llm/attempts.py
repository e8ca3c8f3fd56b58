"""What became of each try of a call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .usage import Spent, total

if TYPE_CHECKING:
    from diptych.protos.replies import Reply as Answer

    from .errors import CallFailed

MAX_TOLD = 8  # attempts that an error's text tells of, the last ones
MAX_LINE_CHARS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """`number` counts from 1 over all models of the call. `why`: what this try was made for: first, retry (of the
    same request), reask (the model was told of its error), repair (one field anew), longer (with more tokens),
    fallback (another model). `error` is None where it gave the value. `answer` is the whole one, also where the try
    went on from the beginning of another's; `spent` is what this try used. Of one that is `cached` nobody was asked,
    and `saved` is what the answer cost when it was made.
    """

    number: int
    model: str
    why: str = "first"
    answer: Answer | None = field(default=None, repr=False)
    error: CallFailed | None = None
    spent: Spent = field(default_factory=Spent)
    saved: Spent = field(default_factory=Spent)
    seconds: float = 0.0
    request_id: str = ""
    raw: list[Any] = field(default_factory=list, repr=False)

    @property
    def text(self) -> str:
        """What the model said, as far as it said anything."""
        return "" if self.answer is None else self.answer.message.content

    def __str__(self) -> str:
        became = "answered" if self.error is None else f"{type(self.error).__name__}: {self.error.message}"
        line = f"{self.number}. {self.why} at {self.model}, {self.seconds:.2f} s, {self.spent.tokens} tokens: "
        return _cut(line + " ".join(became.split()))


def history(attempts: Sequence[Attempt], left_out: Sequence[str] = ()) -> str:
    """A few lines: all of them together, then one line for each of the last ones."""
    seconds = sum(attempt.seconds for attempt in attempts)
    tokens = total(attempt.spent for attempt in attempts).tokens
    lines = [f"{len(attempts)} attempts, {seconds:.2f} s, {tokens} tokens:"]
    if len(attempts) > MAX_TOLD:
        lines.append(f"... {len(attempts) - MAX_TOLD} more before")
    lines += [str(attempt) for attempt in attempts[-MAX_TOLD:]]
    lines += [_cut(" ".join(one.split())) for one in left_out]
    return "\n".join(lines)


def _cut(line: str) -> str:
    return line if len(line) <= MAX_LINE_CHARS else f"{line[: MAX_LINE_CHARS - 3]}..."
