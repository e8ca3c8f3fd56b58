"""`llm.Agent`: a model with instructions, tools and limits, whose run goes on until there is an answer.

An Agent is data, and may be used by many runs at once; all of a run is in its AgentState. The loop itself is in
agent_loop.py, and three lines of a developer's own do the same:

    while reply.tool_calls:
        reply = reply.resume(reply.run_tools())
"""

from __future__ import annotations

import inspect
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Generic, TypeVar, Unpack, cast, overload

from typing_extensions import TypeForm
from typing_extensions import TypeVar as TypeVarWithDefault

from diptych.protos.messages import Message, said

from .agent_events import Run
from .agent_limits import Limits
from .agent_loop import Flow, Guarded, Loop, OnStep, Open, Orders
from .agent_state import AgentState
from .agent_streams import AgentStream
from .call import Call, call
from .conversation import Prompt, Rendered, messages_of
from .delegation import Delegation
from .errors import DefinitionError, UsageError
from .handoff import Handoff, as_handoff
from .machine import Awaited, Machine, take, verb
from .output import Output
from .params import Params, checked, merged
from .processors.processor import Processor
from .registry import Registry, current, default_registry
from .retries import Retries
from .templates import Template
from .together import Aside
from .tool_context import Context
from .tools import Approves, Kit, Tool, as_tools

T = TypeVar("T")
D = TypeVarWithDefault("D", default=Any)
E = TypeVar("E")
Instructions = str | Rendered | Template | Callable[[Context[D]], Any]
Handoffs = Sequence["Agent[Any, Any] | Handoff"] | Callable[[], Sequence["Agent[Any, Any] | Handoff"]]
Tools = Sequence[Tool | Kit | Callable[..., Any]] | Kit
_NAME = re.compile(r"[^\s/][^\n/]{0,63}")


class AgentSettings(Params, total=False):
    """What an Agent takes beside its model, name, instructions and the types of its result and deps: see there."""

    tools: Tools
    limits: Limits | None
    before: Sequence[Processor]
    after: Sequence[Processor]
    handoffs: Handoffs
    description: str
    retries: Retries | None
    registry: Registry | None
    validation: Any
    strict: bool


