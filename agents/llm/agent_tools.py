"""What becomes of the calls of an agent's answer: tools are run, agents are asked, people are waited for, and the
conversation may go to another agent.

A part of agent_loop.py. Each call that has its answer is in the state at once, so that it is not made again.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from diptych.protos.messages import Message, ToolCall

from .agent_events import AgentStep, Delegated, HandedOff, RunEnded, ToolBegan, ToolEnded
from .agent_limits import exceeded
from .agent_loop import Flow, Loop, Orders, Tell
from .agent_state import Pending
from .conversation import messages_of
from .errors import CallFailed, UsageError
from .hooks import ToolRan, told
from .machine import Awaited, Machine, Step, take
from .outcomes import Deferred, Failed, NeedsApproval, Ok, Outcome, Retry, ToolOutcome, cut, settled, words_of
from .reply import Reply
from .reports import report_of
from .together import Aside, Done, Running, each
from .tool_runs import needs_approval

if TYPE_CHECKING:
    from .delegation import Delegation
    from .tools import Tool

logger = logging.getLogger(__name__)
DEPTH: ContextVar[int] = ContextVar("diptych_llm_agent_depth", default=0)  # of agents that are tools of one another


class _TimeIsUp(Exception):
    """The run's seconds are over while tools run."""


@dataclass(slots=True)
class _Within:
    """A step with a deadline."""

    step: Step[Any]
    seconds: float

    async def perform(self) -> Any:
        try:
            async with asyncio.timeout(self.seconds) as limit:
                return await self.step.perform()
        except TimeoutError:
            if limit.expired():
                raise _TimeIsUp from None
            raise


def tools_run(loop: Loop[Any]) -> Flow[bool]:
    """Makes the calls of the last answer that have no answer yet. Whether all have one now; else the state tells what
    is waited for.
    """
    reply = yield from loop.last()
    approvals, results = loop.orders.approvals, loop.orders.results
    loop.orders = replace(loop.orders, approvals={}, results={})  # they are for these calls, not for later ones
    left = [call for call in reply.tool_calls if call.id not in loop.state.answered]
    waits = {one.call_id: one for one in loop.state.pending if one.kind == "result" and one.call_id not in results}
    kept = tuple(waits[call.id] for call in left if call.id in waits)
    loop.limits.check_tools(loop.noted(), len(left) - len(kept))
    loop.noted(phase="tools", pending=kept)
    transfers = [call.id for call in reply.tool_calls if call.name in loop.agent.transfers]
    to_run: list[ToolCall] = []
    machines: list[Flow[None]] = []
    for call in left:
        if call.id in waits:
            continue
        if call.id in results:
            yield from _ended(loop, settled(call, results[call.id]))
        elif call.id in transfers[1:]:
            yield Tell(ToolBegan(loop.agent.name, call))
            yield from _ended(loop, settled(call, Failed("another call of this answer hands the conversation on")))
        elif (delegation := _delegation(reply, call)) is not None:
            machines.append(_delegated(loop, reply, call, *delegation, approvals, results))
        else:
            to_run.append(call)
    if to_run:
        machines.insert(0, _tools(loop, reply, to_run, approvals))
    if machines:
        yield from _at_once(loop, machines)
    if not loop.state.pending:
        return True
    loop.noted(phase="paused")
    yield from loop.stepped()
    return False


def handed_on(loop: Loop[Any]) -> Flow[None]:
    """All calls have their answers: they become turns, and the conversation goes on, with whom it was handed to."""
    state, source = loop.state, loop.agent
    calls = state.calls
    turns = tuple(state.answered[call.id] for call in calls)
    messages = (*state.messages, *turns)
    done: dict[str, Any] = {"phase": "model", "answered": {}, "pending": (), "children": {}}
    for call, turn in zip(calls, turns, strict=True):
        handoff = source.transfers.get(call.name)
        if handoff is None or turn.result is None or turn.result.is_error:
            continue
        history: Any = messages[state.head :]
        if handoff.filter is not None:
            history = handoff.filter(history)
            if inspect.isawaitable(history):
                history = yield from take(Awaited(history))
            history = () if history == [] else messages_of(history, f"what the filter of {call.name} gave")
        target = handoff.agent
        head = yield from target.instructed(loop.orders.deps, state.session)
        if not head and not history:
            raise UsageError(f"{source.name}: the filter of {call.name} left nothing, and {target.name} has no words")
        loop.agent = target
        loop.noted(agent=target.name, model="", messages=(*head, *history), head=len(head), **done)
        yield from loop.stepped()
        yield Tell(HandedOff(source.name, target.name))
        return
    loop.noted(messages=messages, **done)
    yield from loop.stepped()


