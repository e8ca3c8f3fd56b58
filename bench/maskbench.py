"""How many schemas of MaskBench each way of making grammars serves: llguidance alone, with xgrammar for what it
refuses, and ours, without and with the check after an answer.

Regime: one process, no model; every instance as compact JSON, byte by byte. DIR holds MaskBench's files (a schema with
its instances each), which are not part of this project. Ends with exit code 1 where an answer that a schema forbids
was accepted without a word. Run: python bench/maskbench.py DIR [--limit N]
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llguidance

from diptych.cluster.bench.figures import save_result
from diptych.cluster.bench.provenance import provenance
from diptych.cluster.constraints import trial
from diptych.cluster.constraints.schema import judge
from diptych.cluster.constraints.validate import validator
from diptych.protos.errors import InvalidRequest

xgrammar = importlib.import_module("xgrammar") if importlib.util.find_spec("xgrammar") else None

Accepts = Callable[[object], bool]
REORDER_STEPS = 100_000


class Tally:
    """What became of the schemas in one way of making grammars."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.counts: collections.Counter[str] = collections.Counter()
        self.reasons: collections.Counter[str] = collections.Counter()
        self.times: list[float] = []
        self.unreported: list[str] = []

    def row(self) -> dict[str, object]:
        times = sorted(self.times) or [0.0]
        total = sum(self.counts.values())
        return {
            "name": self.name,
            **{word: self.counts[word] for word in ("right", "order", "over_tight", "wrong", "refused")},
            "right_percent": round(100 * self.counts["right"] / max(1, total), 2),
            "unreported_wrong": len(self.unreported),
            "compile_ms_p50": round(1e3 * times[len(times) // 2], 2),
            "compile_ms_p99": round(1e3 * times[int(len(times) * 0.99)], 2),
            "compile_ms_max": round(1e3 * times[-1], 2),
        }


def text_of(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def accepts_bytes(matcher: llguidance.LLMatcher, value: object) -> bool:
    data, tried = list(text_of(value).encode()), matcher.deep_copy()
    return tried.try_consume_tokens(data) == len(data) and tried.is_accepting()


def after(state: llguidance.LLMatcher, text: str) -> llguidance.LLMatcher | None:
    copy, data = state.deep_copy(), list(text.encode())
    return copy if copy.try_consume_tokens(data) == len(data) else None


def written(matcher: llguidance.LLMatcher, value: object, steps: list[int]) -> Iterator[llguidance.LLMatcher]:
    """The matcher after `value`, for each order of its members that it takes."""
    steps[0] -= 1
    if isinstance(value, dict):
        opened = after(matcher, "{")
        if opened is not None:
            yield from members(opened, value, "", steps)
    elif isinstance(value, list):
        yield from items(matcher, value, steps)
    elif (done := after(matcher, text_of(value))) is not None:
        yield done


def members(
    state: llguidance.LLMatcher, left: dict[str, object], comma: str, steps: list[int]
) -> Iterator[llguidance.LLMatcher]:
    if not left and (closed := after(state, "}")) is not None:
        yield closed
    for name, value in left.items():
        named = after(state, f"{comma}{text_of(name)}:")
        if named is None or steps[0] < 0:
            continue
        rest = {other: inner for other, inner in left.items() if other != name}
        for done in written(named, value, steps):
            yield from members(done, rest, ",", steps)


def items(matcher: llguidance.LLMatcher, values: list[object], steps: list[int]) -> Iterator[llguidance.LLMatcher]:
    state: llguidance.LLMatcher | None = matcher
    for i, value in enumerate(values):
        state = after(state, "," if i else "[") if state is not None else None
        state = next(written(state, value, steps), None) if state is not None else None
    closed = after(state, "]" if values else "[]") if state is not None else None
    if closed is not None:
        yield closed


def strict_llguidance(schema: object) -> Accepts | str:
    grammar = llguidance.LLMatcher.grammar_from_json_schema(text_of(schema), overrides={"whitespace_flexible": False})
    matcher = trial.matcher(grammar)
    return matcher.get_error() if matcher.is_error() else lambda value: accepts_bytes(matcher, value)


def else_xgrammar(schema: object) -> Accepts | str:
    first = strict_llguidance(schema)
    return by_xgrammar(schema) if isinstance(first, str) else first


def by_xgrammar(schema: object) -> Accepts | str:
    assert xgrammar is not None
    vocabulary = [bytes([i]) for i in range(256)] + [b"<eos>"]
    info = xgrammar.TokenizerInfo(vocabulary, vocab_type=xgrammar.VocabType.RAW, stop_token_ids=[256])
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    try:
        compiled = compiler.compile_json_schema(
            text_of(schema), any_whitespace=False, separators=(",", ":"), strict_mode=False
        )
    except RuntimeError as error:
        return str(error)

    def accepts(value: object) -> bool:
        matcher = xgrammar.GrammarMatcher(compiled)
        return bool(matcher.accept_string(text_of(value)) and matcher.accept_token(256))

    return accepts


def count(
    tally: Tally, case: dict[str, Any], name: str, made: Accepts | str, *, partial: bool, reorder: Accepts
) -> None:
    if isinstance(made, str):
        tally.counts["refused"] += 1
        tally.reasons[made.split("\n")[0][:60]] += 1
        return
    outcome = "right"
    for test in case["tests"]:
        accepted = made(test["data"])
        if accepted and not test["valid"]:
            outcome = "wrong"
            if not partial:
                tally.unreported.append(name)
            break
        if test["valid"] and not accepted and outcome != "over_tight":
            outcome = "order" if reorder(test["data"]) else "over_tight"
    tally.counts[outcome] += 1


def ours(tally: Tally, checked: Tally, case: dict[str, Any], name: str) -> None:
    schema = case["schema"]
    start = time.perf_counter()
    try:
        judged = judge(schema, "schema")
    except InvalidRequest as error:
        for each in (tally, checked):
            count(each, case, name, error.message.rsplit(": ", 1)[-1], partial=False, reorder=bool)
        return
    tally.times.append(time.perf_counter() - start)
    if judged.backend == "xgrammar":
        made = by_xgrammar(schema) if xgrammar else "left to xgrammar"
        for each in (tally, checked):
            count(each, case, name, made, partial=True, reorder=lambda _: False)
        return
    matcher = trial.matcher(trial.json_grammar(judged.schema))
    start = time.perf_counter()
    check = validator(schema)
    checked.times.append(time.perf_counter() - start)

    def in_some_order(value: object) -> bool:
        found = next(written(matcher, value, [REORDER_STEPS]), None)
        return found is not None and found.is_accepting()

    def grammar(value: object) -> bool:
        return accepts_bytes(matcher, value)

    def both(value: object) -> bool:
        return grammar(value) and not check.errors(text_of(value))

    partial = judged.coverage == "partial"
    count(tally, case, name, grammar, partial=partial, reorder=in_some_order)
    count(checked, case, name, both, partial=partial, reorder=in_some_order)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--limit", type=int, default=None, help="only the first files")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    args = parser.parse_args()
    others = [(Tally("llguidance"), strict_llguidance)]
    if xgrammar:
        others.append((Tally("llguidance, else xgrammar"), else_xgrammar))
    tally, checked = Tally("ours, grammar alone"), Tally("ours, and checked after")
    files = sorted(args.folder.glob("*.json"))[: args.limit]
    for path in files:
        case = json.loads(path.read_text())
        for other, make in others:
            start = time.perf_counter()
            made = make(case["schema"])
            other.times.append(time.perf_counter() - start)
            count(other, case, path.name, made, partial=False, reorder=lambda _: False)
        ours(tally, checked, case, path.name)
    rows = [each.row() for each in (*(other for other, _ in others), tally, checked)]
    print("order: valid answers are refused only for the order of their members, which is the schema's")
    print("times are those of making a grammar; of the last row, those of making its check")
    words = [word for word in rows[0] if word != "name"]
    print(f"{'':28}" + "".join(f"{word:>17}" for word in words))
    for row in rows:
        print(f"{row['name']:28}" + "".join(f"{row[word]!s:>17}" for word in words))
    for reason, times in tally.reasons.most_common(12):
        print(f"refused, {times:3}: {reason}")
    versions = {"llguidance": llguidance.__version__, "xgrammar": getattr(xgrammar, "__version__", None)}
    result = provenance()
    result["versions"] |= versions
    result |= {"schemas": len(files), "rows": rows, "unreported": tally.unreported}
    save_result(result, args.json)
    print(json.dumps(result))
    return 1 if tally.unreported else 0


if __name__ == "__main__":
    sys.exit(main())
