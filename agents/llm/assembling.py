"""What is known of a result, put together as its JSON comes: from the pieces of the text, or from what a cluster tells
of finished parts. streams.py asks it.

Each character of the text is looked at once, nothing is read again and nothing is copied: what is shown is one view
that grows. The rule for JSON in prose is that of json_text.py: the last object or list counts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter

from diptych.protos.deltas import Content, Structured
from diptych.protos.json_scanner import JsonScanner

from .errors import CallFailed, UsageError
from .json_text import JsonFinder
from .output import WRAPPED, Output, invalid
from .partial import Partial, member, plain
from .reply import UNSET
from .shapes import FREE, Shape, item_of, shape_of
from .strict_json import validated

T = TypeVar("T")
MAX_DEPTH = 200  # pydantic reads no deeper
_COMPLETE = re.compile(  # characters of a JSON string that no later one changes: no half escape, no half pair of them
    r"(?:[^\\]+|\\[^u]|\\u(?![dD][89abAB])[0-9a-fA-F]{4}|\\u[0-9a-fA-F]{4}(?=\\u[0-9a-fA-F]{4}|\\[^u]|[^\\]))*"
)
_MOST_ESCAPE_CHARS = 12  # of a pair
_SHARES = 1024  # a growing text is shown anew when it grew by this part of itself, so that its copies stay linear


class _Open:
    """An object or list that is not complete. `place` is where its members are kept, `key` that of the present one."""

    __slots__ = ("key", "node", "place", "shape")

    def __init__(self, node: Any, place: Any, shape: Shape) -> None:
        self.node = node
        self.place = place
        self.shape = shape
        self.key: str | int = 0 if isinstance(place, list) else ""


class Tree:
    """One value that is being told: the sink of a scanner. `changes` counts what became known."""

    def __init__(self, output: Output[Any], context: Callable[[], Any]) -> None:
        self.root: Any = UNSET
        self.changes = 0
        self._output = output
        self._context = context
        self._stack: list[_Open] = []
        self._left: list[Any] = []  # containers that were open when another began to tell
        self._is_growing = False  # the value at the last key is a text that is not complete
        self._free = _Wrapper(output.kind) if output.is_wrapped else shape_of(output.kind)

    @property
    def shown(self) -> Any:
        """What there is of the result; UNSET while nothing is known."""
        root = self.root
        if self._output.is_wrapped and isinstance(root, dict):
            return root.get(WRAPPED, root or UNSET)
        return root

    @property
    def may_grow(self) -> bool:
        """Whether the value that comes may be shown before its end."""
        return self._below().grows

    def _below(self) -> Shape:
        if not self._stack:
            return self._free
        top = self._stack[-1]
        return top.shape.below(top.key)

    def opens(self, kind: str) -> None:
        """See Sink."""
        if len(self._stack) >= MAX_DEPTH:
            raise RecursionError("nested too deeply")
        shape = self._below().opened(kind)
        found = shape.partial() if kind == "{" else None
        if found is not None:
            node: Any = found(self)
            place: Any = node._partial_values
        else:
            node = place = [] if kind == "[" else {}
        self._put(node)
        self._stack.append(_Open(node, place, shape))

    def key(self, name: str) -> None:
        """See Sink."""
        self._stack[-1].key = name

    def value(self, value: Any) -> None:
        """See Sink."""
        self._put(value)
        self._pass()

    def closes(self, *, is_empty: bool) -> None:
        """See Sink."""
        node = self._stack.pop().node
        if self._left:
            self._left = [one for one in self._left if one is not node]
        self._pass()

    def grows(self, text: str) -> None:
        """The text at the present key, as far as it came."""
        self._put(text)
        self._is_growing = True
        self.changes += 1

    def _put(self, value: Any) -> None:
        self._is_growing = False
        if not self._stack:
            self.root = value
            return
        top = self._stack[-1]
        if isinstance(top.place, list) and top.key == len(top.place):
            top.place.append(value)
        else:
            top.place[top.key] = value

    def _pass(self) -> None:
        self.changes += 1
        if self._stack and isinstance(index := self._stack[-1].key, int):
            self._stack[-1].key = index + 1

    def leave(self) -> None:
        """What was read of the text stays; from now on it is told."""
        self._left = [one.node for one in self._stack]
        self._stack = []

    def tell(self, part: dict[str, Any]) -> None:
        """A finished part, as closed_paths.py writes them; those before it were told. Raises ValueError for one that
        leads nowhere.
        """
        steps = [step.replace("~1", "/").replace("~0", "~") for step in part["path"].split("/")[1:]]
        if closed := part.get("closed"):
            self._go_to(steps)
            self._settle_kind(closed)
            self.closes(is_empty=False)
            return
        if steps:
            self._go_to(steps[:-1], steps[-1])
            self._at(steps[-1])
        value = part.get("value")
        if (value == {} and isinstance(value, dict)) or (value == [] and isinstance(value, list)):
            self.opens("{" if isinstance(value, dict) else "[")
            self.closes(is_empty=True)
        else:
            self.value(value)

    def _go_to(self, steps: Sequence[str], first: str = "0") -> None:
        """Opens what leads to the container at `steps`, where it is not open. `first` is a key in it."""
        keys = [str(one.key) for one in self._stack[:-1]]
        if self._stack and keys != list(steps[: len(keys)]):
            raise ValueError("a part beside those that are open")
        if not self._stack:
            self._enter([*steps, first][0])
        for at in range(len(self._stack) - 1, len(steps)):
            self._at(steps[at])
            self._enter(steps[at + 1] if at + 1 < len(steps) else first)

    def _enter(self, key: str) -> None:
        """Opens the container at the present place; it has the key `key`, of which "0" is that of a list in doubt."""
        top = self._stack[-1] if self._stack else None
        there = self.root if top is None else member(top.node, top.key)
        if not isinstance(there, Partial | dict | list):
            is_object = key != "0" or self._below().opened("{").partial() is not None
            self.opens("{" if is_object else "[")
            return
        place = there._partial_values if isinstance(there, Partial) else there
        kind = "[" if isinstance(place, list) else "{"
        self._stack.append(_Open(there, place, self._below().opened(kind)))

    def _at(self, step: str) -> None:
        top = self._stack[-1]
        if not isinstance(top.place, list):
            top.key = step
            return
        if not step.isdigit() or int(step) > len(top.place):
            self._settle_kind("object")
            self._stack[-1].key = step
        else:
            top.key = int(step)

    def _settle_kind(self, kind: str) -> None:
        """What was taken for a list, by its first key, may be an object."""
        top = self._stack[-1]
        if kind != "object" or not isinstance(top.place, list):
            return
        found = {str(at): value for at, value in enumerate(top.place)}
        self._stack.pop()
        self._put(found)
        self._stack.append(_Open(found, found, FREE))

    def is_final(self, node: Any, steps: Sequence[str]) -> bool:
        """See Partial.is_final."""
        at = node
        for step in steps:
            node, at = at, member(at, step)
            if at is UNSET:
                return False
        if isinstance(at, Partial | dict | list):
            return all(one is not at for one in (*self._left, *(one.node for one in self._stack)))
        is_present = self._is_growing and bool(self._stack) and node is self._stack[-1].node
        return not (is_present and str(self._stack[-1].key) == steps[-1])

    def validated(self, partial: Partial[Any], kinds: tuple[type, ...]) -> Any:
        """See Partial.validated."""
        kind: Any = kinds[0]
        for other in kinds[1:]:
            kind = kind | other
        document = json.dumps(plain(partial), ensure_ascii=False)
        try:
            return validated(TypeAdapter(kind), document, strict=self._output.is_strict, context=self._context())
        except (ValueError, RecursionError) as exc:
            name = " or ".join(one.__name__ for one in kinds)
            raise invalid(exc, name, document, document) from exc


class _Wrapper(Shape):
    """Of the object around a result that is none, and of the result without it."""

    grows = False

    def __init__(self, kind: Any) -> None:
        self._inner = shape_of(kind)

    def below(self, key: str | int) -> Shape:
        """See Shape."""
        return self._inner if key == WRAPPED else FREE

    def opened(self, kind: str) -> Shape:
        """See Shape."""
        return self if kind == "{" else self._inner.opened(kind)


class _Growing:
    """The text of an open string, decoded as far as it is certain. `pieces` are the scanner's."""

    __slots__ = ("_new", "_num_new", "_num_read", "_raw", "pieces", "text")

    def __init__(self, pieces: Sequence[str]) -> None:
        self.pieces = pieces
        self.text = ""
        self._new: list[str] = []
        self._num_new = 0
        self._num_read = 1  # the first is the quote
        self._raw = ""

    def is_longer(self) -> bool:
        """Takes what came; whether the text is to be shown anew."""
        raw = self._raw + "".join(self.pieces[self._num_read :])
        self._num_read = len(self.pieces)
        found = _COMPLETE.match(raw) if "\\" in raw else None
        end = len(raw) if found is None else found.end()
        if len(raw) - end > _MOST_ESCAPE_CHARS:  # no JSON: the scanner will say so where the string ends
            self._raw = ""
            return False
        self._raw = raw[end:]
        try:
            told = json.loads(f'"{raw[:end]}"', strict=False) if found is not None else raw
        except ValueError:
            return False
        self._new.append(told)
        self._num_new += len(told)
        if not self._num_new or self._num_new * _SHARES < len(self.text):
            return False
        self.text = "".join([self.text, *self._new])
        self._new, self._num_new = [], 0
        return True


