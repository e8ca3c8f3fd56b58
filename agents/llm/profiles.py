"""What a target can do, as data: what a request may hold for it, and which of our extensions it knows."""

from __future__ import annotations

from dataclasses import dataclass, field

from diptych.protos.providers.openai_chat_requests import EXTENSIONS
from diptych.protos.providers.quirks import Quirks

# Of a Diptych cluster's own format: everything that the canonical request can say.
POOL_QUIRKS = Quirks(
    family="pool",
    rename={
        **{name: name for name in EXTENSIONS},
        **{
            name: name
            for name in (
                "reasoning_budget guided_regex guided_choice guided_grammar chat_template_kwargs continue_final_message"
            ).split()
        },
    },
    schema_dialect="openai",
    replay_reasoning="optional",
    media=frozenset({"image", "audio", "file"}),
    most_stops=16,
    tells_parts=True,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Facts of one target.

    media              kinds of parts that it can be sent
    has_schemas        it holds answers to a schema; else the schema is told in words, and answers are checked alone
    tells_parts        its streams tell each finished part of a JSON answer (`structured`)
    continues          an answer goes on from a beginning that is given: `exact` within its form, `prefill` as free text
    has_sessions       requests of one session are kept together by a header
    is_own             a Diptych cluster
    """

    media: frozenset[str] = field(default_factory=frozenset)
    has_schemas: bool = True
    tells_parts: bool = False
    continues: str = ""
    has_sessions: bool = False
    is_own: bool = False


POOL = Profile(media=POOL_QUIRKS.media, tells_parts=True, continues="exact", has_sessions=True, is_own=True)


def profile_of(quirks: Quirks) -> Profile:
    """Of an outside provider."""
    return Profile(
        media=quirks.media,
        has_schemas=quirks.schema_dialect != "none",
        continues="prefill" if quirks.prefill else "",
    )
