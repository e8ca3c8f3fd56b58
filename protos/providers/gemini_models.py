"""What Gemini's codec must know of a model by its name: which generation's rules it follows.

Google's API has one wire format, and rules that differ by generation: its documentation as of 2026-11. A name without a
number (gemini-flash-latest) is of the newest; one that is no Gemini's (Gemma, a tuned model) gets what all take.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import quote

_NAME = re.compile(r"(?:^|/)gemini-(?:([0-9]+)(?:\.([0-9]+))?-?)?([a-z-]*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """The rules of one model.

    has_ids          calls and their results carry an id; older ones refuse the field
    signs_calls      the first call of a turn that is sent back needs a thoughtSignature
    media_in_results images stand within a functionResponse; elsewhere beside it
    thinks           `level`: by thinkingLevel; `budget`: by thinkingBudget; `no`: not at all; `unknown`
    may_stop         thinkingBudget 0 turns thinking off
    """

    has_ids: bool = False
    signs_calls: bool = False
    media_in_results: bool = False
    thinks: str = "unknown"
    may_stop: bool = False


def generation(model: str) -> Generation:
    """Of a model's name, with or without a folder before it."""
    found = _NAME.search(model)
    if found is None:
        return Generation()
    version = (int(found[1] or 3), int(found[2] or 0))
    if version >= (3, 0):
        return _THIRD
    if version >= (2, 5):
        return Generation(thinks="budget", may_stop="pro" not in found[3])
    return Generation(thinks="no")


_THIRD = Generation(has_ids=True, signs_calls=True, media_in_results=True, thinks="level")


def path(model: str, *, stream: bool) -> str:
    """Behind the base URL of AI Studio (.../v1beta) as well as of Vertex (.../publishers/google)."""
    folder, _, name = model.rpartition("/")
    if folder not in ("", "models", "tunedModels", "endpoints"):
        folder, name = "", model
    place = f"/{folder or 'models'}/{quote(name, safe='@:')}"
    return f"{place}:streamGenerateContent?alt=sse" if stream else f"{place}:generateContent"
