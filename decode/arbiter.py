"""How many prompt tokens a step takes beside its decoding sequences, for an engine that computes both.

Every prompt token makes all decoding sequences wait for it, and every step without enough of them makes prompts wait.
Asked by the scheduler before each step; pure arithmetic over the runner's own estimate of a step's time.
"""

from __future__ import annotations

from dataclasses import dataclass

from diptych.protos.ports import StepCost

CHUNK = 64  # prompt tokens are given in multiples of this, and so many are given in any case: prompts never stand still


@dataclass(frozen=True, slots=True, kw_only=True)
class Goals:
    """Seconds that clients may wait. Defaults: of interactive chat, where 20 ms a token reads faster than anybody."""

    itl_target_s: float = 0.020  # a step with decoding sequences, as long as prompts can be served so
    itl_limit_s: float = 0.05  # the same when prompts would wait too long
    ttft_target_s: float = 0.2  # from arrival to a prompt's last token; beyond, steps are as long as itl_limit_s
    overload: float = 14.0  # backlog, in ttft_target_s, from which on the steps are full: latency is lost then anyway


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """Who wants tokens of the next step."""

    decode_rows: int
    kv_tokens: int  # that the decoding sequences read
    queued_tokens: int  # of prompts that are computed here, in computation or waiting
    prompt_kv: int  # positions that the prompt whose turn it is reads already
    oldest_wait_s: float  # of those prompts


class StepBudget:
    """Of steps of at most `step_tokens` tokens. Where nothing is known of a step's time, there is no such object."""

    def __init__(self, *, step_tokens: int, cost: StepCost, goals: Goals | None = None) -> None:
        self._step_tokens = step_tokens
        self._cost = cost
        self._goals = goals or Goals()

    def prompt_tokens(self, demand: Demand) -> int:
        """At most so many prompt tokens in the next step, decoding rows not counted."""
        full = self._step_tokens - demand.decode_rows
        if not demand.decode_rows or not demand.queued_tokens:
            return full
        goals = self._goals
        calm = self._within(goals.itl_target_s, demand, full)
        if demand.oldest_wait_s + self._clears_in(calm, demand) <= goals.ttft_target_s:
            return calm
        hurried = self._within(goals.itl_limit_s, demand, full)
        if self._clears_in(hurried, demand) > goals.overload * goals.ttft_target_s:
            return full
        return hurried

    def _within(self, seconds: float, demand: Demand, full: int) -> int:
        """All, or the most chunks with which a step takes no longer than `seconds`, at least one."""
        if self._seconds(full, demand) <= seconds:
            return full
        low, high = 1, max(1, full // CHUNK)
        while low < high:
            middle = (low + high + 1) // 2
            if self._seconds(middle * CHUNK, demand) <= seconds:
                low = middle
            else:
                high = middle - 1
        return min(low * CHUNK, full)

    def _clears_in(self, num_tokens: int, demand: Demand) -> float:
        """Seconds until all prompts are computed, so many tokens in each step."""
        if num_tokens <= 0:
            return float("inf")
        steps = -(-demand.queued_tokens // num_tokens)
        return steps * self._seconds(num_tokens, demand)

    def _seconds(self, num_tokens: int, demand: Demand) -> float:
        return self._cost.seconds(
            decode_rows=demand.decode_rows,
            prompt_tokens=num_tokens,
            kv_tokens=demand.kv_tokens,
            prompt_kv=demand.prompt_kv,
        )
