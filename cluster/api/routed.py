"""Answers of gateway routes: a request goes to the gateway, its events come back in the endpoint's wire format.

answering.py asks it, where a configuration has routes or providers. One RoutedModels per router replica. It chooses no
target and retries nothing: that is cluster/gateway's. Nothing is sent before the first piece of an answer is there.
"""

from __future__ import annotations

import asyncio
import difflib
import os
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import replace

from diptych.cluster.gateway.gateway import Gateway
from diptych.cluster.gateway.ports import Context
from diptych.cluster.gateway.relay import Relayed, RelayItem, Verbatim
from diptych.cluster.gateway.requests import of_one_choice
from diptych.cluster.gateway.settings import OWN
from diptych.cluster.gateway.signals import Restarted, Signal
from diptych.cluster.gateway.sizes import size_of
from diptych.cluster.router.router import Router
from diptych.protos.errors import DeadlineExceeded, DiptychError, InvalidRequest, RequestError, UnknownModel
from diptych.protos.openai import ChatRequest
from diptych.protos.openai_replies import JsonObject
from diptych.protos.replies import Usage
from diptych.protos.strict_json import parse_object, printable

from .endpoint import Endpoint, StreamEncoder, Void, Whole
from .errors import public
from .generation import INLINE_BODY_BYTES, Origin, session_of
from .overrides import overrides
from .prepared import Checks, Header
from .reading import Said
from .routed_choice import RoutedChoice
from .routed_headers import route_headers
from .routed_life import RoutedLife, Work
from .sse import DONE

MAX_PENDING = 64  # events of several choices that wait for a slow client


class RoutedModels:
    """The names that lead to the gateway. Whoever made the gateway closes it."""

    def __init__(self, gateway: Gateway, router: Router) -> None:
        self.gateway = gateway
        self.router = router
        self.created = int(time.time())
        self.work = Work()

    @property
    def names(self) -> tuple[str, ...]:
        """Of all routes."""
        return self.gateway.models

    def takes(self, model: str, own: Mapping[str, object]) -> bool:
        """Whether `model` is the gateway's: a route stands before an own model of its name, and that before a
        provider's model which a client names itself.
        """
        return model in self.names or (model not in own and self.gateway.is_direct(model))

    def unknown(self, model: str, own: Mapping[str, object], *, is_chat: bool) -> RequestError:
        """What to raise for a name that leads nowhere at an endpoint."""
        if not is_chat and (model in self.names or self.gateway.is_direct(model)):
            return no_own_model(model, own)
        own.get(model)  # raises for an own model that answers elsewhere
        known = sorted({*own, *self.names})
        close = difflib.get_close_matches(model[:128], known, n=1, cutoff=0.6)
        hint = f"did you mean {close[0]}? There is" if close else "there is"
        return UnknownModel(f"the model {printable(model)} is not served; {hint}: {', '.join(known)}", "model")

    def pools_of(self, model: str) -> tuple[str, ...]:
        """The own models among the targets of a route, in its order."""
        return tuple(name.removeprefix(f"{OWN}/") for name in self.targets_of(model) if name.startswith(f"{OWN}/"))

    def targets_of(self, model: str) -> tuple[str, ...]:
        """The names of all targets that a name in `model` may lead to."""
        return self.gateway.targets_of(model)

    def counting_model(self, model: str) -> str:
        """The own model that counts a route's tokens. Raises InvalidRequest where it has none."""
        if pools := self.pools_of(model):
            return pools[0]
        raise InvalidRequest(
            f"{printable(model)} has no own pool among its targets, and only a provider knows how it counts: "
            "ask for an answer and read its usage, or count with the name of an own model",
            "model",
        )

    async def prepare(self, request: ChatRequest, origin: Origin, endpoint: Endpoint, body: bytes) -> RoutedAnswer:
        """The answer to be, of which nothing was begun; `body` as it came, or nothing. Raises RequestError."""
        origin.priority(request.priority)
        answer = RoutedAnswer(self, request, origin, endpoint)
        if body and endpoint.relays:
            await answer.relay(body)
        return answer


