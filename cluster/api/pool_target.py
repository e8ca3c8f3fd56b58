"""An own pool as a target of the gateway: the road of own models from messages to deltas, without a wire format.

Made where the router is, for each served model that generates; the gateway asks it as it asks a provider. Engines that
die under an answer are the router's matter: it goes on behind the last token elsewhere, and nothing of it is seen here.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing

from diptych.cluster.gateway.public import failure_of
from diptych.cluster.gateway.record import AttemptRecord
from diptych.cluster.gateway.requests import of_one_choice
from diptych.cluster.gateway.settings import OWN
from diptych.cluster.gateway.target import Continues
from diptych.cluster.providers.terms import Terms
from diptych.cluster.router.router import Router
from diptych.protos.deltas import Delta, Logprobs
from diptych.protos.errors import (
    ContextTooLong,
    DeadlineExceeded,
    DiptychError,
    InvalidRequest,
    RequestError,
    UnknownModel,
    param_of,
)
from diptych.protos.failures import Failure, FailureKind, ProviderFailure
from diptych.protos.openai import ChatRequest
from diptych.protos.providers.codec import Note
from diptych.protos.replies import Began, Ended, Event, Finish, Reply, ReplyBuilder, Usage

from .answer import Answer, Choice, Piece, run
from .chat import ChatEndpoint
from .generation import INLINE_LOGPROBS, Generator, Origin
from .logprobs import chat_logprobs, prompt_logprobs
from .prepared import check_chat
from .reading import Parts, Said
from .served import ServedModel

SIGN_S = (
    1.0  # an answer whose tokens say nothing for so long, as hidden reasoning does, tells its usage as a sign of life
)
NO_ROOM = "model_context_window_exceeded"  # of an answer that might have as many tokens as fit, which were too few
_FINISHES: Mapping[str, Finish] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
}


def pool_targets(router: Router, models: Iterable[ServedModel]) -> list[PoolTarget]:
    """One for each model that generates."""
    return [PoolTarget(model, router) for model in models]


class PoolTarget:
    """`pool/MODEL`. Context.origin may be an Origin, with the request that clients may ask about and cancel; without
    one the context's tenant and session are all that is known. One choice, whatever `n` is; no `structured` events.
    """

    is_own = True
    continues: Continues = "exact"
    key_id = ""

    def __init__(self, model: ServedModel, router: Router) -> None:
        self.name = f"{OWN}/{model.name}"
        self.weights = model.weights
        self._model = model
        self._router = router
        self._generator = Generator(ChatEndpoint(), router, {model.name: model})

    def check(self, request: ChatRequest) -> None:
        """Nothing, where the model can do what is asked, as far as that is known without counting tokens. Raises
        ProviderFailure (UNSUPPORTED).
        """
        try:
            check_chat(request, self._model)
        except RequestError as exc:
            raise self._refused(exc) from exc

    async def whole(self, request: ChatRequest, terms: Terms, record: AttemptRecord) -> Reply:
        """The whole answer. Raises ProviderFailure."""
        builder = ReplyBuilder()
        async with aclosing(self.stream(request, terms, record)) as events:
            async for event in events:
                builder.add(event)
        return builder.reply()

    async def stream(self, request: ChatRequest, terms: Terms, record: AttemptRecord) -> AsyncGenerator[Event, None]:
        """The answer's events. Began comes with the first token, the prompt's tokens are told behind it. Raises
        ProviderFailure, behind what is known of the usage.
        """
        origin = self._origin(record)
        try:
            answer = await self._generator.prepare(self._asked(request, terms, origin, record), origin)
        except RequestError as exc:
            raise self._refused(exc) from exc
        except DiptychError as exc:
            raise failure_of(exc, self.name) from exc
        record.notes.extend(_notes(answer, request))
        (choice,) = answer.choices
        try:
            async with aclosing(self._told(answer, choice)) as events:
                async for event in events:
                    yield event
        except DiptychError as exc:
            if choice.num_tokens:
                yield _usage(choice)
            failure = self._failure(exc, answer, terms)
            raise failure from failure.__cause__
        finally:
            if choice.num_tokens:
                record.usage = record.usage.merged(_usage(choice))
            if request.explain and choice.explanation is not None:
                record.explanation = dataclasses.asdict(choice.explanation)
        assert choice.explanation is not None
        yield _usage(choice)
        native = NO_ROOM if choice.is_cut and choice.finish_reason == "length" else choice.explanation.reason.value
        yield Ended(_FINISHES[choice.end_reason], native, choice.stop_text)

    async def _told(self, answer: Answer, choice: Choice) -> AsyncGenerator[Event, None]:
        """From Began to the last delta."""
        clock = asyncio.get_running_loop().time
        has_begun, last = False, clock()
        async with aclosing(run(self._router, answer.choices)) as pieces:
            async for _, piece in pieces:
                if not has_begun:
                    has_begun = True
                    yield Began(answer.id, self._model.name)
                    yield Usage(input_tokens=len(choice.call.prompt))
                    if choice.prompt_logprobs is not None:
                        yield await self._of_prompt(answer, choice, choice.call.sampling.prompt_logprobs or 0)
                if piece is None:
                    break
                told = self._read(choice, piece)
                for event in told:
                    yield event
                if told:
                    last = clock()
                elif clock() - last >= SIGN_S:
                    last = clock()
                    yield _usage(choice)
            if choice.reader is not None:
                for event in _deltas(choice.reader.finish()):
                    yield event

    def _read(self, choice: Choice, piece: Piece) -> list[Delta]:
        told: list[Delta] = []
        if piece.entries:
            told.append(Logprobs(chat_logprobs(piece.entries, self._model.renderer.table)["content"]))
        return told + _deltas(choice.read(piece))

    async def _of_prompt(self, answer: Answer, choice: Choice, num_top: int) -> Logprobs:
        assert choice.prompt_logprobs is not None
        told = choice.call.prompt, choice.prompt_logprobs, num_top, answer.model.renderer.table
        if len(choice.prompt_logprobs) * (1 + num_top) <= INLINE_LOGPROBS:
            return Logprobs(prompt=prompt_logprobs(*told))
        return Logprobs(prompt=await asyncio.to_thread(prompt_logprobs, *told))

    def _origin(self, record: AttemptRecord) -> Origin:
        """Who asks. A request that was elsewhere before arrives now: the pool is not to blame for that time."""
        context, traceparent = record.context, record.traceparent
        now = self._router.clock()
        if context is not None and isinstance(context.origin, Origin):
            origin = context.origin
            arrived_at = origin.arrived_at if record.cause == "first" else now
            return dataclasses.replace(origin, arrived_at=arrived_at, traceparent=traceparent or origin.traceparent)
        if context is None:
            return Origin(tenant="", arrived_at=now, traceparent=traceparent)
        return Origin(tenant=context.tenant, session=context.session, arrived_at=now, traceparent=traceparent)

    def _asked(self, request: ChatRequest, terms: Terms, origin: Origin, record: AttemptRecord) -> ChatRequest:
        """The same of this model, with the attempt's own end; the first token's is kept by who made the attempt. Of
        several answers each has a seed of its own, where the seed is the model's.
        """
        choice, own_seed = 0 if record.context is None else record.context.choice, self._model.seed
        if choice and request.seed is None and own_seed is not None:
            request = of_one_choice(request.model_copy(update={"seed": own_seed}), choice)
        left_s = terms.deadline - asyncio.get_running_loop().time()
        spent_s = self._router.clock() - origin.arrived_at
        update = {
            "model": self._model.name,
            "n": None,
            "structured": None,
            "timeout_s": max(left_s, 0.0) + spent_s,
            "first_token_timeout_s": None,
        }
        return request.model_copy(update=update)

    def _refused(self, exc: RequestError) -> ProviderFailure:
        """What this model cannot do another target may; if none can, the client is told `exc`."""
        if isinstance(exc, ContextTooLong | UnknownModel):
            return failure_of(exc, self.name)
        failure = Failure(kind=FailureKind.UNSUPPORTED, message=exc.message, param=param_of(exc))
        return ProviderFailure(failure, self.name, exc.detail)

    def _failure(self, exc: DiptychError, answer: Answer, terms: Terms) -> ProviderFailure:
        """Of an answer that ended by `exc`; its cause is what the client is told."""
        (choice,) = answer.choices
        if isinstance(exc, InvalidRequest):
            exc = answer.prepared.blamed(exc)
        if isinstance(exc, RequestError) and not choice.num_tokens:
            failure = self._refused(exc)
        elif isinstance(exc, DeadlineExceeded) and not choice.num_tokens and _is_early(terms):
            told = Failure(kind=FailureKind.FIRST_TOKEN_TIMEOUT, message=exc.message, status=exc.http_status)
            failure = ProviderFailure(told, self.name, exc.detail)
        else:
            failure = failure_of(exc, self.name)
        failure.__cause__ = exc
        return failure


def _is_early(terms: Terms) -> bool:
    """Whether a deadline that passed was the pool's own (router.limits), so that another target has time left."""
    return asyncio.get_running_loop().time() < terms.deadline


def _deltas(said: Iterable[Said]) -> list[Delta]:
    """Without what wire formats tell besides."""
    return [one for one in said if not isinstance(one, Parts)]


def _usage(choice: Choice) -> Usage:
    told = choice.explanation
    return Usage(
        input_tokens=len(choice.call.prompt),
        output_tokens=choice.num_tokens,
        cache_read_tokens=None if told is None else told.cached_tokens,
        cache_write_tokens=0,  # prefixes are kept without a price
        reasoning_tokens=choice.reasoning_tokens,
    )


def _notes(answer: Answer, request: ChatRequest) -> list[Note]:
    """What the client may want to know: what of a schema is checked only when the answer is there; an effort that its
    template has no word for.
    """
    loose, effort = answer.prepared.unenforced, request.template.effort
    found = [Note("adapted", answer.prepared.asked, f"not enforced token by token: {loose}")] if loose else []
    if effort is not None and answer.model.renderer.reads("reasoning_effort"):
        shown = request.template.variables["reasoning_effort"]
        if shown != effort:
            found.append(Note("renamed", "reasoning_effort", f"{shown}, the most that chat templates know"))
    return found