class Assembler:
    """Of one stream. `grows`: texts are shown before their end; then it is the text that is read. Else a cluster that
    tells the finished parts is believed, and the text behind the first of them is not looked at.

    `context`: what validators get, asked for when they run.
    """

    def __init__(self, output: Output[Any], context: Callable[[], Any] = lambda: None, *, grows: bool = False) -> None:
        self._output = output
        self._context = context
        self._grows = grows
        self.begin_again()

    def begin_again(self) -> None:
        """What was told is void; what was shown of it changes no more."""
        self._finder = JsonFinder(lambda: Tree(self._output, self._context))
        self._tree: Tree | None = None  # what is shown
        self._complete: Tree | None = None  # the last that came to its end
        self._growing: _Growing | None = None
        self._is_told = False
        self._seen: tuple[Tree | None, int] = (None, 0)

    def add(self, event: object) -> None:
        """An event of the stream; what it does not need it passes over."""
        if isinstance(event, Content):
            if not self._is_told:
                self._read(event.text)
        elif isinstance(event, Structured) and not self._grows:
            self._tell(event.parts)

    def taken(self) -> Iterator[Any]:
        """What is known now, if it is more than the last time."""
        tree = self._tree
        now = (tree, 0 if tree is None else tree.changes)
        if tree is not None and now != self._seen and (shown := tree.shown) is not UNSET:
            self._seen = now
            yield shown

    @property
    def known(self) -> Any:
        """What is known now; UNSET where nothing is."""
        return UNSET if self._tree is None else self._tree.shown

    def _tell(self, parts: Sequence[dict[str, Any]]) -> None:
        if not self._is_told:
            self._is_told = True
            begun = self._finder.sink if self._finder.is_inside else None
            self._tree = self._tree or begun or Tree(self._output, self._context)
            self._tree.leave()
        assert self._tree is not None
        for part in parts:
            try:
                self._tree.tell(part)
            except (ValueError, RecursionError):  # nothing is lost: the whole answer is read at its end
                return

    def _read(self, text: str) -> None:
        for state in self._finder.feed(text):
            tree = self._finder.sink
            assert tree is not None
            if state == "none":
                self._tree, self._growing = self._complete, None
                continue
            if self._grows and state == "open":
                self._grow(tree)
            if tree.changes:
                self._tree = tree
            if state == "whole":
                self._complete, self._growing = tree, None

    def _grow(self, tree: Tree) -> None:
        scanner = self._finder.scanner
        assert scanner is not None
        if not scanner.in_text or not tree.may_grow:
            self._growing = None
            return
        if self._growing is None or self._growing.pieces is not scanner.scalar:
            self._growing = _Growing(scanner.scalar)
        if self._growing.is_longer():
            tree.grows(self._growing.text)


