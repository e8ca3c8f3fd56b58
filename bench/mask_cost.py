"""What constrained answers cost: a token's mask, a batch beside a free one, a new grammar, memory after 10,000 of them.

Regime, one thread of this process unless told otherwise:
masks    the valid instances of MaskBench's schemas, token by token: fill and accept of a guide, wall and CPU time
compile  the same schemas, each new: compose() as in the router, then Guides.open() as in an engine (two threads)
batch    echo with steps of 5 ms, so many answers at once: each form in turn with free answers of as many tokens
memory   unique schemas composed, compiled and followed once: resident memory of this process, router and engine
Run: python bench/mask_cost.py --schemas FOLDER [--only masks batch ...] ; FOLDER holds MaskBench's files
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from one_engine import CACHE, OneEngine, one_engine
from tokenizers import Tokenizer

from diptych.cluster.bench.figures import regime, save_result, spread
from diptych.cluster.bench.provenance import provenance
from diptych.cluster.config import ModelSettings
from diptych.cluster.constraints import trial
from diptych.cluster.constraints.compose import compose
from diptych.cluster.engine.guides.guides import Guides
from diptych.cluster.engine.guides.matcher import Llguidance
from diptych.cluster.models import ModelFolder, resolve
from diptych.protos.constraint import Backend, Constraint, Guide, mask_words
from diptych.protos.errors import DiptychError
from diptych.protos.openai_output import OutputForm
from diptych.protos.types import GenerateRequest, SamplingParams, TransferKey

Json = dict[str, Any]
PROMPT = tuple(range(1, 33))
MAX_INSTANCE_TOKENS = 2000
_AHEAD_CHARS = 200  # of the rest of a text, to see its first token
SECTIONS = ("masks", "compile", "batch", "memory")

_ROW = {
    "type": "object",
    "properties": {
        "id": {"type": "integer", "minimum": 1000, "maximum": 9999},
        "name": {"type": "string", "minLength": 12, "maxLength": 24},
        "kind": {"enum": ["author", "reader", "editor"]},
    },
    "required": ["id", "name", "kind"],
    "additionalProperties": False,
}
FORMS: dict[str, str] = {  # each longer than any answer here
    "pattern": trial.regex_grammar("[a-z][a-z ]{9000}"),
    "strings": trial.json_grammar(
        {"type": "array", "items": {"type": "string", "minLength": 100, "maxLength": 200}, "minItems": 900}
    ),
    "objects": trial.json_grammar({"type": "array", "items": _ROW, "minItems": 900}),
}


def schemas_of(folder: Path, most: int | None, seed: int = 0) -> list[tuple[str, Json, list[Any]]]:
    """(file, schema, valid instances), different schemas only; a sample of `most`."""
    paths = sorted(folder.glob("*.json"))
    if most is not None and most < len(paths):
        paths = sorted(random.Random(seed).sample(paths, most))
    found: dict[str, tuple[str, Json, list[Any]]] = {}
    for path in paths:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(schema := content["schema"], dict):
            valid = [test["data"] for test in content["tests"] if test["valid"]]
            found.setdefault(json.dumps(schema), (path.name, schema, valid))
    return list(found.values())


def in_order(value: Any, schema: Any) -> Any:
    """An instance with its members as the schema has them, where that is plain to see: answers have that order."""
    if isinstance(value, list):
        items = schema.get("items") if isinstance(schema, dict) else None
        return [in_order(item, items) for item in value]
    if not isinstance(value, dict):
        return value
    told = schema.get("properties") if isinstance(schema, dict) else None
    known: Mapping[str, Any] = told if isinstance(told, dict) else {}
    names = [name for name in known if name in value] + [name for name in value if name not in known]
    return {name: in_order(value[name], known.get(name)) for name in names}


def guides_of(model: ModelFolder) -> Guides:
    """As an engine of this model has them, of one backend."""
    facts = model.facts
    ends = tuple(facts.eos_token_ids)
    make = partial(Llguidance, model.path / "tokenizer.json", vocab_size=facts.vocab_size, end_tokens=ends)
    return Guides({Backend.LLGUIDANCE: make}, end_tokens=ends, clock=time.monotonic)


def request_of(constraint: Constraint, ends: Sequence[int]) -> GenerateRequest:
    sampling = SamplingParams(max_tokens=MAX_INSTANCE_TOKENS, stop_token_ids=frozenset(ends))
    return GenerateRequest(key=TransferKey(bytes(16)), prompt=PROMPT, sampling=sampling, constraint=constraint)


def form_of(schema: Json) -> OutputForm:
    text = json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
    return OutputForm(kind="json_schema", value=text, path="response_format.json_schema.schema")


class Follower:
    """Writes a text under a guide as a model would that wants to write it, and times the guide."""

    def __init__(self, model: ModelFolder) -> None:
        self._tokenizer = Tokenizer.from_file(str(model.path / "tokenizer.json"))
        self._mask = np.zeros(mask_words(model.facts.vocab_size), np.int32)
        self._end = min(model.facts.eos_token_ids)
        self.wall_us: list[float] = []  # of each sampled token: the mask before it, and telling the guide of it
        self.cpu_us: list[float] = []
        self.fill_us: list[float] = []
        self.forced = 0

    def forget(self) -> None:
        """The times so far."""
        for times in (self.wall_us, self.cpu_us, self.fill_us):
            times.clear()

    def follow(self, guide: Guide, text: str) -> bool:
        """Whether the guide let the whole text pass."""
        at, done = len(PROMPT), ""
        buffer = self._mask.data.cast("B")
        while at < len(PROMPT) + MAX_INSTANCE_TOKENS:
            rest = text[len(done) : len(done) + _AHEAD_CHARS]
            token = self._tokenizer.encode(rest, add_special_tokens=False).ids[0] if rest else self._end
            cpu, began = time.thread_time_ns(), time.perf_counter_ns()
            guide.fill(at, buffer)
            filled = time.perf_counter_ns()
            is_allowed = bool(self._mask[token // 32] >> token % 32 & 1)
            forced = guide.accept(at, token) if is_allowed else ()
            ended, cpu_ended = time.perf_counter_ns(), time.thread_time_ns()
            self.wall_us.append((ended - began) / 1e3)
            self.cpu_us.append((cpu_ended - cpu) / 1e3)
            self.fill_us.append((filled - began) / 1e3)
            if not is_allowed or guide.error is not None:
                return False
            if token == self._end or (forced and forced[-1] == self._end):
                return True
            self.forced += len(forced)
            at += 1 + len(forced)
            done += self._tokenizer.decode([token, *forced], skip_special_tokens=False)
            if not text.startswith(done):
                return False  # another spelling was forced
        return False


async def masks(model: ModelFolder, options: argparse.Namespace) -> Json:
    """Masks and grammars of MaskBench's schemas, in one pass."""
    guides, follower = guides_of(model), Follower(model)
    ends = model.facts.eos_token_ids
    compose_ms: list[float] = []
    open_ms: list[float] = []
    counts = dict.fromkeys(("schemas", "refused", "xgrammar", "uncompiled", "instances", "followed"), 0)
    slowest: dict[str, float] = {}
    await guides.open(request_of(Constraint(grammar=trial.json_grammar({})), ends))  # the backend itself
    for name, schema, instances in schemas_of(options.schemas, options.most):
        counts["schemas"] += 1
        began = time.perf_counter()
        try:
            composed = compose(form_of(schema), None, None)
        except DiptychError:
            counts["refused"] += 1
            continue
        finally:
            compose_ms.append((time.perf_counter() - began) * 1e3)
        assert composed is not None
        if composed.constraint.backend is Backend.XGRAMMAR:
            counts["xgrammar"] += 1
            continue
        request = request_of(composed.constraint, ends)
        began = time.perf_counter()
        try:
            await guides.open(request)
        except DiptychError:
            counts["uncompiled"] += 1
            continue
        open_ms.append((time.perf_counter() - began) * 1e3)
        if "masks" not in options.only:
            continue
        before = len(follower.wall_us)
        for instance in instances:
            counts["instances"] += 1
            text = json.dumps(in_order(instance, schema), ensure_ascii=False)
            counts["followed"] += follower.follow(await guides.open(request), text)
        slowest[name] = max(follower.cpu_us[before:], default=0.0)
    guides.close()
    worst = sorted(slowest.items(), key=lambda item: -item[1])[:5]
    told: Json = {"counts": counts, "compose_ms": spread(compose_ms, 3), "open_ms": spread(open_ms, 3)}
    if follower.wall_us:
        told["masks"] = len(follower.wall_us)
        told["forced_share"] = round(follower.forced / (follower.forced + len(follower.wall_us)), 3)
        told |= {"wall_us": spread(follower.wall_us, 1), "cpu_us": spread(follower.cpu_us, 1)}
        told |= {"fill_us": spread(follower.fill_us, 1), "slowest_cpu_us": {k: round(v) for k, v in worst}}
        told["over_1_ms"] = sum(value > 1000 for value in follower.wall_us) / len(follower.wall_us)
    return told


