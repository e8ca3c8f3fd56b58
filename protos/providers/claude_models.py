"""What each Claude model takes and what it answers 400 to, by its name at Anthropic, Bedrock, Vertex or a reseller.

For the codecs anthropic.messages and bedrock.converse. Of a name without a known family and version nothing is assumed.
Facts: platform.claude.com/docs (thinking troubleshooting, effort, structured outputs, tool use, errors, versions) and
pydantic-ai's measured profiles 2.68, all read 2026-11-23.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

# claude-opus-4-20250514 is 4.0: a date is no minor version. Others: claude-3-7-sonnet, claude-opus-4.6.
_NAME = re.compile(r"claude-(?:(opus|sonnet|haiku|fable|mythos|instant|v)-?)?(\d{1,2})(?:[-.](\d{1,2}))?(?!\d)")
_ALWAYS_THINKS = ("fable", "mythos")
LATEST_VERSION = "2026-10-21"  # of the API, which knows no sampling parameters any more, whatever the model
LEAST_BUDGET = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Claude:
    """One model. `family` is empty for names that put the version first."""

    family: str
    version: tuple[int, int]

    @property
    def samples(self) -> bool:
        """Takes temperature, top_p and top_k."""
        return self.version < (4, 7)

    @property
    def one_sampler(self) -> bool:
        """Refuses temperature together with top_p."""
        return self.version >= (4, 1)

    @property
    def manual_thinking(self) -> bool:
        """Knows thinking of the type enabled, with a budget of tokens."""
        return (3, 7) <= self.version < (4, 7)

    @property
    def adaptive_thinking(self) -> bool:
        """Knows thinking of the type adaptive."""
        return self.version >= (4, 6)

    @property
    def hides_thinking(self) -> bool:
        """Tells its thinking only where `display` asks for it."""
        return self.version >= (4, 7)

    @property
    def thinks_by_default(self) -> bool:
        """Thinks where the request says nothing of it."""
        return self.version >= (5, 0)

    @property
    def no_thinking(self) -> Literal["omit", "disabled", "between_tools", "never"]:
        """How it is told not to think: nothing is said; the type of `thinking`; it cannot be."""
        if self.version < (5, 0):
            return "omit"
        if self.family in _ALWAYS_THINKS or (self.family == "opus" and self.version >= (5, 5)):
            return "never"
        return "between_tools" if self.family == "sonnet" and self.version >= (5, 5) else "disabled"

    @property
    def efforts(self) -> tuple[str, ...]:
        """The values of output_config.effort, least first; empty: it has none."""
        least = {"opus": (4, 5), "sonnet": (4, 6), "haiku": (5, 5)}.get(self.family, (5, 0))
        if self.version < least:
            return ()
        if self.version < (4, 6):
            return ("low", "medium", "high")
        if self.version < (4, 7):
            return ("low", "medium", "high", "max")
        return ("low", "medium", "high", "xhigh", "max")

    @property
    def forced_calls(self) -> bool:
        """Takes a tool_choice that demands a call."""
        if self.family in _ALWAYS_THINKS:
            return self.version < (5, 1)
        return self.family == "haiku" or self.version < (5, 5)

    @property
    def prefill(self) -> bool:
        """Goes on with an assistant's message that is the last one."""
        return self.version < (4, 6)

    @property
    def structured(self) -> bool:
        """Can be held to a JSON schema."""
        return self.version >= (4, 5) or (self.family, self.version) == ("opus", (4, 1))

    @property
    def cuts_at_context(self) -> bool:
        """Takes more max_tokens than its context has room for."""
        return self.version >= (4, 5)

    @property
    def most_tokens(self) -> int | None:
        """The most tokens of one answer; None: not known here."""
        if self.version >= (4, 6):
            return 128_000
        return 64_000 if self.version >= (4, 5) else None


def claude_of(name: str) -> Claude | None:
    """The model behind `name`; None where it is no Claude, or one that the name does not tell enough of."""
    if "claude-mythos-preview" in name:
        return Claude(family="mythos", version=(5, 0))
    found = _NAME.search(name)
    if found is None:
        return None
    family = found[1] or ""
    if not family:  # claude-3-5-haiku
        behind = re.match(r"-(opus|sonnet|haiku)", name[found.end() :])
        family = behind[1] if behind else ""
    return Claude(family=family, version=(int(found[2]), int(found[3] or 0)))
