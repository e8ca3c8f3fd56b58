"""One attempt at a request: submits to the engines of a placement, collects their tokens, cancels what is left over.

Engine sessions call `on_token` and `on_end`; the router's generator waits in `next`. One wake-up per step, no queue.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from diptych.protos.errors import DeadlineExceeded, DiptychError, EngineLost
from diptych.protos.lifecycle import finish_reason
from diptych.protos.types import (
    DecodeOrder,
    EngineRef,
    Finish,
    FinishReason,
    GenerateRequest,
    PrefillOrder,
    PromptLogprobs,
    Role,
    TokenLogprobs,
)

from .incident import Incident, Strike, is_fault
from .merge import TokenMerge
from .placement import Placement
from .session import EngineSession

LINGER_S = 0.1  # a prefill engine's report may arrive after the answer's end; longer than this nobody waits for it


class Attempt:
    """Used by one task. `close` must be called, at the latest when the client is gone.

    When the stream to the prefill engine breaks before any token came, nobody knows whether that engine has the order,
    and the decode engine might wait for it as long as a lease lasts. So the attempt fails and is tried anew, unless it
    `is_last`: then the decode engine's own fallback is waited for. `is_suspect`: no fallback, for who ends the engine
    that computes its prompt should not end another one at once.
    """

    def __init__(
        self,
        request: GenerateRequest,
        placement: Placement,
        prefill: EngineSession | None,
        decode: EngineSession,
        *,
        is_last: bool,
        is_suspect: bool = False,
        on_start: Callable[[], None] = lambda: None,
    ) -> None:
        self.request = request
        self.placement = placement
        wants_prompt = request.sampling.prompt_logprobs is not None
        self.merge = TokenMerge(
            has_prefill=prefill is not None,
            prompt_logprobs=len(request.prompt) - 1 if wants_prompt else 0,
            emitted=request.resume,
        )
        self._prefill = prefill
        self._decode = decode
        self._is_last = is_last
        self._is_suspect = is_suspect
        self._on_start = on_start
        self._incidents: dict[Role, Incident] = {}
        self._handles: list[tuple[EngineSession, int]] = []
        self._is_dirty = False
        self._waiter: asyncio.Future[None] | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._is_late = False

    def start(self, *, timeout_s: float | None) -> None:
        """Tell both engines at once. Raises EngineLost, Overloaded."""
        # Decode first: when its engine is lost, the prefill engine never hears of the request.
        wanted = DecodeOrder(
            request=self.request, prefill=self.placement.prefill, allow_local_prefill=not self._is_suspect
        )
        self._submit(Role.DECODE, self._decode, wanted)
        if self._prefill is not None:
            order = PrefillOrder(request=self.request, decode=self.placement.decode)
            self._submit(Role.PREFILL, self._prefill, order)
        if timeout_s is not None:
            self._deadline = asyncio.get_running_loop().call_later(max(timeout_s, 0), self._expire)

    def _submit(self, role: Role, session: EngineSession, order: PrefillOrder | DecodeOrder) -> None:
        try:
            self._handles.append((session, session.submit(order, self)))
        except DiptychError:
            self.merge.blame = role
            raise

    async def next(self) -> list[int]:
        """New tokens in order; empty once, when the attempt is over. Raises what ended it."""
        while True:
            self.merge.settle()
            if tokens := self.merge.take():
                return tokens
            if self.merge.error is not None:
                if (reason := self._whole()) is None:
                    raise self.merge.error
                self.merge.conclude(self._end(reason, len(self.merge.tokens)))
            if self.merge.finish is not None:
                return []
            lost = self.merge.over.get(Role.PREFILL)
            if isinstance(lost, DiptychError) and not self.merge.has_begun and not self._is_last:
                self.merge.blame = Role.PREFILL
                raise lost
            if self._is_late:
                raise DeadlineExceeded("the request's deadline passed")
            await self._changed()

    async def linger(self) -> None:
        """Wait a moment for the prefill engine's report, after the end."""
        if self._prefill is None or not self._prefill.is_ready or Role.PREFILL in self.merge.over:
            return
        try:
            async with asyncio.timeout(LINGER_S):
                while Role.PREFILL not in self.merge.over:
                    await self._changed()
        except TimeoutError:
            pass

    @property
    def engines(self) -> list[EngineRef]:
        """The one or two of the placement."""
        placement = self.placement
        return [placement.decode] if placement.prefill is None else [placement.prefill, placement.decode]

    def failed_engines(self) -> set[EngineRef]:
        """Whom another attempt should avoid: who is not connected, whose step raised, and who ended its part with the
        attempt's error.
        """
        return {
            session.info.ref
            for role, session in self._sessions()
            if not session.is_ready or role is self.merge.blame or role in self._incidents
        }

    def strike(self) -> Strike | None:
        """What struck it, as far as its engines' streams show; the decode engine's incident first."""
        for role, _ in self._sessions():
            if role in self._incidents:
                return Strike(role, self._incidents[role])
        return None

    @property
    def is_proven(self) -> bool:
        """Whether the decode engine has made a token, so that what happens to it now is not this request's doing."""
        return self.merge.num_new > (self._prefill is not None)

    def _sessions(self) -> list[tuple[Role, EngineSession]]:
        prefill = [] if self._prefill is None else [(Role.PREFILL, self._prefill)]
        return [(Role.DECODE, self._decode), *prefill]

    def stop(self, num_tokens: int) -> None:
        """The answer is complete after `num_tokens`: the decode engine may stop, and the end counts as an engine's."""
        self._decode.cancel(self.request.key)
        self.merge.stop(self._end(FinishReason.STOP, num_tokens))

    def close(self) -> None:
        """Cancel on every engine that has not ended its part; idempotent."""
        if self._deadline is not None:
            self._deadline.cancel()
        open_roles = {Role.PREFILL, Role.DECODE} - self.merge.over.keys()
        for session, handle in self._handles:
            role = Role.DECODE if session is self._decode else Role.PREFILL
            if role in open_roles:
                session.cancel(self.request.key)
            session.release(handle)
        self._handles.clear()

    def on_start(self) -> None:
        """Sink: an engine has begun to compute the prompt."""
        self._on_start()

    def on_token(self, index: int, token: int, logprobs: TokenLogprobs | None = None) -> None:
        """Sink: generated token number `index`."""
        self.merge.token(index, token, logprobs)
        self._wake()

    def on_prompt(self, piece: PromptLogprobs) -> None:
        """Sink: logprobs of some of the prompt's tokens."""
        self.merge.prompt(piece.first, piece.logprobs)
        self._wake()

    def on_end(self, role: Role, outcome: Finish | DiptychError) -> None:
        """Sink: one engine's part is over."""
        if isinstance(outcome, EngineLost) or (isinstance(outcome, Finish) and is_fault(outcome)):
            session = self._decode if role is Role.DECODE else self._prefill
            if session is not None and session.incident is not None:
                self._incidents[role] = session.incident
        self.merge.end(role, outcome)
        self._wake()

    def _end(self, reason: FinishReason, num_tokens: int) -> Finish:
        return Finish(key=self.request.key, role=Role.DECODE, reason=reason, num_tokens=num_tokens)

    def _whole(self) -> FinishReason | None:
        """Why nothing can follow the tokens that came, by the rule that the engines follow."""
        tokens = self.merge.tokens
        if not self.merge.has_begun:
            return None
        return finish_reason(
            self.request.sampling,
            tokens[-1],
            num_generated=len(tokens),
            num_prompt=len(self.request.prompt),
            max_context_tokens=self._decode.info.max_context_tokens,
        )

    def _expire(self) -> None:
        self._is_late = True
        self._wake()

    def _wake(self) -> None:
        self._is_dirty = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _changed(self) -> None:
        if not self._is_dirty:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._is_dirty = False
