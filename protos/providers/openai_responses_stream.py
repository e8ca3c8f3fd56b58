"""Answers of OpenAI's /v1/responses, streamed and whole, as events.

A whole answer is read as a stream that tells each item when it is done. Items come one after another here, whatever
order a provider tells them in: what it says of a second one waits until the first is over.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from diptych.protos.deltas import CallArguments, CallBegin, CallEnd, Content, Extras, Reasoning, Refusal
from diptych.protos.failures import Failure, FailureKind, ProviderFailure
from diptych.protos.replies import Began, Ended, Event, Finish, Usage
from diptych.protos.strict_json import printable

from .codec import JsonObject, ServerEvent
from .loose_values import check_kept, count_in, json_in, list_in, object_in, text_in
from .openai_responses_failures import failure_in
from .openai_responses_input import AFTER, ITEM

_INCOMPLETE: Final[dict[str, Finish]] = {"max_output_tokens": "length", "content_filter": "content_filter"}
# By the type of an event: the field of its text, and how it is told.
_DELTAS: Final = {
    "response.output_text.delta": "text",
    "response.refusal.delta": "refusal",
    "response.reasoning_summary_text.delta": "summary",
    "response.reasoning_text.delta": "thought",
    "response.function_call_arguments.delta": "arguments",
}
_DONE: Final = {
    "response.output_text.done": ("text", "text"),
    "response.refusal.done": ("refusal", "refusal"),
    "response.reasoning_summary_text.done": ("summary", "text"),
    "response.reasoning_text.done": ("thought", "text"),
    "response.function_call_arguments.done": ("arguments", "arguments"),
}
# About an item, and the field in which it, or its part, stands.
_ITEMS: Final = {
    "response.output_item.added": "item",
    "response.output_item.done": "item",
    "response.content_part.done": "part",
}
_ENDS: Final = ("response.completed", "response.incomplete", "response.failed", "response.cancelled")
_SAID: Final = frozenset({"type", "status", "role", "content", "call_id", "name", "arguments"})
_SPOKEN = (Content, Refusal, Reasoning, CallBegin)


@dataclass(frozen=True, slots=True)
class _Raw:
    """An item that no delta can say."""

    item: JsonObject


@dataclass(slots=True)
class _Item:
    """One item of the output. `seen`: of which of its pieces something was told, by kind and index."""

    head: JsonObject = field(default_factory=dict)
    call: int | None = None
    arguments: list[str] = field(default_factory=list)  # of a call, as they came
    has_arguments: bool = False  # all of them
    seen: dict[tuple[str, int], None] = field(default_factory=dict)
    signed: int = 0  # how many of them there were when extras told of the part
    waiting: list[Event | _Raw] = field(default_factory=list)
    is_done: bool = False


class ResponsesDecoder:
    """One answer."""

    def __init__(self, family: str) -> None:
        self.skipped = 0
        self._family = family
        self._items: dict[object, _Item] = {}
        self._open: object = None
        self._num_calls = 0
        self._number: object = None  # of the event before
        self._last = ""
        self._has_begun = False
        self._has_ended = False
        self._after: list[JsonObject] = []  # items behind the part before, which are told anew with each

    def feed(self, event: ServerEvent) -> list[Event]:
        """See StreamDecoder."""
        told = json_in(event.data)
        if not isinstance(told, dict):
            self.skipped += event.data.strip() != "[DONE]"
            return []
        number = told.get("sequence_number")
        if number and number == self._number and event.data == self._last:
            self.skipped += 1  # sent twice
            return []
        self._number, self._last = number, event.data
        kind = text_in(told.get("type")) or event.event
        return [] if self._has_ended else list(self._told(self._read(kind, told)))

    def finish(self) -> list[Event]:
        """See StreamDecoder."""
        if not self._has_ended:
            raise _broken("the answer ended without saying that it is whole")
        return []

    def whole(self, response: JsonObject) -> list[Event]:
        """All events of a whole answer. Raises ProviderFailure."""
        status = response.get("status")
        if isinstance(response.get("error"), dict):
            raise ProviderFailure(failure_in(response["error"]))
        if not isinstance(response.get("output"), list) or status in ("queued", "in_progress"):
            words = f"the provider's answer is none (status {printable(str(status), 40)})"
            raise _broken(words)
        return list(self._told(self._end(str(status or "completed"), response)))

    def _read(self, kind: str, told: JsonObject) -> Iterator[Event | _Raw]:
        body = object_in(told.get("response"))
        if kind == "error" or (kind not in _ENDS and isinstance(told.get("error"), dict)):
            raise ProviderFailure(failure_in(told))
        if not kind.startswith("response."):
            self.skipped += 1
            return
        yield from self._begin(body)
        if kind in _ENDS:
            yield from self._end(kind.removeprefix("response."), body)
        elif kind in _DELTAS or kind in _DONE:
            yield from self._of_piece(kind, told)
        elif kind in _ITEMS:
            yield from self._of_item(kind, told)

    def _of_piece(self, kind: str, told: JsonObject) -> Iterator[Event | _Raw]:
        key, item = self._item(told)
        name, where = _DONE[kind] if kind in _DONE else (_DELTAS[kind], "delta")
        if item.is_done:
            return
        if kind in _DONE and name == "arguments":
            if item.has_arguments:
                return
            item.has_arguments = True
            yield from self._say(key, self._rest(item, told.get(where)))
        elif kind not in _DONE or not self._has_seen(item, name, told):
            yield from self._say(key, self._piece(item, name, told, told.get(where)))

    def _of_item(self, kind: str, told: JsonObject) -> Iterator[Event | _Raw]:
        key, item = self._item(told)
        whole = told.get(_ITEMS[kind])
        if item.is_done or not isinstance(whole, dict):
            return
        if kind == "response.output_item.done":
            yield from self._close(key, item, whole)
        elif kind == "response.output_item.added":
            yield from self._say(key, self._added(item, whole))
        else:
            yield from self._say(key, self._part(item, whole, _index(told, "content_index")))

    def _begin(self, response: JsonObject) -> Iterator[Event]:
        if not self._has_begun:
            self._has_begun = True
            yield Began(text_in(response.get("id")), text_in(response.get("model")))

    def _item(self, told: JsonObject) -> tuple[object, _Item]:
        """The item that an event is about; of an event that does not say, the last one."""
        key = told.get("output_index")
        if type(key) is not int:
            found = told.get("item_id")
            key = found if isinstance(found, str) else next(reversed(self._items), 0)
        if key not in self._items:
            check_kept(list(self._items))
        return key, self._items.setdefault(key, _Item())

    def _say(self, key: object, events: Iterator[Event | _Raw]) -> Iterator[Event | _Raw]:
        for event in events:
            if self._open is None:
                self._open = key
            if self._open == key:
                yield event
            else:
                self._items[key].waiting.append(event)

    def _close(self, key: object, item: _Item, whole: JsonObject) -> Iterator[Event | _Raw]:
        """The item is done, and what waited for that is told."""
        yield from self._say(key, self._finished(item, whole))
        item.is_done = True
        while self._open is None or self._items[self._open].is_done:
            key = next((key for key, other in self._items.items() if other.waiting), None)
            if key is None:
                self._open = None
                return
            self._open = key
            waiting, self._items[key].waiting = self._items[key].waiting, []
            yield from waiting

    def _added(self, item: _Item, told: JsonObject) -> Iterator[Event]:
        item.head = _head(told)
        if told.get("type") == "function_call" and item.call is None and text_in(told.get("name")):
            yield from self._call(item, told)

    def _call(self, item: _Item, told: JsonObject) -> Iterator[Event]:
        item.call = self._num_calls
        self._num_calls += 1
        yield CallBegin(item.call, text_in(told.get("name")), text_in(told.get("call_id")) or text_in(told.get("id")))
        for piece in item.arguments:
            yield CallArguments(item.call, piece)

    def _has_seen(self, item: _Item, name: str, told: JsonObject) -> bool:
        where = _index(told, "summary_index" if name == "summary" else "content_index")
        return (name, where) in item.seen

    def _piece(self, item: _Item, name: str, told: JsonObject, text: Any) -> Iterator[Event]:
        if not isinstance(text, str) or not text:
            return
        where = _index(told, "summary_index" if name == "summary" else "content_index")
        if name in ("summary", "thought"):
            yield from self._thought(item, name, where, text)
            return
        item.seen[name, where] = None
        if name == "text":
            yield Content(text)
        elif name == "refusal":
            yield Refusal(text)
        else:
            item.arguments.append(text)
            if item.call is not None:
                yield CallArguments(item.call, text)

    def _thought(self, item: _Item, name: str, where: int, text: str) -> Iterator[Event]:
        """Reasoning is told once: its summary or itself, whichever comes first. Paragraphs are apart."""
        if any(other != name for other, _ in item.seen):
            return
        if item.seen and (name, where) not in item.seen:
            yield Reasoning("\n\n")
        item.seen[name, where] = None
        yield Reasoning(text)

    def _part(self, item: _Item, part: JsonObject, where: int) -> Iterator[Event]:
        """A part of a message is done."""
        kind = part.get("type")
        name = {"output_text": "text", "refusal": "refusal"}.get(kind) if isinstance(kind, str) else None
        if name is None:
            return
        if (name, where) not in item.seen:
            yield from self._piece(item, name, {"content_index": where}, part.get(name))
        if name == "text" and ("text", where) in item.seen and len(item.seen) > item.signed:
            item.signed = len(item.seen)
            notes = part.get("annotations")
            told = item.head | ({"annotations": notes} if notes else {})
            if told:
                yield Extras(self._family, {ITEM: told})

    def _finished(self, item: _Item, whole: JsonObject) -> Iterator[Event | _Raw]:
        kind = whole.get("type")
        item.head = _head(whole) or item.head
        if kind == "message":
            for where, part in enumerate(list_in(whole.get("content"))):
                yield from self._part(item, object_in(part), where)
        elif kind == "function_call":
            if item.call is None:
                yield from self._call(item, whole)
            yield from self._rest(item, whole.get("arguments"))
            yield CallEnd(item.call or 0)
            if item.head:
                yield Extras(self._family, {ITEM: item.head})
        elif kind == "reasoning":
            yield from self._reasoned(item, whole)
        elif isinstance(kind, str):
            yield _Raw(whole)

    def _rest(self, item: _Item, arguments: Any) -> Iterator[Event]:
        """What is left of a call's arguments. Raises ProviderFailure where a piece of them was lost."""
        said = "".join(item.arguments)
        if not isinstance(arguments, str) or arguments == said:
            return
        if not arguments.startswith(said) and (json_in(arguments) is None or json_in(arguments) != json_in(said)):
            raise _broken("a piece of the arguments of a call was lost on the way")
        if arguments.startswith(said):
            yield from self._piece(item, "arguments", {}, arguments[len(said) :])

    def _reasoned(self, item: _Item, whole: JsonObject) -> Iterator[Event | _Raw]:
        for name, pieces in (("summary", whole.get("summary")), ("thought", whole.get("content"))):
            for where, piece in enumerate(list_in(pieces)):
                if (name, where) not in item.seen:
                    told = {"summary_index": where, "content_index": where}
                    yield from self._piece(item, name, told, object_in(piece).get("text"))
        kept = {name: value for name, value in whole.items() if name != "status"}
        if not item.seen:
            yield _Raw(kept)
        else:
            yield Extras(self._family, {ITEM: {name: value for name, value in kept.items() if name != "type"}})

    def _end(self, status: str, response: JsonObject) -> Iterator[Event | _Raw]:
        if status in ("failed", "cancelled"):
            error = response.get("error")
            raise ProviderFailure(failure_in(error)) if isinstance(error, dict) else _broken(f"the answer is {status}")
        yield from self._begin(response)
        output = list_in(response.get("output"))
        check_kept(output)
        for at, whole in enumerate(output):
            if isinstance(whole, dict) and not self._is_known(at, whole):
                yield from self._close(at, self._items.setdefault(at, _Item()), whole)
        for key, item in list(self._items.items()):  # that the stream left open
            if not item.is_done:
                kind = "function_call" if item.call is not None else "message"
                yield from self._close(key, item, {"type": kind, **item.head})
        yield _usage(response.get("usage"))
        reason = text_in(object_in(response.get("incomplete_details")).get("reason"))
        finish: Finish = "tool_calls" if self._num_calls else "stop"
        if status == "incomplete":
            finish = _INCOMPLETE.get(reason, "length")
        self._has_ended = True
        yield Ended(finish, printable(reason or status, 64))

    def _is_known(self, at: int, whole: JsonObject) -> bool:
        """Whether the stream told of it, by its place or, where there was none, by its id."""
        item = self._items.get(at) or self._items.get(text_in(whole.get("id")))
        return item is not None and item.is_done

    def _told(self, events: Iterator[Event | _Raw]) -> Iterator[Event]:
        for event in events:
            if isinstance(event, _Raw):
                self._after = [*self._after, event.item]
                check_kept(self._after)
                yield Extras(self._family, {AFTER: self._after})
                continue
            if isinstance(event, _SPOKEN):
                self._after = []
            yield event


def _head(item: JsonObject) -> JsonObject:
    return {name: value for name, value in item.items() if name not in _SAID and value is not None}


def _usage(value: object) -> Usage:
    told = object_in(value)
    read, made = object_in(told.get("input_tokens_details")), object_in(told.get("output_tokens_details"))
    return Usage(
        input_tokens=count_in(told.get("input_tokens")),
        output_tokens=count_in(told.get("output_tokens")),
        cache_read_tokens=count_in(read.get("cached_tokens")),
        cache_write_tokens=count_in(read.get("cache_write_tokens")),
        reasoning_tokens=count_in(made.get("reasoning_tokens")),
    )


def _index(told: JsonObject, name: str) -> int:
    found = told.get(name)
    return found if type(found) is int else 0


def _broken(words: str) -> ProviderFailure:
    return ProviderFailure(Failure(kind=FailureKind.SERVER, message=words))
