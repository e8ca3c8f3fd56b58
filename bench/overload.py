"""What a cluster does under more than it can: goodput, refusals and recovery (R14), and another tenant's share (R15).

Regime: the shipped binary with one prefill and one decode engine of the echo model (a step takes 5 ms, nothing is
computed), few enough seats that the engines and not the cores are the limit; clients in this process, open loop,
connections kept alive. Run: python bench/overload.py [--seconds 60] [--into FILE]; exit code 1 if a bound is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import uvloop

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests" / "exam"))

import rig as exam  # noqa: E402 - a script beside the tests, no package
from procfs import descendants  # noqa: E402

TOKENS = 128
PROMPT = "the quick brown fox says hello to the world"
WARM_UP_S = 3.0
MOST_REFUSED_S = 0.1
LEAST_GOODPUT = 0.8
MOST_RECOVERY_S = 10.0
MOST_SLOWER = 1.5
LEAST_OK = 0.99


@dataclass(slots=True)
class Outcome:
    """One request. Times in seconds on one clock; status 0: no answer."""

    sent: float
    took: float
    status: int
    retry_after: float | None


class _Connection(asyncio.Protocol):
    """Kept alive; one request at a time."""

    def __init__(self) -> None:
        self.done: asyncio.Future[tuple[int, float | None]] | None = None
        self.is_open = True
        self._transport: asyncio.Transport | None = None
        self._retry_after: float | None = None
        self._parser = httptools.HttpResponseParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by its type

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        if self.done is not None and not self.done.done():
            self.done.set_result((0, None))

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"retry-after":
            self._retry_after = float(value)

    def on_message_complete(self) -> None:
        status, told, self._retry_after = self._parser.get_status_code(), self._retry_after, None
        self.is_open = self.is_open and self._parser.should_keep_alive()
        self._parser = httptools.HttpResponseParser(self)
        if self.done is not None and not self.done.done():
            self.done.set_result((status, told))

    async def ask(self, request: bytes) -> tuple[int, float | None]:
        self.done = asyncio.get_running_loop().create_future()
        assert self._transport is not None
        self._transport.write(request)
        return await self.done


@dataclass
class Client:
    """Of one tenant. `outcomes` in the order of the ends."""

    url: str
    headers: dict[str, str]
    outcomes: list[Outcome] = field(default_factory=list)
    _idle: deque[_Connection] = field(default_factory=deque)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        assert parts.hostname is not None
        self._address = parts.hostname, parts.port
        body = json.dumps({"model": "echo", "prompt": PROMPT, "max_tokens": TOKENS, "ignore_eos": True}).encode()
        own = "".join(f"{name}: {value}\r\n" for name, value in self.headers.items())
        head = f"POST /v1/completions HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-type: application/json\r\n{own}"
        self._request = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body

    async def ask(self) -> Outcome:
        sent = time.perf_counter()
        try:
            while self._idle and not self._idle[-1].is_open:
                self._idle.pop()
            if self._idle:
                connection = self._idle.pop()
            else:
                _, connection = await asyncio.get_running_loop().create_connection(_Connection, *self._address)
            status, retry_after = await connection.ask(self._request)
            if connection.is_open:
                self._idle.append(connection)
        except OSError:
            status, retry_after = 0, None
        outcome = Outcome(sent, time.perf_counter() - sent, status, retry_after)
        self.outcomes.append(outcome)
        return outcome

    async def openly(self, rate: float, seconds: float, chance: random.Random) -> list[Outcome]:
        """Arrivals as they come, whatever became of those before; returns when all have ended."""
        before, tasks = len(self.outcomes), set[asyncio.Task[Outcome]]()
        began, at = time.perf_counter(), 0.0
        while (at := at + chance.expovariate(rate)) < seconds:
            await asyncio.sleep(began + at - time.perf_counter())
            task = asyncio.create_task(self.ask())
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)
        return self.outcomes[before:]

    async def closed(self, clients: int, seconds: float) -> list[Outcome]:
        """So many at a time, each as soon as the one before has ended."""
        before, end = len(self.outcomes), time.perf_counter() + seconds

        async def one() -> None:
            while time.perf_counter() < end:
                await self.ask()

        await asyncio.gather(*(one() for _ in range(clients)))
        return self.outcomes[before:]


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else float("nan")


def goodput(outcomes: Sequence[Outcome], began: float, ended: float) -> float:
    """Answers per second that came between the two."""
    return sum(one.status == 200 and began <= one.sent + one.took < ended for one in outcomes) / (ended - began)


def strangers_s(cluster: exam.Rig) -> float:
    """Seconds of the cores that neither the cluster nor this process had, since the machine started: what else runs
    takes from both, and no ratio makes up for it.
    """
    tick = os.sysconf("SC_CLK_TCK")
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    user, nice, system, _, _, irq, soft, steal = (int(number) / tick for number in fields)
    own = 0.0
    for pid in {cluster.pid, os.getpid(), *descendants(cluster.pid)}:
        try:
            rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # it ended just now
            continue
        own += (int(rest[11]) + int(rest[12])) / tick
    return user + nice + system + irq + soft + steal - own


async def overload(
    cluster: exam.Rig, client: Client, args: argparse.Namespace, chance: random.Random
) -> dict[str, float]:
    """R14. The peak is the mean of two, before and after: other work on the machine comes and goes."""
    await client.closed(args.seats, WARM_UP_S)
    alone = await client.closed(1, WARM_UP_S)
    began = time.perf_counter()
    peak = await client.closed(args.seats + 2, args.seconds / 3)
    capacity = goodput(peak, began + 1, began + args.seconds / 3)
    busy_before = strangers_s(cluster)
    began = time.perf_counter()
    flood = await client.openly(args.factor * capacity, args.seconds, chance)
    ended = began + args.seconds
    under = goodput(flood, began + 1, ended)
    refusals = [one for one in flood if one.status in (429, 503)]
    usual = percentile([one.took for one in alone], 0.95)
    busy_s, ended_at = strangers_s(cluster) - busy_before, time.perf_counter()
    recovery = await recovered(client, capacity / 2, usual * MOST_SLOWER + 0.05, ended, chance)
    began = time.perf_counter()
    peak = await client.closed(args.seats + 2, args.seconds / 3)
    after = goodput(peak, began + 1, began + args.seconds / 3)
    return {
        "capacity_per_s": capacity,
        "capacity_after_per_s": after,
        "cores_busy_with_others": busy_s / (ended_at - ended + args.seconds),
        "offered_per_s": len(flood) / args.seconds,
        "goodput_per_s": under,
        "goodput_ratio": under / statistics.mean((capacity, after)),
        "refusals": len(refusals),
        "refusal_p50_s": percentile([one.took for one in refusals], 0.5),
        "refusal_p99_s": percentile([one.took for one in refusals], 0.99),
        "refusal_max_s": max((one.took for one in refusals), default=float("nan")),
        "without_retry_after": sum(one.retry_after is None for one in refusals),
        "retry_after_p50_s": percentile([one.retry_after or 0 for one in refusals], 0.5),
        "answered_wait_p50_s": percentile([one.took for one in flood if one.status == 200], 0.5),
        "other_statuses": sum(one.status not in (200, 429, 503) for one in flood),
        "alone_p95_s": usual,
        "recovery_s": recovery,
    }


async def recovered(client: Client, rate: float, usual: float, ended: float, chance: random.Random) -> float:
    """Seconds since the flood's end until a second's requests are all answered, 95 % of them within `usual`."""
    while (since := time.perf_counter() - ended) < 3 * MOST_RECOVERY_S:
        outcomes = await client.openly(rate, 1.0, chance)
        is_answered = bool(outcomes) and all(one.status == 200 for one in outcomes)
        if is_answered and percentile([one.took for one in outcomes], 0.95) <= usual:
            return since
    return float("inf")


async def share(noisy: Client, quiet: Client, args: argparse.Namespace, capacity: float) -> dict[str, float]:
    """R15: the quiet tenant asks for half of its half."""
    rate = capacity / 4
    before = await quiet.openly(rate, args.seconds / 2, random.Random(5))
    flood = asyncio.create_task(noisy.openly(args.times * capacity / 2, args.seconds / 2 + 2, random.Random(6)))
    await asyncio.sleep(1.0)
    beside = await quiet.openly(rate, args.seconds / 2, random.Random(5))
    others = await flood
    p95 = [percentile([one.took for one in outcomes if one.status == 200], 0.95) for outcomes in (before, beside)]
    statuses = [one.status for one in others]
    return {
        "quiet_per_s": rate,
        "noisy_per_s": args.times * capacity / 2,
        "p95_alone_s": p95[0],
        "p95_beside_s": p95[1],
        "p95_ratio": p95[1] / p95[0],
        "ok_share": sum(one.status == 200 for one in beside) / len(beside),
        "noisy_answered_per_s": statuses.count(200) / (args.seconds / 2 + 2),
        "noisy_429": statuses.count(429),
        "noisy_503": statuses.count(503),
    }


def verdicts(r14: dict[str, float], r15: dict[str, float]) -> list[tuple[str, str, str, bool]]:
    """Row, figure, bound, whether it holds."""
    rows: list[tuple[str, str, str, bool]] = []

    def row(name: str, value: str, bound: str, *, holds: bool) -> None:
        rows.append((name, value, bound, holds))

    row(
        "R14 goodput, of its peak",
        f"{r14['goodput_ratio']:.3f} ({r14['goodput_per_s']:.1f}/s of "
        f"{r14['capacity_per_s']:.1f} and {r14['capacity_after_per_s']:.1f})",
        f">= {LEAST_GOODPUT}",
        holds=r14["goodput_ratio"] >= LEAST_GOODPUT,
    )
    slowest = r14["refusal_p99_s"]
    row(
        "R14 refusals, 99 %",
        f"{1000 * slowest:.1f} ms (p50 {1000 * r14['refusal_p50_s']:.1f}, max {1000 * r14['refusal_max_s']:.1f})",
        f"<= {1000 * MOST_REFUSED_S:.0f} ms",
        holds=slowest <= MOST_REFUSED_S,
    )
    missing = r14["without_retry_after"] + r14["other_statuses"]
    row("R14 refused without Retry-After, or otherwise failed", f"{missing:.0f}", "0", holds=not missing)
    row("R14 normal after", f"{r14['recovery_s']:.1f} s", f"<= {MOST_RECOVERY_S:g} s",
        holds=r14["recovery_s"] <= MOST_RECOVERY_S)  # fmt: skip
    row(
        "R15 p95 beside, of alone",
        f"{r15['p95_ratio']:.2f} ({1000 * r15['p95_beside_s']:.0f} of {1000 * r15['p95_alone_s']:.0f} ms)",
        f"<= {MOST_SLOWER}",
        holds=r15["p95_ratio"] <= MOST_SLOWER,
    )
    row("R15 answered", f"{r15['ok_share']:.4f}", f">= {LEAST_OK}", holds=r15["ok_share"] >= LEAST_OK)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description="Overload and fairness of a served cluster of echo engines.")
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload")
    parser.add_argument("--seats", type=int, default=32, help="router.limits.max_running")
    parser.add_argument("--waiting", type=int, default=64, help="router.limits.max_waiting")
    parser.add_argument("--factor", type=float, default=5.0, help="R14: of the capacity")
    parser.add_argument("--times", type=float, default=20.0, help="R15: of its share")
    parser.add_argument("--into", type=Path, help="write the figures there as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="overload-") as folder:
        limits = {"max_running": args.seats, "max_waiting": args.waiting}
        changes = {"models": {"echo": {"echo": {"step_s": 0.005}}}, "router": {"limits": limits}}
        cluster = exam.start("echo", folder=Path(folder), prefill=1, decode=1, changes=changes)
        try:
            figures = uvloop.run(measure(cluster, args))
        finally:
            exam.stop(cluster)
    rows = verdicts(figures["R14"], figures["R15"])
    width = max(len(row[0]) for row in rows)
    for name, value, bound, holds in rows:
        print(f"{name:<{width}}  {value:<48} {bound:<10} {'holds' if holds else 'MISSED'}")
    print(f"{figures['R14']['cores_busy_with_others']:.1f} of {os.cpu_count()} cores were busy with other work")
    text = json.dumps(figures, indent=1)
    print(text)
    if args.into is not None:
        args.into.write_text(text + "\n", encoding="utf-8")
    return 0 if all(row[3] for row in rows) else 1


async def measure(cluster: exam.Rig, args: argparse.Namespace) -> dict[str, Any]:
    noisy, quiet = (Client(cluster.url, cluster.headers(who)) for who in ("a", "b"))
    r14 = await overload(cluster, noisy, args, random.Random(4))
    await settled(lambda: asyncio.to_thread(cluster.reading))
    r15 = await share(noisy, quiet, args, r14["capacity_per_s"])
    await settled(lambda: asyncio.to_thread(cluster.reading))
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "load_before": os.getloadavg()[2]}
    given = {name: value for name, value in vars(args).items() if name != "into"}
    return {"kind": "overload", "given": given, "machine": machine, "R14": r14, "R15": r15}


async def settled(read: Callable[[], Awaitable[exam.Reading]]) -> None:
    """Nothing may be held once the load is over."""
    async with asyncio.timeout(15):
        while (await read()).leaks(None):  # noqa: ASYNC110 - another process tells it
            await asyncio.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main())
