"""Markdown tables of what bench/gpu.py measured, beside the figures of bench/peers/: so that no figure is typed.

Of each section the newest file counts. A figure that is not there is a dash; one that failed says so.
Run: python bench/table.py [RESULT.json ...] [--card h200] [--part http] [--into README.md] | --steps PROFILE.json
`--into` replaces what stands between the lines `<!-- figures: CARD -->` and `<!-- end of figures -->` of that file.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MODELS = ("llama-8b", "qwen3-30b-a3b")
WORKLOADS = {  # which figure of a workload counts, and its unit
    "latency-b1": ("output_tok_s", "tok/s"),
    "decode-64": ("output_tok_s", "tok/s"),
    "decode-512": ("output_tok_s", "tok/s"),
    "mixed-1000": ("total_tok_s", "tok/s, prompts included"),
    "prefill-8k": ("s", "s"),
}
_Json = Mapping[str, Any]
DASH = "-"
PARTS = ("offline", "start", "session", "http", "deterministic", "generic", "kernels", "missing")
_SHOWN = 10  # kernels of a step


class Results:
    """The newest file of each section. `sections`: name -> content."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.sections: dict[str, dict[str, Any]] = {}
        for path in sorted(files, key=lambda path: path.name):  # which begins with a date
            content = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(content, dict) and "section" in content:
                self.sections[content["section"]] = content | {"file": path.name}

    def of(self, section: str) -> dict[str, Any]:
        """Empty where it was not measured."""
        return self.sections.get(section, {})

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [content for content in self.sections.values() if content.get("kind") == kind]


class Peers:
    """The files `CARD_*.json` of bench/peers/."""

    def __init__(self, folder: Path, card: str) -> None:
        def read(name: str) -> dict[str, Any]:
            path = folder / f"{card}_{name}.json"
            return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}

        offline = read("offline")
        self.by_model = {name.rpartition(" ")[2]: (name, figures) for name, figures in reversed(offline.items())}
        self.http, self.kernels, self.floors = read("http"), read("kernels"), read("floors")

    def offline(self, model: str) -> tuple[str, _Json]:
        """The first system that was measured with that model, and its figures."""
        name, figures = self.by_model.get(model, ("", {}))
        return name.removesuffix(f" {model}") or "peer", figures


def number(value: Any) -> str:
    """As a table has it: four digits that count."""
    if not isinstance(value, (int, float)):
        return DASH
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def ratio(ours: Any, theirs: Any, *, less_is_better: bool = False) -> str:
    """How many times as fast as the peer."""
    if not all(isinstance(each, (int, float)) and each for each in (ours, theirs)):
        return DASH
    return f"{theirs / ours if less_is_better else ours / theirs:.2f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    body = [f"| {' | '.join(cells)} |" for cells in rows]
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *body] if body else []


def offline_tables(results: Results, peers: Peers) -> Iterator[str]:
    for model in MODELS:
        ours, (peer, theirs), floors = results.of(model), peers.offline(model), peers.floors.get(model, {})
        rows = []
        for workload, (figure, unit) in WORKLOADS.items():
            mine, other = ours.get(workload, {}), theirs.get(workload, {})
            less = figure == "s"
            value = mine.get(figure)
            low, high = mine.get("spread_s", (None, None))
            rows.append(
                (
                    f"{model} {workload}, {unit}",
                    number(other.get(figure)),
                    f"**{number(value)}**" if value is not None else DASH,
                    ratio(value, other.get(figure), less_is_better=less),
                    number(floors.get(workload)),
                    f"{low:.4g} .. {high:.4g}" if low is not None else DASH,
                )
            )
        yield from table(
            (f"bare engine ({provenance(ours)})", peer, "Diptych", "ratio", "floor", "s of each run"), rows
        )
        yield ""


def start_table(results: Results, peers: Peers) -> Iterator[str]:
    peer, theirs = peers.offline("llama-8b")
    rows = [
        (name, number(theirs.get("startup_s")), number(results.of(section).get("startup_s")))
        for section, name in (("start_cold", "no kernel compiled before"), ("start_warm", "kernels compiled before"))
        if section in results.sections
    ]
    yield from table(("start-up of a bare engine, llama-8b, to ready, s", peer, "Diptych"), rows)
    yield ""


