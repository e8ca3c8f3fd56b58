"""One run of an agent: ask, run what the answer calls, ask again; as a machine that tells events on its way.

agent.py begins it, agent_streams.py reads it, agent_tools.py has what becomes of calls. It is made of what a developer
has, too: the draft of a Call, its exchange or Stream, and reply.run_tools. All that it knows is in its AgentState after
each step.
"""

from __future__ import annotations

import asyncio
import inspect
import secrets
import time
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from diptych.protos.deltas import Content, Reasoning
from diptych.protos.messages import Message, Part, ToolCall
from diptych.protos.replies import Ended, Finish
from diptych.protos.replies import Reply as Answer

from .agent_events import AgentEvent, AgentStep, Paused, Run, RunEnded, TextDelta, ThoughtDelta, TurnBegan
from .agent_limits import Limits
from .agent_state import AgentState
from .attempts import Attempt
from .draft import Draft
from .errors import BudgetExceeded, CallFailed, Error
from .exchange import exchange, value_of
from .machine import Awaited, Machine, Step, take
from .params import merged
from .processors.processor import Processor, ProcessorContext, Side, passed_after, passed_before
from .registry import current
from .reply import UNSET, Reply
from .streams import Emit, Finished, Restarted, Stream
from .together import Aside, Running
from .tools import arrived
from .tracing import Traced, agent_span
from .usage import Spent, total

if TYPE_CHECKING:
    from .agent import Agent

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Tell(Aside):
    """What a run has for its reader."""

    event: AgentEvent


Flow = Generator[Step[Any] | Aside, Any, T]
OnStep = Callable[[AgentState], "Awaitable[object] | object"]


@dataclass(frozen=True, slots=True)
class Orders:
    """What a run is asked for: see Agent.run. `approvals` and `results` are by the ids of pending calls."""

    deps: Any = None
    approvals: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Any] = field(default_factory=dict)
    limits: Limits | None = None
    on_step: OnStep | None = None
    is_streamed: bool = False


@dataclass(slots=True)
class Open:
    """What must be closed where a reader leaves: connections and running tools, of delegated agents, too."""

    streams: list[Stream[Any]] = field(default_factory=list)
    running: list[Running] = field(default_factory=list)

    async def close(self) -> None:
        """In the loop on which they are."""
        streams, self.streams = self.streams, []
        running, self.running = self.running, []
        for stream in streams:
            await stream.aclose()
        for one in running:
            await one.close()


@dataclass(slots=True)
class Guarded:
    """A step whose cancelling closes everything that the run has open."""

    step: Step[Any]
    open: Open

    async def perform(self) -> Any:
        """Wait for it."""
        try:
            return await self.step.perform()
        except asyncio.CancelledError:
            await self.open.close()
            raise


@dataclass(slots=True)
class _Closing:
    open: Open

    async def perform(self) -> None:
        await self.open.close()