def _ended(loop: Loop[Any], outcome: ToolOutcome) -> Flow[None]:
    """A call has its answer, or waits for somebody."""
    call = outcome.call
    if outcome.is_settled:
        (turn,) = yield from _turn(loop, outcome)
        state = loop.state
        children = {name: child for name, child in state.children.items() if name != call.id}
        pending = tuple(one for one in state.pending if one.call_id != call.id)
        answered = {**state.answered, call.id: turn}
        loop.noted(answered=answered, children=children, pending=pending, tool_calls=state.tool_calls + 1)
    else:
        loop.noted(pending=(*loop.state.pending, _pending(loop, outcome)))
    if not loop.steps:
        loop.steps.append(AgentStep(loop.agent.name, (yield from loop.last())))
    step = loop.steps[-1]
    loop.steps[-1] = replace(step, outcomes=(*step.outcomes, outcome))
    yield from loop.stepped()
    yield Tell(ToolEnded(loop.agent.name, outcome))


def _turn(loop: Loop[Any], outcome: ToolOutcome) -> Machine[tuple[Message, ...]]:
    turns = yield from loop.before((outcome.turn(),))
    if len(turns) != 1 or turns[0].result is None or turns[0].result.call_id != outcome.call.id:
        raise UsageError(
            f"{loop.agent.name}: a processor's before(...) took the result of {outcome.call.name} away: each call must "
            f"keep its answer; change the words in it"
        )
    return turns


def _pending(loop: Loop[Any], outcome: ToolOutcome) -> Pending:
    call, found = outcome.call, outcome.outcome
    reason = found.reason if isinstance(found, NeedsApproval) else ""
    return Pending(
        call_id=call.id,
        tool=call.name,
        arguments=call.arguments,
        kind="approval" if isinstance(found, NeedsApproval) else "result",
        agent=loop.agent.name,
        reason=reason,
        token=found.token if isinstance(found, Deferred) else "",
    )


def _tools(loop: Loop[Any], reply: Reply[Any], calls: Sequence[ToolCall], approvals: Mapping[str, Any]) -> Flow[None]:
    """Functions: run_tools does it, and tells each as it ends."""
    ids = {call.id for call in calls}
    others = [ToolOutcome(call, Deferred()) for call in reply.tool_calls if call.id not in ids]
    ended: deque[ToolOutcome] = deque()
    machine = reply.run_tools.machine(
        approved={name: said for name, said in approvals.items() if name in ids}, done=others, on_outcome=ended.append
    )
    for call in calls:
        yield Tell(ToolBegan(loop.agent.name, call))
    try:
        step = next(machine)
        while True:
            while ended:
                yield from _ended(loop, ended.popleft())
            try:
                found = yield step
            except Exception as exc:
                step = machine.throw(exc)
            else:
                step = machine.send(found)
    except StopIteration:
        pass
    finally:
        machine.close()
    while ended:
        yield from _ended(loop, ended.popleft())


def _at_once(loop: Loop[Any], machines: Sequence[Flow[None]]) -> Flow[None]:
    """All of them, within the run's time. The first error ends the others."""
    context = copy_context()
    context.run(DEPTH.set, loop.depth + 1)
    running = Running()
    loop.open.running.append(running)
    flow = each(machines, running, context=context)
    try:
        item: Any = next(flow)
        while True:
            if isinstance(item, Done):
                item = flow.send(None) if item.error is None else flow.throw(item.error)
            elif isinstance(item, Aside):
                yield item
                item = flow.send(None)
            else:
                item = yield from _stepped(loop, flow, item)
    except StopIteration:
        loop.open.running.remove(running)
    finally:
        flow.close()


def _stepped(loop: Loop[Any], flow: Any, step: Step[Any]) -> Machine[Any]:
    seconds = loop.limits.seconds_left(loop.noted())
    try:
        found = yield step if seconds is None else _Within(step, seconds)
    except _TimeIsUp:
        most = loop.limits.seconds
        assert most is not None
        return flow.throw(exceeded("seconds", most, "tools were running", loop.noted()))
    except Exception as exc:
        return flow.throw(exc)
    return flow.send(found)


def _delegation(reply: Reply[Any], call: ToolCall) -> tuple[Delegation, Tool] | None:
    from .delegation import Delegation

    for tool in reply.draft.tools:
        if tool.name == call.name and isinstance(tool.body, Delegation):
            return tool.body, tool
    return None


