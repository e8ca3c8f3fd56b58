"""What the gateway costs, beside a bare call and beside LiteLLM's Router.

Regime: `Gateway` as an object in a process of its own on one core; a provider on the same host that only repeats
itself, on another core where there is one; one request at a time, rounds of all systems in turn, CPU by the process's
own clock (kernel included), latencies added over a bare httpx2 call of the same round, medians over the rounds.
LiteLLM's Router runs in its own environment, which is made in build/. `front` is the server with such a gateway, asked
over HTTP by another process: its CPU, the client's latencies. Exit code 1 if a bound is missed.
Run: python bench/gateway.py [--rounds 9] [--wait-s 600] [--litellm 1.109.1 | --without-litellm] | --page RESULT.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from diptych.cluster.bench.provenance import provenance

ROOT = Path(__file__).resolve().parents[1]
PARTS = Path(__file__).with_name("gateway_parts.py")
PAGE = ROOT / "docs" / "concepts" / "gateway-cost.md"
LITELLM = "1.109.1"
CALLS = {"whole": 300, "stream": 60, "paced": 12}
TITLES = {
    "whole": "whole answer",
    "stream": "stream of 64 chunks, as fast as they are read",
    "paced": "stream of 64 chunks, one each 2 ms",
}
# What it must do, from the table printed: (what, figure) to (bound, whether it is the least).
BOUNDS = {
    ("whole", "cpu_ms"): (2.0, False),
    ("whole", "added_p50_ms"): (1.5, False),
    ("whole", "added_p99_ms"): (4.0, False),
    ("stream", "cpu_ms"): (4.0, False),
    ("stream", "added_p50_ms"): (1.5, False),
    ("stream", "added_p99_ms"): (4.0, False),
    ("stream", "added_first_p50_ms"): (1.5, False),
    ("stream", "added_first_p99_ms"): (4.0, False),
    ("whole", "times_less_cpu"): (5.0, True),
    ("stream", "times_less_cpu"): (5.0, True),
    ("import", "cpu_s"): (1.0, False),
    ("import", "network_calls"): (0, False),
    ("import", "torch"): (0, False),
}
# Runs in the interpreter that is asked about: CPU of an import, and what it reached for.
_IMPORT = """
import json, sys, time
calls = []
def hook(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        calls.append(event)
        raise OSError("no network while importing")
sys.addaudithook(hook)
before = time.process_time()
{statement}
cpu = time.process_time() - before
print(json.dumps({{"cpu_s": cpu, "network_calls": len(calls), "torch": "torch" in sys.modules,
                   "modules": len(sys.modules)}}))
"""
_OURS = "from diptych.cluster.gateway.gateway import Gateway"
_THEIRS = "from litellm import Router"


class Child:
    """A part of gateway_parts.py, pinned to a core; ends with this process's hold on its input."""

    def __init__(self, python: str, *words: str) -> None:
        self._process = subprocess.Popen(
            [python, str(PARTS), *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sys.stderr, text=True
        )
        self.name = words[0]
        self.said = self._line()

    def ask(self, what: str, count: int) -> dict[str, Any]:
        told: dict[str, Any] = self.line(f"{what} {count}")
        if told["wrong"]:
            raise SystemExit(f"{self.name}: {told['wrong']} of {count} answers of {what!r} were not whole")
        return told

    def line(self, words: str) -> Any:
        """What it answers to a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{words}\n")
        self._process.stdin.flush()
        return self._line()

    def rss_mib(self) -> int:
        fields = Path(f"/proc/{self._process.pid}/statm").read_text().split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") >> 20

    def end(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _line(self) -> Any:
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            with contextlib.suppress(ValueError):  # libraries greet on the output, too
                return json.loads(line)
        raise SystemExit(f"{self.name} has ended with {self._process.wait()}")


class Front:
    """The HTTP front in one process and who asks it in another: the first one's CPU, the second one's clock."""

    def __init__(self, server: Child, client: Child) -> None:
        self.said = {"rss_mib": server.rss_mib()}
        self._server = server
        self._client = client

    def ask(self, what: str, count: int) -> dict[str, Any]:
        before = self._server.line("cpu")
        told = self._client.ask(what, count)
        told["cpu_ms"] = (self._server.line("cpu") - before) / count * 1e3
        return told


@contextlib.contextmanager
def children(pythons: Mapping[str, str]) -> Iterator[dict[str, Child | Front]]:
    """The systems by their names, asking one provider."""
    cores = sorted(os.sched_getaffinity(0))
    first, last = str(cores[0]), str(cores[-1])
    started: list[Child] = []
    systems: dict[str, Child | Front] = {}
    try:
        started.append(provider := Child(sys.executable, "echo", last))
        address = f"http://127.0.0.1:{provider.said}/v1"
        for name, python in pythons.items():
            started.append(child := Child(python, name, first, address))
            systems[name] = child
            if name == "front":
                started.append(client := Child(sys.executable, "bare", last, child.said))
                systems[name] = Front(child, client)
        yield systems
    finally:
        for child in reversed(started):
            child.end()


def quantile(values: Sequence[float], share: float) -> float:
    """The nearest rank."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def figures(told: Mapping[str, Any]) -> dict[str, float]:
    """Of one system in one round."""
    return {
        "cpu_ms": told["cpu_ms"],
        "p50_ms": quantile(told["total_ms"], 0.5),
        "p99_ms": quantile(told["total_ms"], 0.99),
        "first_p50_ms": quantile(told["first_ms"], 0.5),
        "first_p99_ms": quantile(told["first_ms"], 0.99),
    }


def summary(rounds: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Of each system: medians over the rounds of its figures and of what it adds over the bare call of its round; of
    the gateway how many times less CPU than LiteLLM's it took.
    """
    found: dict[str, dict[str, float]] = {}
    for name in rounds[0]:
        found[name] = {key: statistics.median(one[name][key] for one in rounds) for key in rounds[0][name]}
        if name != "bare":
            for key in [key for key in found[name] if key.endswith("_ms")]:
                added = [one[name][key] - one["bare"][key] for one in rounds]
                found[name][f"added_{key}"] = statistics.median(added)
    for name in ("gateway", "relay", "front"):
        if "litellm" in found and name in found:
            ratios = [one["litellm"]["cpu_ms"] / one[name]["cpu_ms"] for one in rounds]
            found[name]["times_less_cpu"] = statistics.median(ratios)
    return {name: {key: round(value, 3) for key, value in row.items()} for name, row in found.items()}


def missed(results: Mapping[str, Mapping[str, Any]], imports: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The bounds that do not hold, as sentences."""
    told = {what: row["gateway"] for what, row in results.items()} | {"import": imports["gateway"]}
    found = []
    for (what, figure), (bound, is_least) in BOUNDS.items():
        value = told[what].get(figure)
        if value is not None and (value < bound if is_least else value > bound):
            found.append(f"{what}: {figure} is {value}, the bound is {bound}")
    return found


def measure(systems: Mapping[str, Child | Front], rounds: int) -> dict[str, list[dict[str, dict[str, float]]]]:
    """Of each kind of request the rounds; each round begins with another system."""
    found: dict[str, list[dict[str, dict[str, float]]]] = {what: [] for what in CALLS}
    names = list(systems)
    for number in range(rounds):
        turn = names[number % len(names) :] + names[: number % len(names)]
        for what, count in CALLS.items():
            told = {
                name: figures(systems[name].ask(what, count)) for name in turn if (name, what) != ("relay", "whole")
            }
            found[what].append({name: told[name] for name in names if name in told})
    return found


def import_cost(python: str, statement: str, **environ: str) -> dict[str, Any]:
    """The least of three: an import reads files, and the first reads them from the disk."""
    runs = []
    for _ in range(3):
        done = subprocess.run(
            [python, "-c", _IMPORT.format(statement=statement)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            check=True,
            env={**os.environ, **environ},
        )
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    best: dict[str, Any] = min(runs, key=lambda run: run["cpu_s"])
    return {**best, "cpu_s": round(best["cpu_s"], 3)}


def litellm_python(version: str) -> tuple[str, list[str]]:
    """An interpreter that has it, and which of its bounds an index could not keep. Made once, in build/."""
    folder = ROOT / "build" / f"litellm-{version}"
    python, told = folder / "bin" / "python", folder / "unkept.json"
    if told.exists():
        return str(python), json.loads(told.read_text())
    print(f"making {folder.relative_to(ROOT)}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    unkept: list[str] = []
    if _pip(python, f"litellm=={version}"):
        _install_without_bounds(python, version, unkept)
    told.write_text(json.dumps(unkept))
    return str(python), unkept


def _install_without_bounds(python: Path, version: str, unkept: list[str]) -> None:
    """An index may lack the newest release that it asks for (certificates, say): such a bound is let go, and told."""
    if wrong := _pip(python, "--no-deps", f"litellm=={version}"):
        raise SystemExit(f"LiteLLM {version} cannot be installed: {wrong}")
    ask = "import importlib.metadata, json; print(json.dumps(importlib.metadata.requires('litellm')))"
    done = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True)
    needs = [need for need in json.loads(done.stdout) if "extra ==" not in need]
    while wrong := _pip(python, *needs):
        lacking = re.search(r"No matching distribution found for ([A-Za-z0-9_.-]+)", wrong)
        keep = [need for need in needs if lacking and not re.match(rf"{re.escape(lacking[1])}\b", need)]
        if lacking is None or len(keep) == len(needs) or lacking[1] in needs:
            raise SystemExit(f"what LiteLLM {version} needs cannot be installed: {wrong}")
        unkept += [need for need in needs if need not in keep]
        needs = [*keep, lacking[1]]


def _pip(python: Path, *words: str) -> str:
    """Empty, or what went wrong."""
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stderr[-2000:] if done.returncode else ""


def wait_until_quiet(most_load: float, wait_s: float) -> float:
    """The load average when it began: below `most_load`, or whatever it is after `wait_s`."""
    end = time.monotonic() + wait_s
    while os.getloadavg()[0] > most_load and time.monotonic() < end:
        time.sleep(5)
    return round(os.getloadavg()[0], 2)


def table(results: Mapping[str, Mapping[str, Mapping[str, float]]], imports: Mapping[str, Mapping[str, Any]]) -> str:
    """In Markdown, as the documentation has it."""
    lines = []
    for what, rows in results.items():
        lines += [f"{TITLES[what]}:", ""]
        lines += [
            "| | CPU, ms | LiteLLM's over it | p50, ms | p99 | added p50 | added p99 | to the first text p50 | p99 |"
        ]
        lines += ["|---|---|---|---|---|---|---|---|---|"]
        for name, row in rows.items():
            keys = "cpu times_less_cpu p50 p99 added_p50 added_p99 added_first_p50 added_first_p99".split()
            found = (row.get(key, row.get(f"{key}_ms")) for key in keys)
            cells = ["-" if value is None else f"{value:.2f}" for value in found]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    lines += ["| import | CPU, s | network calls | modules |", "|---|---|---|---|"]
    for name, row in imports.items():
        lines.append(f"| {name} | {row['cpu_s']:.2f} | {row['network_calls']} | {row['modules']} |")
    return "\n".join(lines)


def page_figures(told: Mapping[str, Any]) -> str:
    """What the documentation says of a result."""
    machine, load, config = told["machine"], told["load"], told["config"]
    return (
        f"{told['date'][:10]}, {machine['cores']} cores of {machine['cpu']}, load average {load['before']:.1f} before "
        f"and {load['after']:.1f} after, rounds: {config['rounds']}, LiteLLM {config['litellm']}.\n\n"
        + table(told["results"], told["imports"])
        + "\n"
    )


def write_page(told: Mapping[str, Any], page: Path) -> None:
    """Between the two marks of the page. Raises ValueError where they are not there."""
    text = page.read_text()
    head, begin, rest = text.partition("<!-- figures -->\n")
    _, end, tail = rest.partition("<!-- end of figures -->")
    if not begin or not end:
        raise ValueError(f"{page.name} has no marks for figures")
    page.write_text(f"{head}{begin}{page_figures(told)}{end}{tail}")


def new_file(folder: Path) -> Path:
    """A second run of a day has a file of its own: results are never written over."""
    day, count = datetime.now(UTC).strftime("%Y-%m-%d"), 1
    path = folder / f"{day}_gateway.json"
    while path.exists():
        count += 1
        path = folder / f"{day}_gateway_{count}.json"
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--litellm", default=LITELLM, help="the version that is installed into build/")
    parser.add_argument("--litellm-python", help="an interpreter that has it already")
    parser.add_argument("--without-litellm", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="the folder for the result")
    parser.add_argument("--most-load", type=float, default=1.0, help="begin when the load average is below this")
    parser.add_argument("--wait-s", type=float, default=0.0, help="how long to wait for that")
    parser.add_argument("--page", type=Path, help="measure nothing: put the tables of this result into docs/")
    args = parser.parse_args()
    if args.page is not None:
        write_page(json.loads(args.page.read_text()), PAGE)
        return
    pythons, unkept = dict.fromkeys(("bare", "gateway", "relay", "front"), sys.executable), []
    imports = {"gateway": import_cost(sys.executable, _OURS)}
    if not args.without_litellm:
        given = args.litellm_python
        pythons["litellm"], unkept = (given, []) if given else litellm_python(args.litellm)
        imports["litellm"] = import_cost(pythons["litellm"], _THEIRS)
        imports["litellm, price map from its package"] = import_cost(
            pythons["litellm"], _THEIRS, LITELLM_LOCAL_MODEL_COST_MAP="True"
        )
    load = wait_until_quiet(args.most_load, args.wait_s)
    with children(pythons) as systems:
        rss = {name: child.said["rss_mib"] for name, child in systems.items()}
        rounds = measure(systems, args.rounds)
    results = {what: summary(told) for what, told in rounds.items()}
    print(table(results, imports))
    told = {
        "bench": "gateway",
        "config": {"rounds": args.rounds, "calls": CALLS, "litellm": args.litellm, "bounds_not_kept": unkept},
        "load": {"before": load, "after": round(os.getloadavg()[0], 2)},
        **provenance(),
        "results": results,
        "imports": imports,
        "rss_mib": rss,
        "rounds": rounds,
        "missed": missed(results, imports),
    }
    file = new_file(args.out)
    file.write_text(json.dumps(told, indent=1) + "\n")
    print(f"\nwritten: {file.name}")
    print(json.dumps({key: told[key] for key in ("bench", "load", "results", "imports", "missed")}))
    sys.exit("\n".join(told["missed"]) or 0)


if __name__ == "__main__":
    main()
