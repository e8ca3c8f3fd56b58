"""What constrained answers cost an engine: the same batch with and without a grammar, in turn, in one run.

Forms: a pattern that forces nothing (each step has a mask, none has a token for nothing) and JSON objects (whose keys
and punctuation are taken without being sampled). Greedy, colocated, nothing else on the machine. On random weights the
vocabulary is made up: byte-level, with as many words as the shape has rows.
Run: python bench/guided.py [--shape llama-8b | --model smollm2-135m-instruct] [--requests 64] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diptych.cluster.bench.figures import save_result
from diptych.cluster.bench.provenance import provenance
from diptych.cluster.bench.shapes import SHAPES, write_shape
from diptych.cluster.bench.workload import random_prompts
from diptych.cluster.config import ModelSettings
from diptych.cluster.constraints import trial
from diptych.cluster.engine.offline import OfflineEngines
from diptych.cluster.engine.spec import EngineSpec
from diptych.cluster.models import ModelFolder, resolve
from diptych.protos.constraint import Constraint
from diptych.protos.settings import DecodeSettings, TransferSettings
from diptych.protos.types import EngineId, Role

_LETTERS = "etaoinshrdlucmfwypvbgk"
_ROW = {
    "type": "object",
    "properties": {
        "id": {"type": "integer", "minimum": 0, "maximum": 99_999},
        "kind": {"enum": ["author", "reader", "editor"]},
        "is_member": {"type": "boolean"},
        "score": {"type": "number", "minimum": 0, "maximum": 10},
    },
    "required": ["id", "kind", "is_member", "score"],
    "additionalProperties": False,
}
FORMS: dict[str, str | None] = {
    "free": None,
    "pattern": trial.regex_grammar("[a-z][a-z ,.]*"),
    "json": trial.json_grammar({"type": "array", "items": _ROW, "minItems": 1000}),
}


def write_tokenizer(path: Path, vocab_size: int) -> None:
    """Byte-level: every byte, then words of 2 to 12 characters, half of them behind a space: of ten six in small
    letters, two with a capital, one of digits and signs, one of letters that ASCII lacks.
    """
    rng = random.Random(0)
    chars = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    chars += list(range(0x100, 0x100 + 256 - len(chars)))
    vocab = {chr(char): at for at, char in enumerate(chars)}
    while len(vocab) < vocab_size:
        kind = rng.randrange(10)
        letters = "0123456789.,-+/()" if kind == 8 else "".join(map(chr, range(0xC0, 0x100))) if kind == 9 else _LETTERS
        word = "".join(rng.choices(letters, k=rng.randint(2, 12)))
        word = word.capitalize() if kind in (6, 7) else word
        vocab.setdefault(("\u0120" if rng.random() < 0.5 else "") + word, len(vocab))
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": level,
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocab, "merges": [], "ignore_merges": True},
    }
    path.write_text(json.dumps(tokenizer), encoding="utf-8")


def model_of(options: argparse.Namespace, folder: Path) -> tuple[ModelSettings, ModelFolder]:
    """What is measured, and its files."""
    decode = DecodeSettings(max_running=options.requests, step_tokens=8192 if options.shape else 512)
    settings = {"decode": decode.model_dump(exclude_unset=True) | {"pace": "throughput"}}
    if options.shape:
        model = write_shape(options.shape, folder)
        write_tokenizer(folder / "tokenizer.json", model.facts.vocab_size)
        return ModelSettings.model_validate({"source": "shape", "weights": "random", **settings}), model
    model = resolve(options.model, Path.home() / ".cache" / "diptych")
    return ModelSettings.model_validate({"source": options.model, **settings}), model


@contextlib.contextmanager
def engine_of(options: argparse.Namespace, folder: Path) -> Iterator[tuple[OfflineEngines, int]]:
    """A decode engine that computes prompts, too."""
    settings, model = model_of(options, folder)
    spec = EngineSpec(
        engine_id=EngineId("decode-0"),
        epoch=1,
        roles=frozenset({Role.DECODE}),
        model="bench",
        settings=settings.model_copy(update={"layout": "colocated"}),
        transfer=TransferSettings(),
        folder=model.path,
        facts=model.facts,
        dtype="bfloat16",
        run_dir=folder,
    )
    engines = OfflineEngines([spec])
    try:
        engines.start()
        engines.settle()
        yield engines, model.facts.vocab_size
    finally:
        engines.stop()


def measure(engines: OfflineEngines, vocab: int, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """By form: tokens a second, steps and their mean time; the median of the repeats."""
    found: dict[str, list[dict[str, Any]]] = {form: [] for form in FORMS}
    for repeat in range(options.repeats + 1):
        for form, grammar in FORMS.items():
            prompts = random_prompts(options.requests, options.prompt, vocab_size=vocab, seed=repeat)
            constraint = None if grammar is None else Constraint(grammar=grammar)
            engines.pause_steps()
            engines.take_steps()
            began = time.perf_counter()
            salt = f"{form}/{repeat}".encode()
            answers = engines.generate(prompts, options.tokens, salt=salt, constraint=constraint)
            first = statistics.median(answer.first_token_s for answer in answers)
            seconds = max(answer.last_token_s for answer in answers)
            total = sum(answer.num_tokens for answer in answers)
            (steps,) = engines.take_steps()
            if repeat:  # the first round compiles
                wall = time.perf_counter() - began
                told = {kind: one.means() | {"steps": one.steps} for kind, one in steps.items()}
                row = {"tokens": total, "seconds": seconds, "first_p50_s": first, "wall_s": wall, "steps": told}
                found[form].append(row)
    return {form: sorted(rows, key=lambda row: row["seconds"])[len(rows) // 2] for form, rows in found.items()}


def main() -> None:
    """Measure, print a table, and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), help="random weights of this shape")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="else: a model with weights")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="diptych-bench-") as folder,
        engine_of(options, Path(folder)) as (engines, vocab),
    ):
        found = measure(engines, vocab, options)
    free = found["free"]["seconds"]
    print(f"{options.shape or options.model}, {options.requests} requests of {options.prompt}/{options.tokens}")
    print("| form | tokens/s | of free | steps by kind, us |\n|---|---|---|---|")
    for form, row in found.items():
        rate = row["tokens"] / row["seconds"]
        kinds = ", ".join(f"{kind} {one}" for kind, one in row["steps"].items())
        print(f"| {form} | {rate:,.0f} | {free / row['seconds']:.3f} | {kinds} |")
    result = provenance() | {"options": {k: str(v) for k, v in vars(options).items()}, "forms": found}
    if options.json:
        save_result(result, options.json)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
