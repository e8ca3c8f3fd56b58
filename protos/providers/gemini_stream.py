"""Gemini's answers, whole and streamed, as events.

A whole answer is a stream of one chunk. Its parts have no beginning and no end: neighbouring texts are one. What no
canonical part can hold (signatures, code that Google ran, images) becomes extras of the part before.
"""

from __future__ import annotations

import hashlib
from typing import Final

from diptych.protos.deltas import CallArguments, CallBegin, CallEnd, Content, Extras, Reasoning
from diptych.protos.failures import Failure, FailureKind, ProviderFailure
from diptych.protos.replies import Began, Ended, Event, Finish, Usage
from diptych.protos.strict_json import printable
from diptych.protos.wire_checks import compact

from .codec import JsonObject, ServerEvent
from .gemini_contents import AFTER, SIGNATURE
from .gemini_failures import read_error
from .loose_values import check_kept, count_in, json_in, list_in, object_in, text_in

# CONTINUATION: the limit of one request, behind which another one could go on.
_FINISHES: Final[dict[str, Finish]] = {"STOP": "stop", "MAX_TOKENS": "length", "CONTINUATION": "length"}
_FILTERED: Final = frozenset(
    {"SAFETY", "RECITATION", "LANGUAGE", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "ESCALATION", "MODEL_ARMOR"}
    | {"IMAGE_SAFETY", "IMAGE_PROHIBITED_CONTENT", "IMAGE_RECITATION", "PUP_LIMITED_DISABLED"}
)
# The model failed to say what it wanted to say: another attempt may be better.
_BROKEN: Final = frozenset(
    {"MALFORMED_FUNCTION_CALL", "MALFORMED_RESPONSE", "UNEXPECTED_TOOL_CALL", "TOO_MANY_TOOL_CALLS", "NO_IMAGE"}
)
_TOLD: Final = ("citationMetadata", "groundingMetadata", "urlContextMetadata")


