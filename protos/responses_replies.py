"""OpenAI's bodies of /v1/responses and the events of its streams, made from what an answer says, piece by piece.

A ResponseWriter is one response's: cluster/api/responses.py feeds it. Whole answers and streams are written by the
same steps, so that both end in the same body.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from .deltas import Signature
from .errors import DiptychError, InvalidRequest, RateLimited, RequestError
from .messages import Reasoning
from .replies import Usage
from .responses_items import ItemIds, packed
from .strict_json import parse_inner
from .wire_checks import JsonObject

End = Literal["completed", "incomplete", "failed", "cancelled"]
Status = Literal["queued", "in_progress"] | End
UNFINISHED: Final = ("queued", "in_progress")
Event = JsonObject  # with its `type` and its `sequence_number`


def usage(used: Usage) -> JsonObject | None:
    """Token counts; null what nobody told, and without both totals there is none."""
    prompt, output = used.input_tokens, used.output_tokens
    if prompt is None or output is None:
        return None
    return {
        "input_tokens": prompt,
        "input_tokens_details": {
            "cached_tokens": used.cache_read_tokens,
            "cache_write_tokens": used.cache_write_tokens,
        },
        "output_tokens": output,
        "output_tokens_details": {"reasoning_tokens": used.reasoning_tokens},
        "total_tokens": prompt + output,
    }


def response_error(error: DiptychError) -> JsonObject:
    """The `error` of a response that failed: OpenAI's codes are few; `type` is ours."""
    code = "server_error"
    if isinstance(error, RateLimited):
        code = "rate_limit_exceeded"
    elif isinstance(error, RequestError):
        code = "invalid_prompt"
    param = error.param if isinstance(error, RequestError) else None
    return {"code": code, "message": str(error), "param": param, "type": error.code}


def error_event(error: DiptychError, sequence: int) -> Event:
    """What ends a stream whose response could not be kept."""
    param = error.param if isinstance(error, RequestError) else None
    told = {"type": "error", "code": error.code, "message": str(error), "param": param}
    return told | {"sequence_number": sequence}


def ended(body: JsonObject, status: Status, error: DiptychError | None = None) -> JsonObject:
    """An unfinished response as one that ended so, by somebody else than its writer."""
    return {**body, "status": status, "error": None if error is None else response_error(error)}


def deleted(response_id: str) -> JsonObject:
    """The answer to DELETE."""
    return {"id": response_id, "object": "response", "deleted": True}


def input_tokens(number: int) -> JsonObject:
    """The answer of /v1/responses/input_tokens."""
    return {"object": "response.input_tokens", "input_tokens": number}


def item_list(items: Sequence[JsonObject], *, has_more: bool) -> JsonObject:
    """A page of items."""
    first, last = (items[0]["id"], items[-1]["id"]) if items else (None, None)
    return {"object": "list", "data": list(items), "first_id": first, "last_id": last, "has_more": has_more}


_Kind = Literal["message", "refusal", "reasoning", "function_call"]


@dataclass(slots=True)
class _Open:
    """The item that is being written; `call` are the fields of a function_call."""

    kind: _Kind
    id: str
    call: JsonObject = field(default_factory=dict)
    pieces: list[str] = field(default_factory=list)
    logprobs: list[JsonObject] = field(default_factory=list)
    proof: Signature | None = None  # of reasoning, by its maker

    def item(self, status: str, text: str | None, sealed: str | None = None) -> JsonObject:
        """`text` None: nothing was said yet."""
        head: JsonObject = {"id": self.id, "type": _TYPES.get(self.kind, self.kind), "status": status}
        if self.kind == "function_call":
            return head | self.call | {"arguments": text or ""}
        if self.kind in ("message", "refusal"):
            return head | {"role": "assistant", "content": [] if text is None else [self.part(text)]}
        thought: JsonObject = head | {"summary": [], "content": [] if text is None else [self.part(text)]}
        return thought | ({} if sealed is None else {"encrypted_content": sealed})

    def part(self, text: str) -> JsonObject:
        """The one content part of a message or of reasoning."""
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        if self.kind == "refusal":
            return {"type": "refusal", "refusal": text}
        return {"type": "output_text", "annotations": [], "logprobs": list(self.logprobs), "text": text}


_TYPES: dict[_Kind, str] = {"refusal": "message"}
_NAMES: dict[_Kind, str] = {
    "message": "response.output_text",
    "refusal": "response.refusal",
    "reasoning": "response.reasoning_text",
    "function_call": "response.function_call_arguments",
}


