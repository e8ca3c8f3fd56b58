"""Bodies of POST /v1/rerank and /v2/rerank: what Cohere's and Jina's clients send, and an answer that both read. Pure.

What needs the model is checked by cluster/api.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, PlainValidator

from .errors import InvalidRequest
from .openai_embeddings import Label, text_usage
from .openai_sampling import Wire, validated
from .strict_json import parse_object

JsonObject = dict[str, Any]

DEFAULT_TOKENS_PER_DOC = 4096  # as Cohere documents it


def _documents(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise InvalidRequest("documents must be a list of strings, or of objects with the field text", "documents")
    return tuple(_document(entry, f"documents[{at}]") for at, entry in enumerate(value))


def _document(value: object, path: str) -> str:
    if isinstance(value, dict):
        if set(value) != {"text"}:
            raise InvalidRequest(f"{path} must be a string, or an object with the field text and no other", path)
        value, path = value["text"], f"{path}.text"
    if not isinstance(value, str):
        raise InvalidRequest(f"{path} must be a string", path)
    if not value:
        raise InvalidRequest(f"{path} is empty", path)
    return value


def _rank_fields(value: object) -> None:
    """Checked and dropped: documents have one field."""
    if value not in (None, ["text"]):
        raise InvalidRequest('rank_fields must be ["text"]: that is the one field of a document', "rank_fields")


class RerankRequest(Wire):
    """None means: not given."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    query: Annotated[str, Field(min_length=1)]
    documents: Annotated[tuple[str, ...], PlainValidator(_documents)]
    top_n: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None  # more than there are: all
    return_documents: bool | None = None
    max_tokens_per_doc: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    rank_fields: Annotated[None, PlainValidator(_rank_fields)] = None
    user: Label | None = None
    timeout_s: Annotated[float, Field(gt=0, le=86_400)] | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None  # lower is sooner; not given: 0


def parse_rerank(body: bytes, *, most_documents: int) -> RerankRequest:
    """The request in `body`, of `most_documents` or fewer. Raises InvalidRequest naming the field."""
    request = validated(RerankRequest, parse_object(body), "")
    if len(request.documents) > most_documents:
        number = len(request.documents)
        raise InvalidRequest(f"documents has {number} entries; the limit is {most_documents}", "documents")
    return request


def rerank_answer(request: RerankRequest, scores: Sequence[float], *, id: str, num_tokens: int) -> JsonObject:
    """The best first, equal ones in the order of the request. `usage` is Jina's, `id` and `meta` are Cohere's."""
    order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
    results: list[JsonObject] = []
    for index in order[: request.top_n]:
        result: JsonObject = {"index": index, "relevance_score": scores[index]}
        if request.return_documents:
            result["document"] = {"text": request.documents[index]}
        results.append(result)
    return {
        "id": id,
        "object": "list",
        "model": request.model,
        "results": results,
        "usage": text_usage(num_tokens),
        "meta": {
            "api_version": {"version": "2"},
            "billed_units": {"search_units": 1},
            "tokens": {"input_tokens": num_tokens, "output_tokens": 0},
        },
    }
