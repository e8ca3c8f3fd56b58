"""Tools that come together, and others made of them by wrapping: `Toolkit(...).filtered(...).prefixed("x_")`.

tools.py takes them wherever it takes functions. A kit changes no tool: each step gives another kit of other tools.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from .errors import DefinitionError, UsageError
from .tools import Approves, FunctionTool, Kit, Tool, as_tools, checked_name, distinct

Changes = Callable[[Tool], "Tool | None"]  # None leaves it out
Late = Callable[[], "Sequence[Tool | Callable[..., Any]] | Awaitable[Sequence[Tool | Callable[..., Any]]]"]


class Toolkit:
    """Of tools, functions and other kits; of an instance, its methods marked with @llm.tool; of a function without
    arguments (`Toolkit.late`), whatever it gives when a call begins. Raises DefinitionError.
    """

    def __init__(self, tools: Sequence[Tool | Kit | Callable[..., Any]] | Kit | object = ()) -> None:
        if isinstance(tools, Sequence | Kit) and not isinstance(tools, str):
            self._tools = as_tools(tools)
        else:
            self._tools = _of_instance(tools)
        self._late: tuple[tuple[Late, tuple[Changes, ...]], ...] = ()
        for one in [tool for tool in self._tools if hasattr(tool, "kit")]:
            raise DefinitionError(f"Toolkit([...]): the kit of {one!r} tells its tools late: join them, kit + kit")

    @classmethod
    def late(cls, give: Late) -> Toolkit:
        """Tools that are asked for anew when a call begins: `give` is called, and awaited where it is async, on the
        loop that makes the call. A conversation that goes on keeps those that it began with.
        """
        _check_function(give, "late")
        made = cls(())
        made._late = ((give, ()),)
        return made

    @property
    def is_late(self) -> bool:
        """Whether there are tools that nobody knows yet."""
        return bool(self._late)

    def now(self) -> Sequence[Tool]:
        """The tools. Raises UsageError where some are not known yet."""
        if self._late:
            raise UsageError("these tools are told when a call begins: await kit.tools()")
        return self._tools

    async def tools(self) -> Sequence[Tool]:
        """The tools, late ones included. Raises DefinitionError."""
        found = list(self._tools)
        for give, changes in self._late:
            given = give()
            if inspect.isawaitable(given):
                given = await given
            made: Sequence[Tool] = as_tools(given)
            for change in changes:
                made = _changed(made, change)
            found += made
        return distinct(found)

    def __iter__(self) -> Iterator[Tool]:
        return iter(self.now())

    def __len__(self) -> int:
        return len(self.now())

    def __repr__(self) -> str:
        return f"Toolkit({', '.join(one.name for one in self._tools)}{', ...' if self._late else ''})"

    def __add__(self, other: Sequence[Tool | Kit | Callable[..., Any]] | Toolkit) -> Toolkit:
        more = other if isinstance(other, Toolkit) else Toolkit(other)
        made = Toolkit(())
        made._tools = distinct([*self._tools, *more._tools])
        made._late = (*self._late, *more._late)
        return made

    def changed(self, change: Changes) -> Toolkit:
        """Another kit, of what `change` makes of each tool; None leaves it out. The other verbs are made of this."""
        _check_function(change, "changed")
        made = Toolkit(())
        made._tools = distinct(_changed(self._tools, change))
        made._late = tuple((give, (*changes, change)) for give, changes in self._late)
        return made

    def filtered(self, keeps: Callable[[Tool], bool]) -> Toolkit:
        """Those for which `keeps` is true."""
        _check_function(keeps, "filtered")
        return self.changed(lambda one: one if keeps(one) else None)

    def prefixed(self, prefix: str) -> Toolkit:
        """Their names begin with `prefix`. Raises DefinitionError where a name becomes too long."""
        if not isinstance(prefix, str):
            raise DefinitionError(f"Toolkit: prefixed(...) takes a text, not {prefix!r}")
        return self.changed(lambda one: _named(one, prefix + one.name))

    def renamed(self, names: Mapping[str, str]) -> Toolkit:
        """Old names to new ones. Raises DefinitionError where there is no such tool."""
        known = {one.name for one in self._tools}
        if not self._late and (unknown := [name for name in names if name not in known]):
            raise DefinitionError(f"renamed: there is no tool {unknown[0]!r} in this kit: {', '.join(sorted(known))}")
        return self.changed(lambda one: _named(one, names[one.name]) if one.name in names else one)

    def approving(self, needs: Callable[[Tool], Approves]) -> Toolkit:
        """A person must approve calls of those for which `needs` is true, or the function of the arguments that it
        gives says so. What needed approval before still does.
        """

        _check_function(needs, "approving")

        def change(one: Tool) -> Tool:
            asked = needs(one)
            return one if not asked or one.needs_approval is True else replace(one, needs_approval=_either(one, asked))

        return self.changed(change)

    def with_timeout(self, seconds: float) -> Toolkit:
        """Each run may take so long; a shorter time of a tool's own holds."""

        def change(one: Tool) -> Tool:
            return replace(one, timeout=seconds if one.timeout is None else min(seconds, one.timeout))

        return self.changed(change)