class ResponseWriter:
    """One response from its first event to its last.

        created [queued] in_progress ( item.added ( part.added delta* done part.done | delta* done ) item.done )* end

    `head` is what stays the same in its body. `seal` makes the encrypted_content of reasoning: of all where it `seals`,
    else of what has a proof, so that it comes back with the item.
    """

    def __init__(
        self, head: JsonObject, ids: ItemIds, *, seal: Callable[[str], str] | None = None, seals: bool = True
    ) -> None:
        self.sequence = 0  # of the next event
        self.output: list[JsonObject] = []
        self.body: JsonObject = {}  # the whole one, once it ended
        self._head = head
        self._ids = ids
        self._seal = seal
        self._seals = seals
        self._open: _Open | None = None

    def state(self, status: Status) -> JsonObject:
        """The body as it is while nothing has been said."""
        return {**self._head, "status": status, "output": [], **_NOTHING}

    def created(self, *, is_queued: bool = False) -> list[Event]:
        """The first events. A response that is queued is in progress later: see `begun`."""
        status: Status = "queued" if is_queued else "in_progress"
        return [
            self._told("response.created", self.state(status)),
            self._told(f"response.{status}", self.state(status)),
        ]

    def begun(self) -> list[Event]:
        """A queued response goes on."""
        return [self._told("response.in_progress", self.state("in_progress"))]

    def think(self, text: str) -> list[Event]:
        """More reasoning."""
        return self._more("reasoning", text, ())

    def say(self, text: str, logprobs: Sequence[JsonObject] = ()) -> list[Event]:
        """More of what the answer says."""
        return self._more("message", text, logprobs)

    def prove(self, proof: Signature) -> list[Event]:
        """The maker's proof of the reasoning that was told, which is over with it; or in place of any."""
        is_of_open = self._open is not None and self._open.kind == "reasoning" and not proof.is_redacted
        if not is_of_open and not proof.signature:
            return []
        events: list[Event] = []
        if not is_of_open:
            events += self._close("completed")
            events += self._begin(_Open("reasoning", self._ids.new("rs")))
        assert self._open is not None
        self._open.proof = proof
        return events + self._close("completed")

    def refuse(self, text: str) -> list[Event]:
        """More of why there is no answer."""
        return self._more("refusal", text, ())

    def call(self, call_id: str, name: str) -> list[Event]:
        """A function is called; its arguments follow."""
        events = self._close("completed")
        call = {"call_id": call_id, "name": name}
        return events + self._begin(_Open("function_call", self._ids.new("fc"), call))

    def argue(self, text: str) -> list[Event]:
        """More of the arguments of the call that began last."""
        assert self._open is not None
        self._open.pieces.append(text)
        return [self._event("response.function_call_arguments.delta", delta=text)]

    def end_call(self) -> list[Event]:
        """The call that began last is whole."""
        return self._close("completed")

    def finish(
        self,
        status: End,
        *,
        use: JsonObject | None,
        ended_at: int,
        error: DiptychError | None = None,
        more: JsonObject | None = None,
        reason: str = "max_output_tokens",
    ) -> list[Event]:
        """The last events; afterwards `body` is whole. `ended_at` in Unix seconds; `more`: fields besides OpenAI's;
        `reason`: why it is incomplete, where it is.
        """
        is_whole = status == "completed"
        events = []
        if not self.output and self._open is None and status in ("completed", "incomplete"):
            events += self._begin(_Open("message", self._ids.new("msg")))
        events += self._close("completed" if is_whole else "incomplete")
        self.body = {
            **self._head,
            "status": status,
            "output": self.output,
            "completed_at": ended_at if is_whole else None,
            "error": None if error is None else response_error(error),
            "incomplete_details": {"reason": reason} if status == "incomplete" else None,
            "usage": use,
            **(more or {}),
        }
        return [*events, self._told(f"response.{status}", self.body)]

    def _more(self, kind: _Kind, text: str, logprobs: Sequence[JsonObject]) -> list[Event]:
        events = []
        if self._open is None or self._open.kind != kind:
            events = self._close("completed")
            events += self._begin(_Open(kind, self._ids.new("rs" if kind == "reasoning" else "msg")))
        assert self._open is not None
        self._open.pieces.append(text)
        if kind != "message":
            return [*events, self._event(f"{_NAMES[kind]}.delta", content_index=0, delta=text)]
        self._open.logprobs += logprobs
        told = self._event("response.output_text.delta", content_index=0, delta=text, logprobs=list(logprobs))
        return [*events, told]

    def _begin(self, item: _Open) -> list[Event]:
        self._open = item
        events = [self._event("response.output_item.added", item=item.item("in_progress", None), is_of_item=False)]
        if item.kind != "function_call":
            events.append(self._event("response.content_part.added", content_index=0, part=item.part("")))
        return events

    def _close(self, status: str) -> list[Event]:
        item = self._open
        if item is None:
            return []
        text = "".join(item.pieces)
        done = f"{_NAMES[item.kind]}.done"
        if item.kind == "function_call":
            status = status if _is_object(text) else "incomplete"
            events = [self._event(done, name=item.call["name"], arguments=text)]
        else:
            more: JsonObject = {"logprobs": item.logprobs} if item.kind == "message" else {}
            said: JsonObject = {"refusal": text} if item.kind == "refusal" else {"text": text}
            events = [self._event(done, content_index=0, **said, **more)]
            events.append(self._event("response.content_part.done", content_index=0, part=item.part(text)))
        sealed = None
        if item.kind == "reasoning" and self._seal is not None and (self._seals or item.proof is not None):
            sealed = self._seal(_packed(text, item.proof))
        whole = item.item(status, text, sealed)
        events.append(self._event("response.output_item.done", item=whole, is_of_item=False))
        self.output.append(whole)
        self._open = None
        return events

    def _event(self, kind: str, *, is_of_item: bool = True, **fields: object) -> Event:
        assert self._open is not None
        told: Event = {"type": kind, "sequence_number": self._next(), "output_index": len(self.output)}
        return told | ({"item_id": self._open.id} if is_of_item else {}) | fields

    def _told(self, kind: str, body: JsonObject) -> Event:
        return {"type": kind, "sequence_number": self._next(), "response": body}

    def _next(self) -> int:
        self.sequence += 1
        return self.sequence - 1


def _packed(text: str, proof: Signature | None) -> str:
    if proof is None:
        return text
    part = Reasoning(proof.signature, is_redacted=True) if proof.is_redacted else Reasoning(text, proof.signature)
    return packed(part)


_NOTHING: JsonObject = {"completed_at": None, "error": None, "incomplete_details": None, "usage": None}


def _is_object(text: str) -> bool:
    try:
        parse_inner(text, "arguments")
    except InvalidRequest:
        return False
    return True
