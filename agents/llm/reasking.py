"""The request after a failure: the model is told what is wrong, a field is made anew, an answer that was cut off goes
on, or another model is asked from the start.

exchange.py calls it with what retries.py decided. It decides nothing about whether there is another attempt.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from diptych.protos.messages import Message, Part, Reasoning, Text, said
from diptych.protos.replies import Reply as Answer

from .attempts import Attempt
from .draft import Draft, with_params
from .errors import CallFailed, InvalidOutput, Truncated
from .output import WRAPPED
from .profiles import Profile
from .repair import kept, resumable
from .retries import Next

T = TypeVar("T")
MOST_TURNS = 2  # bad answers that the model is shown, the last ones
MAX_ERRORS = 8  # fields that a turn tells of
MAX_TOLD_CHARS = 2_000
MAX_FIELD_CHARS = 500
_TURN = 2  # messages: the answer, and what is wrong with it


def following(origin: Draft[T], draft: Draft[T], attempt: Attempt, step: Next) -> Draft[T]:
    """The draft of the attempt after `attempt`, which was made of `draft`; `origin` is the developer's own.

    A turn is added behind what was sent, so that a target finds its KV; at most MOST_TURNS of them are there, so that
    what many attempts send grows with their number and not with its square.
    """
    match step.why:
        case "fallback":
            return replace(origin, model=step.model)
        case "reask" | "repair":
            begun = said("assistant", step.begun) if step.begun else None
            if not isinstance(attempt.error, InvalidOutput) or attempt.answer is None:  # told already
                return replace(draft, begun=begun)
            told = draft.messages[len(origin.messages) :]
            told = (*told, attempt.answer.message, reproach(attempt.error))[-_TURN * MOST_TURNS :]
            return replace(draft, messages=(*origin.messages, *told), begun=begun)
        case "longer" if step.begun and attempt.answer is not None:
            thoughts = tuple(part for part in attempt.answer.message.parts if isinstance(part, Reasoning))
            return replace(draft, begun=Message(role="assistant", parts=(*thoughts, Text(step.begun))))
        case "longer":
            asked = draft.params.get("max_tokens") or _answered(attempt)
            return replace(with_params(draft, {"max_tokens": 2 * max(asked, 1)}, draft.name), begun=None)
        case _:
            return draft


def beginning(draft: Draft[Any], profile: Profile, answer: Answer | None, error: CallFailed) -> str:
    """The part of a failed answer that another attempt can go on from, within its form; empty where there is none. A
    field whose repair failed is not repaired again: the whole answer is made anew.
    """
    output = draft.output
    if output is None or answer is None or profile.continues != "exact" or not _is_held(draft):
        return ""
    if isinstance(error, Truncated) and not answer.message.tool_calls:
        return resumable(error.said)
    if isinstance(error, InvalidOutput):
        found = kept(error.report, f"/{WRAPPED}" if output.is_wrapped else "")
        return "" if draft.begun is not None and found == draft.begun.content else found
    return ""


def _is_held(draft: Draft[Any]) -> bool:
    """Whether the answer is a text held to the result's own schema."""
    pool = (draft.params.get("options") or {}).get("pool") or {}
    is_own = any(name.startswith("guided_") for name in pool)
    return not is_own and (not draft.tools or draft.params.get("tool_choice") in (None, "auto", "none"))


def joined(begun: Message | None, answer: Answer) -> Answer:
    """The whole answer, where it went on from a beginning."""
    if begun is None:
        return answer
    parts: list[Part] = list(answer.message.parts)
    at = next((at for at, part in enumerate(parts) if isinstance(part, Text)), None)
    if at is None:
        parts.insert(0, Text(begun.content))
    else:
        text = parts[at]
        assert isinstance(text, Text)
        parts[at] = replace(text, text=begun.content + text.text)
    thoughts = [part for part in begun.parts if isinstance(part, Reasoning)]
    return replace(answer, message=replace(answer.message, parts=(*thoughts, *parts)))


def reproach(error: InvalidOutput) -> Message:
    """The user's turn that says what is wrong, field by field; bounded."""
    lines = [_cut(f"- {one}", MAX_FIELD_CHARS) for one in error.report.errors[:MAX_ERRORS]]
    more = len(error.report.errors) - MAX_ERRORS
    if more > 0:
        lines.append(f"- and {more} more")
    told = _cut("\n".join(lines), MAX_TOLD_CHARS)
    return said("user", f"That answer cannot be used:\n{told}\nAnswer again, with all of it put right.")


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _answered(attempt: Attempt) -> int:
    usage = None if attempt.answer is None else attempt.answer.usage
    return (usage.output_tokens if usage is not None else None) or 256