def _check_function(given: object, verb: str) -> None:
    if not callable(given):
        raise DefinitionError(f"Toolkit: {verb}(...) takes a function, not {given!r}")


def _changed(tools: Sequence[Tool], change: Changes) -> list[Tool]:
    found = []
    for old in tools:
        new = change(old)
        if new is not None and not isinstance(new, Tool):
            raise DefinitionError(f"Toolkit: changed(...) made {new!r} of {old.name}: give a tool, or None for no tool")
        found += [] if new is None else [new]
    return found


def _either(one: Tool, asked: Approves) -> Approves:
    own = one.needs_approval
    if isinstance(asked, bool) or isinstance(own, bool):
        return asked

    def both(args: dict[str, Any]) -> bool | Awaitable[bool]:
        found = own(args)  # in the caller's thread, where it may make calls that wait
        if inspect.isawaitable(found):
            return later(found, args)
        return bool(found) or asked(args)

    async def later(first: Awaitable[bool], args: dict[str, Any]) -> bool:
        if await first:
            return True
        found = asked(args)
        return bool(await found if inspect.isawaitable(found) else found)

    return both


def _named(one: Tool, name: str) -> Tool:
    return replace(one, name=checked_name(name, f"tool {one.name}"))


def _of_instance(thing: object) -> tuple[Tool, ...]:
    """Its methods marked with @llm.tool, those of its classes first. A docstring may hold `{self.name}`: it is filled
    for each instance, so that two of one class tell the model different things.
    """
    if isinstance(thing, type):
        raise DefinitionError(f"Toolkit({thing.__name__}): this is the class; its tools need an instance of it")
    names = dict.fromkeys(name for kind in reversed(type(thing).__mro__) for name in vars(kind))
    found = [one for name in names if isinstance(one := inspect.getattr_static(thing, name), FunctionTool)]
    if not found:
        raise DefinitionError(
            f"Toolkit({type(thing).__name__} instance): none of its methods is marked with @llm.tool; a list of "
            f"functions is written Toolkit([f, g])"
        )
    bound = [one.bound(thing) if one.is_method else one for one in found]
    return distinct([replace(one, description=_filled(one, thing)) for one in bound])


def _filled(one: Tool, thing: object) -> str:
    if "{self." not in one.description:
        return one.description
    parts = one.description.split("{self.")
    told = [parts[0]]
    for part in parts[1:]:
        name, brace, rest = part.partition("}")
        try:
            value = thing
            for step in name.split("."):
                value = getattr(value, step)
        except AttributeError as exc:
            raise DefinitionError(
                f"tool {one.name}: its docstring holds {{self.{name}{brace}, and {exc}: an attribute of the instance "
                f"must have this name when the Toolkit is made"
            ) from exc
        told += [str(value), rest]
    return "".join(told)
