"""Times an op's cases on a card: graphs of calls over inputs that outgrow the cache, beside the ceilings of the hour.

Ceilings: a copy of 1 GiB (bytes read and written), and a bfloat16 product of 8192^3 of random numbers.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .cases import Case, Peer

_CALLS = 20  # in a graph, at least: a replay costs the host 4 us once
_GRAPH_US = 40_000  # of a graph, about: longer calls are fewer
_ROUNDS = 7
_CACHES = 4  # inputs of a graph, in sizes of the card's cache
_MOST_SETS = 64


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the card does at best, measured just now."""

    copy_gb_s: float
    product_tflop_s: float


def ceilings(device: torch.device) -> Ceilings:
    """Measure them; takes 3 GB of the card for a moment."""
    copied = [torch.randn(1 << 29, device=device, dtype=torch.bfloat16) for _ in range(2)]
    copies = [partial(copied[1].copy_, copied[0])] * 4
    # Outside of a graph, where a copy is a node of another kind, which reached 2,757 instead of 4,286 GB/s.
    copy_us = statistics.median(_timed(copies) for _ in range(_ROUNDS))
    gb_s = 2 * copied.pop().nbytes / copy_us / 1e3
    size = 8192
    a, b, out = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(3))
    product_us = microseconds([partial(torch.mm, a, b, out=out)] * 4)
    return Ceilings(round(gb_s, 1), round(2 * size**3 / product_us / 1e6, 1))


def microseconds(calls: Sequence[Callable[[], object]], rounds: int = _ROUNDS) -> float:
    """The median time of one call, all of them in one graph. They run before it is captured: compiled, warm."""
    torch.cuda.synchronize()  # inputs were made on another stream
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    _timed([graph.replay])
    return statistics.median(_timed([graph.replay]) / len(calls) for _ in range(rounds))


def _timed(calls: Sequence[Callable[[], object]]) -> float:
    """Microseconds of a call on the current stream."""
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for call in calls:
        call()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) * 1e3 / len(calls)


def input_sets(make: Callable[[], tuple[Any, ...]], size_bytes: int) -> list[tuple[Any, ...]]:
    """Inputs made anew until all of them are several times the card's cache."""
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return [make() for _ in range(max(2, min(_MOST_SETS, -(-_CACHES * cache // size_bytes))))]


def calls_over(
    run: Callable[..., object], sets: Sequence[tuple[Any, ...]], count: int = _CALLS
) -> list[Callable[[], object]]:
    """Calls for one graph, at least `count`: every set of inputs in turn."""
    return [partial(run, *sets[at % len(sets)]) for at in range(max(len(sets), count))]


def calls_within(us: float) -> int:
    """Calls of a graph where one takes so many microseconds."""
    return max(1, min(_CALLS, int(_GRAPH_US / max(us, 1.0))))


def too_little_memory(case: Case) -> dict[str, str] | None:
    """What to tell instead of figures where the card has no room for a case's inputs; None where it has."""
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    needed = max(2 * case.size_bytes, min(_MOST_SETS * case.size_bytes, _CACHES * cache))
    free, _ = torch.cuda.mem_get_info()
    free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    if needed < free * 0.9:
        return None
    return {"error": f"needs {needed / 2**30:.1f} GiB of the card, {free / 2**30:.1f} are free"}


def measure(case: Case, limits: Ceilings) -> dict[str, Any]:
    """us, gb_s or tflop_s, of_ceiling (1 is the ceiling); the same of each peer, or what kept it from running, and
    `of_best_peer`: the fastest one's time over ours.
    """
    sets = input_sets(case.make, case.size_bytes)
    found = _figures(case, _time(case.run, sets), limits)
    peers: dict[str, Any] = {}
    for name, peer in case.peers.items():
        try:
            run, theirs = (peer.run, [peer.prepare(*one) for one in sets]) if isinstance(peer, Peer) else (peer, sets)
            peers[name] = _figures(case, _time(run, theirs), limits)
        except (RuntimeError, ValueError, TypeError, AttributeError, ImportError) as exc:  # another project's: told
            peers[name] = {"error": (str(exc) or type(exc).__name__).splitlines()[0][:200]}
    times = [peer["us"] for peer in peers.values() if "us" in peer]
    if times:
        found["of_best_peer"] = round(min(times) / found["us"], 3)
    return found | ({"peers": peers} if peers else {})


def _time(run: Callable[..., object], sets: Sequence[tuple[Any, ...]]) -> float:
    first = partial(run, *sets[0])
    first()  # compiles
    return microseconds(calls_over(run, sets, calls_within(_timed([first]))))


def _figures(case: Case, us: float, limits: Ceilings) -> dict[str, Any]:
    found: dict[str, Any] = {"us": round(us, 2)}
    if case.flop:
        rate, limit = case.flop / us / 1e6, limits.product_tflop_s
        found["tflop_s"] = round(rate, 1)
    else:
        rate, limit = case.size_bytes / us / 1e3, limits.copy_gb_s
        found["gb_s"] = round(rate, 1)
    return found | {"of_ceiling": round(rate / limit, 4)}
