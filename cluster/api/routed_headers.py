"""The headers of a routed answer: who answered, after how many attempts, what was asked for otherwise, what is left of
limits. Called by routed.py when an answer begins.

x-route-target, x-route-rule, x-route-attempts, x-cache, x-route-notes, x-ratelimit-{limit,remaining,reset}-KIND
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from diptych.cluster.gateway.record import AttemptRecord, ExchangeRecord
from diptych.protos.strict_json import printable

from .limits import allowance_headers

Header = tuple[bytes, bytes]
MAX_NOTES_CHARS: Final = 2048


def route_headers(records: Sequence[ExchangeRecord]) -> list[Header]:
    """Of the exchanges that have begun, one for each choice."""
    if not records:
        return []
    winners = [found for record in records if (found := winner_of(record)) is not None]
    targets = dict.fromkeys(attempt.target for attempt in winners)
    headers = [_header("x-route-target", ", ".join(targets))] if targets else []
    if rules := [rule for rule in dict.fromkeys(record.rule for record in records) if rule]:
        headers.append(_header("x-route-rule", ", ".join(rules)))
    headers.append(_header("x-route-attempts", str(sum(len(record.attempts) for record in records))))
    caches = {record.cache for record in records} - {""}
    if caches:
        headers.append(_header("x-cache", "hit" if caches == {"hit"} else "miss"))
    notes = dict.fromkeys(
        f"{note.kind} {note.field}" + (f": {note.words}" if note.words else "")
        for attempt in winners
        for note in attempt.notes
    )
    if notes:
        headers.append(_header("x-route-notes", "; ".join(notes)[:MAX_NOTES_CHARS]))
    return headers + allowance_headers(records[-1].allowances)


def winner_of(record: ExchangeRecord) -> AttemptRecord | None:
    """The attempt whose answer the client gets; None where it comes out of the cache."""
    found = [attempt for attempt in record.attempts if attempt.phase == "C" and attempt.outcome != "lost"]
    return found[-1] if found else None


def _header(name: str, value: str) -> Header:
    return name.encode(), printable(value, MAX_NOTES_CHARS).encode("ascii", "backslashreplace")