def session_table(results: Results) -> Iterator[str]:
    ours = results.of("session")
    rows = [
        (
            workload,
            number(ours.get(workload, {}).get("output_tok_s")),
            number(figures.get("output_tok_s")),
            f"{figures['of_engine']:.1%}" if "of_engine" in figures else DASH,
        )
        for workload in WORKLOADS
        if (figures := ours.get(f"{workload} through session"))
    ]
    words = f"through the engine's gRPC session, output tok/s ({provenance(ours)})"
    yield from table((words, "bare engine", "session", "of bare"), rows)
    yield ""


def comparison(results: Results, words: str, heads: Sequence[str], with_it: str, without: str) -> Iterator[str]:
    """The same workloads in two sections; the ratio is that of speeds, the first over the second."""
    first, second = results.of(with_it), results.of(without)
    rows = [
        (
            f"{workload}, {unit}",
            number(first[workload].get(figure)),
            number(second.get(workload, {}).get(figure)),
            ratio(first[workload].get(figure), second.get(workload, {}).get(figure), less_is_better=figure == "s"),
        )
        for workload, (figure, unit) in WORKLOADS.items()
        if workload in first
    ]
    yield from table((words, *heads, "ratio"), rows)
    yield ""


HTTP_FIGURES = {  # ours by path: the peer's name, words
    ("output_tok_s",): ("output_tok_s", "output tok/s"),
    ("total_tok_s",): ("total_tok_s", "total tok/s"),
    ("ttft_ms", "p50"): ("ttft_p50", "first token p50, ms"),
    ("itl_ms", "p99"): ("itl_p99", "between tokens p99, ms"),
}
LESS = ("ttft_p50", "itl_p99")


def http_table(results: Results, peers: Peers) -> Iterator[str]:
    measured = {content["row"]: content for content in results.of_kind("http")}
    rows = []
    for row, theirs in peers.http.items():
        if not isinstance(theirs, dict):
            continue
        mine = measured.get(row, {})
        for path, (name, words) in HTTP_FIGURES.items():
            if name in theirs:
                value = value_at(mine, path)
                told = f"**{number(value)}**" if value is not None else DASH
                rows.append(
                    (row, words, number(theirs[name]), told, ratio(value, theirs[name], less_is_better=name in LESS))
                )
        if mine.get("failed"):  # a count, by the client
            rows.append((row, "requests that failed", DASH, number(mine["failed"]), DASH))
    at = ", ".join(sorted({provenance(content) for content in measured.values()}))
    yield from table((f"llama-8b over HTTP ({at})", "figure", "peer", "Diptych", "ratio"), rows)
    yield ""


def value_at(content: Any, path: Sequence[str]) -> Any:
    for key in path:
        content = content.get(key) if isinstance(content, dict) else None
    return content


def kernel_table(results: Results, peers: Peers, *, every: bool) -> Iterator[str]:
    """Of cases with a peer, or of every one: the fastest of those that ran beside it, and the one measured before."""
    rows = []
    for case, figures in results.of("kernels").items():
        if not isinstance(figures, dict) or "us" not in figures:
            continue
        known = peers.kernels.get(peer_kernel(case) or "", {})
        beside = {name: told["us"] for name, told in figures.get("peers", {}).items() if "us" in told}
        if not known and not beside and not every:
            continue
        best = min(beside, key=lambda name: beside[name]) if beside else ""
        rate = f"{figures['tflop_s']:,.0f} TFLOP/s" if "tflop_s" in figures else f"{figures['gb_s']:,.0f} GB/s"
        rows.append(
            (
                case,
                number(figures["us"]),
                f"{rate}, {figures['of_ceiling']:.0%}",
                f"{number(beside[best])} ({best})" if best else DASH,
                f"{number(known['us'])} ({(peer_kernel(case) or '').partition(' ')[0]})" if known else DASH,
            )
        )
    yield from table(
        ("kernel", "us", "rate, of the ceiling", "us of the best peer beside it", "us of a peer before"), rows
    )
    yield ""


def peer_kernel(case: str) -> str | None:
    """What a case of `bench kernels` is called in bench/peers/CARD_kernels.json."""
    shapes = {
        "qkv": "4096x6144",
        "o": "4096x4096",
        "gate_up": "4096x28672",
        "down": "14336x4096",
        "head": "4096x128256",
    }
    if found := re.fullmatch(r"paged_attention (decode|prompts) (\d+) x (\d+)", case):
        return f"fa3 {'decode' if found[1] == 'decode' else 'prefill'} {found[2]}x{found[3]}"
    if (found := re.fullmatch(r"linear llama-8b (\w+) x(\d+)", case)) and found[1] in shapes:
        return f"cublas {found[2]}x{shapes[found[1]]}"
    if found := re.fullmatch(r"moe (\d+) tokens, 8 of 128 experts of 2048 x 768", case):
        return f"vllm fused_experts {found[1]}"
    if found := re.fullmatch(r"add_norm (\d+x\d+), 1 bfloat16 parts", case):
        return f"vllm fused_add_rms_norm {found[1]}"
    if found := re.fullmatch(r"silu_mul (\d+x\d+)", case):
        return f"vllm silu_and_mul {found[1]}"
    return None