class Loop(Generic[T]):
    """One run. `parent` is the loop of the agent whose tool this one is, and `place` the id of the call there."""

    def __init__(
        self,
        agent: Agent[T, Any],
        state: AgentState,
        orders: Orders,
        *,
        parent: Loop[Any] | None = None,
        place: str = "",
        depth: int = 0,
    ) -> None:
        self.entry = agent
        self.agent: Agent[Any, Any] = agent.found(state.agent)
        self.state = state
        self.orders = orders
        self.limits = orders.limits or agent.limits
        self.parent = parent
        self.place = place
        self.depth = depth
        self.open: Open = Open() if parent is None else parent.open
        self.steps: list[AgentStep] = []
        self.reply: Reply[Any] | None = None  # the last, as processors let it through
        self.span: Traced | None = None
        self.over: BudgetExceeded | None = None  # of this run's own limits, while an agent that is a tool ran
        self._began = time.monotonic() - state.seconds

    def flow(self, prompt: Sequence[Message] | None) -> Flow[Run[T]]:
        """All of it; `prompt` is what is new. Raises Error with the state to go on from."""
        above = None if self.parent is None else self.parent.span
        self.span = agent_span(
            current().registry or self.agent.registry,
            self.entry.name,
            session=self.state.session,
            parent=None if above is None else above.context,
        )
        try:
            found = yield from self._run(prompt)
        except GeneratorExit:
            if self.span is not None:
                self.span.end()
            raise
        except BaseException as exc:
            if isinstance(exc, Error) and self.state.messages:  # of an agent below, that of the outermost holds
                exc.state = self.noted()
            if self.span is not None:
                self.span.end(exc)
            if self.parent is None:
                yield _Closing(self.open)
            raise
        if self.span is not None:
            self.span.end()
        return found

    def _run(self, prompt: Sequence[Message] | None) -> Flow[Run[T]]:
        from .agent_tools import handed_on, tools_run

        if prompt is not None:
            yield from self._prompted(prompt)
        while not self.state.is_done:
            if self.state.phase == "model":
                yield from self._answer()
            elif (yield from tools_run(self)):
                yield from handed_on(self)
            else:
                yield Tell(Paused(self.agent.name, self.state.pending))
                break
        reply = cast("Reply[T]", (yield from self.last()))
        result = reply.result if self.state.is_done else UNSET
        run: Run[T] = Run(state=self.state, reply=reply, steps=tuple(self.steps), result=result)
        yield Tell(RunEnded(run))
        return run

    def noted(self, **changed: Any) -> AgentState:
        """The state, changed, with its time."""
        self.state = replace(self.state, seconds=time.monotonic() - self._began, **changed)
        return self.state

    def stepped(self) -> Machine[None]:
        """The state is told, in a delegated agent as a part of that above it."""
        self.noted()
        if self.parent is not None:
            self.parent.state = replace(
                self.parent.state, children={**self.parent.state.children, self.place: self.state}
            )
            yield from self.parent.stepped()
            return
        if self.orders.on_step is not None:
            found = self.orders.on_step(self.state)
            if inspect.isawaitable(found):
                yield from take(Awaited(found))

    def _spend(self, spent: Spent) -> None:
        self.state = replace(self.state, spent=self.state.spent + spent)
        if self.parent is not None:
            self.parent._spend(spent)

    def _check_above(self) -> None:
        """What a delegated agent uses counts above it, too."""
        above = self.parent
        while above is not None:
            try:
                above.limits.check_spent(above.noted())
            except BudgetExceeded as exc:
                above.over = exc
                raise
            above = above.parent

    def is_over(self, error: CallFailed) -> bool:
        """Whether a limit of this run, or of one above it, ended an agent that is a tool: it is not that one's to tell,
        and goes on with it when there is more.
        """
        return self.over is error or (self.parent is not None and self.parent.is_over(error))

    def _prompted(self, prompt: Sequence[Message]) -> Flow[None]:
        told = yield from self.before(tuple(prompt))
        if not self.state.messages:
            head = yield from self.agent.instructed(self.orders.deps, self.state.session)
            self.state = replace(self.state, messages=head, head=len(head))
        self.noted(messages=(*self.state.messages, *told), phase="model")
        yield from self.stepped()

    def _answer(self) -> Flow[None]:
        agent, state = self.agent, self.noted()
        self.limits.check_turn(state)
        self._check_above()
        yield Tell(TurnBegan(agent.name, state.turns + 1))
        draft = yield from self._draft(state.messages)
        try:
            if self.orders.is_streamed:
                reply = yield from self._streamed(draft)
            else:
                reply = yield from exchange(draft)
        except CallFailed as exc:
            self._spend(total(attempt.spent for attempt in exc.attempts))
            self.noted()
            raise
        self._spend(reply.spent)
        reply = _named(reply)
        try:
            shown = yield from self._after(reply)
        except CallFailed:
            self.noted(turns=self.state.turns + 1)
            raise
        if self.orders.is_streamed and agent.holds:
            if shown.thoughts:
                yield Tell(ThoughtDelta(agent.name, shown.thoughts))
            if shown.text:
                yield Tell(TextDelta(agent.name, shown.text))
        self.reply = shown
        self.steps.append(AgentStep(agent.name, shown))
        self.state = self.state.with_answer(reply.messages, reply.model)
        yield from self.stepped()

    def _draft(self, messages: Sequence[Message]) -> Machine[Draft[Any]]:
        agent = self.agent
        draft = yield from agent.call.draft(messages)  # type: ignore[call-arg]  # mypy binds what a property gives
        params = merged(draft.params, {"session": self.state.session})
        model = self.state.model if self.state.model and draft.model == agent.model else draft.model
        return replace(
            draft,
            model=model,
            params=params,
            deps=self.orders.deps,
            budget=self.limits.left(self.noted()),
            trace=draft.trace if self.span is None else self.span.context,
        )

    def _streamed(self, draft: Draft[T]) -> Flow[Reply[T]]:
        agent = self.agent
        stream = Stream(lambda: _at_hand(draft), draft.name, draft.output)
        self.open.streams.append(stream)
        flow = stream.flow()
        step = flow.send(None)
        try:
            while True:
                if not isinstance(step, Emit):
                    try:
                        found = yield step
                    except Exception as exc:
                        step = flow.throw(exc)
                    else:
                        step = flow.send(found)
                    continue
                event = step.event
                if isinstance(event, Finished):
                    reply: Reply[T] = event.reply
                elif isinstance(event, Content) and not agent.holds:
                    yield Tell(TextDelta(agent.name, event.text))
                elif isinstance(event, Reasoning) and not agent.holds:
                    yield Tell(ThoughtDelta(agent.name, event.text))
                elif isinstance(event, Restarted):
                    yield Tell(event)
                step = flow.send(None)
        except StopIteration:
            self.open.streams.remove(stream)
            return reply

    def last(self) -> Machine[Reply[Any]]:
        """The last answer, as processors let it through; of a run that another process began, from the state alone."""
        if self.reply is not None:
            return self.reply
        *before, message = self.state.messages
        draft = yield from self._draft(before)
        draft = replace(draft, tools=(yield from arrived(draft.tools)))
        finish: Finish = "tool_calls" if message.tool_calls else "stop" if message.content.strip() else "length"
        answer = Answer(message=message, ended=Ended(finish))
        attempt = Attempt(number=1, model=draft.model, answer=answer)
        reply: Reply[Any] = Reply(draft=draft, answer=answer, attempts=(attempt,), result=value_of(draft, answer))
        self.reply = yield from self._after(reply)
        return self.reply

    def _chain(
        self, processors: Sequence[Processor], side: Side, notes: dict[str, Any], is_final: bool
    ) -> list[tuple[Processor, ProcessorContext]]:
        return [
            (
                one,
                ProcessorContext(
                    processor=one.name,
                    side=side,
                    agent=self.agent.name,
                    session=self.state.session,
                    deps=self.orders.deps,
                    is_final=is_final,
                    notes=notes.setdefault(one.name, {}),
                ),
            )
            for one in processors
        ]

    def before(self, messages: tuple[Message, ...]) -> Machine[tuple[Message, ...]]:
        """What is new, as processors let it pass."""
        if not self.agent.before:
            return messages
        notes = deepcopy(dict(self.state.notes))
        found = yield from passed_before(self._chain(self.agent.before, "before", notes, False), messages)
        self.state = replace(self.state, notes=notes)
        return found

    def _after(self, reply: Reply[Any]) -> Machine[Reply[Any]]:
        if not self.agent.after:
            return reply
        notes = deepcopy(dict(self.state.notes))
        message = reply.answer.message
        chain = self._chain(self.agent.after, "after", notes, not reply.tool_calls)
        shown = yield from passed_after(chain, message)
        self.state = replace(self.state, notes=notes)
        if shown is message:
            return reply
        answer = replace(reply.answer, message=shown)
        return replace(reply, answer=answer, result=value_of(reply.draft, answer))


def _at_hand(draft: Draft[T]) -> Machine[Draft[T]]:
    """What is there already, as a machine."""
    yield from ()
    return draft


def _named(reply: Reply[Any]) -> Reply[Any]:
    """With an id of its own for each call: a few servers give none, or the same to all."""
    ids = [call.id for call in reply.tool_calls]
    if all(ids) and len(set(ids)) == len(ids):
        return reply
    parts: list[Part] = []
    for part in reply.answer.message.parts:
        if isinstance(part, ToolCall):
            part = replace(part, id=f"call_{len(parts)}_{secrets.token_hex(4)}")
        parts.append(part)
    return replace(reply, answer=replace(reply.answer, message=replace(reply.answer.message, parts=tuple(parts))))