class Agent(Generic[T, D]):
    """T is what it answers with, D what its tools get as their Context's deps.

    model          PREFIX/MODEL; `using(model=...)` around a run holds over it
    name           in states, events, traces, and the tools that lead to it
    instructions   a text, a filled Template, or a function of a Context (sync or async) that gives either; asked for
                   once in a run, so that the beginning of its requests stays the same
    tools          functions that the model may call, and toolkits
    output         the type of the final answer, whatever pydantic takes; None: the text
    deps           the type of what `run(deps=...)` is given; None: it may be left out
    limits         how far one run may go
    before, after  processors of what the model is told, and of what it says
    handoffs       agents that the conversation may be handed to, with the same `output`; a function that gives them
                   where two hand to one another
    description    one sentence for models that may hand on or delegate to it
    session        requests of all its runs go to one place; empty: each run has its own
    """

    @overload
    def __init__(
        self: Agent[str, Any],
        model: str,
        *,
        name: str,
        output: None = None,
        deps: None = None,
        instructions: Instructions[Any] = "",
        **settings: Unpack[AgentSettings],
    ) -> None: ...
    @overload
    def __init__(
        self: Agent[str, E],
        model: str,
        *,
        name: str,
        output: None = None,
        deps: type[E],
        instructions: Instructions[E] = "",
        **settings: Unpack[AgentSettings],
    ) -> None: ...
    @overload
    def __init__(
        self: Agent[T, Any],
        model: str,
        *,
        name: str,
        output: TypeForm[T],
        deps: None = None,
        instructions: Instructions[Any] = "",
        **settings: Unpack[AgentSettings],
    ) -> None: ...
    @overload
    def __init__(
        self: Agent[T, E],
        model: str,
        *,
        name: str,
        output: TypeForm[T],
        deps: type[E],
        instructions: Instructions[E] = "",
        **settings: Unpack[AgentSettings],
    ) -> None: ...
    def __init__(
        self,
        model: str,
        *,
        name: str,
        output: Any = None,
        instructions: Any = "",
        tools: Tools = (),
        deps: Any = None,
        limits: Limits | None = None,
        before: Sequence[Processor] = (),
        after: Sequence[Processor] = (),
        handoffs: Handoffs = (),
        description: str = "",
        retries: Retries | None = None,
        registry: Registry | None = None,
        validation: Any = None,
        strict: bool = True,
        **params: Unpack[Params],
    ) -> None:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise DefinitionError(f"Agent(name=...) is 1 to 64 characters of one line, without /; not {name!r}")
        self.name = name
        self.model = model
        self.description = description
        self.instructions = _instructions(instructions, name)
        self.output_type = None if output is str else output
        self.deps_type = deps
        self.limits = _limits(limits, f"Agent {name}: limits") or Limits()
        self.before = _processors(before, f"{name}: before")
        self.after = _processors(after, f"{name}: after")
        self.registry = registry or default_registry()
        self._own_tools = as_tools(tools)
        self._handoffs = handoffs
        self._definition: dict[str, Any] = {
            "retries": retries,
            "registry": self.registry,
            "validation": validation,
            "strict": strict,
            **checked(params, f"Agent {name}"),
        }
        if not isinstance(description, str):
            raise DefinitionError(f"Agent {name}: description is a text, not {description!r}")
        if not callable(handoffs) and not isinstance(handoffs, list | tuple):
            raise DefinitionError(f"Agent {name}: handoffs is a list of agents, not {handoffs!r}: write handoffs=[...]")
        if not callable(handoffs):
            self.call  # noqa: B018  what is wrong with it is told here, not at the first run

    @property
    def holds(self) -> bool:
        """Whether a stream of it shows answers only when they are whole."""
        return any(one.needs_whole for one in self.after)

    @cached_property
    def transfers(self) -> Mapping[str, Handoff]:
        """Hand-offs by the names of their tools. Raises DefinitionError."""
        given = self._handoffs() if callable(self._handoffs) else self._handoffs
        found: dict[str, Handoff] = {}
        for one in given:
            handoff = as_handoff(one, f"Agent {self.name}")
            other = handoff.agent
            if other.output_type != self.output_type:
                raise DefinitionError(
                    f"Agent {self.name} hands on to {other.name}, which answers with {_told(other.output_type)}, while "
                    f"{self.name} promises {_told(self.output_type)}: give both the same output, or use "
                    f"{other.name}.as_tool()"
                )
            if handoff.tool_name in found:
                raise DefinitionError(
                    f"Agent {self.name}: two hand-offs are named {handoff.tool_name}: say "
                    f"llm.Handoff(agent=..., name=...)"
                )
            found[handoff.tool_name] = handoff
        return found

    @cached_property
    def call(self) -> Call[..., Any, T]:
        """One answer of it, as a call of the whole conversation."""

        def conversation(messages: Sequence[Message]) -> Sequence[Message]:
            return messages

        conversation.__name__ = conversation.__qualname__ = self.name
        tools = [*self._own_tools, *(one.tool() for one in self.transfers.values())]
        made = call(self.model, output=self.output_type, tools=tools, **self._definition)(conversation)
        return cast("Call[..., Any, T]", made)

    def found(self, name: str) -> Agent[Any, Any]:
        """This agent or one that it may hand on to, near or far. Raises UsageError, DefinitionError."""
        seen: dict[str, Agent[Any, Any]] = {}
        left: list[Agent[Any, Any]] = [self]
        while left:
            one = left.pop()
            if (other := seen.setdefault(one.name, one)) is not one:
                raise DefinitionError(
                    f"Agent {self.name}: it leads to two agents that are named {one.name!r} ({other.model} and "
                    f"{one.model}), and a state tells agents by their names: give one of them another name"
                )
            left += [new for new in (it.agent for it in one.transfers.values()) if seen.get(new.name) is not new]
        if name in seen:
            return seen[name]
        raise UsageError(
            f"the state is of the agent {name!r}; {self.name} leads to: {', '.join(sorted(seen))}", "state"
        )

    def instructed(self, deps: D, session: str) -> Machine[tuple[Message, ...]]:
        """Its instructions as the beginning of a conversation. Raises UsageError."""
        given = self.instructions
        if callable(given) and not isinstance(given, Rendered):
            given = given(Context(deps=deps, session=session))
            if inspect.isawaitable(given):
                given = yield from take(Awaited(given))
        if isinstance(given, str):
            return (said("system", given),) if given.strip() else ()
        messages = messages_of(given, f"what the instructions of {self.name} gave")
        if len(messages) == 1 and messages[0].role == "user":  # a template without headings
            return (replace(messages[0], role="system"),)
        return messages

    def fresh(self, session: str = "") -> AgentState:
        """Of a run that has not begun."""
        override = current()
        layers = ((override.registry or self.registry).params, self._definition, override.params)
        params = merged(*({"session": one["session"]} for one in layers if one.get("session")))
        return AgentState(agent=self.name, session=session or params.get("session") or secrets.token_hex(8))

    @verb
    def run(
        self,
        /,
        prompt: Prompt | None = None,
        *,
        deps: D | None = None,
        state: AgentState | None = None,
        approvals: Mapping[str, Any] | None = None,
        results: Mapping[str, Any] | None = None,
        limits: Limits | None = None,
        on_step: OnStep | None = None,
    ) -> Machine[Run[T]]:
        """Until there is an answer, or somebody must be asked.

        prompt     what a prompt may be; with the `state` of a run that is done: what is said next
        deps       what tools, instructions and processors get
        state      goes on from there: after a crash, a pause, or a limit (error.state)
        approvals  by call id, of a paused run: True, False, {"args": {...}} to run it with others
        results    by call id, of a paused run: the values of calls that wait for them
        limits     in place of the agent's own
        on_step    told the state after each answer and each tool; keep its to_json(), to go on after a crash. It may
                   be a coroutine function

        Raises UsageError before it begins; later any Error (CallFailed, BudgetExceeded, Blocked, Unsupported, ...)
        with the `.state` to go on from.
        """
        return (
            yield from _silent(
                *self._begin(prompt, state, Orders(deps, approvals or {}, results or {}, limits, on_step))
            )
        )

    def stream(
        self,
        prompt: Prompt | None = None,
        *,
        deps: D | None = None,
        state: AgentState | None = None,
        approvals: Mapping[str, Any] | None = None,
        results: Mapping[str, Any] | None = None,
        limits: Limits | None = None,
        on_step: OnStep | None = None,
    ) -> AgentStream[T]:
        """The same as events, for `for` or `async for`; the last one has the Run."""
        orders = Orders(deps, approvals or {}, results or {}, limits, on_step, is_streamed=True)
        return AgentStream(self.name, lambda: self._begin(prompt, state, orders))

    def run_of(
        self, prompt: Sequence[Message], state: AgentState, *, deps: Any, limits: Limits | None, depth: int
    ) -> Machine[Run[T]]:
        """A run as a tool of a plain call."""
        loop: Loop[T] = Loop(self, state, Orders(deps=deps, limits=limits), depth=depth)
        return (yield from _silent(loop.flow(prompt), loop.open))

    def _begin(self, prompt: Prompt | None, state: AgentState | None, orders: Orders) -> tuple[Flow[Run[T]], Open]:
        """Raises UsageError."""
        _check_orders(self.name, state, orders)
        if self.deps_type is not None and orders.deps is None:
            raise UsageError(f"{self.name}: its tools need {_told(self.deps_type)}: run(..., deps=...)", "deps")
        messages = None if prompt is None else messages_of(prompt, f"the prompt of {self.name}")
        if state is None:
            if messages is None:
                raise UsageError(f"{self.name}: there is nothing to do: run(prompt), or run(state=...)", "prompt")
            state = self.fresh()
        elif messages is not None:
            if not state.is_done:
                waits = ", ".join(one.call_id for one in state.pending)
                how = f"approvals or results for {waits}" if waits else "no prompt"
                raise UsageError(f"{self.name}: this run is not done yet: run(state=...) with {how}", "prompt")
            state = replace(state, turns=0, tool_calls=0, seconds=0.0, spent=type(state.spent)())
        _check_answers(self.name, state, orders)
        loop: Loop[T] = Loop(self, state, orders)
        return loop.flow(messages), loop.open

    def as_tool(
        self,
        *,
        name: str | None = None,
        description: str | None = None,
        input: Any = None,
        prompt: Callable[[Any], Any] | None = None,
        limits: Limits | None = None,
        deps: Callable[[Any], Any] | None = None,
        needs_approval: Approves = False,
        timeout: float | None = None,
        depth: int = 4,
    ) -> Tool:
        """Itself as a tool of another agent: asked, it runs, and its value is the result.

        input   the type of what it is asked; None: one text. Fields of an object are the tool's parameters
        prompt  a function of the input that gives its prompt; None: the text, or the input's JSON
        limits  of each run, in place of its own; what it uses counts above, too
        deps    a function of the deps above that gives its own; None: the same
        depth   how deep agents may call one another

        Raises DefinitionError.
        """
        told = name or re.sub(r"[^A-Za-z0-9_-]+", "_", self.name)
        if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
            raise DefinitionError(f"{self.name}.as_tool(depth=...) is a whole number from 1 up, not {depth!r}")
        _limits(limits, f"{self.name}.as_tool: limits")
        body = Delegation(
            agent=self,
            input=None if input is None or input is str else Output(input, name=told, is_strict=False),
            prompt=prompt,
            limits=limits,
            deps=deps,
            depth=depth,
        )
        if description is None:
            description = self.description or f"Asks the agent {self.name}, who answers when it is done."
        return Tool(
            name=told,
            description=description,
            parameters=body.parameters,
            needs_approval=needs_approval,
            timeout=timeout,
            body=body,
        )

    def __repr__(self) -> str:
        return f"Agent({self.model!r}, name={self.name!r})"


