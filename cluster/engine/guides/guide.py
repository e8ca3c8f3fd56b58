"""The guide of one request: free reasoning first, where the constraint says so, then the grammar.

free        | no constraint but that the answer may not end: until the reasoning's end token
maybe       | at the first token: the reasoning's start, or the grammar's first token
grammar     | the matcher's masks; what it says must follow is taken at once
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from enum import Enum

import numpy as np

from diptych.protos.constraint import Guide, Reasoning
from diptych.protos.errors import DiptychError, EngineFault, InvalidRequest

from .matcher import Matcher, Words, fill_rows


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
        self._known: list[int] = []  # the answer's tokens, those that must follow included
        self._has_ended = False
        self._phase = _Phase.GRAMMAR
        if reasoning is not None:
            self._phase = _Phase.FREE if reasoning.is_open else _Phase.MAYBE

    def accept(self, position: int, token: int) -> tuple[int, ...]:
        """See constraint.Guide."""
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
        fill_rows([(guide._matcher, at) for guide, at in asked], masks_MW)
        for guide, at in asked:
            guide._after_matcher(masks_MW[at])

    def _has_filled(self, position: int, mask_W: Words) -> bool:
        """Whether the mask needs no matcher; then it is filled."""
        at = position - self._num_prompt
        if at > len(self._known):
            mask_W.fill(-1)
        elif self.error is not None or (at == len(self._known) and self._has_ended):
            mask_W.fill(0)
        elif at < len(self._known):
            mask_W.fill(0)
            _set(mask_W, self._known[at])
        elif self._phase is _Phase.FREE:
            mask_W.fill(-1)
            for token in self._ends:
                _unset(mask_W, token)
        else:
            return False
        return True

    def _is_reasoning(self, token: int, reasoning: Reasoning) -> bool:
        """Whether the token belongs to the reasoning, which it may begin or end."""
        if self._phase is _Phase.FREE:
            if token == reasoning.end:
                self._phase = _Phase.GRAMMAR
            return True
        if self._phase is _Phase.MAYBE:
            self._phase = _Phase.FREE if token == reasoning.start else _Phase.GRAMMAR
            return self._phase is _Phase.FREE
        return False

    def _after_matcher(self, mask_W: Words) -> None:
        if self._matcher.error:
            mask_W.fill(0)
            self._fail_by_matcher()
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

    def _fail(self, error: DiptychError) -> None:
        self.error = self.error or error


def _set(mask_W: Words, token: int) -> None:
    mask_W.view(np.uint8)[token // 8] |= np.uint8(1 << token % 8)


def _unset(mask_W: Words, token: int) -> None:
    if token // 32 < len(mask_W):
        mask_W.view(np.uint8)[token // 8] &= np.uint8(0xFF ^ (1 << token % 8))
