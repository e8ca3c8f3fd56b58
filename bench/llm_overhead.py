"""What a call costs beside the model: CPU of `llm.call`, of a bare HTTP client, of Instructor and of Mirascope.

Regime: each system in a process of its own, all on one core; a provider on the same host that only repeats itself, with
as many headers as OpenAI sends, on another core where there is one; one call at a time, rounds of all systems in turn,
each round beginning with another one. CPU is the process's own (all threads, kernel included), medians over the
rounds; ratios are made within a round. Kinds: plain text and a result of three fields, synchronous and with asyncio.
bare        httpx2 and json; of the typed kind also pydantic on the answer's text
instructor  on OpenAI's client, in its default mode; of plain text it adds next to nothing to that client
mirascope   Chat Completions, on OpenAI's client
Instructor and Mirascope are installed into environments of their own in build/, once. The import of `diptych.llm` is
measured in a fresh interpreter.
Run: python bench/llm_overhead.py [--rounds 9] [--calls 200] [--python mirascope=PATH ...] [--without NAME ...] [--json
FILE]; exit code 1 if a bound is missed
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diptych.cluster.bench.figures import regime, save_result
from diptych.cluster.bench.provenance import provenance

ROOT = Path(__file__).resolve().parents[1]
PARTS = Path(__file__).with_name("llm_overhead_parts.py")
KINDS = ("plain_sync", "typed_sync", "plain_aio", "typed_aio")
PEERS = {"instructor": ("instructor==1.17.0",), "mirascope": ("mirascope[openai]==2.8.2",)}
TOLD = ("instructor", "mirascope", "openai", "pydantic", "httpx", "httpx2")  # whose versions count
# The most, of ours.
MOST_ADDED_MS = 1.0  # over the bare client
MOST_SHARE = 0.5  # of what a peer adds over it
MOST_IMPORT_S = 0.4
MOST_IMPORT_MIB = 60
_IMPORT = """
import json, resource, sys, time
before = time.process_time()
import diptych.llm
cpu = time.process_time() - before
rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
heavy = [name for name in ("torch", "ray", "numpy", "openai", "anthropic") if name in sys.modules]
print(json.dumps({"cpu_s": round(cpu, 3), "rss_mib": round(rss, 1), "modules": len(sys.modules), "heavy": heavy}))
"""
_VERSIONS = """
import importlib.metadata, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


