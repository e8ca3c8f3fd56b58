"""OpenAI's files and batches on the wire: what is read is what was meant, and what is told can be read by the client.

Guards against names that are taken for paths, limits that are off by one, and objects that the official client cannot
hold.
"""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from openai.types import Batch as ClientBatch
from openai.types import FileObject

from diptych.protos.errors import InvalidRequest, RequestError
from diptych.protos.openai_batches import (
    ENDPOINTS,
    Batch,
    WrongLine,
    batch_object,
    line_id_of,
    parse_batch,
    parse_line,
    result_line,
    schema_faults,
    usage_of,
)
from diptych.protos.openai_files import (
    FILE_ID,
    StoredFile,
    UnknownFile,
    file_object,
    page_object,
    read_expiry,
    read_name,
    read_paging,
    read_upload,
)

FILE = "file-" + "0" * 32
WHOLE = {"input_file_id": FILE, "endpoint": ENDPOINTS[0], "completion_window": "24h"}


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a b;rm -rf ~.txt", "%2e%2e%2fetc", "$(id)", "\u65e5\u672c.txt", "..a", "x" * 255]
)
def test_a_name_is_kept_as_it_is(name: str) -> None:
    assert read_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "/etc/passwd", "a\\b", "a\0b", "a\nb", "x" * 256, "\x1b[31m"])
def test_a_name_that_is_a_path_or_cannot_be_shown_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read_name(name)
    assert refused.value.param == "file"
    assert str(refused.value).isprintable()


def test_purposes_are_honoured_or_refused_by_name() -> None:
    for purpose in ("assistants", "batch", "user_data", "vision"):
        assert read_upload({"purpose": purpose}).purpose == purpose
    for purpose in ("fine-tune", "evals", "batch_output"):
        with pytest.raises(InvalidRequest, match=purpose):
            read_upload({"purpose": purpose})
    for wrong in ({}, {"purpose": "else"}, {"purpose": "batch", "more": "1"}):
        with pytest.raises(InvalidRequest):
            read_upload(wrong)


