"""Every declared field of every request is sent at and around its bounds: what the declaration allows is accepted, and
what it does not allow is refused by name. And no reader knows a field that is not declared.

It guards against declarations, and so an OpenAPI document, that promise what a reader refuses, or keep silent on what
it takes.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from diptych.cluster.api.description import anthropic_requests, chat, files, pages, response_requests, texts
from diptych.cluster.api.description.shapes import Field, Shape, Standing
from diptych.cluster.api.description.testing import JUNK, Place, Samples, validator
from diptych.protos.anthropic_messages import parse_count, parse_messages
from diptych.protos.errors import RequestError
from diptych.protos.openai import parse_chat, parse_completion
from diptych.protos.openai_batches import parse_batch
from diptych.protos.openai_embeddings import parse_embeddings
from diptych.protos.rerank import parse_rerank
from diptych.protos.responses import parse_input_tokens, parse_responses
from diptych.protos.responses_items import ItemIds, ItemReader
from diptych.protos.tokenize import parse_detokenize, parse_tokenize

ROOT = Path(__file__).parents[4]
FUNCTION = {"name": "look_up"}
TOOLS = [{"type": "function", "function": FUNCTION}]
FLAT_TOOLS = [{"type": "function", "name": "look_up"}]
THEIR_TOOLS = [{"name": "look_up", "input_schema": {}}]
SCHEMA_FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
SAID = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "well"}]
CALL = {"id": "a", "function": {"name": "a", "arguments": "{}"}}

OPENAI = Samples(
    given={
        "model": "echo",
        "messages": SAID,
        "prompt": "hello",
        "arguments": "{}",
        "CompletionRequest.best_of": 1,
    },
    besides={
        "AssistantMessage": {"content": "well"},
        "InputFile": {"file_id": "file"},
        "StructuredOutputs": {"regex": "a"},
        "ChatCompletionRequest.stream_options": {"stream": True},
        "CompletionRequest.stream_options": {"stream": True},
        "ChatCompletionRequest.tool_choice": {"tools": TOOLS},
        "ChatCompletionRequest.function_call": {"functions": [FUNCTION]},
        "ChatCompletionRequest.top_logprobs": {"logprobs": True},
        "ChatCompletionRequest.structured": {"stream": True, "response_format": SCHEMA_FORMAT},
        "CompletionRequest.max_tokens": {"echo": True},
    },
    staged={
        "ToolMessage": (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [CALL]},
                    {"role": "tool", "content": "a", "tool_call_id": "a"},
                ]
            },
            ("messages", 1),
        ),
        "FunctionMessage": (
            {
                "messages": [
                    {"role": "assistant", "function_call": CALL["function"]},
                    {"role": "function", "content": "a", "name": "a"},
                ]
            },
            ("messages", 1),
        ),
    },
)
USED = {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "a", "input": {}}]}
ANSWERED = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a"}]}
CALLED_DIRECTLY = {"type": "tool_use", "id": "a", "name": "a", "input": {}, "caller": {"type": "direct"}}
ANTHROPIC = Samples(
    given={"model": "echo", "messages": SAID[:1], "max_tokens": 2**31 - 1},
    besides={
        "MessagesRequest.tool_choice": {"tools": THEIR_TOOLS},
        "CountTokensRequest.tool_choice": {"tools": THEIR_TOOLS},
        "OutputConfig": {},
    },
    staged={
        "ToolResultBlock": ({"messages": [USED, ANSWERED]}, ("messages", 1, "content", 0)),
        "ToolUseBlock": ({"messages": [USED, ANSWERED]}, ("messages", 0, "content", 0)),
        "DirectCaller": (
            {"messages": [{"role": "assistant", "content": [CALLED_DIRECTLY]}, ANSWERED]},
            ("messages", 0, "content", 0, "caller"),
        ),
        "ThinkingBlock": (
            {
                "messages": [
                    {"role": "assistant", "content": [{"type": "thinking", "thinking": "a"}]},
                    {"role": "user", "content": "a"},
                ]
            },
            ("messages", 0, "content", 0),
        ),
        "RedactedThinkingBlock": (
            {
                "messages": [
                    {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "a"}]},
                    {"role": "user", "content": "a"},
                ]
            },
            ("messages", 0, "content", 0),
        ),
    },
)
RETURNED = [
    {"type": "function_call", "call_id": "a", "name": "a", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "a", "output": "a"},
]
ITEMS = Samples(
    given={"model": "echo", "input": "hello", "arguments": "{}", "ItemReference.id": "kept", "encrypted_content": "a"},
    besides={
        "ResponseRequest": {"input": "hello"},
        "InputTokensRequest": {"input": "hello"},
        "ResponseRequest.tool_choice": {"tools": FLAT_TOOLS},
        "InputTokensRequest.tool_choice": {"tools": FLAT_TOOLS},
        "ResponseRequest.stream_options": {"stream": True},
        "ResponseRequest.top_logprobs": {"include": ["message.output_text.logprobs"]},
        "ItemReference": {"type": "item_reference"},
        "InputImage": {"file_id": "a"},
        "InputFilePart": {"file_id": "a"},
        "InputImage.image_url": {"file_id": None},
        "InputFilePart.file_data": {"file_id": None},
        "InputFilePart.file_url": {"file_id": None},
    },
    staged={"FunctionCallOutputItem": ({"input": RETURNED}, ("input", 1))},
)
KEPT = {"type": "message", "role": "user", "content": "kept"}


def with_items(parse: Callable[[bytes], Any]) -> Callable[[bytes], None]:
    """A reader that also reads the items, which the endpoint does behind those of stored responses."""

    def read(body: bytes) -> None:
        request = parse(body)
        ItemReader(ItemIds("resp_" + "0" * 24), {"a": "sealed"}.get, {"kept": KEPT}).read(request.items, "input")

    return read


Reader = Callable[[bytes], object]
READERS: dict[str, tuple[Shape, Reader, Samples]] = {
    "chat": (chat.CHAT, parse_chat, OPENAI),
    "completions": (chat.COMPLETION, parse_completion, OPENAI),
    "tokenize": (pages.TOKENIZE, parse_tokenize, OPENAI),
    "detokenize": (pages.DETOKENIZE, parse_detokenize, OPENAI),
    "messages": (anthropic_requests.MESSAGES, parse_messages, ANTHROPIC),
    "count_tokens": (anthropic_requests.COUNT, parse_count, ANTHROPIC),
    "responses": (response_requests.RESPONSE, with_items(parse_responses), ITEMS),
    "input_tokens": (response_requests.INPUT_TOKENS, with_items(parse_input_tokens), ITEMS),
    "embeddings": (texts.EMBEDDING, lambda body: parse_embeddings(body, most_inputs=2048), Samples()),
    "rerank": (texts.RERANK, lambda body: parse_rerank(body, most_documents=1000), Samples()),
    "batches": (files.BATCH_REQUEST, parse_batch, Samples(given={"input_file_id": "file-" + "0" * 32})),
}

# What no schema says of values that it allows: the words of the refusals, by shape and field, or by field.
RULES: dict[str, str] = {
    "messages": "is the id of no call|is called in no assistant message|a message without calls has a text",
    "content": "must have one of|is missing: a message without calls|is the id of no tool_use|must hold something"
    "|end with calls|cannot be left out",
    "file": "must have one of file_id and file_data",
    "file_id": "must have one of",
    "file_data": "must have one of",
    "file_url": "must have one of",
    "image_url": "must have one of",
    "guided_json": "must hold the JSON of an object",
    "json": "each give the answer a form|must hold the JSON of an object",
    "regex": "asks for nothing",
    "choice": "each give the answer a form|is the same as",
    "grammar": "each give the answer a form",
    "json_object": "each give the answer a form",
    "guided_choice": "is the same as",
    "structured_outputs": "asks for nothing",
    "schema": "must hold the JSON of an object",
    "arguments": "must hold the JSON of an object",
    "tools": "a call could mean either|is none of the request's functions",
    "functions": "a call could mean either",
    "tool_choice": "is none of the request's|chooses among tools",
    "tool_calls": "is the id of another call|must hold the JSON of an object",
    "function_call": "must hold the JSON of an object|is the old name of tool_calls",
    "function": "must hold the JSON of an object",
    "name": "is none of the request's|is called in no assistant message",
    "tool_call_id": "is the id of no call",
    "tool_use_id": "is the id of no tool_use",
    "ToolUseBlock.id": "is the id of no tool_use",
    "ItemReference.id": "is the id of no item",
    "call_id": "is the call_id of no function_call",
    "input": "is missing|is the call_id of no function_call",
    "encrypted_content": "was not made by this server",
    "input_file_id": "there is no file",
    "best_of": "must equal n",
    "n": "must equal n",
    "budget_tokens": "must be less than max_tokens",
    "reasoning": "differ: send one of them",
    "background": "is for responses that are stored",
}
# Values that no declaration allows and that are refused where the model is known, behind the reader.
LATER = {"stop_token_ids", "allowed_token_ids", "prompt", "tokens", "input"}
# Where two fields exclude each other, the other one may be to blame.
BLAMED = {"TokenizeText.messages": ("prompt",), "TokenizeChat.messages": ("prompt",)}


def refusal(parse: Reader, body: object) -> RequestError | None:
    try:
        parse(json.dumps(body).encode())
    except RequestError as exc:
        return exc
    return None


def rule_of(shape: Shape, one: Field) -> str | None:
    return RULES.get(f"{shape.name}.{one.name}") or RULES.get(one.name)


@pytest.mark.parametrize("name", READERS)
def test_a_reader_takes_what_is_declared_and_nothing_else(name: str) -> None:
    body, parse, samples = READERS[name]
    wrong, sent = [], 0
    for place in samples.places(body):
        assert (error := refusal(parse, place.body)) is None, (place.shape.name, str(error), place.body)
        for one in place.shape.fields:
            wrong += list(_disagreements(place, one, parse, samples))
            sent += 1
    assert not wrong, "\n".join(wrong[:20])
    assert sent


def _disagreements(place: Place, one: Field, parse: Reader, samples: Samples) -> Any:
    judge, where = validator(one.schema), f"{place.shape.name}.{one.name}"
    besides = samples.besides.get(where, {})
    accepted = refused = 0
    for value in [samples.value(place.shape, one), *samples.around(one.schema), *JUNK]:
        sent = place.holding({**place.present, **besides, one.name: value})
        is_allowed, error = judge.is_valid(value), refusal(parse, sent)
        shown = f"{where} = {str(value)[:60]}: "
        if error is None:
            accepted += 1
            if not is_allowed and not (one.name in LATER and isinstance(value, list)):
                yield shown + "is accepted, and is not declared"
            continue
        refused += 1
        if is_allowed:
            rule = rule_of(place.shape, one)
            if rule is None or not re.search(rule, str(error)):
                yield shown + f"is declared, and refused: {error}"
        names = {one.name, *(part for part in place.path if isinstance(part, str)), *BLAMED.get(where, ())}
        if not any(each in (error.param or "") for each in names):
            yield shown + f"is refused with the blame on {error.param}: {error}"
    if not accepted:
        yield f"{where}: nothing was accepted"
    if not refused and one.schema.keys() - {"examples"}:
        yield f"{where}: nothing was refused"


def names_in_the_sources() -> list[str]:
    """Every name that stands as a text in the readers' sources: one that a reader knows is among them."""
    found = set()
    for path in sorted((ROOT / "protos").glob("*.py")):
        if not re.match("openai|anthropic|responses|rerank|tokenize", path.name):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found |= {word for word in node.value.split() if re.fullmatch("[a-z][a-z0-9_]*", word)}
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(node.target.id)
    return sorted(word for word in found if "_" in word or len(word) > 2)


