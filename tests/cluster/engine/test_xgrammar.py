"""xgrammar as the second backend: schemas that it alone compiles, in a process that may die."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from diptych.cluster.api.testing import byte_level_tokenizer
from diptych.cluster.engine.guides import xgrammar_matcher
from diptych.cluster.engine.guides.guide import RequestGuide
from diptych.cluster.engine.guides.xgrammar_matcher import Xgrammar
from diptych.protos.constraint import mask_words
from diptych.protos.errors import InvalidRequest

TOKENIZER = byte_level_tokenizer()
END = TOKENIZER.token_to_id("<|im_end|>")
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Xgrammar]:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    TOKENIZER.save(str(path))
    backend = Xgrammar(path, vocab_size=TOKENIZER.get_vocab_size(), end_tokens=(END,))
    yield backend
    backend.close()


def allowed(guide: RequestGuide, position: int) -> set[int]:
    mask = np.zeros(mask_words(TOKENIZER.get_vocab_size()), np.int32)
    guide.fill(position, memoryview(mask).cast("B"))
    return set(np.unpackbits(mask.view(np.uint8), bitorder="little").nonzero()[0].tolist())


def test_a_guide_follows_its_schema(backend: Xgrammar) -> None:
    guide = RequestGuide(backend.compile(json.dumps(SCHEMA)).start(), num_prompt=0, end_tokens={END})
    tokens = TOKENIZER.encode('{"a":12}', add_special_tokens=False).ids
    for at, token in enumerate(tokens):
        assert token in allowed(guide, at)
        assert guide.accept(at, token) == ()
    assert allowed(guide, len(tokens)) == {END}
    assert guide.accept(len(tokens), END) == ()
    assert guide.error is None
    wrong = RequestGuide(backend.compile(json.dumps(SCHEMA)).start(), num_prompt=0, end_tokens={END})
    wrong.accept(0, TOKENIZER.encode("x").ids[0])
    assert isinstance(wrong.error, InvalidRequest)


def test_what_it_refuses_and_what_ends_its_process_are_errors_of_that_schema_alone(
    backend: Xgrammar, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidRequest, match="cannot accept any value"):
        backend.compile("false")
    monkeypatch.setattr(xgrammar_matcher, "COMPILE_S", 0.0)
    with pytest.raises(InvalidRequest, match="could not be compiled"):
        backend.compile(json.dumps({"enum": [f"value {number}" for number in range(20_000)]}))
    monkeypatch.undo()
    assert backend.compile(json.dumps(SCHEMA)).start().consume_text('{"a":1}')


def test_schemas_that_come_together_with_one_that_ends_the_process_are_compiled(
    backend: Xgrammar, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads: one got the process, the other ended it, and the first wrote to a closed pipe."""
    child = backend._child
    exchange = child._exchange
    begun = threading.Event()

    def slow(process: subprocess.Popen[str], line: str) -> dict[str, str]:
        if not begun.is_set():
            begun.set()
            process.kill()
            process.wait()
        return exchange(process, line)

    monkeypatch.setattr(child, "_exchange", slow)
    with ThreadPoolExecutor(3) as threads:
        first = threads.submit(backend.compile, json.dumps({"const": 1}))
        begun.wait(60)
        others = [threads.submit(backend.compile, json.dumps(SCHEMA)) for _ in range(2)]
        with pytest.raises(InvalidRequest, match="its process ended"):
            first.result(60)
        assert all(one.result(60).start().consume_text('{"a":1}') for one in others)


def test_closing_ends_the_process_whoever_waits_for_it(tmp_path: Path) -> None:
    """Also while it starts, which takes seconds: an engine that ends waits for nobody."""
    path = tmp_path / "tokenizer.json"
    TOKENIZER.save(str(path))
    backend = Xgrammar(path, vocab_size=TOKENIZER.get_vocab_size(), end_tokens=(END,))
    process = backend._child._process
    assert process is not None
    process.kill()
    process.wait()
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(backend.compile, json.dumps(SCHEMA))  # begins another process
        while backend._child._process in (None, process) and not asked.done():
            threading.Event().wait(0.001)
        began = time.monotonic()
        backend.close()
        with pytest.raises(InvalidRequest, match="did not start"):
            asked.result(60)
        assert backend._child._process is None
        with pytest.raises(InvalidRequest, match="shutting down"):
            backend.compile(json.dumps(SCHEMA))
        assert time.monotonic() - began < xgrammar_matcher.SILENT_S / 2
    backend.close()


def test_what_takes_too_long_or_crashes_costs_the_next_schema_nothing(
    backend: Xgrammar, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process had to be started anew, for seconds in which every schema that came was refused."""
    process = backend._child._process
    monkeypatch.setattr(xgrammar_matcher, "COMPILE_S", 0.05)
    with pytest.raises(InvalidRequest, match="it took too long; make it simpler"):
        backend.compile(json.dumps({"type": "string", "pattern": "(a{1,500}){1,500}"}))
    monkeypatch.undo()
    assert backend.compile(json.dumps(SCHEMA)).start().consume_text('{"a":1}')
    assert backend._child._process is process


@pytest.mark.parametrize(("fault", "told"), [("os.abort()", "its process ended"), ("1 / 0", "division by zero")])
def test_a_crash_within_the_library_is_that_schemas_alone(tmp_path: Path, fault: str, told: str) -> None:
    path = tmp_path / "tokenizer.json"
    TOKENIZER.save(str(path))
    backend = Xgrammar(path, vocab_size=TOKENIZER.get_vocab_size(), end_tokens=(END,))
    code = (
        "import os, sys; from diptych.cluster.engine.guides import xgrammar_child as child; own = child._compiled\n"
        "class Odd:\n"
        "    def __init__(self, compiler): self.compiler = compiler\n"
        "    def compile_json_schema(self, schema, **options):\n"
        f"        if schema == 'crash': {fault}\n"
        "        return self.compiler.compile_json_schema(schema, **options)\n"
        "child._compiled = lambda compiler, schema: own(Odd(compiler), schema)\n"
        "child.main(sys.stdin, sys.stdout)"
    )
    lines = [backend._child._tokenizer, '["crash", 60]', json.dumps([json.dumps(SCHEMA), 60])]
    ended = subprocess.run(
        [sys.executable, "-c", code], input="\n".join(lines) + "\n", text=True, capture_output=True, timeout=120
    )
    backend.close()
    assert ended.returncode == 0, ended.stderr
    answers = [json.loads(line) for line in ended.stdout.splitlines()]
    assert answers[0] == {}
    assert told in str(answers[1])
    assert list(answers[2]) == ["compiled"]


def test_rows_that_the_model_lacks_are_never_allowed(tmp_path: Path) -> None:
    """Also within the last word of a mask: a token that is not there would be looked up in the weights."""
    path = tmp_path / "tokenizer.json"
    TOKENIZER.save(str(path))
    vocab = TOKENIZER.get_vocab_size() - 3
    backend = Xgrammar(path, vocab_size=vocab, end_tokens=(END,))
    guide = RequestGuide(backend.compile(json.dumps({"type": "string"})).start(), num_prompt=0, end_tokens={END})
    mask = np.zeros(mask_words(vocab), np.int32)
    for at, token in enumerate(TOKENIZER.encode('"', add_special_tokens=False).ids):
        guide.accept(at, token)
        guide.fill(at + 1, memoryview(mask).cast("B"))
    backend.close()
    found = np.unpackbits(mask.view(np.uint8), bitorder="little").nonzero()[0]
    assert found.size
    assert found.max() < vocab
