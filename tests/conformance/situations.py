"""The situations in which every architecture must give the reference's tokens: plain data, and the prompts they use.

Read by the quick tests, the slow tests and `make conformance`, which publishes the table in docs/conformance.md.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

Layout = Literal["disaggregated", "colocated"]
Way = Literal["alone", "company", "twice", "shared", "preempted", "layers", "limit"]
Prompt = tuple[int, ...]

CONTEXT = 160  # prompt and output, except at the model's own limit
NEW_TOKENS = 10
PREEMPTED_TOKENS = 32  # long enough to outgrow a small pool
SMALL_POOL = 9  # blocks, of 16 tokens
SHARED_TOKENS = 50  # of a prefix that several prompts begin with
FIRST_ID, LAST_ID = 3, 511  # of random prompts: no special token

WAYS: dict[Way, str] = {
    "alone": "one request after the other",
    "company": "requests of all lengths arrive while others run, so that the rows of a step differ in length",
    "twice": "the same, and once more when both prefix caches know the prompts",
    "shared": "one prompt, then others that begin like it and find that beginning in both prefix caches",
    "preempted": "more sequences than the decode engine's pool can hold: some lose their blocks and are computed again",
    "layers": "alone; zeroing K or V of any one layer, on either engine, changes the next logits",
    "limit": "a context as long as the model allows; prompts of all but one, all but a few, and one of its positions",
}


@dataclass(frozen=True, slots=True)
class Situation:
    """One column of the matrix. `blocks`: tokens per block of the prefill and of the decode engine."""

    layout: Layout
    way: Way
    chunk: int = 512  # tokens per step of the engine that computes prompts
    blocks: tuple[int, int] = (16, 16)

    @property
    def name(self) -> str:
        """Unique among the situations."""
        parts = [self.layout, self.way]
        if self.chunk != 512:
            parts.append(f"chunk{self.chunk}")
        if self.blocks != (16, 16):
            parts.append(
                "blocks" + "x".join(map(str, self.blocks if self.layout == "disaggregated" else self.blocks[1:]))
            )
        return "-".join(parts)

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Of the engines that take part."""
        return self.blocks if self.layout == "disaggregated" else self.blocks[1:]


def _both(way: Way, chunk: int = 512) -> list[Situation]:
    return [Situation("disaggregated", way, chunk), Situation("colocated", way, chunk)]


SITUATIONS: tuple[Situation, ...] = (
    *_both("alone"),
    *_both("company"),
    *_both("company", 1),
    *_both("company", 16),
    *_both("company", 17),
    *_both("twice", 17),
    *_both("shared"),
    *_both("preempted"),
    Situation("disaggregated", "company", 17, (16, 5)),
    Situation("disaggregated", "twice", 512, (16, 5)),
    Situation("disaggregated", "twice", 16, (8, 32)),
    Situation("disaggregated", "shared", 17, (8, 32)),
    Situation("colocated", "twice", 16, (5, 5)),
    *_both("layers", 16),
    *_both("limit"),
)

# These run with every change.
QUICK: tuple[Situation, ...] = (
    Situation("disaggregated", "twice", 512, (16, 5)),
    Situation("colocated", "preempted"),
)


# These families also run through `diptych serve`, in both layouts.
SERVED = ("llama", "gemma2", "gpt-oss")


def random_prompt(length: int, seed: int = 0) -> Prompt:
    """The same for the same arguments, so that its reference is computed once for all situations."""
    rng = random.Random(1000 * seed + length)
    return tuple(rng.randint(FIRST_ID, LAST_ID) for _ in range(length))


def prompts_of(situation: Situation, max_context_tokens: int) -> list[Prompt]:
    """In order of arrival."""
    match situation.way:
        case "shared":
            head = random_prompt(SHARED_TOKENS, seed=1)
            return [head + random_prompt(tail, seed=2) for tail in (1, 14, 20, 33, 70)]
        case "preempted":
            return [random_prompt(length) for length in (20, 31, 16, 12, 9, 14, 7, 25)]
        case "layers":
            return [random_prompt(length) for length in (2, 17, 40)]
        case "limit":
            return [random_prompt(max_context_tokens - less) for less in (1, 4)] + [random_prompt(1)]
        case _:
            edges = {size + more for size in situation.block_sizes for more in (-1, 0, 1)}
            lengths = [77, *sorted({1, *edges}), 40, max_context_tokens - 6, max_context_tokens - 1]
            return [random_prompt(length) for length in lengths]