@pytest.mark.parametrize("name", READERS)
def test_no_reader_knows_a_field_that_is_not_declared(name: str) -> None:
    body, parse, samples = READERS[name]
    words, wrong = names_in_the_sources(), []
    assert {"model", "temperature", "guided_json", "tool_call_id"} <= set(words)
    for place in samples.places(body):
        if place.shape.is_open:
            continue
        declared = {one.name for one in place.shape.fields}
        for word in words:
            if word in declared:
                continue
            error = refusal(parse, place.holding({**place.present, word: None}))
            if error is None or not (word in (error.param or "") or word in str(error) or _shape_is_told(error, place)):
                wrong.append(f"{place.shape.name}.{word}: {error}")
    assert not wrong, wrong[:20]


def _shape_is_told(error: RequestError, place: Place) -> bool:
    """Parts of two fields are refused with the two names, not with the third one."""
    return all(one.name in str(error) for one in place.shape.fields)


def test_fields_that_are_refused_say_why() -> None:
    for one in chat.CHAT.fields:
        if one.standing is not Standing.HONOURED:
            base = OPENAI.least(chat.CHAT)
            error = refusal(parse_chat, {**base, one.name: "junk"})
            assert error is not None
            assert error.param == one.name


# Values that a model with 294 tokens and a context of 2,048 can work with.
AT_HTTP: dict[str, object] = {
    "max_tokens": 8,
    "max_completion_tokens": 8,
    "max_output_tokens": 8,
    "min_tokens": 1,
    "allowed_token_ids": [7, 8],
    "bad_words": ["zebra"],
    "timeout_s": 60,
    "first_token_timeout_s": 60,
    "guided_regex": "a+",
    "guided_grammar": 'root ::= "a"',
    "guided_json": {"type": "object"},
    "structured_outputs": {"regex": "a+"},
    "chat_template_kwargs": {"enable_thinking": True},
    "messages": SAID[:1],
    "input_file_id": None,
    "continue_final_message": True,
    "thinking": {"type": "adaptive"},
    "tool_choice": "none",
    "MessagesRequest.tool_choice": {"type": "none"},
    "CountTokensRequest.tool_choice": {"type": "none"},
    "function_call": "none",
}
BESIDE_AT_HTTP: dict[str, dict[str, object]] = {
    "continue_final_message": {"messages": SAID},
    "max_tokens": {},
}
# What only a stored response, a file or another model could make valid.
ELSEWHERE = {"previous_response_id", "input_file_id"}
AT: dict[str, str] = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "tokenize": "/v1/tokenize",
    "detokenize": "/v1/detokenize",
    "messages": "/v1/messages",
    "count_tokens": "/v1/messages/count_tokens",
    "responses": "/v1/responses",
    "input_tokens": "/v1/responses/input_tokens",
}


