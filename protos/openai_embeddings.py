"""Bodies of POST /v1/embeddings: OpenAI's request, with what other servers' clients add, and its answer. Pure.

What needs the model is checked by cluster/api: vocabulary, lengths, dimensions, names of prompts.
"""

from __future__ import annotations

import base64
import sys
from array import array
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator

from .errors import InvalidRequest
from .openai_sampling import Wire, validated
from .strict_json import parse_object

JsonObject = dict[str, Any]
Text = str | tuple[int, ...]
Truncation = Literal["none", "start", "end"]

_KINDS = "a string, a list of strings, a list of token ids, or a list of such lists"


def _inputs(value: object) -> tuple[Text, ...]:
    if isinstance(value, list) and value and all(isinstance(entry, str | list) for entry in value):
        return tuple(_input(entry, f"input[{at}]") for at, entry in enumerate(value))
    return (_input(value, "input"),)


def _input(value: object, path: str) -> Text:
    if not isinstance(value, str) and not (isinstance(value, list) and all(type(token) is int for token in value)):
        raise InvalidRequest(f"{path} must be {_KINDS}", "input")
    if not value:
        raise InvalidRequest(f"{path} is empty", "input")
    return value if isinstance(value, str) else tuple(value)


def read_truncation(value: object) -> Truncation | None:
    """`truncate` in its two spellings: true is `end`, false is `none`. Raises InvalidRequest."""
    if value is None or isinstance(value, bool):
        return {True: "end", False: "none", None: None}[value]
    for known in ("none", "start", "end"):
        if isinstance(value, str) and value.lower() == known:
            return known
    raise InvalidRequest('truncate must be "none", "start", "end", true or false', "truncate")


Label = Annotated[str, Field(min_length=1, max_length=512)]


class EmbeddingRequest(Wire):
    """None means: not given."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    input: Annotated[tuple[Text, ...], PlainValidator(_inputs)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    user: Label | None = None
    input_type: Label | None = None  # what the texts are: query, document, or a prompt's name; Cohere's field
    task: Label | None = None  # the same, Jina's field
    truncate: Annotated[Truncation | None, PlainValidator(read_truncation)] = None
    timeout_s: Annotated[float, Field(gt=0, le=86_400)] | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None  # lower is sooner; not given: 0

    @property
    def kind(self) -> tuple[str, str] | None:
        """The field that says what the texts are, and its value; None: neither was given."""
        if self.input_type is not None:
            return "input_type", self.input_type
        return None if self.task is None else ("task", self.task)


def parse_embeddings(body: bytes, *, most_inputs: int) -> EmbeddingRequest:
    """The request in `body`, of `most_inputs` texts or fewer. Raises InvalidRequest naming the field."""
    request = validated(EmbeddingRequest, parse_object(body), "")
    if len(request.input) > most_inputs:
        raise InvalidRequest(f"input has {len(request.input)} texts; the limit is {most_inputs}", "input")
    if request.input_type is not None and request.task not in (None, request.input_type):
        raise InvalidRequest("input_type and task differ; send one of them", "task")
    return request


def embedding_entries(values: list[array[float]], encoding_format: str | None) -> Iterator[JsonObject]:
    """The entries of `data`, in order; base64 is of little-endian float32."""
    for index, row in enumerate(values):
        embedding: object = _base64(row) if encoding_format == "base64" else row.tolist()
        yield {"object": "embedding", "index": index, "embedding": embedding}


def _base64(row: array[float]) -> str:
    if sys.byteorder == "big":
        row = array("f", row)
        row.byteswap()
    return base64.b64encode(row.tobytes()).decode("ascii")


def embeddings_head(model: str) -> JsonObject:
    """What stands in an answer beside `data` and `usage`."""
    return {"object": "list", "model": model}


def text_usage(num_tokens: int) -> JsonObject:
    """Token counts of a request whose answer has no tokens."""
    return {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
