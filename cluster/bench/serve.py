"""`diptych bench serve`: requests on a schedule against a running server, streamed, with every gap between tokens.

Open loop: a request is sent when its time has come, whatever became of those before it. Arrivals are Poisson's.
"""

from __future__ import annotations

import json
import math
import random
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from diptych.cluster.client.wire import headers
from diptych.cluster.config import api_key
from diptych.protos.errors import StartupError

from .figures import regime, spread, system, write_result
from .fleet import Load, send
from .provenance import CardWatch, provenance
from .stream import Streamed, Target
from .workload import random_prompts, read_prompts

_MODELS_TIMEOUT_S = 10.0
_BUSY = 0.7  # of a core: from here on the client's own queue shows in the gaps


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """The command line, with the URL found."""

    url: str
    model: str | None = None
    requests: int | None = None  # None: 64, or every line of `prompts`
    rate: float = math.inf  # requests per second
    input: int = 128
    output: int = 64
    seed: int = 0
    vocab: int = 30_000
    concurrency: int | None = None
    clients: int = 1  # processes
    prompts: Path | None = None
    timeout_s: float = 600.0
    json_out: Path | None = None


def run_serve_bench(options: ServeOptions) -> int:
    """Measure and print; exit code 1 when not one request was answered whole. Raises StartupError."""
    if not options.rate > 0:
        raise StartupError(f"--rate {options.rate:g}: write requests per second, or inf for all at once")
    target = Target.parse(options.url, api_key())
    prompts = _prompts(options)
    model = options.model or _first_model(options.url)
    bodies = [_body(model, prompt, options.output) for prompt in prompts]
    load = Load(
        target=target,
        bodies=bodies,
        offsets=arrivals(len(bodies), options.rate, options.seed),
        concurrency=options.concurrency,
        timeout_s=options.timeout_s,
    )
    print(f"{options.url}, {model}; client: {regime()}")
    print(f"{len(bodies)} requests, {_load(options)}, {options.output} tokens out each, greedy, end tokens ignored")
    with CardWatch() as card:  # of this machine: the server's, where both are one
        began = time.monotonic()
        sent = send(load, options.clients)
        state = card.between(began, time.monotonic())
    result: dict[str, Any] = {
        "client": system(),
        "url": options.url,
        "model": model,
        "requests": len(bodies),
        "rate": "inf" if math.isinf(options.rate) else options.rate,
        "concurrency": options.concurrency,
        "input": options.input if options.prompts is None else options.prompts.name,
        "output": options.output,
        "seed": options.seed,
    }
    result |= summary(sent.outcomes, options.output)
    result["send_late_ms"] = spread([1e3 * late for late in sent.late_s])
    result["client_cpu"] = sent.cpu
    _print(result)
    result |= provenance() | {"card_state": state}
    write_result(result, options.json_out)
    return 0 if result["completed"] else 1


def arrivals(count: int, rate: float, seed: int) -> list[float]:
    """Seconds from the start at which requests are sent: a Poisson process; all 0 at an infinite rate."""
    if math.isinf(rate):
        return [0.0] * count
    rng = random.Random(f"arrivals {seed}")
    times, now = [], 0.0
    for _ in range(count):
        times.append(now)
        now += rng.expovariate(rate)
    return times


