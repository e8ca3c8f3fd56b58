"""Whether constrained answers are valid: a real model at temperature 1 over 50 schemas, each answer judged three times.

Regime: requests as a client sends them (chat, response_format), made ready as the API does, answered by one engine in
this process, so many at once; no router, no HTTP. A finished answer is held against its schema by the check of the
product and by the package jsonschema; one that was cut off must be the beginning of one that the grammar accepts.
Exit code 1 when one is invalid that the schema's coverage says cannot be. Run: python bench/structured_answers.py
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import llguidance
from one_engine import CACHE, OneEngine, Written, one_engine
from structured_schemas import SCHEMAS

from diptych.cluster.api.prepared import Prepared, prepare_chat
from diptych.cluster.api.sampling import sampling_of
from diptych.cluster.api.served import ServedModel
from diptych.cluster.bench.figures import regime, save_result
from diptych.cluster.bench.provenance import provenance
from diptych.cluster.config import ModelSettings
from diptych.cluster.constraints import trial
from diptych.cluster.models import resolve
from diptych.protos.openai import parse_chat
from diptych.protos.types import FinishReason

Json = dict[str, Any]
MAX_SHOWN = 3  # answers of each kind that the result quotes
_SHOWN_CHARS = 400


@dataclass(slots=True)
class Asked:
    """A request, made ready, and its answer."""

    name: str
    prepared: Prepared
    written: Written


@dataclass(slots=True)
class Row:
    """Of one schema. `faulty`: finished and not valid, by the product's check; `disputed`: the package disagrees with
    the check, or the grammar does not accept the answer.
    """

    coverage: str
    finished: int = 0
    truncated: int = 0
    faulty: int = 0
    disputed: int = 0
    no_beginning: int = 0  # truncated, and nothing that the grammar accepts begins so
    tokens: int = 0
    forced: int = 0
    quoted: list[Json] = field(default_factory=list)

    @property
    def invalid(self) -> int:
        """What must not be."""
        return (self.faulty if self.coverage == "full" else 0) + self.disputed + self.no_beginning


class Judge:
    """Holds answers against their schemas. `folder`: the model's, for the bytes of its tokens."""

    def __init__(self, folder: Path, ends: frozenset[int]) -> None:
        self._tokenizer = llguidance.LLTokenizer(str(folder / "tokenizer.json"))
        self._ends = ends

    def judge(self, asked: Asked, row: Row) -> None:
        """Count one answer that has ended."""
        written = asked.written
        assert written.finish is not None
        ids = [token for token in written.tokens if token not in self._ends]
        data = self._tokenizer.decode_bytes(ids)
        row.tokens += len(written.tokens)
        row.forced += written.num_forced
        assert asked.prepared.constraint is not None
        grammar = asked.prepared.constraint.grammar
        if written.finish.reason is FinishReason.LENGTH:
            row.truncated += 1
            if not begins(grammar, data):
                row.no_beginning += 1
                _quote(row, "no beginning", data)
            return
        row.finished += 1
        if written.finish.reason is not FinishReason.STOP:
            row.disputed += 1
            _quote(row, f"{written.finish.reason}: {written.finish.error_message}", data)
            return
        text = data.decode(errors="replace")  # half a character is nothing that a grammar accepts
        faults = asked.prepared.checks.faults(text, ()) if asked.prepared.checks is not None else []
        others = by_the_package(SCHEMAS[asked.name][1], text)
        row.faulty += bool(faults)
        if faults and row.coverage == "full":
            _quote(row, faults[0], data)
        if bool(faults) != bool(others) or not trial.accepts(grammar, text):
            row.disputed += 1
            _quote(row, f"jsonschema: {others[:1]}, the check: {faults[:1]}", data)


def _quote(row: Row, why: str, data: bytes) -> None:
    if len(row.quoted) < MAX_SHOWN:
        row.quoted.append({"why": why[:_SHOWN_CHARS], "answer": data.decode(errors="replace")[:_SHOWN_CHARS]})


def begins(grammar: str, data: bytes) -> bool:
    """Whether something that the grammar accepts begins with these bytes, of which the last may be half a character."""
    matcher = trial.matcher(grammar)
    return not matcher.is_error() and matcher.try_consume_tokens(list(data)) == len(data)


def by_the_package(schema: Json, text: str) -> list[str]:
    """What jsonschema finds, or why it has nothing to look at. Exact numbers: 19.99 is a multiple of 0.01."""
    try:
        value, exact = (json.loads(part, parse_float=Decimal) for part in (text, json.dumps(schema)))
    except ValueError as error:
        return [f"no JSON: {error}"]
    cls = jsonschema.validators.validator_for(exact, default=jsonschema.Draft202012Validator)
    return [error.message for error in cls(exact, format_checker=cls.FORMAT_CHECKER).iter_errors(value)]


