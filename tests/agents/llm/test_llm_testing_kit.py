"""The models of the testing kit do what a real one would: else a test that passes with them says nothing.

Guards against scripts that end silently, requests that change after they came, cassettes that hold keys or answer
another request than the recorded one, minimal answers that their schema does not take, and a real model in a test.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import threading
from datetime import date
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema_rs import validator_for
from pydantic import BaseModel, Field, TypeAdapter

from diptych.agents import llm
from diptych.agents.llm.testing import (
    CassetteMismatch,
    EchoModel,
    NetworkForbidden,
    NoMinimal,
    Player,
    Recorder,
    Said,
    ScriptedModel,
    ScriptExhausted,
    cut,
    failure,
    forbid_network,
    minimal,
    registry_of,
    tool_call,
)
from diptych.agents.llm.testing.bodies import last_text, schema_of, tools_of
from diptych.protos.openai import read_chat
from diptych.protos.providers.codecs import CODECS, by_name
from diptych.protos.providers.quirks import Quirks


class Color(Enum):
    RED = "red"


class Point(NamedTuple):
    x: int
    y: float


class Node(BaseModel):
    name: Annotated[str, Field(min_length=2, max_length=4)]
    left: Node | None
    children: list[Node]


class Book(BaseModel):
    title: str
    year: Annotated[int, Field(ge=1450, lt=2030)]
    isbn: Annotated[str, Field(pattern=r"^97[89]-\d{1,5}-[0-9A-F]{3}(x|yz)?[^a-c]$")]
    notes: str = "none"


def ask(model: Any, prompt: str = "hello", **settings: Any) -> Any:
    @llm.call("test/m", registry=registry_of(test=model), retries=llm.Retries(attempts=1), **settings)
    def question(text: str) -> str:
        return text

    return question(prompt)


def test_a_script_that_is_at_its_end_says_which_request_came() -> None:
    model = ScriptedModel(["one"])
    ask(model)
    with pytest.raises(ScriptExhausted, match=r"has 1 entries, and request 2 came: 'what now\?'"):
        ask(model, "what now?")
    assert model.left == 0


def test_then_answers_what_comes_behind_the_script() -> None:
    model = ScriptedModel(["one"], then=lambda body: last_text(body).upper())
    assert [ask(model, text).text for text in ("a", "b", "c")] == ["one", "B", "C"]


def test_a_text_alone_is_no_script() -> None:
    with pytest.raises(TypeError, match=re.escape("write ScriptedModel(['hello'])")):
        ScriptedModel("hello")
    with pytest.raises(ValueError, match="no kind of failure; those that are: bad_request, "):
        failure("rate-limited")


def test_requests_that_came_do_not_change_any_more() -> None:
    kept: list[dict[str, Any]] = []

    def entry(body: dict[str, Any]) -> str:
        kept.append(body)
        body["messages"].clear()
        return "hi"

    model = ScriptedModel([entry])
    extra = {"tags": ["a"]}
    ask(model, extra=extra)
    extra["tags"].append("b")
    assert kept[0]["messages"] == []
    assert model.requests[0]["messages"] == [{"role": "user", "content": "hello"}]
    assert model.requests[0]["tags"] == ["a"]


def test_headers_and_limits_come_with_each_request() -> None:
    model = ScriptedModel(["a"])
    ask(model, session="s1", timeout=7.5)
    assert model.headers == [{"x-session-id": "s1"}]
    assert model.limits[0].total_s == 7.5


def test_a_cut_stream_gives_its_beginning_and_then_the_failure() -> None:
    model = ScriptedModel([cut("abcdefghij", after=3), cut({"a": 1}, after=0)])

    @llm.call("test/m", registry=registry_of(test=model), retries=llm.Retries(attempts=1))
    def question() -> str:
        return "x"

    seen: list[str] = []
    with pytest.raises(llm.ProviderError, match="broke after 3 events"):
        seen.extend(question.stream().text())
    assert seen == ["abcd", "efgh"]
    assert model.open_streams == 0
    with pytest.raises(llm.ProviderError, match="broke after 0 events"):
        question()


def test_an_entry_that_takes_longer_than_the_timeout_fails_as_over_a_network() -> None:
    slow = Said(text="late", delay_s=3600)
    with pytest.raises(llm.ProviderError) as caught:
        ask(ScriptedModel([slow]), timeout=0.001)
    assert caught.value.failure.kind == "timeout_total"
    with pytest.raises(llm.ProviderError) as caught:
        list(_streamed(ScriptedModel([slow]), first_token_timeout=0.001))
    assert caught.value.failure.kind == "timeout_first_token"
    assert ask(ScriptedModel([Said(text="soon", delay_s=0.0001)]), timeout=600).text == "soon"


def _streamed(model: Any, **params: Any) -> Any:
    @llm.call("test/m", registry=registry_of(test=model), retries=llm.Retries(attempts=1), **params)
    def question() -> str:
        return "x"

    return question.stream().text()


def test_many_threads_each_take_one_entry() -> None:
    model = ScriptedModel([str(at) for at in range(40)])
    got: list[str] = []
    threads = [threading.Thread(target=lambda: got.append(ask(model).text)) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got, key=int) == [str(at) for at in range(40)]


@pytest.mark.parametrize(
    "kind",
    [
        str, int, float, bool, date, UUID, Decimal, Color, Point, Node, Book, Literal["b", "a"], list[int],
        set[str], dict[str, int], int | str, Book | None, tuple[int, str], Annotated[list[Book], Field(min_length=2)],
        Annotated[float, Field(gt=0, lt=1)], Annotated[int, Field(multiple_of=7, gt=7)], Annotated[int, Field(lt=-3)],
        Annotated[set[int], Field(min_length=3)],
    ],
    ids=str,
)  # fmt: skip
def test_an_echo_gives_a_valid_value_of_any_type(kind: Any) -> None:
    value = ask(EchoModel(), output=kind).value
    adapter = TypeAdapter(kind)
    assert adapter.validate_python(value) == value


def test_an_echo_repeats_the_last_turn_and_calls_tools_where_it_is_told_to() -> None:
    assert ask(EchoModel(), "the question").text == "the question"
    body = {
        "messages": [{"role": "user", "content": "go"}],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": BOOK}}],
    }
    entry = EchoModel(calls_tools=True).then
    assert callable(entry)
    assert entry(body).calls[0][0] == "f"
    assert set(entry(body).calls[0][1]) == {"title", "year", "isbn"}
    body["messages"].append({"role": "tool", "content": "done"})  # type: ignore[attr-defined]
    assert entry(body).text == "go"


BOOK = Book.model_json_schema()


def test_what_no_minimal_answer_is_known_for_is_told() -> None:
    for schema, words in (
        ({"type": "string", "pattern": r"(?=a)b"}, r"/? ?: no text for the pattern"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "no integer lies within its bounds"),
        ({"$ref": "#/$defs/A", "$defs": {"A": {"$ref": "#/$defs/A"}}}, "refers to itself"),
        (
            {"$ref": "#/$defs/A", "$defs": {"A": {"type": "object", "required": ["a"],
             "properties": {"a": {"$ref": "#/$defs/A"}}}}},
            "never ends",
        ),
    ):  # fmt: skip
        with pytest.raises(NoMinimal, match=words):
            minimal(schema)


@settings(max_examples=60)
@given(
    low=st.integers(-50, 50),
    span=st.integers(0, 5),
    step=st.sampled_from([None, 1, 2, 0.5]),
    kind=st.sampled_from(["integer", "number"]),
    is_open=st.booleans(),
)
def test_a_minimal_number_lies_within_its_bounds(
    low: int, span: int, step: float | None, kind: str, is_open: bool
) -> None:
    words = ("exclusiveMinimum", "exclusiveMaximum") if is_open else ("minimum", "maximum")
    schema: dict[str, Any] = {"type": kind, words[0]: low, words[1]: low + span}
    if step is not None and not (kind == "integer" and step == 0.5):
        schema["multipleOf"] = step
    try:
        found = minimal(schema)
    except NoMinimal:
        candidates = [low + at / 4 for at in range(4 * span + 1)]
        fitting = [c for c in candidates if validator_for(schema).is_valid(int(c) if c == int(c) else c)]
        assert not fitting
    else:
        assert validator_for(schema).is_valid(found)


@pytest.mark.parametrize("codec", CODECS)
def test_bodies_of_every_wire_format_are_understood(codec: str) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    request = read_chat(
        {
            "model": "m",
            "messages": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": "A"},
                {"role": "user", "content": [{"type": "text", "text": "there"}]},
            ],
            "tools": [tool],
            "response_format": {"type": "json_schema", "json_schema": {"name": "B", "schema": schema}},
        }
    )
    dialect = {"gemini.generate": "gemini", "anthropic.messages": "anthropic", "bedrock.converse": "anthropic"}
    quirks = Quirks(schema_dialect=dialect.get(codec, "openai"))
    body = by_name(codec).encode(request, model="claude-sonnet-4-5", stream=False, quirks=quirks).body
    assert last_text(body) == "there"
    found = schema_of(body)
    assert found is not None
    assert found["required"] == ["a"]
    assert tools_of(body)["f"]["required"] == ["a"]


# Cassettes.


def _through(upstream: Any, *, prompt: str = "hello", **params: Any) -> list[Any]:
    @llm.call("test/m", registry=registry_of(test=upstream), output=Book, retries=llm.Retries(attempts=2), **params)
    def question(text: str) -> str:
        return text

    whole = question(prompt)
    streamed = question.stream(prompt)
    events = list(streamed)
    return [whole.value, whole.usage, whole.finish, whole.text, [repr(event) for event in events[:-1]]]


GOOD = {"title": "Emma", "year": 1815, "isbn": "978-1-0F0z"}


def test_what_was_recorded_is_played_again_exactly(tmp_path: Path) -> None:
    path = tmp_path / "books.jsonl"
    source = ScriptedModel([Said(text=json.dumps(GOOD), thoughts="hm"), {"title": "?"}, GOOD], name="test")
    seen = _through(Recorder(source, path))
    player = Player(path)
    assert player.left == 3  # the whole answer, the stream that was no book, and the one that was
    assert _through(player) == seen
    assert player.left == 0


def test_failures_and_calls_are_played_too(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    limited = failure("rate_limited", retry_after_s=0.0, status=429, message="slow down")
    recorder = Recorder(ScriptedModel([limited, tool_call("f", x=1)]), path)
    for make in (lambda: recorder, lambda: Player(path)):
        upstream = make()
        with pytest.raises(llm.ProviderError, match="slow down") as caught:
            ask(upstream)
        assert caught.value.failure.retry_after_s == 0.0
        assert caught.value.failure.status == 429
        assert [(call.name, call.arguments) for call in ask(upstream).tool_calls] == [("f", {"x": 1})]


def test_another_request_is_told_with_the_difference(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    ask(Recorder(ScriptedModel(["hi"]), path), "hello", temperature=0.5)
    with pytest.raises(CassetteMismatch) as caught:
        ask(Player(path), "hello", temperature=0.7)
    told = str(caught.value)
    assert '-  "temperature": 0.5' in told
    assert '+  "temperature": 0.7' in told
    assert "hello" not in told  # what is equal is left out
    player = Player(path)
    ask(player, "hello", temperature=0.5)
    with pytest.raises(CassetteMismatch, match="all its answers were played"):
        ask(player, "hello", temperature=0.5)
    with pytest.raises(CassetteMismatch, match="no answer left"):
        ask(player, "bye")


def test_keys_are_never_written(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    servers = [{"url": "https://x", "authorization_token": "sk-secret-1"}]
    extra = {"mcp_servers": servers, "api-key": "sk-secret-2", "metadata": {"Authorization": "Bearer sk-secret-3"}}
    ask(Recorder(ScriptedModel(["hi"]), path), extra=extra, session="private-session")
    assert "sk-secret" not in path.read_text()
    assert "private-session" not in path.read_text()
    other = {
        "mcp_servers": [{**servers[0], "authorization_token": "another"}],
        "api-key": "",
        "metadata": {"Authorization": ""},
    }
    assert ask(Player(path), extra=other).text == "hi"


async def test_a_stream_that_was_left_is_played_as_far_as_it_was_recorded(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"

    async def first(upstream: Any, most: int) -> list[str]:
        @llm.call("test/m", registry=registry_of(test=upstream))
        def question() -> str:
            return "x"

        seen: list[str] = []
        async with question.stream() as stream:
            async for piece in stream.text():
                seen.append(piece)
                if len(seen) == most:
                    break
        return seen

    source = ScriptedModel([Said(text="abcdefghijkl")], delay_s=0.001)
    assert await first(Recorder(source, path), 1) == ["abcd"]
    assert source.open_streams == 0
    assert await first(Player(path), 1) == ["abcd"]


def test_a_file_that_is_no_cassette_is_told(tmp_path: Path) -> None:
    with pytest.raises(llm.UsageError, match="make one with Recorder"):
        Player(tmp_path / "none")
    for at, text in enumerate(("", "{}", "[1]", "not json", '{"format": "diptych-cassette", "version": 99}')):
        file = tmp_path / str(at)
        file.write_text(text)
        with pytest.raises(llm.UsageError, match="is no cassette"):
            Player(file)


# The network.


def test_no_request_leaves_this_machine() -> None:
    registry = llm.Registry(keys={"anthropic": "k"}, environ={})

    @llm.call("anthropic/claude-sonnet-4-5", registry=registry, retries=llm.Retries(fallback=["anthropic/other"]))
    def question() -> str:
        return "hi"

    with pytest.raises(NetworkForbidden, match=r"anthropic \(api\.anthropic\.com\) is not reached"):
        question()
    with pytest.raises(NetworkForbidden):
        asyncio.run(question.aio())
    with pytest.raises(NetworkForbidden):
        list(question.stream())


def test_a_block_inside_another_allows_no_more_than_it() -> None:
    from diptych.agents.llm.network import check_network

    with forbid_network(allow=["api.openai.com"]), pytest.raises(NetworkForbidden):
        check_network("https://api.openai.com/v1", "openai")
    for near in ("http://127.0.0.1:8000", "http://localhost", "http://[::1]:9/v1", "http://127.9.9.9"):
        check_network(near, "near")
    for far in ("http://127.0.0.1.example.com", "http://10.0.0.1", "https://localhost.example.com", ""):
        with pytest.raises(NetworkForbidden):
            check_network(far, "far")


def test_what_is_allowed_is_reached_where_nothing_else_forbids(monkeypatch: pytest.MonkeyPatch) -> None:
    from diptych.agents.llm import network

    monkeypatch.setattr(network, "_bans", [])
    with forbid_network(allow=["API.openai.com"]):
        network.check_network("https://api.openai.com/v1", "openai")
        with pytest.raises(NetworkForbidden):
            network.check_network("https://api.mistral.ai/v1", "mistral")
    network.check_network("https://api.mistral.ai/v1", "mistral")


def test_the_plugin_holds_for_a_whole_run(pytester_run: Any) -> None:
    assert pytester_run.returncode == 0, pytester_run.stdout


@pytest.fixture
def pytester_run(tmp_path: Path) -> Any:
    import subprocess
    import sys

    (tmp_path / "test_one.py").write_text(
        "import pytest\n"
        "from diptych.llm.testing import NetworkForbidden\n"
        "from diptych.agents.llm.network import check_network\n"
        "def test_it():\n"
        "    with pytest.raises(NetworkForbidden):\n"
        "        check_network('https://api.openai.com', 'openai')\n"
    )
    plugins = ["-p", "diptych.llm.testing.no_network", "-p", "no:cacheprovider"]
    environ = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *plugins, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environ,
    )