def provenance(content: _Json) -> str:
    """Card, date and commit of a section, for the head of its table."""
    if not content:
        return "not measured"
    name = (content.get("card") or {}).get("name") or content.get("device") or "?"
    commit = str(content.get("commit") or "?")[:7] + (" and changes" if content.get("dirty") else "")
    return f"{name}, {str(content.get('date', '?'))[:10]}, {commit}"


def missing(results: Results) -> Iterator[str]:
    for section, content in sorted(results.sections.items()):
        if content.get("why_failed"):
            yield f"- {section}: {content['why_failed']}"


def step_tables(profile: _Json) -> Iterator[str]:
    """Of a file that `bench offline --profile` wrote: where the time of a step goes."""
    for workload, found in profile.items():
        if not found.get("steps"):
            continue
        kernels = found["kernels"]
        rows = [
            (f"`{k['name'][:80]}`", number(k["count"]), number(k["us"]), f"{k['share']:.1%}") for k in kernels[:_SHOWN]
        ]
        if rest := kernels[_SHOWN:]:
            us, share = sum(k["us"] for k in rest), sum(k["share"] for k in rest)
            rows.append((f"{len(rest)} others", "", number(us), f"{share:.1%}"))
        rows.append(("idle", "", number(found["step_us"] * found["idle_share"]), f"{found['idle_share']:.1%}"))
        head = f"{workload}: a step of {number(found['step_us'])} us, mean of {found['steps']}"
        yield from table((head, "times", "us", "share"), rows)
        yield ""


def generic_tables(results: Results) -> Iterator[str]:
    for model in MODELS:
        yield from comparison(results, model, ("transformers' forward", "hand-written"), f"{model}_generic", model)


def render(results: Results, peers: Peers, parts: Sequence[str] = (), *, every: bool = False) -> str:
    """All parts where none is named."""
    exact = "llama-8b, `deterministic: true`"
    made = {
        "offline": lambda: offline_tables(results, peers),
        "start": lambda: start_table(results, peers),
        "session": lambda: session_table(results),
        "http": lambda: http_table(results, peers),
        "deterministic": lambda: comparison(results, exact, ("with", "without"), "deterministic", "llama-8b"),
        "generic": lambda: generic_tables(results),
        "kernels": lambda: kernel_table(results, peers, every=every),
        "missing": lambda: missing(results),
    }
    assert tuple(made) == PARTS
    text = "\n".join(line for part in parts or PARTS for line in made[part]())
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def replace_between(text: str, card: str, figures: str) -> str:
    """Raises ValueError without the two marks."""
    begin, end = f"<!-- figures: {card} -->\n", "<!-- end of figures -->"
    head, found, rest = text.partition(begin)
    _, closed, behind = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"there is no {begin.strip()} with an {end} behind it")
    return head + begin + figures + end + behind


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path, help="by default all of the card in bench/results")
    parser.add_argument("--card", default="h200")
    parser.add_argument("--peers", type=Path, default=HERE / "peers")
    parser.add_argument("--part", action="append", choices=PARTS, help="some of the tables; by default all")
    parser.add_argument("--every", action="store_true", help="kernels without a peer too")
    parser.add_argument("--steps", type=Path, help="instead: the kernels of a file of bench offline --profile")
    parser.add_argument("--into", type=Path)
    args = parser.parse_args()
    if args.steps is not None:
        print("\n".join(step_tables(json.loads(args.steps.read_text(encoding="utf-8")))))
        return 0
    files = args.results or sorted((HERE / "results").glob(f"*_{args.card}_*.json"))
    figures = render(Results(files), Peers(args.peers, args.card), args.part or (), every=args.every)
    if args.into is None:
        print(figures, end="")
        return 0
    try:
        text = replace_between(args.into.read_text(encoding="utf-8"), args.card, figures)
    except ValueError as exc:
        print(f"{args.into}: {exc}", file=sys.stderr)
        return 1
    args.into.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
