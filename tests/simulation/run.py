"""Seeds over processes: `python tests/simulation/run.py --seeds 0:200 --workers 2`.

Prints the rate and what was injected. Ends with 1 and the command that repeats it when a seed breaks an invariant, or
when one that is run twice (every 500th) does not leave the same trace.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterator

import world

REPLAY_EVERY = 500
REPLAYED = "replay"
Job = tuple[int, int, int, int | None]  # seed, requests, faults, depth
Row = tuple[int, str, str, Counter[str], Counter[str], float]  # seed, violation, trace, outcomes, counters, seconds


def one(job: Job) -> Row:
    """A seed's run: words of a violation or none, and seconds of this process's time."""
    seed, requests, faults, depth = job
    began = time.process_time()
    outcome = world.run(seed, requests=requests, faults=faults, depth=depth)
    words = str(outcome.violation) if outcome.violation is not None else ""
    if not words and seed % REPLAY_EVERY == 0:
        again = world.run(seed, requests=requests, faults=faults, depth=depth)
        if again.trace != outcome.trace:
            words = f"{REPLAYED}: the trace was {outcome.trace} and then {again.trace}"
    return seed, words, outcome.trace, outcome.outcomes, outcome.counters, time.process_time() - began


def rows(jobs: list[Job], workers: int) -> Iterator[Row]:
    """In any order."""
    if workers == 1:
        yield from map(one, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap_unordered(one, jobs, chunksize=10)


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description="Simulate the cluster under faults, seed by seed.")
    parser.add_argument("--seeds", default="0:200", help="first:last+1")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--requests", type=int, default=50, help="of each seed, at least")
    parser.add_argument("--faults", type=int, default=3, help="of each seed, at least")
    parser.add_argument("--depth", type=int, choices=(1, 2), help="of all runners; by default each draws its own")
    options = parser.parse_args()
    first, _, stop = options.seeds.partition(":")
    seeds = range(int(first), int(stop or int(first) + 1))
    jobs = [(seed, options.requests, options.faults, options.depth) for seed in seeds]
    began = time.monotonic()
    outcomes: Counter[str] = Counter()
    counters: Counter[str] = Counter()
    broken: list[tuple[int, str]] = []
    busy_s = 0.0
    traces: dict[int, str] = {}
    for seed, words, trace, ended, counted, seconds in rows(jobs, options.workers):
        traces[seed] = trace
        outcomes += ended
        counters += counted
        busy_s += seconds
        if words:
            broken.append((seed, words))
            print(f"seed {seed}: {words}", flush=True)
    took = time.monotonic() - began
    print(
        f"{len(jobs)} seeds in {took:.1f} s, {len(jobs) / took:.2f} a second, {busy_s / len(jobs):.3f} s of a core each"
    )
    print("calls:", ", ".join(f"{name} {count}" for name, count in sorted(outcomes.items())))
    print("faults:", ", ".join(f"{name[6:]} {n}" for name, n in sorted(counters.items()) if name.startswith("fault ")))
    print("seen:", ", ".join(f"{name} {n}" for name, n in sorted(counters.items()) if not name.startswith("fault ")))
    num_twice = sum(seed % REPLAY_EVERY == 0 for seed in traces)
    differing = sum(words.startswith(REPLAYED) for _, words in broken)
    together = hashlib.blake2b("".join(traces[seed] for seed in sorted(traces)).encode(), digest_size=8).hexdigest()
    print(f"replays: {num_twice} seeds run twice, {differing} with another trace; all traces together: {together}")
    for seed, _ in sorted(broken)[:10]:
        depth = "" if options.depth is None else f" --depth {options.depth}"
        print(f"again: python tests/simulation/run.py --workers 1 --seeds {seed}{depth}")
    print(f"violations: {len(broken)}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