class Child:
    """A part of llm_overhead_parts.py, on one core; ends with this process's hold on its input."""

    def __init__(self, python: str, *words: str) -> None:
        self._process = subprocess.Popen(
            [python, str(PARTS), *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sys.stderr, text=True
        )
        self.name = words[0]
        self.said = self._line()

    def ask(self, kind: str, count: int) -> dict[str, float]:
        """So many calls."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{kind} {count}\n")
        self._process.stdin.flush()
        told: dict[str, float] = self._line()
        if told["wrong"]:
            raise SystemExit(f"{self.name}: {told['wrong']} of {count} answers of {kind!r} were wrong")
        return told

    def end(self) -> None:
        """And waits for it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _line(self) -> Any:
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            with contextlib.suppress(ValueError):  # libraries greet on the output, too
                return json.loads(line)
        raise SystemExit(f"{self.name} has ended with {self._process.wait()}")


@contextlib.contextmanager
def children(pythons: Mapping[str, str]) -> Iterator[dict[str, Child]]:
    """The systems by their names, asking one provider."""
    cores = sorted(os.sched_getaffinity(0))
    started: list[Child] = []
    try:
        started.append(provider := Child(sys.executable, "echo", str(cores[-1])))
        address = f"http://127.0.0.1:{provider.said}/v1"
        for name, python in pythons.items():
            started.append(Child(python, name, str(cores[0]), address))
        yield {child.name: child for child in started[1:]}
    finally:
        for child in reversed(started):
            child.end()


def peer_python(name: str) -> str:
    """An interpreter that has it, made once."""
    folder = ROOT / "build" / f"llm-{PEERS[name][0].replace('==', '-').replace('[openai]', '')}"
    python, is_made = folder / "bin" / "python", folder / "made"
    if not is_made.exists():
        print(f"making {folder.relative_to(ROOT)}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PEERS[name]], check=True)
        is_made.touch()
    return str(python)


def said_by(python: str, script: str, *words: str) -> Any:
    """The last line of a script's output."""
    done = subprocess.run([python, "-c", script, *words], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def import_cost() -> dict[str, Any]:
    """The least of five: an import reads files, and the first reads them from the disk."""
    best: dict[str, Any] = min((said_by(sys.executable, _IMPORT) for _ in range(5)), key=lambda run: run["cpu_s"])
    return best


Round = dict[str, dict[str, dict[str, float]]]  # kind, system, figure


def measure(systems: Mapping[str, Child], rounds: int, calls: int) -> list[Round]:
    """Each round begins with another system."""
    names, found = list(systems), list[Round]()
    for number in range(rounds):
        at = number % len(names)
        turn = [*names[at:], *names[:at]]
        found.append({kind: {name: systems[name].ask(kind, calls) for name in turn} for kind in KINDS})
    return found


def summary(rounds: Sequence[Round]) -> dict[str, dict[str, dict[str, float]]]:
    """Of each kind and system, medians over the rounds: CPU, its spread, what it adds over the bare client of its
    round, how many times ours it takes, and of peers which share of what they add ours adds.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for kind in rounds[0]:
        rows = [one[kind] for one in rounds]
        found[kind] = {}
        for name in rows[0]:
            cpu = [row[name]["cpu_ms"] for row in rows]
            figures = {"cpu_ms": statistics.median(cpu), "least_ms": min(cpu), "most_ms": max(cpu)}
            figures["wall_ms"] = statistics.median(row[name]["wall_ms"] for row in rows)
            figures["added_ms"] = statistics.median(row[name]["cpu_ms"] - row["bare"]["cpu_ms"] for row in rows)
            figures["times_ours"] = statistics.median(row[name]["cpu_ms"] / row["ours"]["cpu_ms"] for row in rows)
            if name in PEERS:
                figures["share"] = statistics.median(_share(row, name) for row in rows)
            found[kind][name] = {key: round(value, 3) for key, value in figures.items()}
    return found


def _share(row: Mapping[str, Mapping[str, float]], peer: str) -> float:
    bare = row["bare"]["cpu_ms"]
    return (row["ours"]["cpu_ms"] - bare) / max(row[peer]["cpu_ms"] - bare, 1e-6)


def missed(results: Mapping[str, Mapping[str, Mapping[str, float]]], imported: Mapping[str, Any]) -> list[str]:
    """The bounds that do not hold, as sentences."""
    found = []
    for kind, rows in results.items():
        added = rows["ours"]["added_ms"]
        if added > MOST_ADDED_MS:
            found.append(f"{kind}: a call adds {added} ms to the bare client's, the bound is {MOST_ADDED_MS}")
        for name, row in rows.items():
            if name in PEERS and row["share"] > MOST_SHARE:
                found.append(f"{kind}: a call adds {row['share']} of what {name}'s adds, the bound is {MOST_SHARE}")
    if imported["cpu_s"] > MOST_IMPORT_S:
        found.append(f"the import takes {imported['cpu_s']} s, the bound is {MOST_IMPORT_S}")
    if imported["rss_mib"] > MOST_IMPORT_MIB:
        found.append(f"the import takes {imported['rss_mib']} MiB, the bound is {MOST_IMPORT_MIB}")
    if imported["heavy"]:
        found.append(f"the import loads {', '.join(imported['heavy'])}")
    return found


def table(results: Mapping[str, Mapping[str, Mapping[str, float]]], imported: Mapping[str, Any]) -> str:
    """In Markdown."""
    names = list(next(iter(results.values())))
    peers = [name for name in names if name in PEERS]
    heads = [*names, "ours over bare", *(f"of what {name} adds" for name in peers)]
    lines = ["| CPU of a call, ms (times ours) | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for kind, rows in results.items():
        cells = [f"{rows[name]['cpu_ms']:.2f} ({rows[name]['times_ours']:.2f})" for name in names]
        cells += [f"{rows['ours']['added_ms']:+.2f}", *(f"{rows[name]['share']:.2f}" for name in peers)]
        lines.append(f"| {kind.replace('_', ', ')} | {' | '.join(cells)} |")
    heavy = ", ".join(imported["heavy"]) or "no torch, no ray, no client of a provider"
    lines += ["", f"import diptych.llm: {imported['cpu_s']:.2f} s of CPU, {imported['rss_mib']} MiB, {heavy}"]
    return "\n".join(lines)


def main() -> int:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=200, help="of each kind, system and round")
    parser.add_argument(
        "--python", action="append", default=[], metavar="NAME=PATH", help="which has that peer already"
    )
    parser.add_argument("--without", action="append", default=[], choices=list(PEERS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    given = dict(words.split("=", 1) for words in options.python)
    if unknown := given.keys() - PEERS.keys():
        parser.error(f"--python: there is no peer {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
    head = regime()
    pythons = dict.fromkeys(("bare", "ours"), sys.executable)
    pythons |= {name: given.get(name) or peer_python(name) for name in PEERS if name not in options.without}
    imported = import_cost()
    with children(pythons) as systems:
        rss = {name: child.said["rss_mib"] for name, child in systems.items()}
        rounds = measure(systems, options.rounds, options.calls)
    results = summary(rounds)
    print(f"{head}\n\n{table(results, imported)}\n")
    wrong = missed(results, imported)
    result = {
        "bench": "llm_overhead",
        "config": {"rounds": options.rounds, "calls": options.calls, "load_average": round(os.getloadavg()[0], 1)},
        **provenance(),
        "peers": {name: said_by(python, _VERSIONS, *TOLD) for name, python in pythons.items() if name in PEERS},
        "import": imported,
        "results": results,
        "rss_mib": rss,
        "rounds": rounds,
        "missed": wrong,
    }
    save_result(result, options.json)
    print(json.dumps({name: value for name, value in result.items() if name != "rounds"}))
    for words in wrong:
        print(words, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
