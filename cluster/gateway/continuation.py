"""Going on with an answer that broke off, from its text: whether that may be, and what to ask for then.

Own pools go on from their token ids below all this, and never come here unless a whole pool is gone.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from diptych.protos.deltas import Content, Extras
from diptych.protos.failures import Failure
from diptych.protos.messages import Message, Text
from diptych.protos.openai import ChatRequest
from diptych.protos.replies import Began, Event, Usage

from .relay import Relayed, as_events, aside, num_relayed
from .retries import CONSEQUENCES
from .settings import Midstream
from .target import Target

_CHARS_PER_TOKEN = 4  # where nobody told tokens; an answer may come out shorter than asked for, never much longer


@dataclass(slots=True)
class Told:
    """What the client has seen of an answer. `whys_not` is the first thing in it that no text can go on from."""

    texts: list[str] = field(default_factory=list)
    why_not: str = ""
    has_begun: bool = False
    num_pieces: int = 0
    tokens: int | None = None  # of the texts, as far as an attempt told
    relayed: list[Relayed] = field(default_factory=list)  # seen as bytes, and not read yet

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.texts)

    @property
    def is_empty(self) -> bool:
        """Whether nothing of the answer itself was seen."""
        return not self.num_pieces and not self.why_not and not self.relayed

    def add(self, event: Event | Relayed) -> None:
        """The client sees it."""
        if isinstance(event, Relayed):
            self.relayed.append(event)
        elif type(event) is Content:
            self.texts.append(event.text)
            self.num_pieces += 1
        elif isinstance(event, Began):
            self.has_begun = True
        elif isinstance(event, Usage):
            self.tokens = event.output_tokens if event.output_tokens is not None else self.tokens
        elif not isinstance(event, Extras) and not self.why_not:
            self.why_not = f"it holds more than text ({type(event).__name__})"

    async def read_relayed(self) -> None:
        """What was seen as bytes is known from here on; not before an answer has broken off."""
        relayed, self.relayed = self.relayed, []
        for event in await aside(lambda: list(as_events(relayed)), num_relayed(relayed)):
            self.add(event)
        if relayed and self.is_empty:
            self.why_not = "it holds what cannot be read again"

    @property
    def num_tokens(self) -> int:
        """Of the texts: what was told, which may have been told before the last of them, or a guess."""
        guess = max(self.num_pieces, -(-len(self.text.encode()) // _CHARS_PER_TOKEN))
        return max(guess, self.tokens or 0)


def why_not(request: ChatRequest, told: Told, failure: Failure, midstream: Midstream) -> str:
    """Why the answer may not go on elsewhere, in a phrase; empty where it may, as far as the target can."""
    if midstream == "error":
        return "the route's midstream is error"
    if CONSEQUENCES[failure.kind].others != "general":
        return f"nothing follows a failure of the kind {failure.kind.value}"
    if told.why_not:
        return told.why_not
    if not told.text.strip():
        return "it holds no text yet"
    if request.tool_use is not None and request.tool_use.mode != "none":
        return "the request has tools"
    if request.output_form is not None:
        return f"{request.output_form.path} gives the answer a form"
    if request.wanted_logprobs is not None or request.prompt_logprobs is not None:
        return "the request asks for logprobs"
    return ""


def may_go_on(broken: Target, other: Target, midstream: Midstream) -> bool:
    """Whether `other` may go on with what `broken` began."""
    if other.continues == "no":
        return False
    return midstream == "continue" or (midstream == "auto" and other.weights == broken.weights != "")


def continued(request: ChatRequest, told: Told) -> ChatRequest:
    """What is asked of the next target: the same conversation with the text so far as the assistant's last words,
    without spaces at its end, which some providers refuse, and as many tokens less.
    """
    messages = request.messages
    said = told.text.rstrip()
    if request.template.continue_final:
        last = messages[-1]
        messages = (*messages[:-1], _longer(last, told.text.rstrip()))
    else:
        messages = (*messages, Message(role="assistant", parts=(Text(said),)))
    template = replace(request.template, generation_prompt=False, continue_final=True)
    update: dict[str, object] = {"messages": messages, "template": template}
    wanted = request.wanted_tokens
    if wanted is not None:
        left = max(wanted[1] - told.num_tokens, 1)
        for name in ("max_tokens", "max_completion_tokens"):
            if getattr(request, name) is not None:
                update[name] = left
    if request.min_tokens is not None:
        update["min_tokens"] = max(request.min_tokens - told.num_tokens, 0)
    return request.model_copy(update=update)


def _longer(message: Message, text: str) -> Message:
    return Message(
        role=message.role,
        parts=(*message.parts, Text(text)),
        name=message.name,
        provider_data=message.provider_data,
    )


class Seam:
    """Where the continuation meets the text: spaces that ended the text and were not sent are not told twice."""

    def __init__(self, told: Told) -> None:
        text = told.text
        self._spaces = text[len(text.rstrip()) :]

    def joined(self, event: Event | Relayed) -> Event | Relayed | None:
        """`event` as it continues the text; None where nothing of it is left."""
        if not self._spaces or not isinstance(event, Content):
            return event
        shared = 0
        while shared < min(len(self._spaces), len(event.text)) and self._spaces[shared] == event.text[shared]:
            shared += 1
        ends_here = shared < len(event.text)
        self._spaces = "" if ends_here else self._spaces[shared:]
        text = event.text[shared:]
        return Content(text) if text else None