class GenerateDecoder:
    """One answer."""

    def __init__(self, family: str) -> None:
        self.skipped = 0
        self._family = family
        self._id: str | None = None
        self._usage = Usage()
        self._finish = ""
        self._finish_words = ""
        self._num_calls = 0
        self._ids: set[str] = set()  # of calls, as Gemini gave them
        self._has_said = False
        self._after: list[JsonObject] = []  # behind the part before, which is told anew with each of them
        self._told: JsonObject = {}  # sources, of the whole answer

    def feed(self, event: ServerEvent) -> list[Event]:
        """See StreamDecoder."""
        chunk = json_in(event.data)
        if isinstance(chunk, list) and len(chunk) == 1:
            chunk = chunk[0]
        if not isinstance(chunk, dict):
            if '"functionCall"' in event.data:
                raise _broken("a call came in a piece of the stream that is no JSON")
            self.skipped += event.data.strip() != "[DONE]"
            return []
        return self.read(chunk)

    def read(self, chunk: JsonObject) -> list[Event]:
        """A chunk's events. Raises ProviderFailure."""
        if isinstance(chunk.get("error"), dict):
            raise ProviderFailure(read_error(chunk["error"]))
        events: list[Event] = []
        if self._id is None:
            self._id = text_in(chunk.get("responseId"))
            events.append(Began(self._id, text_in(chunk.get("modelVersion"))))
        candidate = next(iter(list_in(chunk.get("candidates"))), None)
        if isinstance(candidate, dict):
            events += self._candidate(candidate)
        elif not self._has_said:
            _check_prompt(chunk.get("promptFeedback"))
        usage = self._usage.merged(_usage(chunk.get("usageMetadata")))
        if usage != self._usage:
            self._usage = usage
            events.append(usage)
        return events

    def finish(self) -> list[Event]:
        """See StreamDecoder."""
        native = self._finish
        if not native:
            raise _broken("the answer ended without saying that it is whole")
        if native in _BROKEN or (native in ("OTHER", "IMAGE_OTHER") and not self._has_said):
            raise _broken(f"the model could not say its answer ({native}) {self._finish_words}".strip(), native)
        if native == "MISSING_THOUGHT_SIGNATURE":
            words = "the model wants the thoughtSignature of a call before, and the conversation has none"
            raise ProviderFailure(Failure(kind=FailureKind.UNSUPPORTED, message=words, code=native))
        finish: Finish = "content_filter" if native in _FILTERED else _FINISHES.get(native, "stop")
        if finish == "stop" and self._num_calls:
            finish = "tool_calls"
        sources: list[Event] = [Extras(self._family, self._told)] if self._told else []
        return [*sources, Ended(finish, native)]

    def _candidate(self, candidate: JsonObject) -> list[Event]:
        events: list[Event] = []
        for part in list_in(object_in(candidate.get("content")).get("parts")):
            if isinstance(part, dict):
                events += self._part(part)
        self._told |= {name: candidate[name] for name in _TOLD if candidate.get(name)}
        reason = text_in(candidate.get("finishReason"))
        if reason and reason != "FINISH_REASON_UNSPECIFIED":  # older models say STOP in every chunk
            self._finish = printable(reason, 64)
            self._finish_words = printable(text_in(candidate.get("finishMessage")), 200)
        return events

    def _part(self, part: JsonObject) -> list[Event]:
        call = part.get("functionCall")
        if isinstance(call, dict):
            return self._call(call, part)
        text = part.get("text")
        if not isinstance(text, str) or (not text and SIGNATURE in part):
            return self._raw(part) if part.keys() - {"text"} else []
        if not text:
            return []
        self._has_said = True
        self._after = []
        said: Event = Reasoning(text) if part.get("thought") is True else Content(text)
        return [said, *self._signature(part)]

    def _call(self, call: JsonObject, part: JsonObject) -> list[Event]:
        if call.get("partialArgs") or call.get("willContinue"):
            raise _broken("the arguments of a call come in pieces: leave out streamFunctionCallArguments")
        if (name := text_in(call.get("id"))) and name in self._ids:
            return []  # a chunk that was sent twice
        self._ids.add(name)
        index = self._num_calls
        self._num_calls += 1
        self._has_said = True
        self._after = []
        arguments = call.get("args")
        text = compact(arguments) if isinstance(arguments, dict) else "{}"
        begin = CallBegin(index, text_in(call.get("name")), name or self._made_id(index))
        return [begin, CallArguments(index, text), CallEnd(index), *self._signature(part)]

    def _made_id(self, index: int) -> str:
        """The same whenever the answer is read; unlike those of other answers."""
        if not self._id:
            return ""
        return "call_" + hashlib.sha256(f"{self._id}/{index}".encode()).hexdigest()[:24]

    def _signature(self, part: JsonObject) -> list[Event]:
        found = part.get(SIGNATURE)
        return [Extras(self._family, {SIGNATURE: found})] if isinstance(found, str) and found else []

    def _raw(self, part: JsonObject) -> list[Event]:
        """What comes as no text and no call."""
        self._has_said = True
        self._after = [*self._after, part]
        check_kept(self._after)
        return [Extras(self._family, {AFTER: self._after})]


def _check_prompt(feedback: object) -> None:
    told = object_in(feedback)
    if not told.get("blockReason"):
        return
    reason = printable(text_in(told["blockReason"]), 64)
    more = printable(text_in(told.get("blockReasonMessage")), 200)
    words = f"the provider's filter refused the prompt ({reason})" + (f": {more}" if more else "")
    raise ProviderFailure(Failure(kind=FailureKind.CONTENT_POLICY, message=words, code=reason))


def _usage(value: object) -> Usage:
    told = object_in(value)
    prompt, thoughts = count_in(told.get("promptTokenCount")), count_in(told.get("thoughtsTokenCount"))
    tools, said = count_in(told.get("toolUsePromptTokenCount")), count_in(told.get("candidatesTokenCount"))
    is_told = said is not None or thoughts is not None
    return Usage(
        input_tokens=None if prompt is None else prompt + (tools or 0),
        output_tokens=(said or 0) + (thoughts or 0) if is_told else None,
        cache_read_tokens=count_in(told.get("cachedContentTokenCount")),
        reasoning_tokens=thoughts,
        input_audio_tokens=_of_audio(told.get("promptTokensDetails")),
        output_audio_tokens=_of_audio(told.get("candidatesTokensDetails")),
    )


def _of_audio(details: object) -> int | None:
    for entry in map(object_in, list_in(details)):
        if entry.get("modality") == "AUDIO":
            return count_in(entry.get("tokenCount"))
    return None


def _broken(words: str, code: str = "") -> ProviderFailure:
    return ProviderFailure(Failure(kind=FailureKind.SERVER, message=words, code=code))
