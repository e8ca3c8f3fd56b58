"""What the attempts of a request are to be paid for: by what providers told, and by estimates where they told nothing.

ledger.py books it. A provider that answered with an error is owed nothing; one whose answer was broken off, lost to its
hedge, or left by the client, is owed the prompt and what had come by then, told or not.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from diptych.protos.failures import FailureKind
from diptych.protos.replies import Usage

from .books import Tally
from .prices import Prices
from .rates import dollars_of
from .record import AttemptRecord, ExchangeRecord
from .sizes import Size, answer_tokens

# Nothing was computed, where nothing else was told.
_UNPAID: Final = frozenset(FailureKind) - {
    FailureKind.SERVER,
    FailureKind.FIRST_TOKEN_TIMEOUT,
    FailureKind.IDLE_TIMEOUT,
    FailureKind.TOTAL_TIMEOUT,
    FailureKind.CANCELLED,
}


def billed(record: ExchangeRecord, size: Size, prices: Prices) -> list[tuple[str, Tally]]:
    """By target, one for each attempt; the request counts at the one that answered, else at the last one. A cost that
    is known in part gets a sentence in `record.words`.
    """
    found = [(attempt.target, _tally(attempt, size, prices, record.words)) for attempt in record.attempts]
    where = record.target or (record.attempts[-1].target if record.attempts else "")
    for target, tally in found:
        if target == where:
            tally.requests = 1
            return found
    return [*found, (where, Tally(requests=1))]


def paid_usage(attempt: AttemptRecord, size: Size) -> tuple[Usage, bool] | None:
    """What an attempt used, and whether that is an estimate; None: nothing is owed."""
    told = attempt.usage
    if not attempt.is_sent:
        return None
    if told.input_tokens is not None and told.output_tokens is not None and attempt.outcome == "answered":
        return told, False
    is_told = told.input_tokens is not None or told.output_tokens is not None
    failure = attempt.failure
    if not is_told and attempt.phase != "C" and failure is not None and (failure.kind in _UNPAID or failure.status):
        return None
    made = answer_tokens(attempt.output_chars)
    used = replace(
        told,
        input_tokens=size.usual_tokens if told.input_tokens is None else told.input_tokens,
        output_tokens=max(told.output_tokens or 0, made)
        if attempt.outcome != "answered"
        else told.output_tokens or made,
    )
    return used, used != told


def _tally(attempt: AttemptRecord, size: Size, prices: Prices, words: list[str]) -> Tally:
    paid = paid_usage(attempt, size)
    if paid is None:
        return Tally()
    usage, is_estimate = paid
    cost = prices.cost(attempt.target, usage)
    if cost is not None and cost.unknown:
        what = " and ".join(cost.unknown)
        words.append(f"{attempt.target} cost ${dollars_of(cost.nanos):f} or more: nobody knows a price for {what}")
    return Tally(
        input_tokens=usage.input_tokens or 0,
        output_tokens=usage.output_tokens or 0,
        cache_read_tokens=usage.cache_read_tokens or 0,
        cache_write_tokens=usage.cache_write_tokens or 0,
        cost_nanos=0 if cost is None else cost.nanos,
        unpriced=int(cost is None or cost.unknown != ()),
        estimated=int(is_estimate),
    )