def known_parts(output: Output[Any], text: str) -> Any:
    """Of an answer that was cut off: its complete parts as plain objects, lists and values; None: there are none."""
    assembler = Assembler(output)
    assembler.add(Content(text))
    return None if assembler.known is UNSET else plain(assembler.known)


class Items(Generic[T]):
    """The objects of a list as they close, validated. `output` is the list's; `name` the function's.

    It reads the text, also where a cluster tells the parts: each item is validated as it was written.
    Raises UsageError where the result is no list.
    """

    def __init__(self, output: Output[Any], name: str, context: Callable[[], Any] = lambda: None) -> None:
        kind = item_of(output.kind)
        if kind is None:
            raise UsageError(
                f"{name}: items() is of a result that is a list, and this one is {output.name}: "
                f"write output=list[...], or read partials()"
            )
        self._output = output
        self._context = context
        self._adapter: TypeAdapter[T] = TypeAdapter(kind)
        self._name = kind.__name__ if isinstance(kind, type) else str(kind)
        self._given: list[int] = []  # hashes of their texts
        self._restart: CallFailed | None = None
        self.begin_again()

    def begin_again(self, why: CallFailed | None = None) -> None:
        """What was told is void, but not what was given: the answer begins with the same again, or `why` is raised."""
        self._restart = why
        self._finder = JsonFinder(self._cutter)
        self._at = 0
        self._has_begun = False
        self._cuts: _Cuts | None = None
        self._pieces: list[str] = []  # of the item that is open

    def _cutter(self) -> _Cuts:
        return _Cuts(self._output.is_wrapped, lambda: self._finder.scanner)

    def taken(self, event: object) -> Iterator[T]:
        """Those that `event` completes. Raises InvalidOutput, which names the item."""
        if not isinstance(event, Content) or (self._cuts is not None and self._cuts.is_over):
            return
        for _ in self._finder.feed(event.text):
            cuts = self._finder.sink
            if cuts is not self._cuts:
                self._cuts, self._pieces, self._at, self._has_begun = cuts, [], 0, False
            assert cuts is not None
            yield from self._cut(event.text, cuts)
            if cuts.is_over:
                return

    def _cut(self, text: str, cuts: _Cuts) -> Iterator[T]:
        begin = 0
        places, cuts.places = cuts.places, []
        for place in places:
            document = "".join([*self._pieces, text[begin:place]]).lstrip(" \t\n\r,")
            self._pieces, begin = [], place
            if not self._has_begun:  # the first place is that of the list's beginning
                self._has_begun = True
                continue
            at, self._at = self._at, self._at + 1
            if at == len(self._given):
                self._given.append(hash(document))
                yield self._checked(document, at)
            elif self._given[at] != hash(document):
                raise self._restart or UsageError("another list after the one whose items were given")
        if cuts.is_inside:
            self._pieces.append(text[begin:])

    def _checked(self, document: str, at: int) -> T:
        try:
            found: T = validated(self._adapter, document, strict=self._output.is_strict, context=self._context())
        except (ValueError, RecursionError) as exc:
            base = f"/{WRAPPED}/{at}" if self._output.is_wrapped else f"/{at}"
            raise invalid(exc, self._name, document, document, base=base) from exc
        return found