async def ready(name: str, served: ServedModel, seed: int, max_tokens: int) -> tuple[Prepared, Any]:
    """The request of a schema, and how it samples."""
    ask, schema = SCHEMAS[name]
    body = {
        "model": served.name,
        "messages": [{"role": "user", "content": f"{ask} Answer in JSON."}],
        "response_format": {"type": "json_schema", "json_schema": {"name": name, "schema": schema}},
        "temperature": 1,
        "top_p": 1,
        "seed": seed,
    }
    request = parse_chat(json.dumps(body).encode())
    prepared = await prepare_chat(request, served, served.max_context_tokens - max_tokens)
    sampling = await sampling_of(
        request, served, prepared.prompts[0], max_tokens=max_tokens, logprobs=None, prompt_logprobs=None
    )
    return prepared, sampling


async def answer_all(
    engine: OneEngine, served: ServedModel, names: Sequence[str], options: argparse.Namespace
) -> Iterator[Asked]:
    """All requests, `options.at_once` in work at a time."""
    asked: list[Asked] = []
    waiting = iter(enumerate(names, options.seed))
    is_more = True
    while is_more or engine.num_open:
        while is_more and engine.num_open < options.at_once:
            if (following := next(waiting, None)) is None:
                is_more = False
                break
            seed, name = following
            prepared, sampling = await ready(name, served, seed, options.tokens)
            written = await engine.ask(prepared.prompts[0], sampling, prepared.constraint)
            asked.append(Asked(name, prepared, written))
        engine.step()
    return iter(asked)


def measure(options: argparse.Namespace) -> Json:
    """Ask, judge, count."""
    settings = ModelSettings.model_validate({"source": options.model, "kv": {"memory_mib": options.kv_mib}})
    model = resolve(options.model, CACHE)
    served = ServedModel.load(options.model, model)
    names = [list(SCHEMAS)[number % len(SCHEMAS)] for number in range(options.answers)]
    random.Random(options.seed).shuffle(names)
    rows: dict[str, Row] = {}
    judge = Judge(model.path, served.eos_token_ids)
    with one_engine(settings, model) as engine:
        began = time.perf_counter()
        done = asyncio.run(answer_all(engine, served, names, options))
        seconds = time.perf_counter() - began
        dtype = engine.parts.info.dtype
    for asked in done:
        told = dict(asked.prepared.headers).get(b"x-schema-coverage", b"full").decode()
        judge.judge(asked, rows.setdefault(asked.name, Row(told)))
    ordered = {name: rows[name] for name in SCHEMAS if name in rows}
    tokens = sum(row.tokens for row in ordered.values())
    return {
        "dtype": dtype,
        "seconds": round(seconds, 1),
        "output_tok_s": round(tokens / seconds, 1),
        "formats_of_jsonschema": sorted(jsonschema.Draft202012Validator.FORMAT_CHECKER.checkers),
        "total": _told(_sum(list(ordered.values()))),
        "schemas": {name: {"coverage": row.coverage} | _told(row) for name, row in ordered.items()},
    }


def _sum(rows: Sequence[Row]) -> Row:
    total = Row("full")
    for row in rows:
        for name in ("finished", "truncated", "disputed", "no_beginning", "tokens", "forced"):
            setattr(total, name, getattr(total, name) + getattr(row, name))
        total.faulty += row.faulty if row.coverage == "full" else 0
    return total


def _told(row: Row) -> Json:
    told: Json = {
        "finished": row.finished,
        "truncated": row.truncated,
        "invalid": row.invalid,
        "tokens": row.tokens,
        "forced_share": round(row.forced / max(row.tokens, 1), 3),
    }
    if row.coverage == "partial":
        told["found_by_the_check"] = row.faulty
    if row.quoted:
        told["quoted"] = row.quoted
    return told


def table(result: Json) -> str:
    """Markdown, a line for each schema."""
    lines = [
        "| schema | finished | truncated | invalid | tokens | forced |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in (*result["schemas"].items(), ("**all**", result["total"])):
        note = f" ({row['found_by_the_check']} found by the check)" if "found_by_the_check" in row else ""
        mark = " (partial)" if row.get("coverage") == "partial" else ""
        cells = (row["finished"], row["truncated"], f"{row['invalid']}{note}", row["tokens"])
        share = f"{100 * row['forced_share']:.0f} %"
        lines.append(f"| {name}{mark} | {' | '.join(map(str, cells))} | {share} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print a table, and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--answers", type=int, default=1000)
    parser.add_argument("--at-once", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256, help="the most of an answer")
    parser.add_argument("--seed", type=int, default=0, help="of the first request")
    parser.add_argument("--kv-mib", type=int, default=1024)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    head = regime()
    found = measure(options)
    print(f"{options.model}, {found['dtype']}, temperature 1, {options.answers} answers; {head}\n")
    print(table(found))
    print(f"\n{found['output_tok_s']} tokens/s over {found['seconds']} s")
    told = {name: value.name if isinstance(value, Path) else value for name, value in vars(options).items()}
    result = {"bench": "structured_answers", "config": told} | provenance() | {"results": found}
    save_result(result, options.json)
    print(json.dumps(result))
    sys.exit(found["total"]["invalid"] > 0)


if __name__ == "__main__":
    main()