@pytest.mark.parametrize("name", AT)
async def test_every_field_is_sent_to_the_server_good_and_bad(http: httpx2.AsyncClient, name: str) -> None:
    body, _, samples = READERS[name]
    wrong = []
    for shape in body.alternatives():
        least = samples.least(shape) | {key: AT_HTTP[key] for key in AT_HTTP if key in shape.required}
        for one in shape.fields:
            if one.name in ELSEWHERE:
                continue
            where = f"{shape.name}.{one.name}"
            beside = BESIDE_AT_HTTP.get(one.name, samples.besides.get(where, {}))
            good = AT_HTTP.get(where, AT_HTTP.get(one.name, samples.value(shape, one)))
            if one.standing is not Standing.HONOURED:
                good = one.schema["enum"][0]
            reply = await http.post(AT[name], json={**least, **beside, one.name: good})
            if reply.status_code != 200:
                wrong.append(f"{where} = {good}: {reply.status_code} {reply.text[:200]}")
            if not one.schema.keys() - {"examples", "description"}:
                continue
            reply = await http.post(AT[name], json={**least, **beside, one.name: {"no": ["such", "thing"]}})
            if one.name in ("metadata", "guided_json", "logit_bias") and reply.status_code == 200:
                continue
            error = reply.json().get("error", {})
            blamed = error.get("param") or error.get("details", {}).get("param") or ""
            if reply.status_code != 400 or not any(part in blamed for part in (one.name, *BLAMED.get(where, ()))):
                wrong.append(f"{where} bad: {reply.status_code} {reply.text[:200]}")
    assert not wrong, "\n".join(wrong)
