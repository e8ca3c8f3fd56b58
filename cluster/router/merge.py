"""One attempt's tokens and terminal events from two engines, made into one sequence with one end. Pure: no clock.

prefill engine:  the prompt's logprobs, 0, then HANDOFF (decode goes on) or STOP/LENGTH (token 0 was the last)
decode engine:   1, 2, 3, ... then STOP/LENGTH; also the prompt's logprobs and 0 when it computed the prompt itself

An answer that was moved begins at the number of its tokens that exist already; 0 above stands for that one.
"""

from __future__ import annotations

from collections.abc import Sequence

from diptych.protos.errors import (
    Cancelled,
    DiptychError,
    Disagreement,
    EngineFault,
    EngineLost,
    TransferError,
    error_from_code,
)
from diptych.protos.types import Finish, FinishReason, Role, TokenLogprobs

MAX_EARLY = 65_536  # tokens that wait for an earlier one; a healthy engine leaves none
_ENDS = (FinishReason.STOP, FinishReason.LENGTH)


class TokenMerge:
    """Feed events as they come, in any order; then `settle`, `take` and look at `finish` and `error`.

    At most one of `finish` and `error` is ever set, and once. `prompt_logprobs` is how many of the prompt's tokens must
    be told before the first token is given out. `emitted` were taken from an earlier attempt: they are not given out,
    and no engine may contradict them.
    """

    def __init__(self, *, has_prefill: bool, prompt_logprobs: int = 0, emitted: Sequence[int] = ()) -> None:
        self.tokens: list[int] = list(emitted)
        self.finish: Finish | None = None
        self.error: DiptychError | None = None
        self.blame: Role | None = None  # whose engine `error` comes from, where it is one's
        self.over: dict[Role, Finish | DiptychError] = {}
        self._early: dict[int, int] = {}
        self._begin = self._taken = len(self.tokens)
        self._roles = (Role.PREFILL, Role.DECODE) if has_prefill else (Role.DECODE,)
        self._logprobs: dict[int, TokenLogprobs] = {}  # by index, of tokens not taken
        self._prompt: dict[int, TokenLogprobs] = {}  # by position
        self._num_prompt = prompt_logprobs

    @property
    def is_over(self) -> bool:
        """Whether `finish` or `error` is set."""
        return self.finish is not None or self.error is not None

    @property
    def num_new(self) -> int:
        """Tokens in order that this attempt brought."""
        return len(self.tokens) - self._begin

    @property
    def has_begun(self) -> bool:
        """Whether there is, or was, something to take."""
        return self.num_new > 0 and len(self._prompt) == self._num_prompt

    @property
    def prompt_logprobs(self) -> list[TokenLogprobs]:
        """Of the prompt's positions 1, 2, ...; whole as soon as `take` gives tokens."""
        return [self._prompt[position] for position in range(1, self._num_prompt + 1)]

    def token(self, index: int, token: int, logprobs: TokenLogprobs | None = None) -> None:
        """Generated token number `index`; a repetition is dropped, and whatever follows an error."""
        if self.error is not None:
            return
        if logprobs is not None and index >= self._taken:
            self._logprobs.setdefault(index, logprobs)
        if index < len(self.tokens):
            if self.tokens[index] != token:
                self._fail(Disagreement(f"two engines disagree about token {index} of this answer"))
        elif index == len(self.tokens):
            self.tokens.append(token)
            while self._early and len(self.tokens) in self._early:
                self.tokens.append(self._early.pop(len(self.tokens)))
        elif self._early.setdefault(index, token) != token:
            self._fail(Disagreement(f"an engine changed token {index} of this answer"))
        elif len(self._early) > MAX_EARLY:
            self._fail(EngineFault(f"token {len(self.tokens)} of this answer is missing"))

    def prompt(self, first: int, logprobs: tuple[TokenLogprobs, ...]) -> None:
        """Those of the prompt's positions first, first + 1, ...; a repetition is dropped, and what nobody asked for."""
        for position, one in enumerate(logprobs, first):
            if 1 <= position <= self._num_prompt:
                self._prompt.setdefault(position, one)

    def end(self, role: Role, outcome: Finish | DiptychError) -> None:
        """The terminal event of one engine's part, or the loss of the engine. Later ones of the role are ignored."""
        if role in self._roles:
            self.over.setdefault(role, outcome)

    def stop(self, finish: Finish) -> None:
        """The router itself ends the answer."""
        if not self.is_over:
            self.finish = finish

    def conclude(self, finish: Finish) -> None:
        """All tokens had come when the engines failed: their end is the answer's."""
        self.error, self.finish = None, finish

    def take(self) -> list[int]:
        """Tokens in order since the last call; none beyond the end that an engine named."""
        if len(self._prompt) < self._num_prompt:
            return []
        upto = len(self.tokens) if self.finish is None else min(len(self.tokens), self.finish.num_tokens)
        taken, self._taken = self.tokens[self._taken : upto], max(upto, self._taken)
        return taken

    def take_logprobs(self, count: int) -> list[TokenLogprobs | None]:
        """Those of the last `count` tokens taken, each given out once; None where an engine told none."""
        return [self._logprobs.pop(index, None) for index in range(self._taken - count, self._taken)]

    def settle(self) -> None:
        """Decide, from all events so far, whether the attempt is over."""
        if self.is_over or not self.over:
            return
        is_told = len(self._prompt) == self._num_prompt
        for outcome in self.over.values():
            if isinstance(outcome, Finish) and self._is_reached(outcome) and is_told:
                self.finish = outcome
                return
        prefill, decode = self.over.get(Role.PREFILL), self.over.get(Role.DECODE)
        if isinstance(decode, DiptychError):
            self._fail(decode, Role.DECODE)
        elif decode is not None and decode.reason is FinishReason.ERROR:
            self._fail(_error_of(decode), Role.DECODE)
        elif len(self.over) == len(self._roles):
            missing = "the whole answer" if is_told else "the prompt's logprobs"
            cause = _cause(prefill)
            error = cause or EngineLost(f"the engines ended without {missing}")
            self._fail(error, Role.PREFILL if cause is not None else Role.DECODE)
        elif _handed_over(prefill) and not is_told:  # decode knows tokens only
            self._fail(EngineLost("the prefill engine handed over without the prompt's logprobs"), Role.PREFILL)
        elif prefill is not None and not self.num_new and (self._early or _handed_over(prefill)):
            self._fail(_cause(prefill) or EngineLost("the first token was lost with its engine"), Role.PREFILL)

    def _is_reached(self, end: Finish) -> bool:
        return end.reason in _ENDS and len(self.tokens) >= end.num_tokens

    def _fail(self, error: DiptychError, blame: Role | None = None) -> None:
        if not self.is_over:
            self.error, self.blame = error, blame


def _handed_over(outcome: Finish | DiptychError | None) -> bool:
    return isinstance(outcome, Finish) and outcome.reason is FinishReason.HANDOFF


def _cause(outcome: Finish | DiptychError | None) -> DiptychError | None:
    if isinstance(outcome, Finish):
        if outcome.reason is not FinishReason.ERROR:
            return None
        return _error_of(outcome)
    return outcome


def _error_of(finish: Finish) -> DiptychError:
    if finish.error_code == Cancelled.code:  # not by this router: the other engine lost sight of it and told this one
        return TransferError("the other engine gave the request up")
    return error_from_code(finish.error_code, finish.error_message, finish.error_param)
