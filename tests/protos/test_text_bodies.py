"""Bodies of embeddings and rerank: what is honoured, and the field that every other one is told.

Guards: true taken for 1; a list of one text taken for token ids; a document that is silently made a string.
"""

from __future__ import annotations

import base64
import json
import struct
from array import array
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.protos.errors import InvalidRequest
from diptych.protos.openai_embeddings import EmbeddingRequest, embedding_entries, parse_embeddings
from diptych.protos.rerank import RerankRequest, parse_rerank, rerank_answer

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def embeddings(**fields: Any) -> EmbeddingRequest:
    return parse_embeddings(json.dumps({"model": "m", "input": "a"} | fields).encode(), most_inputs=3)


def rerank(**fields: Any) -> RerankRequest:
    body = {"model": "m", "query": "q", "documents": ["a", {"text": "b"}]} | fields
    return parse_rerank(json.dumps(body).encode(), most_documents=3)


@pytest.mark.parametrize(
    ("given_input", "read"),
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
        (["a"], ("a",)),
        ([[1]], ((1,),)),
    ],
)
def test_inputs_in_their_four_forms(given_input: Any, read: tuple[object, ...]) -> None:
    assert embeddings(input=given_input).input == read


@pytest.mark.parametrize("value", [True, 1, 1.5, [], [[]], [""], [1, "a"], [1, True], [[1.0]], [None], {"a": 1}, None])
def test_what_is_no_input_is_told_so(value: Any) -> None:
    with pytest.raises(InvalidRequest, match="input") as caught:
        embeddings(input=value)
    assert caught.value.param == "input"


def test_truncation_in_both_spellings() -> None:
    spelled = {True: "end", False: "none", "END": "end", "start": "start", None: None}
    assert {value: embeddings(truncate=value).truncate for value in spelled} == spelled


def test_two_names_of_one_field_may_not_differ() -> None:
    assert embeddings(input_type="query", task="query").kind == ("input_type", "query")
    assert embeddings(task="query").kind == ("task", "query")
    with pytest.raises(InvalidRequest, match="differ"):
        embeddings(input_type="query", task="document")


def blamed(read: Callable[..., object], field: str, value: Any) -> str | None:
    """The field of the request that is told to be wrong; None: it is read, or no field can be blamed."""
    try:
        read(**{field: value})
    except InvalidRequest as error:
        return None if error.param is None else error.param.split("[")[0].split(".")[0]
    return None


@given(st.sampled_from([*EmbeddingRequest.model_fields, "other"]), JSON)
def test_any_value_of_any_field_is_read_or_refused_by_name(field: str, value: Any) -> None:
    assert blamed(embeddings, field, value) in {None, field}


@given(st.sampled_from([*RerankRequest.model_fields, "other"]), JSON)
def test_the_same_of_rerank(field: str, value: Any) -> None:
    assert blamed(rerank, field, value) in {None, field}


def test_too_many_of_either_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="4 texts; the limit is 3"):
        embeddings(input=["a"] * 4)
    with pytest.raises(InvalidRequest, match="4 entries; the limit is 3"):
        rerank(documents=["a"] * 4)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=5))
def test_vectors_in_both_encodings(numbers: list[float]) -> None:
    (plain,) = embedding_entries([array("f", numbers)], "float")
    (packed,) = embedding_entries([array("f", numbers)], "base64")
    assert plain["embedding"] == numbers
    assert struct.unpack(f"<{len(numbers)}f", base64.b64decode(packed["embedding"])) == tuple(numbers)


def test_the_best_first_equal_ones_as_they_came() -> None:
    request = rerank(documents=["a", "b", "c"], top_n=2, return_documents=True)
    answer = rerank_answer(request, [0.5, 0.75, 0.5], id="x", num_tokens=9)
    assert answer["results"] == [
        {"index": 1, "relevance_score": 0.75, "document": {"text": "b"}},
        {"index": 0, "relevance_score": 0.5, "document": {"text": "a"}},
    ]
    assert answer["usage"] == {"prompt_tokens": 9, "total_tokens": 9}
