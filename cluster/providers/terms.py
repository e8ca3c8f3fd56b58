"""What a caller grants one attempt at a provider, and what the attempt shows of itself.

The gateway makes Terms and reads HttpExchange; client.py keeps the one and fills in the other. They know no formats.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """How long the phases of an attempt may take, in seconds.

    connect_s      to reach the provider's host, and again for TLS
    headers_s      of a stream: from the call to the answer's headers
    first_token_s  of a stream: from the call to the first text, reasoning, refusal or tool call
    answer_s       of a whole answer: from the call to its headers, which providers send when all of it is there
    idle_s         between two pieces of an answer's body, whatever they say
    total_s        of the attempt
    """

    connect_s: float = 3.0
    headers_s: float = 15.0
    first_token_s: float = 30.0
    answer_s: float = 120.0
    idle_s: float = 20.0
    total_s: float = 300.0


@dataclass(frozen=True, slots=True)
class Terms:
    """`deadline` is absolute, on the clock of the running event loop (`loop.time()`); no phase goes beyond it. Nobody
    waits beyond `first_by`, on the same clock, for the first content, or for a whole answer.
    """

    deadline: float
    timeouts: Timeouts = Timeouts()
    first_by: float = math.inf

    @classmethod
    def within(cls, timeouts: Timeouts, deadline: float | None = None) -> Terms:
        """From now on; the attempt's own end is `total_s` away, or at `deadline` where that is sooner."""
        end = asyncio.get_running_loop().time() + timeouts.total_s
        return cls(end if deadline is None else min(end, deadline), timeouts)


@dataclass(slots=True)
class HttpExchange:
    """What is known of one attempt so far; times on the event loop's clock, None: not yet. `limits` are the headers
    that tell what is left of a rate limit, by their names in lower case. `first_token_at` is not told by a relay.
    `keeps`, where the caller gives a list: the provider's own JSON, of the whole answer or of each event. A relay keeps
    nothing.
    """

    status: int = 0
    request_id: str = ""
    limits: dict[str, str] = field(default_factory=dict)
    retry_after: str = ""
    began_at: float | None = None
    headers_at: float | None = None
    first_token_at: float | None = None
    ended_at: float | None = None
    bytes_out: int = 0
    bytes_in: int = 0
    skipped_events: int = 0
    keeps: list[Any] | None = None