def no_own_model(model: str, own: Mapping[str, object]) -> InvalidRequest:
    """For an endpoint that routes do not have."""
    known = ", ".join(sorted(own)) or "none"
    return InvalidRequest(
        f"{printable(model)} leads to targets of the gateway, which answer POST /v1/chat/completions, /v1/messages and "
        f"/v1/responses; models that answer here: {known}",
        "model",
    )


class RoutedAnswer:
    """One request, for one of `whole` and `stream`, once. See AnswerView."""

    is_chat = True
    fingerprint = None

    def __init__(self, models: RoutedModels, request: ChatRequest, origin: Origin, endpoint: Endpoint) -> None:
        self.request = request
        self.tenant = origin.tenant
        self.created = int(time.time())
        self.id = origin.tracked.id if origin.tracked else endpoint.id_prefix + os.urandom(12).hex()
        self.choices = [RoutedChoice(index, request) for index in range(request.num_choices)]
        self._models = models
        self._origin = origin
        self._endpoint = endpoint
        self._checks = _checks_of(request)
        self._size: int | None = None
        self._verbatim: Verbatim | None = None

    async def relay(self, body: bytes) -> None:
        """A provider's bytes may be passed on as they are, where nothing has to be added to them."""
        request = self.request
        if request.stream and not (request.num_choices > 1 or self._checks or request.explain or request.structured):
            is_small = len(body) <= INLINE_BODY_BYTES
            fields = parse_object(body) if is_small else await asyncio.to_thread(parse_object, body)
            self._verbatim = Verbatim(body=fields, id=self.id, model=request.model)

    def named(self, name: str) -> RoutedAnswer:
        """The same under another id, before it begins."""
        self.id = name
        return self

    @property
    def sampling(self) -> tuple[float | None, float | None]:
        """As asked; what else holds is the target's own."""
        return self.request.temperature, self.request.top_p

    @property
    def prompt_tokens(self) -> int:
        """As told, or as many as it probably has."""
        told = [choice.usage.input_tokens for choice in self.choices if choice.usage.input_tokens is not None]
        if told:
            return told[0]
        if self._size is None:
            self._size = size_of(self.request).usual_tokens
        return self._size

    @property
    def headers(self) -> list[Header]:
        """Who answered, after how many attempts, and what was asked for otherwise than the client did."""
        return route_headers([choice.record for choice in self.choices if choice.record is not None])

    def used(self) -> Usage:
        """Of all choices; each of them is an exchange of its own, with the prompt."""
        sums: dict[str, int | None] = {}
        for name in Usage.__slots__:
            told = [getattr(choice.usage, name) for choice in self.choices]
            sums[name] = None if None in told else sum(told)
        return Usage(**sums)

    def explanation(self) -> JsonObject | None:
        """The attempts of each choice, if the client asked."""
        if not self.request.explain:
            return None
        return {"choices": [choice.record.told() for choice in self.choices if choice.record is not None]}

    async def whole(self) -> JsonObject:
        """The body of the whole answer. Raises what ended it."""
        try:
            wholes = await self._wholes()
        except DiptychError as exc:
            raise self._endpoint.worded(exc) from exc
        reply = self._endpoint.answer(self, wholes)
        if (explanation := self.explanation()) is not None:
            reply["diptych"] = explanation
        return reply

    async def _wholes(self) -> list[Whole]:
        if len(self.choices) == 1:
            return [await self._whole_of(self.choices[0])]
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._whole_of(choice)) for choice in self.choices]
        except BaseExceptionGroup as exc:
            raise exc.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _whole_of(self, choice: RoutedChoice) -> Whole:
        if self.request.first_token_timeout_s is not None:  # only a stream tells when it is there
            return await self._finished(choice, await self._unseen(choice))
        request, context = self._asked(choice, stream=False)
        with RoutedLife(self._models.router.requests, self._models.work, self._origin, self.request.model) as life:
            with life.interrupts:
                reply, choice.record = await self._models.gateway.answer(request, context, watcher=life.tried)
            life.answers(choice.record)
            said = [one for event in reply.events() for one in choice.told(event)]
            said += choice.rest()
            life.gave(choice.usage)
        return await self._finished(choice, said)

    async def _finished(self, choice: RoutedChoice, said: list[Said]) -> Whole:
        return Whole(choice, said, choice.all_logprobs, await self._faults(choice), choice.prompt_logprobs)

    async def _unseen(self, choice: RoutedChoice) -> list[Said]:
        """All that is said, of a stream of which nobody sees a part: a target that fails amid it voids what it said."""
        said: list[Said] = []
        async with aclosing(self._items(choice, restarts=True)) as items:
            async for item in items:
                if isinstance(item, Restarted):
                    said.clear()
                    choice.begin_again()
                elif not isinstance(item, Relayed):
                    said += choice.told(item)
        return said + choice.rest()

    async def stream(self, void: Void | None = None) -> AsyncGenerator[bytes, None]:
        """The answer's events, encoded. Raises what ended it before its first one; a later failure is the last. `void`:
        called when the events so far are void, for who shows none of them before the end.
        """
        endpoint = self._endpoint
        encoders = [endpoint.encoder(self, choice.index) for choice in self.choices]
        seen: set[int] = set()
        is_relayed = False  # what came last; its finish stands in its bytes
        try:
            async with aclosing(self._run(restarts=void is not None)) as items:
                async for choice, item in items:
                    encoder, data = encoders[choice.index], b""
                    if isinstance(item, Relayed):
                        seen.add(choice.index)
                        is_relayed = True
                        yield item.data
                        continue
                    if isinstance(item, Signal):
                        is_relayed = False
                        told = self._signalled(item, choice, encoders, void)
                        if seen and told:
                            yield told
                        continue
                    said = choice.rest() if item is None else choice.told(item)
                    if is_relayed or (not said and item is not None):
                        continue
                    logprobs = choice.taken_logprobs()
                    if choice.index not in seen:
                        seen.add(choice.index)
                        data = encoder.begin()
                    if said or logprobs:
                        data += encoder.said(said, logprobs)
                    if item is None:
                        data += encoder.finish(choice, await self._faults(choice))
                    if data:
                        yield data
            end = DONE if is_relayed else endpoint.end(self)
        except Exception as exc:
            error = endpoint.worded(exc) if isinstance(exc, DiptychError) else exc
            if not seen:
                raise error from exc
            end = endpoint.failed(self, public(error))
        yield end

    def _signalled(
        self, signal: Signal, choice: RoutedChoice, encoders: list[StreamEncoder], void: Void | None
    ) -> bytes:
        """What a stream tells of a target that goes on for another one."""
        if void is None:
            return self._endpoint.remark(_remark(signal, choice))
        void()  # with it, nobody goes on from a text
        choice.begin_again()
        encoders[choice.index] = self._endpoint.encoder(self, choice.index)
        return b""

    async def _run(self, *, restarts: bool) -> AsyncGenerator[tuple[RoutedChoice, RelayItem | None], None]:
        """What comes of all choices, each item with its choice; None behind a choice's last. Closing it, and the
        failure of one, ends all of them. `restarts`: of one choice alone.
        """
        if len(self.choices) == 1:
            async with aclosing(self._items(self.choices[0], restarts=restarts)) as items:
                async for item in items:
                    yield self.choices[0], item
            yield self.choices[0], None
            return
        queue: asyncio.Queue[tuple[RoutedChoice, RelayItem | Exception | None]] = asyncio.Queue(MAX_PENDING)
        tasks = [asyncio.create_task(self._pour(choice, queue)) for choice in self.choices]
        num_open = len(tasks)
        try:
            while num_open:
                choice, event = await queue.get()
                if isinstance(event, Exception):
                    raise event
                num_open -= event is None
                yield choice, event
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pour(
        self, choice: RoutedChoice, queue: asyncio.Queue[tuple[RoutedChoice, RelayItem | Exception | None]]
    ) -> None:
        try:
            async with aclosing(self._items(choice)) as items:
                async for item in items:
                    await queue.put((choice, item))
            await queue.put((choice, None))
        except Exception as exc:  # raised by the reader of the queue
            await queue.put((choice, exc))

    async def _items(self, choice: RoutedChoice, *, restarts: bool = False) -> AsyncGenerator[RelayItem, None]:
        request, context = self._asked(choice, stream=True)
        with RoutedLife(self._models.router.requests, self._models.work, self._origin, self.request.model) as life:
            gateway, verbatim = self._models.gateway, self._verbatim
            stream = (
                gateway.stream(request, context=context, restarts=restarts)
                if verbatim is None
                else gateway.relay(request, verbatim, context=context)
            )
            stream.watcher = life.tried
            try:
                async with stream:
                    events = aiter(stream)
                    while True:
                        with life.interrupts:
                            item = await anext(events, None)
                        choice.record = stream.record
                        if item is None:
                            return
                        life.answers(stream.record)
                        yield item
                        life.gave(choice.usage)
            finally:
                choice.record = stream.record

    def _asked(self, choice: RoutedChoice, *, stream: bool) -> tuple[ChatRequest, Context]:
        """One choice, in the time that is left of the request's since its arrival."""
        origin, request = self._origin, self.request
        spent_s = self._models.router.clock() - origin.arrived_at
        for name in ("timeout_s", "first_token_timeout_s"):
            if (limit_s := getattr(request, name)) is not None and limit_s <= spent_s:
                raise DeadlineExceeded(f"{name} was over before the request was read")
        context = Context(
            tenant=origin.tenant,
            session=origin.session or session_of(request.prompt_cache_key),
            choice=choice.index,
            waited_s=spent_s,
            traceparent=origin.traceparent,
            # The life of the request is told here, over all its attempts.
            origin=replace(origin, tracked=None, arrived_at=origin.arrived_at),
        )
        context = overrides(context, origin.key, origin.headers, readable=self._models.gateway.settings.rule_headers)
        if len(self.choices) > 1:  # one answer several times is no choice
            context = replace(context, cache="no-store")
        update = {"stream": stream, "structured": None}
        return of_one_choice(request, choice.index).model_copy(update=update), context

    async def _faults(self, choice: RoutedChoice) -> list[str]:
        """How a complete answer fails its form: providers promise less than they are asked for."""
        if self._checks is None or not choice.is_complete:
            return []
        message = choice.message
        calls = [(call.name, call.text or "{}") for call in message.tool_calls]
        faults = await asyncio.to_thread(self._checks.faults, message.content, calls)
        if faults:
            is_route = self.request.model in self._models.names
            label = self.request.model if is_route else self.request.model.partition("/")[0] + "/*"
            self._models.router.metrics.counters["answers_out_of_form"].labels(model=label).inc()
        return faults


def _checks_of(request: ChatRequest) -> Checks | None:
    """What complete answers are held against. Raises InvalidRequest for a schema that says nothing."""
    form, tools = request.output_form, request.tool_use
    schema = None if form is None else form.schema
    schemas = {} if tools is None or tools.mode == "none" else {tool.name: tool.parameters for tool in tools.allowed}
    if schema is None and not schemas:
        return None
    prefix = request.messages[-1].content if request.template.continue_final else ""
    return Checks(content=schema, calls=schemas, prefix=prefix)


def _remark(signal: Signal, choice: RoutedChoice) -> str:
    did = "begins again" if isinstance(signal, Restarted) else "goes on"
    of = f"choice {choice.index} " if choice.index else ""
    return f"{of}{did} at {printable(signal.target)} after {signal.after.value}"
