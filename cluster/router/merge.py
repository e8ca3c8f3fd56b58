"""One attempt's tokens and terminal events from two engines, made into one sequence with one end. Pure: no clock.

prefill engine:  0, then HANDOFF (decode goes on) or STOP/LENGTH (token 0 was the last)
decode engine:   1, 2, 3, ... then STOP/LENGTH; also 0 when it computed the prompt itself
"""

from __future__ import annotations

from diptych.protos.errors import DiptychError, EngineFault, EngineLost, error_from_code
from diptych.protos.types import Finish, FinishReason, Role

MAX_EARLY = 65_536  # tokens that wait for an earlier one; a healthy engine leaves none
_ENDS = (FinishReason.STOP, FinishReason.LENGTH)


class TokenMerge:
    """Feed events as they come, in any order; then `settle`, `take` and look at `finish` and `error`.

    At most one of `finish` and `error` is ever set, and once.
    """

    def __init__(self, *, has_prefill: bool) -> None:
        self.tokens: list[int] = []
        self.finish: Finish | None = None
        self.error: DiptychError | None = None
        self.over: dict[Role, Finish | DiptychError] = {}
        self._early: dict[int, int] = {}
        self._taken = 0
        self._roles = (Role.PREFILL, Role.DECODE) if has_prefill else (Role.DECODE,)

    @property
    def is_over(self) -> bool:
        """Whether `finish` or `error` is set."""
        return self.finish is not None or self.error is not None

    def token(self, index: int, token: int) -> None:
        """Generated token number `index`; a repetition is dropped, and whatever follows an error."""
        if self.error is not None:
            return
        if index < len(self.tokens):
            if self.tokens[index] != token:
                self._fail(EngineFault(f"two engines disagree about token {index} of this answer"))
        elif index == len(self.tokens):
            self.tokens.append(token)
            while self._early and len(self.tokens) in self._early:
                self.tokens.append(self._early.pop(len(self.tokens)))
        elif self._early.setdefault(index, token) != token:
            self._fail(EngineFault(f"an engine changed token {index} of this answer"))
        elif len(self._early) > MAX_EARLY:
            self._fail(EngineFault(f"token {len(self.tokens)} of this answer is missing"))

    def end(self, role: Role, outcome: Finish | DiptychError) -> None:
        """The terminal event of one engine's part, or the loss of the engine. Later ones of the role are ignored."""
        if role in self._roles:
            self.over.setdefault(role, outcome)

    def stop(self, finish: Finish) -> None:
        """The router itself ends the answer."""
        if not self.is_over:
            self.finish = finish

    def take(self) -> list[int]:
        """Tokens in order since the last call; none beyond the end that an engine named."""
        upto = len(self.tokens) if self.finish is None else min(len(self.tokens), self.finish.num_tokens)
        taken, self._taken = self.tokens[self._taken : upto], max(upto, self._taken)
        return taken

    def settle(self) -> None:
        """Decide, from all events so far, whether the attempt is over."""
        if self.is_over or not self.over:
            return
        for outcome in self.over.values():
            if isinstance(outcome, Finish) and outcome.reason in _ENDS and len(self.tokens) >= outcome.num_tokens:
                self.finish = outcome
                return
        prefill, decode = self.over.get(Role.PREFILL), self.over.get(Role.DECODE)
        if isinstance(decode, DiptychError):
            self._fail(decode)
        elif decode is not None and decode.reason is FinishReason.ERROR:
            self._fail(error_from_code(decode.error_code, decode.error_message))
        elif len(self.over) == len(self._roles):
            self._fail(_cause(prefill) or EngineLost("the engines ended without the whole answer"))
        elif prefill is not None and not self.tokens and (self._early or _handed_over(prefill)):
            self._fail(_cause(prefill) or EngineLost("the first token was lost with its engine"))

    def _fail(self, error: DiptychError) -> None:
        if not self.is_over:
            self.error = error


def _handed_over(outcome: Finish | DiptychError) -> bool:
    return isinstance(outcome, Finish) and outcome.reason is FinishReason.HANDOFF


def _cause(outcome: Finish | DiptychError | None) -> DiptychError | None:
    if isinstance(outcome, Finish):
        if outcome.reason is not FinishReason.ERROR:
            return None
        return error_from_code(outcome.error_code, outcome.error_message)
    return outcome