def _silent(flow: Flow[Run[T]], open_: Open) -> Machine[Run[T]]:
    """A run without its events."""
    try:
        item = next(flow)
        while True:
            if isinstance(item, Aside):
                item = flow.send(None)
                continue
            try:
                found = yield Guarded(item, open_)
            except Exception as exc:
                item = flow.throw(exc)
            else:
                item = flow.send(found)
    except StopIteration as end:
        run: Run[T] = end.value
        return run
    finally:
        flow.close()


def _limits(given: Limits | None, where: str) -> Limits | None:
    if given is not None and not isinstance(given, Limits):
        raise DefinitionError(f"{where} is llm.Limits(turns=..., ...), not {given!r}")
    return given


def _check_orders(name: str, state: object, orders: Orders) -> None:
    """Raises UsageError for what is of another kind than it may be."""
    if state is not None and not isinstance(state, AgentState):
        how = "llm.AgentState.from_json(text)" if isinstance(state, str | bytes) else "run.state, or error.state"
        raise UsageError(f"{name}: state is an AgentState, not a {type(state).__name__}: give {how}", "state")
    if orders.limits is not None and not isinstance(orders.limits, Limits):
        raise UsageError(f"{name}: limits is llm.Limits(turns=..., ...), not {orders.limits!r}", "limits")
    if orders.on_step is not None and not callable(orders.on_step):
        raise UsageError(f"{name}: on_step is a function of the state, not {orders.on_step!r}", "on_step")
    for field, given in (("approvals", orders.approvals), ("results", orders.results)):
        if not isinstance(given, Mapping):
            raise UsageError(f"{name}: {field} is a dict by the calls' ids, not {given!r}", field)