async def batch_once(engine: OneEngine, grammar: str | None, options: argparse.Namespace, logprobs: int | None) -> Json:
    """`options.at_once` answers of `options.tokens` tokens: the steps in which all of them decode."""
    sampling = SamplingParams(max_tokens=options.tokens, temperature=0.0, logprobs=logprobs)
    constraint = None if grammar is None else Constraint(grammar=grammar)
    asked = [await engine.ask((*PROMPT, n), sampling, constraint) for n in range(options.at_once)]
    gc.collect()
    while not all(one.tokens for one in asked):
        engine.step()
    before = sum(len(one.tokens) for one in asked)
    timed = [one.guide for one in asked if one.guide is not None]
    for guide in timed:
        guide.fills.clear()
        guide.accepts.clear()
    steps, cpu, began = [], time.thread_time(), time.perf_counter()
    while engine.num_open == options.at_once:
        at = time.perf_counter()
        engine.step()
        steps.append((time.perf_counter() - at) * 1e3)
    seconds, cpu_ms = time.perf_counter() - began, (time.thread_time() - cpu) * 1e3
    sampled = sum(len(one.tokens) for one in asked) - before
    while engine.num_open:
        engine.step()
    assert all(one.finish is not None and not one.finish.error_message for one in asked)
    assert all(len(one.tokens) == options.tokens for one in asked)
    told: Json = {"tok_s": sampled / seconds, "step_ms": spread(steps, 3), "mean_step_ms": statistics.fmean(steps)}
    told["p50_step_ms"] = statistics.median(steps)
    told |= {"cpu_ms": cpu_ms / len(steps), "steps": len(steps)}
    if timed:
        fills = [seconds for one in timed for seconds in one.fills]
        accepts = [seconds for one in timed for seconds in one.accepts]
        told |= {"fill_ms": 1e3 * sum(fills) / len(steps), "accept_ms": 1e3 * sum(accepts) / len(steps)}
        forced = sum(one.num_forced for one in asked)
        told |= {"fill_us": spread([1e6 * one for one in fills], 1), "accept_us": spread([1e6 * a for a in accepts], 1)}
        told["forced_share"] = forced / sum(len(one.tokens) for one in asked)
    return told


