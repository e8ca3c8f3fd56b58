"""The items of `diptych batch submit`: lines of JSON as arguments of a call, each with its id.

batch_command.py reads them. Every mistake is told with its line, before anything is sent.
"""

from __future__ import annotations

import sys
from codecs import BOM_UTF8
from collections.abc import Mapping, Sequence
from inspect import BoundArguments
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from .call import Call
from .command_arguments import WrongArguments, bound, members, parameters_of, rest_of
from .tool_context import Injection


def items_of(
    call: Call[..., Any, Any], source: str, id_member: str | None
) -> Sequence[BoundArguments] | Mapping[str, BoundArguments]:
    """What llm.batch takes, of the file `source`, or of stdin where that is `-`: of each line that is not blank, an
    object of the call's arguments by name, or the one argument itself. `id_member` names the member that is the item's
    id; the call is given it only where it has such a parameter. Raises WrongArguments.
    """
    where = "stdin" if source == "-" else source
    reader = _Reader(call, id_member)
    read: list[BoundArguments] = []
    lines: dict[str, int] = {}  # of ids
    for number, line in enumerate(_content(source).removeprefix(BOM_UTF8).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            name, item = reader.item(line)
        except WrongArguments as exc:
            raise WrongArguments(f"{where}: line {number}: {exc}", exc.field) from exc
        if name in lines:
            raise WrongArguments(f"{where}: line {number}: the id {name!r:.80} is that of line {lines[name]}")
        lines[name or f"line {number}"] = number
        read.append(item)
    if not read:
        raise WrongArguments(f"{where} has no items: write a line of JSON for each")
    return read if id_member is None else dict(zip(lines, read, strict=True))


def _content(source: str) -> bytes:
    if source == "-":
        if sys.stdin is None:
            raise WrongArguments("stdin is closed: give a file with a line of JSON for each item")
        return sys.stdin.buffer.read()
    path = Path(source)
    try:
        return path.read_bytes()
    except OSError as exc:
        why = {FileNotFoundError: "is not there", IsADirectoryError: "is a folder"}.get(type(exc))
        raise WrongArguments(
            f"the file {source!r} {why or f'cannot be read ({exc.strerror})'}: give one with a line of JSON for each "
            f"item, or - for stdin"
        ) from exc


class _Reader:
    """Of lines for one call."""

    def __init__(self, call: Call[..., Any, Any], id_member: str | None) -> None:
        injection = Injection.of(call.function, call.__name__)
        self._without = None if injection is None else injection.name
        self._takes = parameters_of(call.function, self._without, are_options=False)
        self._others = rest_of(call.function)
        self._call = call
        self._id_member = id_member

    def item(self, line: bytes) -> tuple[str, BoundArguments]:
        """With its id, which is empty where ids are not asked for. Raises WrongArguments."""
        try:
            value = from_json(line, allow_inf_nan=False)
        except ValueError as exc:
            raise WrongArguments(f"this is no JSON: {str(exc).replace(' at line 1 column ', ' at column ')}") from exc
        name = "" if self._id_member is None else self._id(value, self._id_member)
        given = value if isinstance(value, dict) else {self._only(value): value}
        values = members(self._call.__name__, self._takes, given, others=self._others)
        return name, bound(self._call.function, values, self._without)

    def _id(self, value: Any, member: str) -> str:
        if not isinstance(value, dict) or member not in value:
            raise WrongArguments(f"there is no {member!r}, which --id names")
        name = value[member] if member in self._takes else value.pop(member)
        if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
            raise WrongArguments(f"{member!r} is {name!r:.80}, and ids are texts or whole numbers")
        return str(name)

    def _only(self, value: Any) -> str:
        """The parameter that a value alone is for."""
        needed = [one.name for one in self._takes.values() if one.is_required] or list(self._takes)
        if len(needed) != 1:
            takes = ", ".join(self._takes) or "none"
            raise WrongArguments(
                f"{value!r:.80} is one value, and {self._call.__name__} takes {takes}: write an object of them by name"
            )
        return needed[0]