class _Cuts:
    """A sink: where in the piece that is read the list begins and its items end."""

    def __init__(self, is_wrapped: bool, scanner: Callable[[], JsonScanner | None]) -> None:
        self.places: list[int] = []
        self.is_inside = False  # the list
        self.is_over = False
        self._is_wrapped = is_wrapped
        self._scanner = scanner
        self._depth = 0
        self._level = 1  # how deep the items lie
        self._key = ""

    def opens(self, kind: str) -> None:
        """See Sink."""
        if self._depth >= MAX_DEPTH:
            raise RecursionError("nested too deeply")
        self._depth += 1
        if self._depth == 1 and kind == "{":
            self._level = 2
        is_here = self._level == 1 or (self._is_wrapped and self._key == WRAPPED)
        if self._depth == self._level and kind == "[" and is_here:
            self.is_inside = True
            self._mark()

    def key(self, name: str) -> None:
        """See Sink."""
        if self._depth == 1:
            self._key = name

    def value(self, value: Any) -> None:
        """See Sink."""
        if self.is_inside and self._depth == self._level:
            self._mark()

    def closes(self, *, is_empty: bool) -> None:
        """See Sink."""
        self._depth -= 1
        if self.is_inside and self._depth == self._level:
            self._mark()
        elif self.is_inside and self._depth < self._level:
            self.is_inside, self.is_over = False, True

    def _mark(self) -> None:
        scanner = self._scanner()
        assert scanner is not None
        self.places.append(scanner.at)