async def batch(options: argparse.Namespace) -> Json:
    """Each form in turn with free answers; of the repeats the one with the median step."""
    settings = ModelSettings.model_validate(
        {
            "source": "echo",
            "echo": {"step_s": options.step_ms / 1e3},
            "kv": {"memory_mib": 64, "prefix_cache": False},
            "decode": {"max_running": options.at_once},
        }
    )
    pairs: list[tuple[str, str, int | None]] = [(name, grammar, None) for name, grammar in FORMS.items()]
    pairs.append(("objects, none forced", FORMS["objects"], 0))
    found: Json = {}
    with one_engine(settings) as engine:
        for name, grammar, logprobs in pairs:
            kinds: dict[str, list[Json]] = {"free": [], "guided": []}
            for repeat in range(options.repeats + 1):
                for kind, asked in (("free", None), ("guided", grammar)):
                    told = await batch_once(engine, asked, options, logprobs)
                    if repeat:  # the first round compiles
                        kinds[kind].append(told)
            middle = {
                kind: sorted(rows, key=lambda row: float(row["mean_step_ms"]))[len(rows) // 2]
                for kind, rows in kinds.items()
            }
            ratios = {
                f"{what}_ratio": statistics.median(row[what] for row in kinds["guided"])
                / statistics.median(row[what] for row in kinds["free"])
                for what in ("mean_step_ms", "p50_step_ms")
            }
            found[name] = middle | ratios
    return found


def resident_mib() -> float:
    gc.collect()
    return float(psutil.Process().memory_info().rss) / (1 << 20)


def unique_schemas(known: Sequence[tuple[str, Json, list[Any]]], count: int) -> Iterator[tuple[Json, Any]]:
    """Real schemas, each as a member of a name that no other has, and an instance; None where there is none."""
    usable = []
    for _, schema, instances in known:
        inner = {word: value for word, value in schema.items() if word not in ("$schema", "$id", "id")}
        if len(text := json.dumps(inner)) < 16 << 10 and '"$ref"' not in text:
            usable.append((inner, in_order(instances[0], inner) if instances else None))
    for number in range(count):
        inner, instance = usable[number % len(usable)]
        name = f"member_{number}"
        schema = {"type": "object", "properties": {name: inner}, "required": [name], "additionalProperties": False}
        yield schema, None if instance is None else {name: instance}


async def memory(model: ModelFolder, options: argparse.Namespace, resident: Callable[[], float] = resident_mib) -> Json:
    """Resident MiB by number of schemas, each of which was composed, compiled and followed once."""
    guides, follower = guides_of(model), Follower(model)
    ends = model.facts.eos_token_ids
    await guides.open(request_of(Constraint(grammar=trial.json_grammar({})), ends))
    known = schemas_of(options.schemas, None)
    marks = {round(options.unique * part) for part in (0.1, 0.2, 0.5, 0.75, 1)}
    readings: dict[int, float] = {0: round(resident(), 1)}
    counts = dict.fromkeys(("refused", "followed"), 0)
    began = time.perf_counter()
    for number, (schema, instance) in enumerate(unique_schemas(known, options.unique), 1):
        try:
            composed = compose(form_of(schema), None, None)
            assert composed is not None
            if composed.constraint.backend is Backend.LLGUIDANCE:
                guide = await guides.open(request_of(composed.constraint, ends))
                if instance is not None:
                    counts["followed"] += follower.follow(guide, json.dumps(instance, ensure_ascii=False))
                    follower.forget()
        except DiptychError:
            counts["refused"] += 1
        if number in marks:
            readings[number] = round(resident(), 1)
            print(f"{number:>8} schemas  {readings[number]:7.1f} MiB", flush=True)
    kept = guides.counters()["engine_grammars_kept"]
    guides.close()
    seconds = time.perf_counter() - began
    return {"resident_mib": readings, **counts, "grammars_kept": kept, "seconds": round(seconds, 1)}


def table(found: Mapping[str, Any], options: argparse.Namespace) -> str:
    """Markdown: what was wanted beside what was found."""
    lines = ["| what | target | p50 | p90 | p99 | max |", "|---|---|---|---|---|---|"]

    def row(what: str, target: str, told: Mapping[str, float] | None) -> None:
        if told:
            lines.append(f"| {what} | {target} | {' | '.join(f'{told[k]:g}' for k in ('p50', 'p90', 'p99', 'max'))} |")

    one = found.get("masks", {})
    row("mask and accept of a token, us", "p99 < 1000", one.get("wall_us"))
    row("the same, CPU time", "", one.get("cpu_us"))
    row("a new grammar in an engine, ms", "p50 <= 50", one.get("open_ms"))
    row("compose() in the router, ms", "", one.get("compose_ms"))
    for name, told in found.get("batch", {}).items():
        free, guided = told["free"], told["guided"]
        lines.append(
            f"\n{options.at_once} x {options.tokens} echo tokens, {name}: free {free['tok_s']:,.0f} tokens/s, a step "
            f"{free['mean_step_ms']:.2f} ms (p99 {free['step_ms']['p99']:.2f}), CPU {free['cpu_ms']:.2f}; guided "
            f"{guided['tok_s']:,.0f}, {guided['mean_step_ms']:.2f} (p99 {guided['step_ms']['p99']:.2f}), CPU "
            f"{guided['cpu_ms']:.2f}, of it fill {guided['fill_ms']:.2f}, accept {guided['accept_ms']:.2f}; forced "
            f"{guided['forced_share']:.0%}; steps {100 * (told['mean_step_ms_ratio'] - 1):+.1f} %, their median "
            f"{100 * (told['p50_step_ms_ratio'] - 1):+.1f} % (target: at most +5 %)"
        )
    if "memory" in found:
        lines.append(f"\nresident MiB by schemas seen: {found['memory']['resident_mib']}")
    return "\n".join(lines)


def main() -> None:
    """Measure, print tables, and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemas", type=Path, help="folder of MaskBench's files; needed by all but batch")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--most", type=int, help="files read, a sample; all by default")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="whose tokens; its weights are not used")
    parser.add_argument("--at-once", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--step-ms", type=float, default=5.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--unique", type=int, default=10_000, help="schemas of the memory section")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.schemas is None and set(options.only) != {"batch"}:
        parser.error("--schemas names the folder of MaskBench's files; without it: --only batch")
    head = regime()
    model = resolve(options.model, CACHE)
    found: Json = {}
    if {"masks", "compile"} & set(options.only):
        found["masks"] = asyncio.run(masks(model, options))
    if "batch" in options.only:
        found["batch"] = asyncio.run(batch(options))
    if "memory" in options.only:
        found["memory"] = asyncio.run(memory(model, options))
    print(f"{options.model}; {head}\n\n{table(found, options)}\n")
    told = {name: value.name if isinstance(value, Path) else value for name, value in vars(options).items()}
    result = {"bench": "mask_cost", "config": told} | provenance() | {"results": found}
    save_result(result, options.json)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