def _delegated(
    loop: Loop[Any],
    reply: Reply[Any],
    call: ToolCall,
    delegation: Delegation,
    tool: Tool,
    approvals: Mapping[str, Any],
    results: Mapping[str, Any],
) -> Flow[None]:
    """The other agent's run goes on inside this one: its steps are told with this one's, and its state is a part."""
    began = time.monotonic()
    yield Tell(ToolBegan(loop.agent.name, call))
    child = yield from _child(loop, call, delegation, tool, approvals, results)
    if isinstance(child, Loop):
        prompt: Sequence[Message] | None = None
        if not child.state.messages:
            try:
                prompt = delegation.prompted(_values(delegation, call, approvals))
            except Exception as exc:
                child = _broken(call, "prompt", exc)
    if isinstance(child, Loop):
        found = yield from _answer(loop, call, child, prompt)
        if found is None:
            return
    else:
        found = child
    if isinstance(found, NeedsApproval):
        outcome = ToolOutcome(call, found, time.monotonic() - began)
    else:
        outcome = settled(call, found, seconds=time.monotonic() - began)
    told(reply.draft, ToolRan(draft=reply.draft, call=call, outcome=outcome.outcome, seconds=outcome.seconds))
    yield from _ended(loop, outcome)


def _answer(
    loop: Loop[Any], call: ToolCall, child: Loop[Any], prompt: Sequence[Message] | None
) -> Flow[Outcome | None]:
    """None where it waits for somebody."""
    from .delegation import no_answer

    flow = child.flow(prompt)
    try:
        item = next(flow)
        while True:
            if isinstance(item, Tell):
                if not isinstance(item.event, RunEnded):
                    yield Tell(Delegated(loop.agent.name, call.id, item.event))
                item = flow.send(None)
                continue
            try:
                result = yield item
            except Exception as exc:
                item = flow.throw(exc)
            else:
                item = flow.send(result)
    except StopIteration as end:
        run = end.value
    except CallFailed as exc:
        if loop.is_over(exc):
            raise
        return no_answer(child.entry.name, exc)
    finally:
        flow.close()
    if run.is_done:
        return Ok(run.value)
    waits = tuple(replace(one, call_id=f"{call.id}/{one.call_id}") for one in run.pending)
    others = tuple(one for one in loop.state.pending if not one.call_id.startswith(f"{call.id}/"))
    loop.noted(pending=(*others, *waits))
    yield from loop.stepped()
    return None


def _child(
    loop: Loop[Any],
    call: ToolCall,
    delegation: Delegation,
    tool: Tool,
    approvals: Mapping[str, Any],
    results: Mapping[str, Any],
) -> Machine[Loop[Any] | Outcome]:
    """The other agent's run, or the outcome of a call that has none."""
    said = approvals.get(call.id)
    if said is False:
        return Failed("this call was not approved, and did not run")
    if loop.depth + 1 > delegation.depth:
        return Failed(f"agents call one another more than {delegation.depth} deep here: answer without {call.name}")
    begun = loop.state.children.get(call.id)
    if begun is None:
        try:
            values = _values(delegation, call, approvals)
        except Exception as exc:  # whatever the developer's own validators raise
            return Retry(f"The arguments are not what this tool takes:\n{report_of(exc, call.text, call.text)}")
        if said is None:
            needs, reason = yield from needs_approval(tool, values)
            if needs:
                return NeedsApproval(reason, delegation.with_defaults(values))
        begun = delegation.agent.fresh(loop.state.session)
    limits = delegation.limits or delegation.agent.limits
    if tool.timeout is not None:
        limits = replace(limits, seconds=min(tool.timeout, limits.seconds or tool.timeout))
    try:
        deps = delegation.deps_of(loop.orders.deps)
    except Exception as exc:
        return _broken(call, "deps", exc)
    orders = Orders(
        deps=deps,
        approvals=_below(approvals, call.id),
        results=_below(results, call.id),
        limits=limits,
        is_streamed=loop.orders.is_streamed,
    )
    return Loop(delegation.agent, begun, orders, parent=loop, place=call.id, depth=loop.depth + 1)


def _values(delegation: Delegation, call: ToolCall, approvals: Mapping[str, Any]) -> dict[str, Any]:
    said = approvals.get(call.id)
    document = call.text if call.text.strip() else "{}"
    if isinstance(said, Mapping):
        from pydantic_core import to_json

        document = to_json(said["args"]).decode()
    return delegation.read(document)


def _broken(call: ToolCall, what: str, error: Exception) -> Failed:
    """A developer's own function broke: the model above is told, as of every tool that raises."""
    logger.warning("the %s function of the agent's tool %s raised", what, call.name, exc_info=error)
    return Failed(f"the {what} of {call.name} cannot be made: {type(error).__name__}: {cut(words_of(error), 500)}")


def _below(said: Mapping[str, Any], call_id: str) -> dict[str, Any]:
    """Those for calls inside the call."""
    prefix = f"{call_id}/"
    return {name.removeprefix(prefix): value for name, value in said.items() if name.startswith(prefix)}