def summary(outcomes: Sequence[Streamed], output: int) -> dict[str, Any]:
    """Figures over the requests that were answered whole, and a count of the others by reason."""
    failures: Counter[str] = Counter()
    whole = []
    for outcome in outcomes:
        if outcome.failure:
            failures[outcome.failure] += 1
        elif outcome.completion_tokens != output or not outcome.texts:
            failures[f"{outcome.completion_tokens} tokens instead of {output}"] += 1
        else:
            whole.append(outcome)
    gaps = [1e3 * (later - earlier) for outcome in whole for earlier, later in pairwise(outcome.texts)]
    per_token = [
        1e3 * (outcome.texts[-1] - outcome.texts[0]) / (outcome.completion_tokens - 1)
        for outcome in whole
        if outcome.completion_tokens > 1
    ]
    tokens_out = sum(outcome.completion_tokens for outcome in whole)
    tokens_in = sum(outcome.prompt_tokens for outcome in whole)
    duration_s = max((o.texts[-1] for o in whole), default=0.0) - min((o.sent for o in outcomes), default=0.0)
    rates: dict[str, float | None] = {"duration_s": None, "requests_s": None, "output_tok_s": None, "total_tok_s": None}
    if whole and duration_s > 0:
        rates = {
            "duration_s": round(duration_s, 3),
            "requests_s": round(len(whole) / duration_s, 3),
            "output_tok_s": round(tokens_out / duration_s, 1),
            "total_tok_s": round((tokens_in + tokens_out) / duration_s, 1),
        }
    return {
        "completed": len(whole),
        "failed": len(outcomes) - len(whole),
        "failures": dict(failures),
        **rates,
        "events": sum(len(outcome.texts) for outcome in whole),  # that brought text; gaps are between these
        "ttft_ms": spread([1e3 * (outcome.texts[0] - outcome.sent) for outcome in whole]),
        "itl_ms": spread(gaps),
        "tpot_ms": spread(per_token),
    }


def _prompts(options: ServeOptions) -> Sequence[list[int] | str]:
    if options.prompts is None:
        return random_prompts(options.requests or 64, options.input, vocab_size=options.vocab, seed=options.seed)
    given = read_prompts(options.prompts)
    if options.requests is not None and options.requests > len(given):
        raise StartupError(f"--requests {options.requests}, and {options.prompts} has {len(given)} lines")
    return given[: options.requests]


def _body(model: str, prompt: list[int] | str, output: int) -> bytes:
    fields = {
        "model": model,
        "prompt": prompt,
        "max_tokens": output,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(fields).encode()


def _first_model(url: str) -> str:
    base = url.rstrip("/").removesuffix("/v1")
    try:
        request = urllib.request.Request(f"{base}/v1/models", headers=headers("", api_key()))
        with urllib.request.urlopen(request, timeout=_MODELS_TIMEOUT_S) as reply:
            return str(json.load(reply)["data"][0]["id"])
    except (OSError, urllib.error.URLError) as exc:
        raise StartupError(f"{url} does not answer: {exc}") from exc
    except (ValueError, KeyError, IndexError, TypeError) as exc:
        raise StartupError(f"{url} serves no model: name one with --model") from exc


def _load(options: ServeOptions) -> str:
    rate = "all at once" if math.isinf(options.rate) else f"Poisson arrivals, {options.rate:g} a second"
    return rate if options.concurrency is None else f"{rate}, at most {options.concurrency} in work"


def _print(result: dict[str, Any]) -> None:
    print(f"{result['completed']} whole, {result['failed']} failed")
    for why, times in result["failures"].items():
        print(f"  {times} x {why}")
    if result["duration_s"] is not None:
        print(
            f"{result['duration_s']} s, {result['requests_s']} requests/s, {result['output_tok_s']:,} output tok/s, "
            f"{result['total_tok_s']:,} in all; text came in {result['events']:,} events"
        )
    print(f"{'ms':<22}{'p50':>10}{'p90':>10}{'p99':>10}{'max':>10}")
    rows = {"ttft_ms": "first token", "itl_ms": "between events", "tpot_ms": "per output token"}
    for key, name in (rows | {"send_late_ms": "sent late by"}).items():
        if result[key] is not None:
            print(f"{name:<22}" + "".join(f"{value:>10,.2f}" for value in result[key].values()))
    busiest = max(result["client_cpu"])
    print(f"client: {len(result['client_cpu'])} processes, the busiest used {busiest:.0%} of a core")
    if busiest > _BUSY:
        print("the client may be what is measured: give it more processes with --clients")
