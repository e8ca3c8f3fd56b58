"""The guide of one request: free reasoning first, where the constraint says so, then the grammar.

free        | no constraint but that the answer may not end: until the reasoning's end token, which a budget brings
maybe       | at the first token: the reasoning's start, or the grammar's first token
grammar     | the matcher's masks; what it says must follow is taken at once
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from enum import Enum

import numpy as np

from diptych.protos.constraint import Guide, Reasoning
from diptych.protos.errors import DiptychError, EngineFault, InvalidRequest

from .matcher import Matcher, Words, fill_rows

log = logging.getLogger(__name__)


class _Phase(Enum):
    FREE = "free"
    MAYBE = "maybe"
    GRAMMAR = "grammar"


class RequestGuide:
    """See constraint.Guide. `end_tokens`: those that end the answer. `forces`: whether tokens that must follow are
    taken without being sampled.
    """

    def __init__(
        self,
        matcher: Matcher,
        *,
        num_prompt: int,
        end_tokens: Collection[int],
        forces: bool = True,
        reasoning: Reasoning | None = None,
    ) -> None:
        self.error: DiptychError | None = None
        self._matcher = matcher
        self._num_prompt = num_prompt
        self._ends = sorted(end_tokens)
        self._forces = forces
        self._reasoning = reasoning
        self._num_free = 0  # tokens of the reasoning without its marks
        self._known: list[int] = []  # the answer's tokens, those that must follow included
        self._has_ended = False
        self._phase = _Phase.GRAMMAR
        if reasoning is not None:
            self._phase = _Phase.FREE if reasoning.is_open else _Phase.MAYBE

    def accept(self, position: int, token: int) -> tuple[int, ...]:
        """See constraint.Guide."""
        try:
            return self._accept(position, token)
        except BaseException as exc:  # a library's panic is no Exception; it would end the step, or its thread
            self._fail_by_library(exc)
            return ()

    def _accept(self, position: int, token: int) -> tuple[int, ...]:
        at = position - self._num_prompt
        if at < len(self._known):
            if self._known[at] != token:
                self._fail(EngineFault("the answer left its form", f"token {at} is {token}, not {self._known[at]}"))
            return ()
        if self.error is not None or at > len(self._known):
            return ()
        self._known.append(token)
        if self._reasoning is not None and self._is_reasoning(token, self._reasoning):
            return self._take_forced() if self._phase is _Phase.GRAMMAR else ()
        if token in self._ends:
            self._has_ended = True
        elif not self._matcher.consume(token):
            self._fail_by_matcher()
        else:
            return self._take_forced()
        return ()

    def fill(self, position: int, mask: memoryview) -> None:
        """See constraint.Guide."""
        self.fill_all([(self, position)], mask)

    def fill_all(self, guided: Sequence[tuple[Guide, int]], masks: memoryview) -> None:
        """See constraint.FillsTogether."""
        masks_MW = np.frombuffer(masks, dtype=np.int32).reshape(len(guided), -1)
        asked: list[tuple[RequestGuide, int]] = []
        for at, (guide, position) in enumerate(guided):
            assert isinstance(guide, RequestGuide)
            if not guide._has_filled(position, masks_MW[at]):
                asked.append((guide, at))
        try:
            fill_rows([(guide._matcher, at) for guide, at in asked], masks_MW)
        except BaseException:  # as in `accept`; whose it was shows one by one
            for guide, at in asked:
                guide._fill_alone(masks_MW[at])
        for guide, at in asked:
            guide._after_matcher(masks_MW[at])

    def _has_filled(self, position: int, mask_W: Words) -> bool:
        """Whether the mask needs no matcher; then it is filled."""
        at = position - self._num_prompt
        if self.error is not None or (at == len(self._known) and self._has_ended):
            mask_W.fill(0)
        elif at > len(self._known):
            mask_W.fill(-1)
        elif at < len(self._known):
            mask_W.fill(0)
            _set(mask_W, self._known[at])
        elif self._phase is _Phase.FREE:
            self._fill_free(mask_W)
        else:
            return False
        return True

    def _is_reasoning(self, token: int, reasoning: Reasoning) -> bool:
        """Whether the token belongs to the reasoning, which it may begin or end."""
        if self._phase is _Phase.FREE:
            if token == reasoning.end:
                self._phase = _Phase.GRAMMAR
            self._num_free += 1
            return True
        if self._phase is _Phase.MAYBE:
            self._phase = _Phase.FREE if token == reasoning.start else _Phase.GRAMMAR
            return self._phase is _Phase.FREE
        return False

    def _fill_free(self, mask_W: Words) -> None:
        reasoning = self._reasoning
        if reasoning is not None and reasoning.budget is not None and self._num_free >= reasoning.budget:
            mask_W.fill(0)
            _set(mask_W, reasoning.end)
            if mask_W.any():
                return
        mask_W.fill(-1)
        for token in self._ends:
            _unset(mask_W, token)

    def _fill_alone(self, mask_W: Words) -> None:
        try:
            self._matcher.fill(mask_W)
        except BaseException as exc:
            self._fail_by_library(exc)

    def _after_matcher(self, mask_W: Words) -> None:
        try:
            if self.error is None and self._matcher.error:
                self._fail_by_matcher()
        except BaseException as exc:
            self._fail_by_library(exc)
        if self.error is not None:
            mask_W.fill(0)
        elif not mask_W.any():
            # A row without a token would look like a fault of the model's numbers, and the engine would be blamed.
            self._fail(
                InvalidRequest(
                    f"the form of the answer allows no token after {len(self._known)}: "
                    "no answer can match it from there"
                )
            )
        elif self._phase is _Phase.MAYBE and self._reasoning is not None:
            _set(mask_W, self._reasoning.start)

    def _take_forced(self) -> tuple[int, ...]:
        if not self._forces:
            return ()
        tokens = self._matcher.forced()
        for token in tokens:
            if not self._matcher.consume(token):
                self._fail_by_matcher()
                return ()
        if self._ends and self._matcher.is_over():
            tokens = [*tokens, self._ends[0]]
            self._has_ended = True
        self._known.extend(tokens)
        return tuple(tokens)

    def _fail_by_matcher(self) -> None:
        reason = self._matcher.error or "a token was sampled that the form does not allow"
        self._fail(
            InvalidRequest(
                f"the form of the answer became too complex to follow after {len(self._known)} tokens: {reason}"
            )
        )

    def _fail_by_library(self, exc: BaseException) -> None:
        log.error("a guide failed after %d tokens", len(self._known), exc_info=exc)
        self._fail(EngineFault("the form of the answer could not be followed", repr(exc)))

    def _fail(self, error: DiptychError) -> None:
        self.error = self.error or error


def _set(mask_W: Words, token: int) -> None:
    if token // 32 < len(mask_W):  # a tokenizer may know ids that the model has no row for
        mask_W.view(np.uint8)[token // 8] |= np.uint8(1 << token % 8)


def _unset(mask_W: Words, token: int) -> None:
    if token // 32 < len(mask_W):
        mask_W.view(np.uint8)[token // 8] &= np.uint8(0xFF ^ (1 << token % 8))
