"""xgrammar as the second backend: schemas that it alone compiles, in a process that may die."""

from __future__ import annotations

import json
from collections.abc import Iterator

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
