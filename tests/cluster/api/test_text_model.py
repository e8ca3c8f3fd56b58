"""Texts to tokens as the model's own tools make them: specials, prompts, truncation, pairs.

Guards: a text that is cut without being asked for; a prompt that is put before token ids or forgotten; a document's
bound counted in characters; a tokenizer whose settings of one request meet another.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from diptych.cluster.api.testing import FrontDoor
from diptych.cluster.api.text_model import TextModel
from diptych.cluster.api.tokenize import TokenPages
from diptych.cluster.models.texts import TextFacts
from diptych.protos.errors import ContextTooLong, InvalidRequest

WORDS = ["[UNK]", "[CLS]", "[SEP]", "ask", "say", ":", *"abcdefgh"]
CLS, SEP = 1, 2
PLAIN = TextFacts(task="embed", dimensions=8, max_tokens=6)
PROMPTS = (("query", "ask : "), ("passage", "say : "), ("other", "a "))


def tokenizer() -> Tokenizer:
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(["[CLS]", "[SEP]"])
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )
    return made


def model(facts: TextFacts = PLAIN, **fields: object) -> TextModel:
    return TextModel(name="m", facts=facts, tokenizer=tokenizer(), vocab_size=len(WORDS), **fields)  # type: ignore[arg-type]


@pytest.fixture
async def plain() -> AsyncIterator[TextModel]:
    made = model()
    yield made
    made.close()


def ids(*words: str) -> list[int]:
    return [CLS, *(WORDS.index(word) for word in words), SEP]


async def test_specials_go_around_a_text(plain: TextModel) -> None:
    rows = await plain.encode(["a b", "c"])
    assert [(list(row.ids), row.second) for row in rows] == [(ids("a", "b"), 0), (ids("c"), 0)]


async def test_a_long_text_is_refused_by_its_number_or_cut_as_asked(plain: TextModel) -> None:
    with pytest.raises(ContextTooLong, match=r"input\[1\] has 7 tokens, and this model reads 6"):
        await plain.encode(["a", "a b c d e"])
    (cut,) = await plain.encode(["a b c d e"], truncate="end")
    assert cut.ids == ids("a", "b", "c", "d")
    (cut,) = await plain.encode(["a b c d e"], truncate="start")
    assert cut.ids == ids("b", "c", "d", "e")
    with pytest.raises(ContextTooLong):  # the request before left nothing behind
        await plain.encode(["a b c d e"])


async def test_requests_at_once_do_not_share_their_truncation(plain: TextModel) -> None:
    asked = [plain.encode(["a b c d e f"], truncate=side) for side in ("end", "start", "none") * 20]  # type: ignore[arg-type]
    found = await asyncio.gather(*asked, return_exceptions=True)
    for number, outcome in enumerate(found):
        if number % 3 == 2:
            assert isinstance(outcome, ContextTooLong)
        else:
            assert not isinstance(outcome, BaseException)
            assert outcome[0].ids == (ids("a", "b", "c", "d") if number % 3 == 0 else ids("c", "d", "e", "f"))


async def test_the_models_own_default_holds_where_a_request_says_nothing() -> None:
    made = model(truncate="end")
    assert len((await made.encode(["a b c d e f"]))[0].ids) == 6
    with pytest.raises(ContextTooLong):
        await made.encode(["a b c d e f"], truncate="none")


@pytest.mark.parametrize(
    ("kind", "prompt"),
    [
        (None, ""),
        (("input_type", "query"), "ask : "),
        (("input_type", "search_query"), "ask : "),
        (("task", "retrieval.passage"), "say : "),
        (("task", "document"), "say : "),
        (("task", "other"), "a "),
    ],
)
def test_prompts_by_their_names_and_by_what_others_call_them(kind: tuple[str, str] | None, prompt: str) -> None:
    assert model(dataclasses.replace(PLAIN, prompts=PROMPTS)).prompt(kind) == prompt


def test_a_default_prompt_and_models_without_prompts() -> None:
    own = model(dataclasses.replace(PLAIN, prompts=PROMPTS, default_prompt="query"))
    assert own.prompt(None) == "ask : "
    assert model().prompt(("input_type", "query")) == ""  # queries and documents alike
    with pytest.raises(InvalidRequest, match="knows query, document, passage, other") as caught:
        own.prompt(("task", "poem"))
    assert caught.value.param == "task"


async def test_a_prompt_that_takes_no_part_in_pooling_is_counted() -> None:
    kept = model(dataclasses.replace(PLAIN, pools_prompt=False))
    assert await kept.prompt_tokens("ask : ") == 3  # [CLS] ask :
    assert await kept.prompt_tokens("") == 0
    assert await model().prompt_tokens("ask : ") == 0


async def test_lower_case_where_the_folder_says_so() -> None:
    (row,) = await model(dataclasses.replace(PLAIN, lower_case=True)).encode(["A B"])
    assert row.ids == ids("a", "b")


async def test_pairs_know_where_the_document_begins_and_lose_its_end() -> None:
    ranker = model(dataclasses.replace(PLAIN, task="rerank", max_tokens=8))
    one, long, bounded = await ranker.encode_pairs("a b", ["c", "c d e f g h", "c"], tokens_per_doc=4096)
    assert (one.ids, one.second) == ([CLS, *ids("a", "b", "c")[1:3], SEP, WORDS.index("c"), SEP], 4)
    assert (len(long.ids), long.second) == (8, 4)
    assert bounded.ids == one.ids
    blind = model(dataclasses.replace(PLAIN, task="rerank", max_tokens=8, tells_pairs=False))
    assert [row.second for row in await blind.encode_pairs("a b", ["c"], tokens_per_doc=9)] == [0]
    with pytest.raises(ContextTooLong, match="query has"):
        await ranker.encode_pairs("a b c d e f", ["a"], tokens_per_doc=4096)


async def test_documents_are_bounded_by_tokens(plain: TextModel) -> None:
    documents = ["a b c", "a", "ddd eee fff"]
    assert await plain.shortened(documents, tokens_per_doc=2) == ["a b", "a", "ddd eee"]
    assert await plain.shortened(documents, tokens_per_doc=3) == documents


async def test_tokens_are_told_of_a_text_of_any_length(plain: TextModel, door: FrontDoor) -> None:
    """The pages of tokens said of a model that was served for embeddings that it is not served."""
    pages = TokenPages(door.router, {}, {"m": plain})
    told = await pages.tokenize(b'{"prompt": "a b c d e f g", "return_token_strs": true}')
    assert told["tokens"] == ids(*"abcdefg")
    assert (told["count"], told["max_model_len"], told["token_strs"][:2]) == (9, 6, ["[CLS]", "a"])
    bare = await pages.tokenize(b'{"model": "m", "prompt": "a", "add_special_tokens": false}')
    assert bare["tokens"] == [WORDS.index("a")]
    assert await pages.detokenize(b'{"model": "m", "tokens": [1, 6]}') == {"prompt": "[CLS] a"}
    with pytest.raises(InvalidRequest, match="send prompt"):
        await pages.tokenize(b'{"model": "m", "messages": [{"role": "user", "content": "a"}]}')


def test_wrong_endpoints_are_told_the_right_ones() -> None:
    assert "POST /v1/embeddings and POST /v1/rerank" in str(model().refusal("generate text"))
    assert "POST /v1/rerank" in str(model(dataclasses.replace(PLAIN, task="rerank")).refusal("embed"))
