"""One workload on engines that run: repeats, figures, a line for people. Called by offline.py.

Prompts of repeat n come from seed 100 + n, as those that the peers in bench/peers/ were measured with.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from diptych.protos.errors import EngineFault
from diptych.protos.trust import SECRET_BYTES

from .figures import quantile
from .profile import profile_lines, summary
from .provenance import CardWatch
from .session_client import Batch, SessionClient
from .workload import Workload, random_prompts

if TYPE_CHECKING:
    from diptych.cluster.engine.offline import OfflineEngines

ENGINE, SESSION = "engine", "session"  # the ways of --through
FIRST_SEED = 100
_TRACED_STEPS = 20  # at most: a trace of a step of 32 layers has 200 to 700 kernels


@dataclass(frozen=True, slots=True)
class Run:
    """One workload with its prompts; each repeat has others where they are random."""

    workload: Workload
    given: tuple[tuple[int, ...], ...] | None
    vocab_size: int

    def prompts(self, repeat: int) -> Sequence[Sequence[int]]:
        """Token ids of every request."""
        if self.given is not None:
            return self.given
        work = self.workload
        return random_prompts(work.requests, work.input_tokens, vocab_size=self.vocab_size, seed=FIRST_SEED + repeat)

    def salt(self, repeat: int, way: str) -> bytes:
        """Of the prefix cache: no KV of an earlier repeat, workload or way."""
        return f"{self.workload.name}/{way}/{repeat}".encode()


class Answer(Protocol):
    """How one request went; seconds since the batch was submitted."""

    num_tokens: int
    first_token_s: float
    last_token_s: float
    cached_tokens: int


Generate = Callable[[Sequence[Sequence[int]], int, bytes], Sequence[Answer]]  # prompts, tokens of each, salt


def measure(engines: OfflineEngines, run: Run, repeats: int, card: CardWatch) -> dict[str, Any]:
    """The workload on the bare engines. Raises EngineFault."""

    def generate(prompts: Sequence[Sequence[int]], num_tokens: int, salt: bytes) -> Sequence[Answer]:
        return engines.generate(prompts, num_tokens, salt=salt)

    figures = _repeated(generate, engines, run, repeats, card, way=ENGINE)
    print(_line(run, repeats, figures), flush=True)
    _tell_steps(figures)
    return figures


def measure_session(
    engines: OfflineEngines, run: Run, repeats: int, card: CardWatch, *, bare: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The same through the engine's gRPC session; `of_engine`: its rate over that of `bare`, where that is there."""
    secret = os.urandom(SECRET_BYTES)
    with engines.sessions(secret) as info, SessionClient(info, secret, lambda: engines.lost) as client:

        def generate(prompts: Sequence[Sequence[int]], num_tokens: int, salt: bytes) -> Sequence[Answer]:
            return client.run(Batch(prompts, num_tokens, salt))

        figures = _repeated(generate, engines, run, repeats, card, way=SESSION)
    line = f"{_line(run, repeats, figures)}, through a session"
    if bare is not None:
        figures["of_engine"] = round(bare["s"] / figures["s"], 4)
        line += f": {figures['of_engine']:.1%} of the engine alone"
    print(line, flush=True)
    _tell_steps(figures)
    return figures


def trace(engines: OfflineEngines, run: Run, repeats: int, measured: Mapping[str, Any]) -> dict[str, Any]:
    """Steps from the middle of one more repeat, by kernel: see profile.summary. `measured`: its figures so far, which
    tell how many steps a repeat has.
    """
    total = sum(mean["steps"] for mean in measured["steps"].values()) // repeats
    first = total // 3
    prompts = run.prompts(repeats)

    def batch() -> None:
        engines.generate(prompts, run.workload.output_tokens, salt=run.salt(repeats, "trace"))

    traced, pieces = engines.profile(first, max(1, min(_TRACED_STEPS, total - first)), batch)
    found = {"first_step": first} | summary(pieces, traced)
    print("\n".join(profile_lines(run.workload.name, found)), flush=True)
    return found


def _repeated(
    generate: Generate, engines: OfflineEngines, run: Run, repeats: int, card: CardWatch, *, way: str
) -> dict[str, Any]:
    work = run.workload
    seconds, first_tokens = [], []
    prompts: Sequence[Sequence[int]] = ()
    cached = 0
    engines.take_steps()
    began = time.monotonic()
    for repeat in range(repeats):
        prompts = run.prompts(repeat)
        engines.pause_steps()
        answers = generate(prompts, work.output_tokens, run.salt(repeat, way))
        short = [answer.num_tokens for answer in answers if answer.num_tokens != work.output_tokens]
        if short:
            raise EngineFault(f"{work.name}: an answer has {short[0]} tokens; there are {len(short)} such answers")
        seconds.append(max(answer.last_token_s for answer in answers))
        cached = max(cached, sum(answer.cached_tokens for answer in answers))
        first_tokens += [answer.first_token_s for answer in answers]
    median = statistics.median(seconds)
    tokens_out = len(prompts) * work.output_tokens
    tokens_in = sum(len(prompt) for prompt in prompts)
    kinds = engines.take_steps()[-1]
    return {
        "s": round(median, 4),
        "spread_s": [round(min(seconds), 4), round(max(seconds), 4)],
        "output_tok_s": round(tokens_out / median, 2),
        "total_tok_s": round((tokens_in + tokens_out) / median, 2),
        "ttft_p50_s": round(quantile(first_tokens, 0.5), 4),
        "requests": len(prompts),
        "tokens_in": tokens_in,
        "tokens_out": tokens_out,
        "cached_tokens": cached,  # the most that a repeat had
        "repeats_s": [round(each, 4) for each in seconds],
        "seeds": None if run.given is not None else [FIRST_SEED + repeat for repeat in range(repeats)],
        "steps": {kind: totals.means() for kind, totals in sorted(kinds.items())},  # means over all repeats
        "card_state": card.between(began, time.monotonic()),
    }


def _line(run: Run, repeats: int, figures: Mapping[str, Any]) -> str:
    low, high = figures["spread_s"]
    return (
        f"{run.workload.name:<16}{figures['requests']} requests, "
        f"{figures['tokens_in']:,} tokens in ({figures['cached_tokens']:,} cached), {figures['tokens_out']:,} out: "
        f"{figures['s']} s ({low:.2f} to {high:.2f}, {repeats} repeats), "
        f"{figures['output_tok_s']:,} output tok/s, {figures['total_tok_s']:,} in all, "
        f"first token p50 {figures['ttft_p50_s']} s"
    )


def _tell_steps(figures: Mapping[str, Any]) -> None:
    for kind, mean in figures["steps"].items():
        device = "not timed" if mean["device_us"] is None else f"{mean['device_us']:,} us"
        print(
            f"  {kind:<14}{mean['steps']:,} steps of {mean['rows']} rows, {mean['tokens']} tokens: "
            f"{mean['step_us']:,} us, host {mean['host_us']:,} us, device {device}",
            flush=True,
        )
    if (state := figures["card_state"]) is not None:
        print("  card          " + ", ".join(f"{name} {value:g}" for name, value in state.items()), flush=True)
