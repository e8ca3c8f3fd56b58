"""Forms that lead nowhere, and forms that spell the model's own markers.

Guards against a row without a token, which looked like a fault of the model's numbers: each engine was asked, and the
request refused for ten minutes as one that engines fail over.
"""

from __future__ import annotations

import json
from pathlib import Path

import llguidance
import numpy as np
import pytest

from diptych.cluster.api.testing import byte_level_tokenizer
from diptych.cluster.engine.guides.guide import RequestGuide
from diptych.cluster.engine.guides.matcher import Llguidance, Words
from diptych.protos.constraint import mask_words
from diptych.protos.errors import EngineFault, InvalidRequest

TOKENIZER = byte_level_tokenizer()
END = TOKENIZER.token_to_id("<|im_end|>")
VOCAB = TOKENIZER.get_vocab_size()


class DeadEnd:
    """Allows nothing, and has no error to tell."""

    error = ""

    def consume(self, token: int) -> bool:
        return True

    def fill(self, mask_W: Words) -> None:
        mask_W.fill(0)

    def forced(self) -> list[int]:
        return []

    def is_over(self) -> bool:
        return False

    def consume_text(self, text: str) -> bool:
        return True


def mask_of(guide: RequestGuide, position: int) -> set[int]:
    mask = np.zeros(mask_words(VOCAB), np.int32)
    guide.fill(position, memoryview(mask).cast("B"))
    return set(np.unpackbits(mask.view(np.uint8), count=VOCAB, bitorder="little").nonzero()[0].tolist())


def test_a_form_without_a_way_on_is_the_requests_fault() -> None:
    guide = RequestGuide(DeadEnd(), num_prompt=2, end_tokens=(END,))
    guide.accept(2, 9)
    assert mask_of(guide, 3) == set()
    assert isinstance(guide.error, InvalidRequest)
    assert not isinstance(guide.error, EngineFault)
    assert "no token after 1" in str(guide.error)


@pytest.mark.parametrize("forces", [True, False])
@pytest.mark.parametrize("text", ["<|im_end|>", "a<|im_start|>b", "<|endoftext|><|endoftext|>"])
def test_a_marker_in_a_form_is_text(tmp_path: Path, text: str, forces: bool) -> None:
    """The library tokenised what must follow, found the marker's own token and refused it: 400 for such a schema."""
    file = tmp_path / "tokenizer.json"
    TOKENIZER.save(str(file))
    backend = Llguidance(file, vocab_size=VOCAB, end_tokens=(END,))
    schema = json.dumps({"type": "object", "properties": {text: {"const": text}}, "required": [text]})
    grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
    guide = RequestGuide(backend.compile(grammar).start(), num_prompt=0, end_tokens=(END,), forces=forces)
    written: list[int] = []
    closing = TOKENIZER.encode("}", add_special_tokens=False).ids[0]
    while END not in written:
        ways = mask_of(guide, len(written))
        assert ways, guide.error
        token = closing if closing in ways else END if END in ways else min(ways)
        written += [token, *guide.accept(len(written), token)]
    assert guide.error is None
    assert json.loads(TOKENIZER.decode(written[:-1], skip_special_tokens=False)) == {text: text}
    assert backend.compile(grammar).start().consume_text(json.dumps({text: text}, separators=(",", ":"))[:-4]), "begun"