def test_an_expiry_in_a_form_is_one_in_json() -> None:
    fields = {"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    assert read_upload(fields).expires_after_s == 3600
    for name, value in (
        ("anchor", "later"),
        ("seconds", "3599"),
        ("seconds", "2592001"),
        ("seconds", "-1"),
        ("seconds", "1e4"),
    ):
        with pytest.raises(InvalidRequest, match=f"expires_after.{name}"):
            read_upload({**fields, f"expires_after[{name}]": value})
    with pytest.raises(InvalidRequest, match="anchor"):
        read_upload({"purpose": "batch", "expires_after[seconds]": "3600"})
    assert read_expiry({"anchor": "created_at", "seconds": 2_592_000}, "x") == 2_592_000
    with pytest.raises(InvalidRequest):
        read_expiry({"anchor": "created_at", "seconds": True}, "x")


def test_a_page_is_asked_for_within_bounds() -> None:
    known = ("after", "limit", "order", "purpose")
    paging = read_paging([("limit", "5"), ("order", "asc"), ("after", FILE)], known=known, most=10, default=7)
    assert (paging.limit, paging.is_ascending, paging.after) == (5, True, FILE)
    assert read_paging([], known=known, most=10, default=7).limit == 7
    for wrong in ("0", "11", "-1", "1.5", "", "9" * 40, "\u0665"):
        with pytest.raises(InvalidRequest, match="limit"):
            read_paging([("limit", wrong)], known=known, most=10, default=7)
    for query in ([("order", "up")], [("befor", "x")], [("limit", "1"), ("limit", "2")]):
        with pytest.raises(InvalidRequest):
            read_paging(query, known=known, most=10, default=7)


def test_the_official_client_reads_the_objects() -> None:
    file = StoredFile(id=FILE, purpose="batch_output", name="a", num_bytes=3, created_at=1, expires_at=None)
    assert FileObject.model_validate(file_object(file), strict=True).bytes == 3
    batch = Batch(
        id="batch_1",
        endpoint=ENDPOINTS[0],
        input_file_id=FILE,
        window="24h",
        status="failed",
        created_at=1,
        expires_at=2,
        errors=[WrongLine("invalid_json_line", "no", None).told(3)],
        labels={"a": "b"},
    )
    read = ClientBatch.model_validate(batch_object(batch), strict=True)
    assert read.errors is not None
    assert read.errors.data is not None
    assert read.errors.data[0].line == 3
    assert read.metadata == {"a": "b"}
    assert page_object([], has_more=False) == {
        "object": "list",
        "data": [],
        "first_id": None,
        "last_id": None,
        "has_more": False,
    }


@pytest.mark.parametrize(("window", "seconds"), [("24h", 86_400), ("1m", 60), ("7d", 604_800), ("90m", 5400)])
def test_a_window_is_what_it_says(window: str, seconds: int) -> None:
    assert parse_batch(json.dumps({**WHOLE, "completion_window": window}).encode()).window_s == seconds


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("completion_window", "0h"),
        ("completion_window", "8d"),
        ("completion_window", "24"),
        ("completion_window", 24),
        ("completion_window", None),
        ("completion_window", "24h\n"),
        ("endpoint", "/v1/moderations"),
        ("endpoint", None),
        ("metadata", {"a": 1}),
        ("metadata", {"a" * 65: ""}),
        ("metadata", {"a": "b" * 513}),
        ("metadata", {str(i): "" for i in range(17)}),
        ("output_expires_after", {"anchor": "created_at", "seconds": 1}),
        ("input_file_id", None),
        ("input_file_id", 7),
        ("more", 1),
    ],
)
def test_a_wrong_field_of_a_batch_is_named(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse_batch(json.dumps({**WHOLE, field: value}).encode())
    assert str(refused.value.param).startswith(field)


@pytest.mark.parametrize("name", ["../../etc/passwd", "file-x", FILE.upper(), FILE + "\n", "' OR 1=1 --", "%00"])
def test_an_id_that_none_can_have_is_an_unknown_file(name: str) -> None:
    assert not FILE_ID.fullmatch(name)
    with pytest.raises(UnknownFile):
        parse_batch(json.dumps({**WHOLE, "input_file_id": name}).encode())


@given(st.binary(max_size=200))
def test_no_bytes_of_a_line_raise_anything_but_wrong_line(raw: bytes) -> None:
    with contextlib.suppress(WrongLine):
        parse_line(raw, ENDPOINTS[0])


@given(st.dictionaries(st.text(max_size=8), st.integers() | st.text(max_size=8) | st.lists(st.integers(), max_size=3)))
def test_a_body_arrives_as_it_was_sent(body: dict[str, Any]) -> None:
    body = json.loads(json.dumps(body).encode("utf-8", "replace"))
    raw = json.dumps({"custom_id": "a", "method": "POST", "url": ENDPOINTS[0], "body": body})
    try:
        line = parse_line(raw.encode(), ENDPOINTS[0])
    except WrongLine as wrong:
        reject = wrong.code == "invalid_json_line"  # half of a surrogate pair, a number without end
        assume(not reject)
        raise
    assert json.loads(line.body) == body


def test_results_are_lines_of_their_own() -> None:
    data = result_line("batch_req_1", "a\nb", status=200, request_id="r", body={"x": "\u2028\n"})
    assert data.count(b"\n") == 1
    assert data.endswith(b"\n")
    assert json.loads(data)["response"] == {"status_code": 200, "request_id": "r", "body": {"x": "\u2028\n"}}
    assert json.loads(result_line("i", "a", error=("batch_expired", "late")))["response"] is None
    assert line_id_of("batch_1", 2) == line_id_of("batch_1", 2) != line_id_of("batch_1", 3)


def test_tokens_and_faults_are_found_in_every_shape_of_an_answer() -> None:
    chat = {"usage": {"prompt_tokens": 4, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 3}}}
    other = {"usage": {"input_tokens": 4, "output_tokens": 5, "input_tokens_details": {"cached_tokens": 3}}}
    assert usage_of(chat) == usage_of(other)
    assert usage_of({"usage": {"prompt_tokens": 7, "total_tokens": 7}}).input_tokens == 7
    assert usage_of({}).output_tokens == 0
    assert schema_faults({"choices": [{"schema_errors": ["x"]}, {}]}) == ["x"]
    assert schema_faults({"schema_errors": ["y"]}) == ["y"]
    assert schema_faults({}) == []


def test_not_found_is_told_in_one_wording() -> None:
    assert issubclass(UnknownFile, RequestError)
    assert UnknownFile.http_status == 404