def _check_answers(name: str, state: AgentState, orders: Orders) -> None:
    """Raises UsageError for an approval or a result that nothing waits for."""
    known = {one.call_id: one for one in state.pending}
    outer = {call_id.partition("/")[0] for call_id in known}
    for field, given in (("approvals", orders.approvals), ("results", orders.results)):
        for call_id in given:
            if call_id not in known and not (field == "results" and call_id in outer):
                waits = ", ".join(f"{one.call_id} ({one.tool}: {one.kind})" for one in state.pending) or "nothing"
                raise UsageError(f"{name}: {field} names {call_id!r}; what waits is: {waits}", field)
            if field == "approvals" and known[call_id].kind == "result":
                raise UsageError(f"{name}: {call_id} waits for its result: results={{{call_id!r}: value}}", field)
    for call_id, told in orders.approvals.items():
        is_args = isinstance(told, Mapping) and told.keys() == {"args"} and isinstance(told["args"], Mapping)
        if not isinstance(told, bool) and not is_args:
            raise UsageError(
                f"{name}: approvals[{call_id!r}] is True, False or {{'args': {{...}}}}, not {told!r}", "approvals"
            )


def _instructions(given: Any, name: str) -> Any:
    if isinstance(given, Template):
        if given.slots:
            raise DefinitionError(
                f"Agent {name}: the instructions have slots ({', '.join(given.slots)}): fill them, template(...), or "
                f"give a function: lambda ctx: template(...)"
            )
        return given()
    if not isinstance(given, str | Rendered) and not callable(given):
        raise DefinitionError(
            f"Agent {name}: instructions is a text, a filled llm.Template or a function of a Context, "
            f"not {type(given).__name__}"
        )
    if callable(given) and not isinstance(given, Rendered):
        _check_takes_context(given, name)
    return given


def _check_takes_context(function: Callable[..., Any], name: str) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(None)
    except TypeError as exc:
        told = getattr(function, "__name__", type(function).__name__)
        raise DefinitionError(
            f"Agent {name}: the instructions' function {told}{signature} is called with one argument, the Context "
            f"({exc}): write def {told}(ctx: llm.Context)"
        ) from exc


def _processors(given: Sequence[Processor], where: str) -> tuple[Processor, ...]:
    names: set[str] = set()
    if not isinstance(given, list | tuple):
        raise DefinitionError(f"{where} is a list of processors, not {given!r}: write [...] around it")
    for one in given:
        if not isinstance(one, Processor):
            raise DefinitionError(f"{where} holds objects of classes below llm.Processor, not {one!r}")
        if one.name in names:
            raise DefinitionError(f"{where}: two processors are named {one.name}: override `name` in one of them")
        names.add(one.name)
    return tuple(given)


def _told(kind: Any) -> str:
    return "a text" if kind is None else getattr(kind, "__name__", str(kind))
